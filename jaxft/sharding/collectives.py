"""What devices say to each other in a compiled program: its collectives, read from its text.

XLA prints a program after all of its passes, so what is found here is what runs: what a strategy
was meant to do, and what the compiler made of it.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

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
      count: How often one step runs it, loops multiplied.
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
      origin: What of the traced function it came from, `op_name` in the text.
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

    @property
    def bytes(self) -> int:
        """Payload of one run, per device."""
        return sum(self.arrays)

    @property
    def wire_bytes(self) -> int:
        """What a device sends in one run if groups are rings, which is the least it can be.

        For n devices and the payload b: 2b(n-1)/n for all-reduce, b(n-1)/n for all-gather,
        reduce-scatter and all-to-all, b for a permute.
        """
        return round(_WIRE[self.kind](self.group_size) * self.bytes)


@dataclass(frozen=True, slots=True)
class Total:
    """All collectives of one kind over the same mesh axes, in one step and per device.

    Attributes:
      kind: As `Collective.kind`.
      axes: As `Collective.axes`.
      count: Runs in one step.
      bytes: Payload of all runs.
      wire_bytes: What rings send for them.
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
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    devices = _numbering(mesh, int(partitions[1]) if partitions else 1)
    program = _Program(text)
    return list(program.visit(program.entry, _Frame(mesh, devices)))


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


class _Element(NamedTuple):
    """An element of the tuple that a loop carries."""

    index: int


# What a value in a loop is, as far as its length depends on it.
type _Value = int | _Element | None


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, after the operands
    literal: str  # the text between the parentheses

    def called(self, attribute: str) -> list[str]:
        """Returns the computations that an attribute names."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


@dataclass(frozen=True)
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def users(self) -> Mapping[str, list[_Instruction]]:
        found = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found[operand].append(instruction)
        return found


@dataclass(frozen=True)
class _Frame:
    """Where in the running program a computation stands.

    Attributes:
      mesh: The program's.
      devices: Place in the mesh of each number of a device in the text.
      count: How often it runs.
      exact: Whether that is known.
      fused: Whether it is the body of a fusion.
      chains: Asynchronous collectives met so far that are spread over several fusions.
    """

    mesh: Mesh
    devices: np.ndarray
    count: int = 1
    exact: bool = True
    fused: bool = False
    chains: set[str] = field(default_factory=set)


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        for name, is_entry, lines in _computations(text):
            instructions, root = {}, ""
            for line in lines:
                if (parsed := _parse(line)) is None:
                    continue
                instructions[parsed.name] = parsed
                if line.lstrip().startswith("ROOT "):
                    root = parsed.name
            self.computations[name] = _Computation(name, instructions, root)
            self.entry = name if is_entry else self.entry

    def visit(self, name: str, frame: _Frame) -> Iterator[Collective]:
        """Yields the collectives that one run of a computation leads to."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._loop(computation, instruction, frame)
            elif opcode == "conditional":
                branches = [
                    list(self.visit(branch, frame))
                    for attribute in (
                        "branch_computations",
                        "true_computation",
                        "false_computation",
                    )
                    for branch in instruction.called(attribute)
                ]
                yield from max(branches, key=_sent, default=[])
            elif opcode in ("fusion", "call", "async-start", "custom-call"):
                inner = replace(frame, fused=opcode == "fusion")
                for attribute in ("calls", "to_apply", "called_computations"):
                    for called in instruction.called(attribute):
                        yield from self.visit(called, inner)
            else:
                yield from self._collective(computation, instruction, frame)

    def _loop(
        self, computation: _Computation, loop: _Instruction, frame: _Frame
    ) -> Iterator[Collective]:
        [condition], [body] = loop.called("condition"), loop.called("body")
        trips = self._trips(computation, loop)
        exact = frame.exact and trips is not None
        runs = 1 if trips is None else trips
        inner = replace(frame, exact=exact, fused=False, chains=set())
        yield from self.visit(body, replace(inner, count=frame.count * runs))
        yield from self.visit(condition, replace(inner, count=frame.count * (runs + 1)))

    def _trips(self, computation: _Computation, loop: _Instruction) -> int | None:
        """Returns how often a loop runs, or None where the text does not say.

        XLA for CPU and GPU writes it down; XLA for TPU leaves `i < constant`, or `<=` or `!=`, in
        the condition, and start and step are read from the loop's operand and its body.
        """
        known = re.search(r'"known_trip_count"\s*:\s*\{\s*"n"\s*:\s*"(\d+)"\s*\}', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        body = self.computations[loop.called("body")[0]]
        compared = self._binary(condition, condition.root, "compare")
        if compared is None:
            return None
        left, right, direction = compared
        if direction in ("GT", "GE"):
            left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
        if direction not in ("LT", "LE", "NE") or not isinstance(left, _Element):
            return None
        first = self._initial(computation, loop, left.index)
        last = right if isinstance(right, int) else None
        if isinstance(right, _Element) and self._passed_on(body, right.index):
            last = self._initial(computation, loop, right.index)
        step = self._step(body, left.index)
        if first is None or last is None or not step:
            return None
        distance = last - first + (direction == "LE")
        if direction == "NE":  # counts down as well, but has to meet its end
            return distance // step if distance % step == 0 and distance // step >= 0 else None
        return max(0, math.ceil(distance / step)) if step > 0 else None

    def _initial(self, computation: _Computation, loop: _Instruction, index: int) -> int | None:
        """Returns the constant that an element of a loop's tuple starts as."""
        start = computation.instructions.get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        value = self._value(computation, start.operands[index])
        return value if isinstance(value, int) else None

    def _passed_on(self, body: _Computation, index: int) -> bool:
        root = body.instructions[body.root]
        return root.opcode == "tuple" and self._value(body, root.operands[index]) == _Element(index)

    def _step(self, body: _Computation, index: int) -> int | None:
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return None
        added = self._binary(body, root.operands[index], "add")
        if added is None or _Element(index) not in added:
            return None
        return next((part for part in added[:2] if isinstance(part, int)), None)

    def _binary(
        self, computation: _Computation, name: str, opcode: str
    ) -> tuple[_Value, _Value, str] | None:
        """Returns what an instruction combines, and in which direction; it may be in a fusion."""
        instruction = computation.instructions[_source(computation, name)]
        arguments: Sequence[_Value] = ()
        inner = computation
        if instruction.opcode == "fusion":
            arguments = [self._value(computation, operand) for operand in instruction.operands]
            inner = self.computations[instruction.called("calls")[0]]
            instruction = inner.instructions[_source(inner, inner.root)]
        if instruction.opcode != opcode:
            return None
        left, right = (self._value(inner, o, arguments) for o in instruction.operands)
        direction = re.search(r"\bdirection=(\w+)", instruction.rest)
        return left, right, direction[1] if direction else ""

    def _value(
        self,
        computation: _Computation,
        name: str,
        arguments: Sequence[_Value] = (),
    ) -> _Value:
        """Returns a constant, or which element of the loop's tuple a value is, if it is either."""
        instruction = computation.instructions[_source(computation, name)]
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
            return int(instruction.literal)
        if instruction.opcode == "parameter" and arguments:
            return arguments[int(instruction.literal)]
        if instruction.opcode == "get-tuple-element":
            source = computation.instructions[instruction.operands[0]]
            index = re.search(r"\bindex=(\d+)", instruction.rest)
            if source.opcode == "parameter" and index:
                return _Element(int(index[1]))
        return None

    def _collective(
        self, computation: _Computation, instruction: _Instruction, frame: _Frame
    ) -> Iterator[Collective]:
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
        numbered = _groups(instruction, kind, len(frame.devices))
        groups = [frame.devices[group] for group in numbered]
        size = max(map(len, groups), default=1)
        if kind == "collective-permute":
            axes = _axes(groups, frame.mesh)
            size = math.prod(frame.mesh.shape[axis] for axis in axes)
        if size == 1:
            return
        if not operands:
            raise ValueError(f"{instruction.name}: no operands in {instruction.literal!r}.")
        arrays = [self._bytes(computation, operand) for operand in operands]
        if kind == "ragged-all-to-all":
            arrays = arrays[:1]  # the others are the result's buffer, offsets and sizes
        if kind == "all-gather":
            arrays = [size * array for array in arrays]
        if kind == "all-reduce" and frame.fused and _only_sliced(computation, instruction):
            kind = "reduce-scatter"
        yield Collective(
            kind=kind,
            axes=_axes(groups, frame.mesh),
            group_size=size,
            count=frame.count,
            exact=frame.exact,
            arrays=tuple(arrays),
            across_slices=_leaves_slice(groups, frame.mesh),
            gathers=kind == "all-reduce"
            and all(_is_padded(computation, operand) for operand in operands),
            name=instruction.name,
            origin=_origin(instruction),
        )

    def _between_slices(
        self, computation: _Computation, send: _Instruction, frame: _Frame
    ) -> Iterator[Collective]:
        """Yields what slices of a TPU exchange over the data centre's network.

        There the program hands one part of the data to the host, which talks to those of the other
        slices. Groups are not in the text in numbers of devices, but no other axis leaves a slice.
        """
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
        kind = transfer[1].lower().replace("_", "-") if transfer else ""
        kind = "collective-permute" if kind == "one-to-one" else kind
        slices = np.vectorize(_slice_of)(frame.mesh.devices)
        if kind not in KINDS:
            raise ValueError(f"{send.name}: unknown transfer between slices, {kind!r}.")
        axes = tuple(
            name
            for i, name in enumerate(frame.mesh.axis_names)
            if np.any(slices != np.take(slices, [0], axis=i))
        )
        size = np.unique(slices).size
        payload = self._bytes(computation, send.operands[0])
        yield Collective(
            kind=kind,
            axes=axes,
            group_size=size,
            count=frame.count,
            exact=frame.exact,
            arrays=(payload * size if kind == "all-gather" else payload,),
            across_slices=True,
            name=send.name,
            origin=_origin(send),
        )

    def _is_continuation(self, instruction: _Instruction, frame: _Frame) -> bool:
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

    def _bytes(self, computation: _Computation, operand: str) -> int:
        if operand not in computation.instructions:
            raise ValueError(f"{computation.name}: the operand {operand!r} is not defined there.")
        return shape_bytes(computation.instructions[operand].shape)


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape as XLA prints it, of a tuple all together.

    Elements of less than a byte are packed; layouts, tiles and padding do not count.
    """
    total = 0
    for dtype, sizes in re.findall(r"\b(pred|[a-z]+\d\w*)\[([^\]]*)\]", shape):
        elements = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8  # pred
        total += math.ceil(elements * bits / 8)
    return total


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yields name, whether it is the entry, and the lines of each computation."""
    lines = iter(text.splitlines())
    for line in lines:
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            # Texts inside an instruction may hold line breaks, and begin a line with "}}".
            body = itertools.takewhile(lambda inner: not re.match(r"\}(,|$)", inner), lines)
            yield head[2], bool(head[1]), list(body)


def _parse(line: str) -> _Instruction | None:
    """Splits `ROOT %name = shape opcode(operands), attributes`."""
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
    if opcode is None:
        return None
    first = end + opcode.end()
    last = _closing(line, first - 1) - 1
    literal = line[first:last]
    # An operand may be printed with its shape before the name, and the name without its sign.
    operands = re.findall(r"%([\w.\-]+)", literal)
    if not operands and opcode[1] != "constant":
        operands = re.findall(r"([A-Za-z_][\w.\-]*)\s*(?:,|$)", literal)
    shape, rest = line[start:end], line[last + 1 :]
    return _Instruction(head[1], shape, opcode[1], tuple(operands), rest, literal)


def _closing(line: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"No closing parenthesis in {line[:80]!r}.")


def _source(computation: _Computation, name: str) -> str:
    """Follows a value to where it was not only copied from."""
    while (found := computation.instructions[name]).opcode in ("copy", "bitcast", "convert"):
        name = found.operands[0]
    return name


def _only_sliced(computation: _Computation, instruction: _Instruction) -> bool:
    """Whether nothing but slices of its result is used."""
    users = computation.users[instruction.name]
    views = ("bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose")
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in views and _only_sliced(computation, user))
        for user in users
    )


def _is_padded(computation: _Computation, name: str) -> bool:
    """Whether a value is a part that was written into one number repeated."""
    written = computation.instructions[_source(computation, name)]
    if written.opcode != "dynamic-update-slice":
        return False
    base = _source(computation, written.operands[0])
    return computation.instructions[base].opcode == "broadcast"


def _groups(instruction: _Instruction, kind: str, size: int) -> list[list[int]]:
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


def _origin(instruction: _Instruction) -> str:
    found = re.search(r'\bop_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _sent(found: list[Collective]) -> int:
    return sum(one.count * one.wire_bytes for one in found)
