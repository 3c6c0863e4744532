"""The text of a compiled program, as XLA prints it after all of its passes.

What is found here is what runs, in the order in which it is scheduled.
"""

import collections
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxft.training.loops import most_trips

# Number of the memory that an array is in, `S(n)` in its layout; without one it is in the device's
# main memory. These are those of XLA for TPU.
HBM, HOST = 0, 5


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
      dtype: Type in XLA's spelling, such as `bf16`.
      sizes: Sizes of the dimensions.
      space: Number of the memory it is in.
      bytes: Size with elements packed.
      padded_bytes: Size with the padding that its tiles have in a TPU's memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    space: int
    bytes: int
    padded_bytes: int


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: Without its sign.
      shape: Text of its result's.
      opcode: Such as `fusion`.
      operands: Names.
      rest: Attributes, after the operands.
      literal: The text between the parentheses.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    literal: str

    def called(self, attribute: str) -> list[str]:
        """Returns the computations that an attribute names."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []

    @property
    def origin(self) -> str:
        """Part of the traced function it came from, `op_name` in the text; empty if unknown."""
        found = re.search(r'\bop_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Function that a custom call calls."""
        found = re.search(r'\bcustom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The instructions that read a value, by its name."""
        found = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The instructions that are the computation's parameters, by number."""
        return {
            int(instruction.literal): instruction
            for instruction in self.instructions.values()
            if instruction.opcode == "parameter"
        }

    def source(self, name: str) -> str:
        """Follows a value to where it was not only copied from."""
        while (found := self.instructions[name]).opcode in ("copy", "bitcast", "convert"):
            name = found.operands[0]
        return name

    def bytes_of(self, operand: str) -> int:
        """Returns the bytes of a value.

        Raises:
          ValueError: If the computation does not define it.
        """
        if operand not in self.instructions:
            raise ValueError(f"{self.name}: the operand {operand!r} is not defined there.")
        return shape_bytes(self.instructions[operand].shape)


class _Element(NamedTuple):
    """An element of the tuple that a loop carries."""

    index: int


# What a value in a loop is, as far as its length depends on it.
type _Value = int | _Element | None


class Module:
    """A program.

    Attributes:
      computations: Computations by name.
      entry: Name of the one that runs.
      partitions: Devices that it is written for.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
        self.partitions = int(partitions[1]) if partitions else 1
        for name, is_entry, lines in _computations(text):
            instructions, root = {}, ""
            for line in lines:
                if (parsed := _parse(line)) is None:
                    continue
                instructions[parsed.name] = parsed
                if line.lstrip().startswith("ROOT "):
                    root = parsed.name
            self.computations[name] = Computation(name, instructions, root)
            self.entry = name if is_entry else self.entry

    def fused(self, instruction: Instruction) -> Computation | None:
        """Returns the body of a fusion, or None for what is no fusion."""
        if instruction.opcode != "fusion":
            return None
        return self.computations[instruction.called("calls")[0]]

    def branches(self, conditional: Instruction) -> list[str]:
        """Returns the computations of which a conditional runs one."""
        attributes = ("branch_computations", "true_computation", "false_computation")
        return [branch for name in attributes for branch in conditional.called(name)]

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often a loop runs, or None where the text does not say.

        XLA for CPU and GPU writes it down; XLA for TPU leaves `i < constant`, or `<=` or `!=`, in
        the condition, and start and step are read from the loop's operand and its body. Of a loop
        that may end early its bound is returned.
        """
        if bound := most_trips(loop.rest):
            return bound
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

    def _initial(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        """Returns the constant that an element of a loop's tuple starts as."""
        start = computation.instructions.get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        value = self._value(computation, start.operands[index])
        return value if isinstance(value, int) else None

    def _passed_on(self, body: Computation, index: int) -> bool:
        root = body.instructions[body.root]
        return root.opcode == "tuple" and self._value(body, root.operands[index]) == _Element(index)

    def _step(self, body: Computation, index: int) -> int | None:
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return None
        added = self._binary(body, root.operands[index], "add")
        if added is None or _Element(index) not in added:
            return None
        return next((part for part in added[:2] if isinstance(part, int)), None)

    def _binary(
        self, computation: Computation, name: str, opcode: str
    ) -> tuple[_Value, _Value, str] | None:
        """Returns what an instruction combines, and in which direction; it may be in a fusion."""
        instruction = computation.instructions[computation.source(name)]
        arguments: Sequence[_Value] = ()
        inner = computation
        if instruction.opcode == "fusion":
            arguments = [self._value(computation, operand) for operand in instruction.operands]
            inner = self.computations[instruction.called("calls")[0]]
            instruction = inner.instructions[inner.source(inner.root)]
        if instruction.opcode != opcode:
            return None
        left, right = (self._value(inner, o, arguments) for o in instruction.operands)
        direction = re.search(r"\bdirection=(\w+)", instruction.rest)
        return left, right, direction[1] if direction else ""

    def _value(
        self,
        computation: Computation,
        name: str,
        arguments: Sequence[_Value] = (),
    ) -> _Value:
        """Returns a constant, or which element of the loop's tuple a value is, if it is either."""
        instruction = computation.instructions[computation.source(name)]
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


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape as XLA prints it, of a tuple all of them."""
    found = []
    for dtype, sizes, layout in re.findall(
        r"\b(pred|[a-z]+\d\w*)\[([^\]]*)\](?:\{([^}]*)\})?", shape
    ):
        dimensions = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 8  # pred
        found.append(
            Array(
                dtype,
                dimensions,
                int(space[1]) if space else HBM,
                math.ceil(math.prod(dimensions) * bits / 8),
                math.ceil(math.prod(_tiled(dimensions, layout)) * bits / 8),
            )
        )
    return found


def _tiled(sizes: tuple[int, ...], layout: str) -> list[int]:
    """Rounds the dimensions that vary fastest up to whole tiles, the first pair of `T(8,128)`."""
    padded = list(sizes)
    order = re.match(r"([\d,]+)", layout)
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if order and tile and sizes:
        fastest = [int(i) for i in order[1].split(",") if i]
        for dimension, size in zip(fastest, reversed(tile[1].split(",")), strict=False):
            padded[dimension] = math.ceil(padded[dimension] / int(size)) * int(size)
    return padded


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape as XLA prints it, of a tuple all together.

    Elements of less than a byte are packed; layouts, tiles and padding do not count.
    """
    return sum(array.bytes for array in arrays(shape))


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yields name, whether it is the entry, and the lines of each computation."""
    lines = iter(text.splitlines())
    for line in lines:
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            # Texts inside an instruction may hold line breaks, and begin a line with "}}".
            yield head[2], bool(head[1]), list(_joined(lines))


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Yields the instructions of a computation, of which texts may hold line breaks."""
    whole = ""
    for line in lines:
        # Such a text may begin a line with "}}".
        ends = re.match(r"\}(,|$)", line) is not None
        if ends or re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = ", line):
            if whole:
                yield whole
            whole = line
        else:
            whole += " " + line
        if ends:
            return


def _parse(line: str) -> Instruction | None:
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
    return Instruction(head[1], shape, opcode[1], tuple(operands), rest, literal)


def _closing(line: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", line[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.end()
    raise ValueError(f"No closing parenthesis in {line[:80]!r}.")
