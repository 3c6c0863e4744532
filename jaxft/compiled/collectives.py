"""The collectives of a compiled program, read from its text: what devices exchange.

XLA prints a program after all of its passes, so what is found here is what runs: what a strategy
was meant to do, and what the compiler made of it.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jax.sharding import Mesh

from jaxft.compiled.hlo import Computation, Instruction, Module

# What a ring sends per device for n devices and a payload of one byte.
_WIRE = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
KINDS = tuple(_WIRE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One instruction that moves data between devices.

    Attributes:
      kind: One of `KINDS`. What a TPU program writes as a fusion of an all-reduce and the slice
        that a device keeps is a reduce-scatter.
      axes: Mesh axes of size over 1 along which devices of one group differ, in the mesh's order;
        a group may be smaller than their product.
      group_size: Devices that take part in one.
      count: Number of runs in one step, loops multiplied.
      exact: False if it lies in a loop whose length the text does not give: `count` is then the
        least it can be.
      arrays: Payload of each array in bytes of one device, for one run: of the operand for
        all-reduce, reduce-scatter, all-to-all and permute; of the result for all-gather. So it is
        the same number for an all-gather and the reduce-scatter that undoes it. Padding that the
        compiler added counts; a ragged all-to-all counts its whole buffer.
      across_slices: It leaves the slice: it goes over the data centre's network.
      gathers: It is an all-reduce of arrays that are zero but for a device's own part. That is how
        XLA for TPU gathers small arrays; it is left an all-reduce, as it sends what one does.
      name: The instruction's, to be found in the text.
      origin: Part of the traced function that it came from, `op_name` in the text.
      groups: Places in the mesh of the devices of each group, or of source and target of each pair
        of a permute; of what leaves a slice they are not in the text.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    exact: bool = True
    arrays: tuple[int, ...]
    across_slices: bool = False
    gathers: bool = False
    name: str = ""
    origin: str = ""
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def bytes(self) -> int:
        """Payload of one run, per device."""
        return sum(self.arrays)

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends in one run if groups are rings, which is the least.

        For n devices and the payload b: 2b(n-1)/n for all-reduce, b(n-1)/n for all-gather,
        reduce-scatter and all-to-all, b for a permute.
        """
        return round(_WIRE[self.kind](self.group_size) * self.bytes)


@dataclass(frozen=True, slots=True)
class Total:
    """All collectives of one kind over the same mesh axes, in one step and per device.

    Attributes:
      kind: Kind of the collectives, see `Collective.kind`.
      axes: Mesh axes, see `Collective.axes`.
      count: Runs in one step.
      bytes: Payload of all runs.
      wire_bytes: Bytes that rings send for them.
      exact: Whether all counts are.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    wire_bytes: int
    exact: bool


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Finds the collectives of one step, in the order of the program.

    Asynchronous ones, which the text names two or three times, are counted once. The body of a
    loop counts as often as it runs. Of the branches of a conditional the one that sends most
    counts. What a group of one device does moves nothing and is left out.

    Args:
      text: `compiled.as_text()`, of XLA for CPU, GPU or TPU.
      mesh: The program's; it numbers devices by their position in `mesh.devices.flat`.

    Raises:
      ValueError: If the program is for another number of devices, or holds a collective whose
        operands or devices cannot be read.
    """
    module = Module(text)
    return list(Reader(module, mesh).visit(module.entry, Frame()))


def _numbering(mesh: Mesh, count: int) -> np.ndarray:
    """Returns the place in the mesh of each of the devices that a program numbers.

    A program for several slices of a TPU is written for one of them, and they run the same.
    """
    slices = np.array([_slice_of(device) for device in mesh.devices.flat])
    first = np.flatnonzero(slices == slices[0])
    if count not in (mesh.size, len(first)):
        raise ValueError(f"The program is for {count} devices, the mesh has {mesh.size}.")
    return np.arange(mesh.size) if count == mesh.size else first


def summary(found: Iterable[Collective]) -> list[Total]:
    """Adds up by kind and mesh axes, the most wire bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = collections.defaultdict(list)
    for one in found:
        groups[one.kind, one.axes].append(one)
    totals = [
        Total(
            kind,
            axes,
            sum(one.count for one in group),
            sum(one.count * one.bytes for one in group),
            sum(one.count * one.wire_bytes for one in group),
            all(one.exact for one in group),
        )
        for (kind, axes), group in groups.items()
    ]
    return sorted(totals, key=lambda t: (-t.wire_bytes, t.kind, t.axes))


@dataclass(frozen=True)
class Frame:
    """The place of a computation in the running program.

    Attributes:
      count: Number of runs.
      exact: Whether that is known.
      fused: Whether it is the body of a fusion.
      chains: Asynchronous collectives met so far that are spread over several fusions.
    """

    count: int = 1
    exact: bool = True
    fused: bool = False
    chains: set[str] = field(default_factory=set)


class Reader:
    """Reads the collectives of a program.

    Args:
      module: The program.
      mesh: Its own; it numbers devices by their position in `mesh.devices.flat`.

    Raises:
      ValueError: If the program is for another number of devices.
    """

    def __init__(self, module: Module, mesh: Mesh):
        self.module, self.mesh = module, mesh
        self.devices = _numbering(mesh, module.partitions)

    def visit(self, name: str, frame: Frame) -> Iterator[Collective]:
        """Yields the collectives that one run of a computation leads to."""
        computation = self.module.computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._loop(computation, instruction, frame)
            elif opcode == "conditional":
                branches = [list(self.visit(b, frame)) for b in self.module.branches(instruction)]
                yield from max(branches, key=_sent, default=[])
            elif opcode in ("fusion", "call", "call-start", "async-start", "custom-call"):
                inner = replace(frame, fused=opcode == "fusion")
                for attribute in ("calls", "to_apply", "called_computations"):
                    for called in instruction.called(attribute):
                        yield from self.visit(called, inner)
            else:
                yield from self.at(computation, instruction, frame)

    def _loop(
        self, computation: Computation, loop: Instruction, frame: Frame
    ) -> Iterator[Collective]:
        [condition], [body] = loop.called("condition"), loop.called("body")
        trips = self.module.trips(computation, loop)
        exact = frame.exact and trips is not None
        runs = 1 if trips is None else trips
        # What was begun before the loop may go on in it; what begins in it ends in it.
        inner = replace(frame, exact=exact, fused=False, chains=set(frame.chains))
        yield from self.visit(body, replace(inner, count=frame.count * runs))
        yield from self.visit(condition, replace(inner, count=frame.count * (runs + 1)))

    def at(
        self, computation: Computation, instruction: Instruction, frame: Frame
    ) -> Iterator[Collective]:
        """Yields the collective that an instruction is or begins, if it is one."""
        kind = instruction.opcode.removesuffix("-start")
        operands = instruction.operands
        if kind == "send":
            if "_xla_megascale_transfer_type" in instruction.rest:
                yield from self._between_slices(computation, instruction, frame)
            elif "is_host_transfer=true" not in instruction.rest:
                # XLA for GPU takes a permute apart, so as to have others run meanwhile; of the two
                # halves `recv` has no data to measure. The second operand is a token.
                kind, operands = "collective-permute", operands[:1]
        if kind not in KINDS or self._is_continuation(instruction, frame):
            return
        numbered = _groups(instruction, kind, len(self.devices))
        groups = [self.devices[group] for group in numbered]
        size = max(map(len, groups), default=1)
        if kind == "collective-permute":
            axes = _axes(groups, self.mesh)
            size = math.prod(self.mesh.shape[axis] for axis in axes)
        if size == 1:
            return
        if not operands:
            raise ValueError(f"{instruction.name}: no operands in {instruction.literal!r}.")
        arrays = [computation.bytes_of(operand) for operand in operands]
        if kind == "ragged-all-to-all":
            arrays = arrays[:1]  # the others are the result's buffer, offsets and sizes
        if kind == "all-gather":
            arrays = [size * array for array in arrays]
        if kind == "all-reduce" and frame.fused and _only_sliced(computation, instruction):
            kind = "reduce-scatter"
        yield Collective(
            kind=kind,
            axes=_axes(groups, self.mesh),
            group_size=size,
            count=frame.count,
            exact=frame.exact,
            arrays=tuple(arrays),
            across_slices=_leaves_slice(groups, self.mesh),
            gathers=kind == "all-reduce"
            and all(_is_padded(computation, operand) for operand in operands),
            name=instruction.name,
            origin=instruction.origin,
            groups=tuple(tuple(map(int, group)) for group in groups),
        )

    def _between_slices(
        self, computation: Computation, send: Instruction, frame: Frame
    ) -> Iterator[Collective]:
        """Yields what slices of a TPU exchange over the data centre's network.

        There the program hands one part of the data to the host, which talks to those of the other
        slices. Groups are not in the text in numbers of devices, but no other axis leaves a slice.
        """
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
        kind = transfer[1].lower().replace("_", "-") if transfer else ""
        kind = "collective-permute" if kind == "one-to-one" else kind
        slices = np.vectorize(_slice_of)(self.mesh.devices)
        if kind not in KINDS:
            raise ValueError(f"{send.name}: unknown transfer between slices, {kind!r}.")
        axes = tuple(
            name
            for i, name in enumerate(self.mesh.axis_names)
            if np.any(slices != np.take(slices, [0], axis=i))
        )
        size = np.unique(slices).size
        payload = computation.bytes_of(send.operands[0])
        yield Collective(
            kind=kind,
            axes=axes,
            group_size=size,
            count=frame.count,
            exact=frame.exact,
            arrays=(payload * size if kind == "all-gather" else payload,),
            across_slices=True,
            name=send.name,
            origin=send.origin,
        )

    def _is_continuation(self, instruction: Instruction, frame: Frame) -> bool:
        """Tells the later pieces of an asynchronous collective from the first.

        XLA for TPU puts its start, what runs beside it and its end into fusions of their own, each
        of which names the same collective, with the same `chain_id`.
        """
        chain = re.search(r'\bchain_id="(\d+)"', instruction.rest)
        if chain is None:
            return False
        channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
        key = f"{chain[1]} {channel[1] if channel else ''}"
        if key in frame.chains:
            return True
        frame.chains.add(key)
        return False


def _only_sliced(computation: Computation, instruction: Instruction) -> bool:
    """Whether nothing but slices of its result is used."""
    users = computation.users[instruction.name]
    views = ("bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose")
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in views and _only_sliced(computation, user))
        for user in users
    )


def _is_padded(computation: Computation, name: str) -> bool:
    """Whether a value is a part that was written into one number repeated."""
    written = computation.instructions[computation.source(name)]
    if written.opcode != "dynamic-update-slice":
        return False
    base = computation.source(written.operands[0])
    return computation.instructions[base].opcode == "broadcast"


def _groups(instruction: Instruction, kind: str, size: int) -> list[list[int]]:
    """Returns the devices of each group, or source and target of each pair of a permute."""
    attributes = instruction.rest
    if kind == "collective-permute":
        pairs = re.search(r'source_target_pairs="?\{((?:\{[\d,]*\},?)*)\}', attributes)
        if pairs is None:
            raise ValueError(f"{instruction.name}: no pairs of devices in {attributes!r}.")
        return _lists(pairs[1])
    meshes = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if meshes:
        return _groups_on_mesh(*meshes.groups())
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[1]).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = _lists(listed[1]) if listed else []
    return groups or [list(range(size))]  # empty: all devices together


def _lists(text: str) -> list[list[int]]:
    return [[int(i) for i in part.split(",") if i] for part in re.findall(r"\{([\d,]*)\}", text)]


def _iota(text: str) -> np.ndarray:
    """Reads `[4,2]<=[2,4]T(1,0)`: count to 8, shape, transpose, shape again."""
    match = re.fullmatch(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"Unknown form of device numbers: {text!r}.")
    shape, reshaped, order = (
        [int(part) for part in group.split(",")] if group else None for group in match.groups()
    )
    numbers = np.arange(math.prod(reshaped or ())).reshape(reshaped or ())
    return numbers.transpose(order).reshape(shape or (-1,))


def _groups_on_mesh(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """Reads `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2,'b'}`.

    `'a':(2)2` is a part of axis a: the second factor where 'a' is taken apart into 2 x 2 x rest.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    grouped = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    shape, places = [], {}
    for name, size in sizes.items():
        starts = {
            (int(before or 1), int(part or size))
            for other, before, part in grouped
            if other == name
        }
        done = 1
        for before, part in sorted(starts):
            shape += [before // done, part]
            places[name, before, part] = len(shape) - 1
            done = before * part
        shape.append(size // done)
    order = [places[n, int(before or 1), int(part or sizes[n])] for n, before, part in grouped]
    if device_ids and device_ids.startswith("["):
        numbers = _iota(device_ids)
    elif device_ids:
        numbers = np.array([int(i) for i in device_ids.split(",")])
    else:
        numbers = np.arange(math.prod(sizes.values()))
    others = [i for i in range(len(shape)) if i not in order]
    width = math.prod(shape[i] for i in order)
    return numbers.reshape(shape).transpose(others + order).reshape(-1, width).tolist()


def _axes(groups: Sequence[np.ndarray], mesh: Mesh) -> tuple[str, ...]:
    places = np.array(np.unravel_index(np.arange(mesh.size), mesh.devices.shape))
    moved = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        members = places[:, group]
        moved |= np.any(members != members[:, :1], axis=1)
    return tuple(name for name, varies in zip(mesh.axis_names, moved, strict=True) if varies)


def _leaves_slice(groups: Sequence[np.ndarray], mesh: Mesh) -> bool:
    slices = [_slice_of(device) for device in mesh.devices.flat]
    return any(len({slices[i] for i in group}) > 1 for group in groups)


def _slice_of(device: object) -> int:
    return getattr(device, "slice_index", 0)


def _sent(found: list[Collective]) -> int:
    return sum(one.count * one.wire_bytes for one in found)
