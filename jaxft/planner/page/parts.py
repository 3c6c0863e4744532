"""Writes figures of plans in words, and cuts bars into shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner import timeline as lanes
from jaxft.planner.plan import Plan, StepTime


def percent(share: float, digits: int = 0) -> str:
    """Returns a share in percent."""
    return f"{100 * share:.{digits}f} %"


def some_percent(share: float) -> str:
    """Returns a share in percent; what rounds to nothing is "< 1 %"."""
    return "< 1 %" if 0 < share < 0.005 else percent(share)


def interval(time: StepTime) -> str:
    """Returns the interval of a step's time, its unit once where both ends share it."""
    low, high = format_seconds(time.low), format_seconds(time.high)
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"


def fit_words(plan: Plan) -> str:
    """Returns by how much a plan fits, or does not, in words."""
    memory = plan.memory
    if not memory.limit:
        return "limit not known"
    size = format_bytes(abs(memory.headroom))
    if memory.headroom < 0:
        return f"does not fit, by {size}"
    if not memory.fits:
        return f"does not fit the host, by {format_bytes(memory.host - memory.host_limit)}"
    return f"fits, {size} left" if plan.evaluation_fits else "training fits, evaluation does not"


def mesh_words(plan: Plan) -> str:
    """Returns the axes of a plan's mesh that are larger than 1."""
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return " × ".join(axes) or "one device"


def money(amount: float, currency: str) -> str:
    """Returns an amount with its currency."""
    return f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.3g} {currency}"


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a bar.

    Attributes:
      name: The kind of memory or time.
      classes: Names that colour it.
      percent: Width in per cent of the bar.
      size: Bytes or seconds with a unit.
      part: Size in per cent of the whole, in words.
    """

    name: str
    classes: str
    percent: float
    size: str
    part: str


def shares(
    sizes: Mapping[str, float],
    *,
    whole: float,
    form: Callable[[float], str],
    width: float = 0.0,
) -> list[Share]:
    """Returns the parts of a bar, without those that are empty.

    Args:
      sizes: Sizes by kind, from left to right.
      whole: What a share in words is a share of.
      form: Turns a size into words.
      width: What the full width of the bar stands for, if not for `whole`.
    """
    return [
        Share(kind, css_class(kind), 100 * size / (width or whole), form(size), some_percent(part))
        for kind, size in sizes.items()
        if size > 0 and (part := size / whole) > 0
    ]


def css_class(kind: str) -> str:
    """Returns the class that colours a kind; all waits look alike."""
    return "k wait" if kind.startswith(lanes.WAIT) else f"k k-{_slug(kind)}"


def _slug(kind: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in kind)
