"""Time of a compiled program's instructions in a trace of jax's profiler."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxft.compiled.hlo import Instruction, Module, arrays

# Instructions that only run others, which stand in the trace by themselves.
_CONTROL = ("while", "conditional", "call")
# Parts of an instruction's origin that say nothing of what it computes.
_WRAPPING = re.compile(
    r"(jvp|transpose)\(.*\)|checkpoint|rematted_computation|closed_call|eval_jaxpr|while|body|cond"
)
# What in an origin tells of the pass it is part of, the narrowest first.
_PASSES = {"rematted_computation": "recomputed", "transpose(": "backward", "jvp(": "forward"}
_LONGEST = 60  # characters of an origin that are shown


@dataclass(frozen=True, slots=True)
class Operation:
    """One instruction of a program in a trace.

    Attributes:
      name: Name in the compiled program.
      what: Opcode and (first) result, the pass it is part of, and the part of the traced function
        that it comes from; empty if the program's text does not have it.
      calls: Number of its runs; a mean over devices.
      seconds: Time in it; a mean over devices. Of two that run side by side both count.
    """

    name: str
    what: str
    calls: float
    seconds: float


def operations(trace: Any, text: str) -> list[Operation]:
    """Returns what the instructions of a program took, the longest first.

    Loops and calls are left out, as what they run is listed.

    Args:
      trace: `jax.profiler.ProfileData` of a process, of whatever programs it ran.
      text: Of the compiled program, from `compiled.as_text()`.
    """
    instructions = {
        name: instruction
        for computation in Module(text).computations.values()
        for name, instruction in computation.instructions.items()
    }
    module = re.match(r"HloModule ([\w.\-]+)", text)
    devices, calls, seconds = set(), defaultdict(int), defaultdict(float)
    with warnings.catch_warnings():
        # Types of jaxlib warn when they are first used, and abort where warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        for device, name, event in _events(trace, module[1] if module else ""):
            devices.add(device)
            if name in instructions and instructions[name].opcode in _CONTROL:
                continue
            calls[name] += 1
            seconds[name] += event.duration_ns / 1e9
    return [
        Operation(name, _what(instructions.get(name)), calls[name] / len(devices), spent)
        for name, total in sorted(seconds.items(), key=lambda item: -item[1])
        if (spent := total / len(devices))
    ]


def _events(trace: Any, module: str) -> Iterator[tuple[Any, str, Any]]:
    """Yields the device, the instruction and the event of each run of one.

    An accelerator has a plane of its own, in which a TPU has a line of instructions, and a GPU
    lines of kernels that say which instruction they are of. Of a CPU, threads of the host say so.
    """
    planes = list(trace.planes)
    accelerators = [plane for plane in planes if plane.name.startswith("/device:")]
    found = False
    for plane in accelerators:
        events = _of_tpu(plane, module) if ":TPU:" in plane.name else _tagged(plane, module)
        for _, name, event in events:
            found = True
            yield plane.name, name, event
    if not found:
        for plane in planes:
            yield from _tagged(plane, module)


def _tagged(plane: Any, module: str) -> Iterator[tuple[Any, str, Any]]:
    """Yields events that name their instruction, program and, on a CPU, device."""
    for line in plane.lines:
        for event in line.events:
            tags = dict(event.stats)
            if "hlo_op" in tags and tags.get("hlo_module") == module:
                yield tags.get("device_ordinal", 0), tags["hlo_op"], event


def _of_tpu(plane: Any, module: str) -> Iterator[tuple[Any, str, Any]]:
    """Yields the instructions of a TPU that ran within runs of the program."""
    lines = {line.name: list(line.events) for line in plane.lines}
    # Of a run the name is that of the program and its number: `jit_step(123)`.
    runs = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for event in lines.get("XLA Modules", ())
        if event.name.partition("(")[0] == module
    ]
    for event in lines.get("XLA Ops", ()):
        if any(start <= event.start_ns < end for start, end in runs):
            # The name is the whole line of the program's text.
            name = re.match(r"%?([\w.\-]+)", event.name)
            yield plane.name, name[1] if name else event.name, event


def _what(instruction: Instruction | None) -> str:
    """Returns `fusion f32[8,64], backward: bth,hf->btf/dot_general`."""
    if instruction is None:
        return ""
    results = arrays(instruction.shape)
    shown = "".join(f" {a.dtype}[{','.join(map(str, a.sizes))}]" for a in results[:1])
    shown += " …" if len(results) > 1 else ""
    origin = instruction.origin
    place = next((name for mark, name in _PASSES.items() if mark in origin), "")
    parts = [part for part in origin.split("/")[1:] if not _WRAPPING.fullmatch(part)]
    source = "/".join(parts[-3:])
    if len(source) > _LONGEST:
        source = source[:_LONGEST] + "…"
    text = f"{instruction.opcode}{shown}{place and f', {place}'}"
    return f"{text}: {source}" if source else text
