"""Time that devices take to exchange data: rings and lines of a TPU's torus, switches, DCN.

The times are what links allow if each carries as much as the others, as
https://jax-ml.github.io/scaling-book/sharding/ derives them.
"""

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxft.compiled.collectives import Collective
from jaxft.hardware.chips import Chip, Switch, Torus

# Of one message from one chip to the next (scaling book, question 5 of the chapter on TPUs).
HOP_SECONDS = 1e-6


@dataclass(frozen=True)
class Network:
    """The links between the devices of a mesh.

    Attributes:
      chip: Chip that the links belong to.
      mesh: The devices.
      shape: Chips of one slice along each dimension; empty where there is no torus.
    """

    chip: Chip
    mesh: Mesh
    shape: tuple[int, ...] = ()

    def seconds(self, one: Collective) -> float:
        """Returns the time of one run of a collective, alone in the network."""
        if one.across_slices:
            return self._between_slices(one)
        if isinstance(self.chip.network, Torus):
            return self._on_torus(one, self.chip.network)
        return self._on_switch(one)

    def leaves(self, one: Collective) -> bool:
        """Whether a collective goes over the slow network, between slices or NVLink domains."""
        network = self.chip.network
        if one.across_slices or not isinstance(network, Switch):
            return one.across_slices
        groups = one.groups or (range(one.group_size),)
        return any(len({place // network.size for place in group}) > 1 for group in groups)

    def _between_slices(self, one: Collective) -> float:
        """Slices exchange over the data centre's network what they have put together within.

        A program says what leaves a slice; of a group that is only named, as in an estimate, each
        device sends its share of what its slice has.
        """
        rate = self.chip.dcn / self.chip.cores
        if not one.groups:
            return one.wire_bytes / rate
        devices: Any = self.mesh.devices.flat
        slices = collections.defaultdict(list)
        for place in one.groups[0]:
            slices[getattr(devices[place], "slice_index", 0)].append(place)
        within = next(iter(slices.values()))
        seconds = one.wire_bytes / len(within) / rate
        if len(within) > 1:
            seconds += self.seconds(
                dataclasses.replace(
                    one, across_slices=False, groups=(tuple(within),), group_size=len(within)
                )
            )
        return seconds

    def _on_switch(self, one: Collective) -> float:
        """GPUs of one domain talk by its switch; of several each has its own way to the others."""
        network = self.chip.network
        if not isinstance(network, Switch):
            return 0.0
        inside = one.wire_bytes / network.link
        groups = one.groups or (range(one.group_size),)
        domains = [collections.Counter(place // network.size for place in g) for g in groups]
        ways = [max(counts.values()) for counts in domains if len(counts) > 1]
        if not ways:
            return inside + HOP_SECONDS
        if one.kind in ("all-to-all", "ragged-all-to-all"):
            # What a GPU has for those elsewhere goes its own way.
            away = 1 - min(ways) / one.group_size
            return max(inside, one.bytes * away / self.chip.dcn) + HOP_SECONDS
        return max(inside, one.wire_bytes / (min(ways) * self.chip.dcn)) + HOP_SECONDS

    def _on_torus(self, one: Collective, torus: Torus) -> float:
        if one.kind == "collective-permute":
            messages, hops = self._busiest_link(one.groups, torus)
            return one.bytes * messages / torus.link + HOP_SECONDS * hops
        extents = self._extents(one.groups)
        wraps = torus.wraps(self.shape)
        # Dimensions along which the group lies, and whether it closes a ring there.
        sides = [
            (size, wraps[i] and size == self.shape[i]) for i, size in enumerate(extents) if size > 1
        ]
        # Both directions of a ring; a line's end has one link.
        links = sum(2 if ring else 1 for _, ring in sides)
        hops = sum(size // 2 if ring else size - 1 for size, ring in sides)
        rate = max(1, links) * torus.link / self._sharing(one.groups[0])
        if one.kind in ("all-to-all", "ragged-all-to-all"):
            # Half of what each half sends crosses the middle, of a ring in two places.
            busiest = max((size / (8 if ring else 4) for size, ring in sides), default=1.0)
            busiest *= self.chip.cores  # each core of a chip sends as much
            return one.bytes * busiest / torus.link + HOP_SECONDS * hops
        return one.wire_bytes / rate + HOP_SECONDS * hops

    def _extents(self, groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Returns the chips along each dimension that a group's devices lie on."""
        places = self._coordinates(groups[0])
        return tuple(len(np.unique(places[:, i])) for i in range(len(self.shape)))

    def _coordinates(self, group: Sequence[int]) -> np.ndarray:
        devices: Any = self.mesh.devices.flat
        return np.array([devices[i].coords[: len(self.shape)] for i in group])

    def _sharing(self, group: Sequence[int]) -> int:
        """Returns how many groups use the same links at a time: cores of a chip that are apart."""
        chips = {tuple(place) for place in self._coordinates(group)}
        return self.chip.cores if len(chips) == len(group) else 1

    def _busiest_link(self, pairs: Sequence[Sequence[int]], torus: Torus) -> tuple[int, int]:
        """Returns the most messages on one link in one direction, and the hops of the longest way.

        Messages go along one dimension after the other, the shorter way round where there are two.
        """
        loads: collections.Counter[tuple] = collections.Counter()
        longest = 0
        wraps = torus.wraps(self.shape)
        for pair in pairs:
            here, there = self._coordinates(pair).tolist()
            hops = 0
            for i, (size, ring) in enumerate(zip(self.shape, wraps, strict=True)):
                ahead = (there[i] - here[i]) % size if ring else there[i] - here[i]
                step = -1 if ahead < 0 or (ring and ahead > size // 2) else 1
                while here[i] != there[i]:
                    loads[(*here, i, step)] += 1
                    here[i] = (here[i] + step) % size
                    hops += 1
            longest = max(longest, hops)
        return max(loads.values(), default=1), longest
