"""The mesh of a plan, coloured by what fast links join."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxft.compiled.mesh_picture import MeshPicture, draw_mesh, hue_of
from jaxft.errors import ConfigError
from jaxft.hardware.chips import Switch
from jaxft.planner.plan import Plan
from jaxft.sharding.rules import load_strategy

_MOST_DEVICES = 1024


@dataclass(frozen=True, slots=True)
class Mesh:
    """Devices in the order of their mesh, and what joins them.

    Attributes:
      picture: The devices.
      axes: `(axis and size, what joins its devices)` of each axis that is larger than 1.
    """

    picture: MeshPicture
    axes: list[tuple[str, str]]


def mesh_of(plan: Plan) -> Mesh | None:
    """Draws the mesh of a plan; returns None for a single device."""
    if math.prod(plan.mesh.values()) == 1:
        return None
    domains = _domains(plan)
    axes = [
        (f"{axis} {size:,}", _axis_words(axis, size, domains))
        for axis, size in plan.mesh.items()
        if size > 1
    ]
    return Mesh(_picture(plan.mesh, domains), axes)


class _Domains(NamedTuple):
    """Groups of devices that fast links join: slices of TPUs, NVLink domains of GPUs.

    Attributes:
      name: The word for one of them.
      between: The network between them.
      within: The links in one of them.
      parts: The number of domains that each mesh axis spans.
    """

    name: str
    between: str
    within: str
    parts: dict[str, int]

    def of(self, at: Sequence[int], mesh: dict[str, int]) -> int:
        """Returns the number of the domain of the device at a place of the mesh."""
        number = 0
        for index, (axis, size) in zip(at, mesh.items(), strict=True):
            parts = self.parts[axis]
            number = number * parts + index * parts // size
        return number


def _domains(plan: Plan) -> _Domains | None:
    """Returns None if it is not known which axis joins slices."""
    topology, mesh = plan.topology, plan.mesh
    parts = dict.fromkeys(mesh, 1)
    network = topology.chip.network
    if isinstance(network, Switch):
        stride = math.prod(mesh.values())
        for axis, size in mesh.items():
            stride //= size
            parts[axis] = min(size, -(-size * stride // network.size))
        return _Domains("NVLink domain", "network between domains", "NVLink", parts)
    links = "links of the slice (ici)" if network else "links of this machine"
    found = _Domains("slice", "data centre network (dcn)", links, parts)
    if topology.slices == 1:
        return found
    try:
        across = load_strategy(plan.strategy).across_slices
    except ConfigError:
        return None
    if mesh.get(across, 1) % topology.slices:
        return None
    parts[across] = topology.slices
    return found


def _axis_words(axis: str, size: int, domains: _Domains | None) -> str:
    if domains is None:
        return "how it lies on slices is not known"
    parts = domains.parts[axis]
    if parts == 1:
        return domains.within
    if parts == size:
        return domains.between
    return f"{domains.between}, {parts} parts; {size // parts} devices of each by {domains.within}"


def _picture(mesh: dict[str, int], domains: _Domains | None) -> MeshPicture:
    """Draws the devices, each in the colour of its domain, or else of its first index."""
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    several = domains is not None and math.prod(domains.parts.values()) > 1

    def cell(place: int, at: Sequence[int], words: str) -> tuple[int, str, str]:
        if domains is not None and several:
            number = domains.of(at, sizes)
            count = math.prod(domains.parts.values())
            return hue_of(number, count), f"{words} · {domains.name} {number}", ""
        number = at[0] if len(at) > 1 else place
        return hue_of(number, next(iter(sizes.values()))), words, ""

    picture = draw_mesh(mesh, cell=cell, most=_MOST_DEVICES)
    colours = ""
    if domains is not None and several:
        colours = f" Each colour is one {domains.name}."
    elif len(sizes) > 1:
        colours = f" Each colour is one index of {next(iter(sizes))}."
    return dataclasses.replace(picture, caption=picture.caption + colours)
