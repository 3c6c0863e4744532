"""A compiled program added up: the time of a step, what is exchanged, and how sure that is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxft.compiled.collectives import Collective, Frame, Reader
from jaxft.compiled.hlo import Module
from jaxft.models.delta import SCOPE
from jaxft.planner import timeline as lanes
from jaxft.planner.plan import Exchange, StepTime
from jaxft.planner.timeline import Timeline
from jaxft.planner.topology import Topology

# Least and most that published training steps on TPU slices took of their predictions:
# benchmarks/published.py, whose table is in docs/planning.md.
PUBLISHED_RANGE = (0.83, 1.08)
# As PUBLISHED_RANGE, of closed-form estimates and of steps on GPUs: PyTorch's on A100 and MaxText's
# on H100 and H200. PyTorch's of 2023 on H100 took up to twice their estimates.
ESTIMATED_RANGE = (0.99, 1.52)


class Reading(NamedTuple):
    """Facts that are read from a compiled program.

    Attributes:
      module: The program.
      reader: Reader of its collectives.
      step: Timeline of the step.
      by_cycles: Length of the timeline in which matrix products take the compiler's cycles.
      flops: FLOPs of matrix products on a device, by the type at whose rate they are made.
      bytes: Bytes to and from a device's main memory.
    """

    module: Module
    reader: Reader
    step: Timeline
    by_cycles: float
    flops: Mapping[str, float]
    bytes: float


def step_time(found: Reading, topology: Topology) -> StepTime:
    """Adds a timeline up."""
    chip, step = topology.chip.core, found.step
    spent: dict[str, float] = {}
    for kind, seconds in _of_core(step):
        spent[kind] = spent.get(kind, 0.0) + seconds
    low, high = PUBLISHED_RANGE if topology.chip.is_tpu else ESTIMATED_RANGE
    return StepTime(
        seconds=step.seconds,
        terms={
            "compute": sum(
                flops / chip.peak(dtype) for dtype, flops in found.flops.items() if flops
            )
            if chip.bfloat16
            else 0.0,
            "memory": found.bytes / chip.bandwidth if chip.bandwidth else 0.0,
            **{lane: step.total(lane=lane) for lane in (lanes.ICI, lanes.DCN, lanes.TO_HOST)},
        },
        spent=spent,
        by_cycles=found.by_cycles if chip.clock else 0.0,
        low=low * step.seconds,
        high=high * step.seconds,
    )


def _of_core(step: Timeline, *, recurs: bool = False) -> Iterator[tuple[str, float]]:
    """Yields what the core does and for how long, the delta rule's work as one kind.

    Args:
      step: Timeline of the step, or of a loop in it.
      recurs: Whether the loop is the rule's: not all within has its name.
    """
    for span in step.spans:
        if span.lane == lanes.CORE:
            rule = recurs or SCOPE in span.origin
            works = not span.kind.startswith(lanes.WAIT)
            yield lanes.RECURRENCE if rule and works else span.kind, span.seconds
    for loop in step.loops:
        for kind, seconds in _of_core(loop.body, recurs=recurs or SCOPE in loop.origin):
            yield kind, seconds * loop.trips


def estimated_time(
    seconds: float,
    *,
    terms: Mapping[str, float] | None = None,
    spent: Mapping[str, float] | None = None,
) -> StepTime:
    """Returns an estimate with the interval in which measured steps lie around such estimates."""
    low, high = ESTIMATED_RANGE
    return StepTime(
        seconds=seconds,
        terms=dict(terms or {}),
        spent={kind: size for kind, size in (spent or {}).items() if size},
        by_cycles=0.0,
        low=low * seconds,
        high=high * seconds,
    )


def exchanges(found: Reading) -> tuple[Exchange, ...]:
    """Adds the collectives of a program up, with the time they take and that is waited for them."""
    taken: dict[str, float] = {}
    waited: dict[str, float] = {}
    for span, times in found.step.every():
        if span.lane in (lanes.ICI, lanes.DCN):
            taken[span.name] = taken.get(span.name, 0.0) + span.seconds * times
        elif span.kind.startswith(lanes.WAIT):
            waited[span.name] = waited.get(span.name, 0.0) + span.seconds * times
    groups: dict[tuple[str, tuple[str, ...], str], list[Collective]] = {}
    for one in found.reader.visit(found.module.entry, Frame()):
        network = lanes.DCN if one.across_slices else lanes.ICI
        groups.setdefault((one.kind, one.axes, network), []).append(one)
    return tuple(
        sorted(
            (
                _exchange(kind, axes, network, group, taken, waited)
                for (kind, axes, network), group in groups.items()
            ),
            key=lambda exchange: -exchange.wire_bytes,
        )
    )


def _exchange(
    kind: str,
    axes: tuple[str, ...],
    network: str,
    group: Sequence[Collective],
    taken: Mapping[str, float],
    waited: Mapping[str, float],
) -> Exchange:
    names = {one.name for one in group}
    seconds = sum(taken.get(name, 0.0) for name in names)
    exposed = sum(waited.get(name, 0.0) for name in names)
    return Exchange(
        kind=kind,
        axes=axes,
        network=network,
        count=sum(one.count for one in group),
        exact=all(one.exact for one in group),
        bytes=sum(one.count * one.bytes for one in group),
        wire_bytes=sum(one.count * one.wire_bytes for one in group),
        seconds=seconds,
        overlapped=min(1.0, max(0.0, 1 - exposed / seconds)) if seconds else 0.0,
    )


def notes(topology: Topology, module: Module) -> tuple[str, ...]:
    """Returns what a reader should know of a plan that was read from this program."""
    found = []
    if not topology.chip.bfloat16:
        found.append(
            "No figures of this device are published: memory and collectives alone are known."
        )
    elif not topology.chip.is_tpu:
        found.append("Times of GPU programs were not held against a GPU.")
    unknown = sum(
        instruction.opcode == "while" and module.trips(computation, instruction) is None
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    )
    if unknown:
        found.append(f"How often {unknown} loops run is not in the program: they count once.")
    return tuple(found)
