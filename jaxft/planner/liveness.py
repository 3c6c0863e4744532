"""The fullest moment of a device's memory: a walk over the schedule of a program.

The compiler says how much it allocates, not for what. Here each value of the scheduled program
lives from where it is made to where it was last read; views, updates in place and what loops carry
share the memory of what they come from. What is alive at the fullest moment is named by shape and
origin.
"""

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxft.compiled.hlo import HBM, Computation, Instruction, Module, arrays
from jaxft.planner.cost import is_view

# Instructions whose result is the memory of an operand.
_ALIASES = (
    "bitcast dynamic-update-slice "
    "copy-done slice-done dynamic-slice-done dynamic-update-slice-done "
    "dynamic-update-slice-start async-done all-gather-done all-reduce-done "
    "collective-permute-done add-dependency"
).split()


class Buffer(NamedTuple):
    """Memory of one array.

    Attributes:
      bytes: Size, tiles padded.
      dtype: Type in XLA's spelling.
      sizes: Sizes of the dimensions.
      origin: Part of the traced function that made it.
      name: The instruction's.
    """

    bytes: int
    dtype: str
    sizes: tuple[int, ...]
    origin: str
    name: str


@dataclass
class Peak:
    """The fullest moment of a computation.

    Attributes:
      bytes: Sum of all buffers, without what the program was given.
      buffers: Buffers that are alive then.
    """

    bytes: int = 0
    buffers: tuple[Buffer, ...] = ()


@dataclass
class _Life:
    """Values of one computation.

    Attributes:
      owners: Names of the buffers that each value is made of; of a tuple for each element.
      made: Buffers by name.
      last: The last instruction that reads a buffer, by its number.
    """

    owners: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    made: dict[str, tuple[Buffer, ...]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)


def peak_of(module: Module) -> Peak:
    """Returns what of a step's own memory is in use when most is, its arguments left out."""
    return _peak(module, module.computations[module.entry], {}, in_place=True)


def _peak(
    module: Module, computation: Computation, known: dict[str, Peak], *, in_place: bool
) -> Peak:
    if computation.name in known:
        return known[computation.name]
    order = list(computation.instructions.values())
    life = _lives(module, order)
    if in_place:
        _carry(life, computation)
    ends = collections.defaultdict(list)
    for name, last in life.last.items():
        ends[last].append(name)
    alive: dict[str, tuple[Buffer, ...]] = {}
    used, best = 0, Peak()
    for number, instruction in enumerate(order):
        made = life.made.get(instruction.name, ())
        # A result takes the place of an operand of its size that nobody reads any more.
        for name in _replaced(module, instruction, made, ends[number], alive):
            used -= sum(buffer.bytes for buffer in alive.pop(name))
        # What a branch or a function returns is counted inside of it until then.
        for own, inner in ((), _inner(module, instruction, known)), (made, Peak()):
            if own:
                alive[instruction.name] = own
                used += sum(buffer.bytes for buffer in own)
            if used + inner.bytes > best.bytes:
                buffers = [buffer for group in alive.values() for buffer in group]
                best = Peak(used + inner.bytes, (*buffers, *inner.buffers))
        for name in ends[number]:
            used -= sum(buffer.bytes for buffer in alive.pop(name, ()))
    known[computation.name] = best
    return best


def _replaced(
    module: Module,
    instruction: Instruction,
    made: tuple[Buffer, ...],
    ending: list[str],
    alive: dict[str, tuple[Buffer, ...]],
) -> list[str]:
    body = module.fused(instruction)
    # A product still reads what it would overwrite.
    products = {inner.opcode for inner in body.instructions.values()} if body else set()
    if instruction.opcode not in ("fusion", "add", "multiply", "subtract", "convert"):
        return []
    if products & {"dot", "convolution"}:
        return []
    sizes = collections.Counter(buffer.bytes for buffer in made)
    found = []
    for name in ending:
        size = sum(buffer.bytes for buffer in alive.get(name, ()))
        if name != instruction.name and size and sizes[size] > 0:
            sizes[size] -= 1
            found.append(name)
    return found


def _inner(module: Module, instruction: Instruction, known: dict[str, Peak]) -> Peak:
    """Returns the peak of what an instruction runs, with its own memory."""
    names: list[str] = []
    if instruction.opcode == "while":
        names = instruction.called("body")
    elif instruction.opcode == "conditional":
        names = module.branches(instruction)
    elif instruction.opcode == "call":
        names = instruction.called("to_apply")
    in_place = instruction.opcode == "while"
    peaks = [_peak(module, module.computations[name], known, in_place=in_place) for name in names]
    return max(peaks, key=lambda peak: peak.bytes, default=Peak())


def _lives(module: Module, order: list[Instruction]) -> _Life:
    life = _Life()
    for number, instruction in enumerate(order):
        owners = _owners(module, life, instruction)
        if owners is None:
            buffers = _buffers(instruction)
            life.made[instruction.name] = buffers
            owners = [(instruction.name,)]
            life.last.setdefault(instruction.name, number)
        life.owners[instruction.name] = owners
        for operand in instruction.operands:
            for names in life.owners.get(operand, []):
                for name in names:
                    life.last[name] = number
    return life


def _owners(module: Module, life: _Life, made: Instruction) -> list[tuple[str, ...]] | None:
    """Returns whose memory a value is in, or None if it is in its own."""
    if made.opcode in ("parameter", "constant", "partition-id", "replica-id", "iota"):
        return [()]
    if made.opcode == "tuple":
        return [_all(life.owners.get(operand, [])) for operand in made.operands]
    if made.opcode == "get-tuple-element":
        parts = life.owners.get(made.operands[0], [])
        index = int(made.rest.split("index=")[1].split(",")[0])
        return [parts[index] if index < len(parts) and len(parts) > 1 else _all(parts)]
    if made.opcode in ("while", "opt-barrier"):
        return life.owners.get(made.operands[0], [])
    if made.opcode in _ALIASES:
        return [_all(life.owners.get(made.operands[0], []))]
    body = module.fused(made)
    if body is not None:
        return _updated(module, life, body, made)
    return None


def _updated(
    module: Module, life: _Life, body: Computation, fusion: Instruction
) -> list[tuple[str, ...]] | None:
    """Returns whose memory a fusion writes into, if all it makes are updates in place."""
    root = body.instructions[body.root]
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    owners = []
    for part in parts:
        made = _behind(module, body, part)
        if made.opcode != "dynamic-update-slice":
            return None
        target = _behind(module, body, made.operands[0])
        if target.opcode != "parameter":
            return None
        owners.append(_all(life.owners.get(fusion.operands[int(target.literal)], [])))
    return owners


def _behind(module: Module, body: Computation, name: str) -> Instruction:
    """Returns what a value is a view of."""
    made = body.instructions[name]
    while made.operands and is_view(module, made):
        made = body.instructions[made.operands[0]]
    return made


def _all(owners: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in owners for name in names))


def _buffers(instruction: Instruction) -> tuple[Buffer, ...]:
    made = arrays(instruction.shape)
    if instruction.opcode == "copy-start":
        made = made[:1]
    elif instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # What is started names its operands, its results, and marks of its progress.
        made = made[len(instruction.operands) if instruction.shape.startswith("((") else 1 :]
    return tuple(
        Buffer(a.padded_bytes, a.dtype, a.sizes, instruction.origin, instruction.name)
        for a in made
        if a.sizes and a.space == HBM
    )


def _carry(life: _Life, computation: Computation) -> None:
    """Lets what is handed on take the memory of what was given in its place.

    So does what a loop's body returns, and what a step returns of a state that it may overwrite.
    """
    root = computation.instructions.get(computation.root)
    if root is None or root.opcode != "tuple" or not computation.parameters:
        return
    for name in {name for names in life.owners[root.name] for name in names}:
        life.made[name] = ()
