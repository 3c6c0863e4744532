"""The memory of a device against its limit, as a page shows it."""

from dataclasses import dataclass

from jaxft.formatting import format_bytes
from jaxft.planner.page.parts import Share, fit_words, shares
from jaxft.planner.plan import Plan

# What the compiled program states; the rest of the memory is split by its schedule.
_FACTS = ("parameters", "optimizer", "reference", "batch", "padding", "program")
# Of a program that does not fit only its arguments and gradients are known.
_FACTS_WITHOUT_PROGRAM = ("parameters", "optimizer", "reference", "gradients")


@dataclass(frozen=True, slots=True)
class Legend:
    """The names and sizes of parts of a bar.

    Attributes:
      title: Words on the origin of the sizes.
      shares: The parts.
    """

    title: str
    shares: list[Share]


@dataclass(frozen=True, slots=True)
class Limit:
    """The end of the memory of a device.

    Attributes:
      percent: Per cent of the bar that lie below it.
      size: The memory that a device has.
      room: Per cent of the bar that are left below it; negative for what is over it.
      room_size: The bytes that are left, or over the limit, with a unit.
    """

    percent: float
    size: str
    room: float
    room_size: str


@dataclass(frozen=True, slots=True)
class Host:
    """The part of the host's memory that is one device's.

    Attributes:
      percent: Width in per cent of the bar of the device.
      size: The bytes with a unit.
      cut: Whether it is longer than drawn.
    """

    percent: float
    size: str
    cut: bool


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """The memory of one device.

    Attributes:
      text: A sentence on the bytes that are used, and whether they fit.
      shares: Parts of the bar: facts, then what is split.
      limit: The end of the memory; None if it is not known.
      host: The host's memory; None if none is used.
      legends: Names of the parts, facts apart from estimates.
    """

    text: str
    shares: list[Share]
    limit: Limit | None
    host: Host | None
    legends: list[Legend]


def memory_bar(plan: Plan) -> MemoryBar:
    """Splits the memory of one device by kind."""
    memory = plan.memory
    kinds = {kind: size for kind, size in memory.kinds.items() if size > 0}
    known = _FACTS if plan.fits else _FACTS_WITHOUT_PROGRAM
    facts = {kind: kinds[kind] for kind in known if kind in kinds}
    rest = {kind: size for kind, size in kinds.items() if kind not in known}
    width = max(memory.limit, memory.used, sum(kinds.values()), 1)
    used = max(memory.used, 1)
    first, second = (shares(s, whole=used, form=format_bytes, width=width) for s in (facts, rest))
    return MemoryBar(
        text=f"{format_bytes(memory.used)} used; {fit_words(plan)}.",
        shares=[*first, *second],
        limit=_limit(plan, width),
        host=_host(memory.host, width),
        legends=_legends(plan, first, second),
    )


def _limit(plan: Plan, width: float) -> Limit | None:
    memory = plan.memory
    if not memory.limit:
        return None
    return Limit(
        percent=100 * memory.limit / width,
        size=format_bytes(memory.limit),
        room=100 * memory.headroom / width,
        room_size=format_bytes(abs(memory.headroom)),
    )


def _host(size: int, width: float) -> Host | None:
    if not size:
        return None
    return Host(min(100.0, 100 * size / width), format_bytes(size), cut=size > width)


def _legends(plan: Plan, facts: list[Share], rest: list[Share]) -> list[Legend]:
    if plan.source != "compiled":
        return [Legend("Estimates", [*facts, *rest])]
    names = ", ".join(share.name for share in facts)
    if plan.fits:
        first = f"Facts of the compiled program, as is the total: {names}"
        second = "Split by the schedule at its fullest moment, scaled to the compiler's sum"
    else:
        first = f"Known without a program: {names}; the compiler says the total"
        second = "The rest, which the compiler does not split"
    return [Legend(first, facts), Legend(second, rest)]
