"""A search as a page shows it: its verdict, memory against step time, and the ranking."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner.page.overview import estimates_of
from jaxft.planner.plan import describe_shape
from jaxft.reporting import charts

if TYPE_CHECKING:
    from jaxft.planner.search import Candidate, Search

_MOST_POINTS = 400
_MOST_CANDIDATES = 300
_MOST_REASONS = 20
# Candidates that were not compiled and are still shown without a click.
_FIRST_CANDIDATES = 12
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Ranked:
    """A row of the ranking; "–" for what is not known.

    Attributes:
      rank: Place in the ranking, from 1.
      name: Words that tell it from the others.
      outcome: Words on the result.
      tone: "better", "worse" or "dim".
      seconds: The time of a step; empty if it is not known.
      estimate_seconds: The time that was estimated in closed form.
      bytes: The memory of a device; empty if it is not known.
      estimate_bytes: The memory that was estimated in closed form.
      rate: Tokens a second and chip.
      mfu: Model FLOP/s of the chips' peak.
    """

    rank: int
    name: str
    outcome: str
    tone: str
    seconds: str
    estimate_seconds: str
    bytes: str
    estimate_bytes: str
    rate: str
    mfu: str


@dataclass(frozen=True, slots=True)
class SearchView:
    """The result of a search.

    Attributes:
      name: The slice.
      verdict: The best candidate, or why there is none.
      text: A sentence on the number of candidates.
      compiles: Whether steps were compiled and not only estimated.
      first: Candidates that are shown.
      rest: Candidates that are shown on a click.
      rest_words: Words on the number of those.
      refused: The number of candidates that strategies refused.
      reasons: `(count, reason)` of the refusals, most first.
      plot: Memory against step time; None if no candidate has both.
    """

    name: str
    verdict: str
    text: str
    compiles: bool
    first: list[Ranked]
    rest: list[Ranked]
    rest_words: str
    refused: int
    reasons: list[tuple[str, str]]
    plot: "Plot | None"


def search_view(found: "Search") -> SearchView:
    """Writes and draws what a search found."""
    topology = found.topology
    verdict = "None of them fits." if found.compiled else f"None was {_made(found)}."
    if (best := found.best) is not None:
        verdict = f"The best: {best.name}, {format_seconds(best.seconds)} a step by estimate."
    numbered = [(number, one) for number, one in enumerate(found.candidates, start=1)]
    real = [(number, one) for number, one in numbered if math.isfinite(one.seconds)]
    planned = [item for item in real if item[1].plan is not None]
    others = [item for item in real if item[1].plan is None]
    rest = others[_FIRST_CANDIDATES:]
    more = f" of {len(rest):,}" if len(rest) > _MOST_CANDIDATES else ""
    refused = [one for _, one in numbered if not math.isfinite(one.seconds)]
    return SearchView(
        name=topology.name,
        verdict=verdict,
        text=f"{found.considered:,} candidates were estimated in closed form and "
        f"{found.compiled:,} {_made(found)} in {format_seconds(found.seconds)} for "
        f"{describe_shape(topology)}.",
        compiles=topology.can_compile,
        first=[_ranked(*item) for item in (*planned, *others[:_FIRST_CANDIDATES])],
        rest=[_ranked(*item) for item in rest[:_MOST_CANDIDATES]],
        rest_words=f"{min(len(rest), _MOST_CANDIDATES):,}{more} more",
        refused=len(refused),
        reasons=_reasons(refused),
        plot=_plot_of(found),
    )


def _made(found: "Search") -> str:
    return "compiled" if found.topology.can_compile else "planned"


def _ranked(rank: int, one: "Candidate") -> Ranked:
    plan = one.plan
    fits = plan is not None and plan.fits
    timed = plan is not None and plan.time is not None
    estimates = estimates_of(plan) if plan is not None else None
    return Ranked(
        rank=rank,
        name=one.name,
        outcome=one.outcome,
        tone="better" if fits else "worse" if "fit" in one.outcome else "dim",
        seconds=format_seconds(one.seconds) if timed else "",
        estimate_seconds=format_seconds(one.estimate_seconds),
        bytes=format_bytes(one.bytes) if plan is not None else "",
        estimate_bytes=format_bytes(one.estimate_bytes),
        rate=estimates.rate if estimates else "–",
        mfu=estimates.mfu if estimates else "–",
    )


def _reasons(refused: "Sequence[Candidate]") -> list[tuple[str, str]]:
    """Returns why the strategies refused candidates, each reason once."""
    reasons: dict[str, int] = {}
    for one in refused:
        reasons[one.outcome] = reasons.get(one.outcome, 0) + 1
    listed = sorted(reasons.items(), key=lambda item: -item[1])[:_MOST_REASONS]
    return [(f"{count:,}", reason.removeprefix("refused: ")) for reason, count in listed]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns which points no other beats: less in one and no more in the other, in order of x."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front: list[int] = []
    for i in order:
        last = points[front[-1]] if front else (math.inf, math.inf)
        if points[i][1] < last[1] or points[i] == last:
            front.append(i)
    return front


class _Point(NamedTuple):
    """A candidate in the plot."""

    x: float
    y: float
    rank: int
    candidate: "Candidate"
    over: bool


class _Frame(NamedTuple):
    """The region of memory and step time that is drawn, and where."""

    right: float
    bottom: float
    top: float
    width: int = 760
    height: int = 380
    left: int = 62
    foot: int = 46
    head: int = 26

    @classmethod
    def around(cls, points: Sequence[_Point], limit: int) -> "_Frame":
        low, high = min(p.y for p in points), max(p.y for p in points)
        room = 0.1 * (high - low) or 0.2 * high
        right = 1.06 * max([limit, *(p.x for p in points)])
        return cls(right=right, bottom=max(0.0, low - 2 * room), top=high + room)

    def x(self, value: float) -> float:
        return self.left + (self.width - self.left - 16) * value / self.right

    def y(self, value: float) -> float:
        tall = self.height - self.foot - self.head
        return self.head + tall * (self.top - value) / (self.top - self.bottom)


@dataclass(frozen=True, slots=True)
class Dot:
    """A candidate in the plot.

    Attributes:
      x: Pixels from the left edge.
      y: Pixels from the top edge.
      kind: "compiled" or "estimated".
      over: Whether it is over the limit.
      radius: Pixels.
      title: The words on hover.
    """

    x: float
    y: float
    kind: str
    over: bool
    radius: float
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Memory of a device against the time of a step.

    Attributes:
      text: The meaning of dots and lines.
      frame: The region that is drawn.
      across: `(x, GiB)` of each tick.
      up: `(y, seconds)` of each tick.
      limit: `(x, size)` of the memory that a device has; None if that is not known.
      front: SVG path data of the line that joins what no other beats; may be empty.
      dots: Candidates from back to front.
      ranks: `(x, y, rank)` of the numbers beside dots.
    """

    text: str
    frame: _Frame
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    limit: tuple[float, str] | None
    front: str
    dots: list[Dot]
    ranks: list[tuple[float, float, int]]


def _plot_of(found: "Search") -> Plot | None:
    limit = found.topology.chip.core.limit
    points = [
        _Point(one.bytes, one.seconds, rank, one, _is_over(one, limit))
        for rank, one in enumerate(found.candidates, start=1)
        if math.isfinite(one.seconds) and one.bytes > 0
    ]
    if not points:
        return None
    drawn = _nearest(points, limit)
    frame = _Frame.around(drawn, limit)
    compiled = [p for p in drawn if _is_compiled(p.candidate)]
    of = compiled or [p for p in drawn if not p.over]
    front = [of[i] for i in pareto([(p.x, p.y) for p in of])]
    joined = f"{_made(found)} candidates" if compiled else "estimates"
    text = (
        f"Filled: {_made(found)}. Hollow: estimated in closed form alone. Red: over the limit. The "
        f"line joins {joined} that no other beats in both; numbers are ranks."
    )
    if missing := len(points) - len(drawn):
        text += f" {missing:,} slower or larger estimates are not drawn."
    line = "L".join(f"{frame.x(p.x):.1f} {frame.y(p.y):.1f}" for p in front)
    return Plot(
        text=text,
        frame=frame,
        across=[(frame.x(v * _GIB), f"{v:g}") for v in charts.ticks(0, frame.right / _GIB, 7)],
        up=[(frame.y(v), f"{v:g}") for v in charts.ticks(frame.bottom, frame.top, 6)],
        limit=(frame.x(limit), format_bytes(limit)) if limit else None,
        front=f"M{line}" if len(front) > 1 else "",
        # Those that were compiled lie on top.
        dots=[_dot(point, frame) for point in reversed(drawn)],
        ranks=list(_ranks(drawn, frame)),
    )


def _is_compiled(one: "Candidate") -> bool:
    return one.plan is not None and one.plan.fits


def _is_over(one: "Candidate", limit: int) -> bool:
    return not one.plan.fits if one.plan is not None else bool(limit) and one.bytes > limit


def _nearest(points: Sequence[_Point], limit: int) -> list[_Point]:
    """Leaves out what is far over the limit or far slower, as the rest would shrink to a spot."""
    compiled = [p for p in points if p.candidate.plan is not None]
    right = max([1.6 * limit, *(p.x for p in compiled)])
    top = max([3 * min(p.y for p in points), *(p.y for p in compiled)])
    inside = [p for p in points if (p.x <= right or not limit) and p.y <= top] or list(points)
    return sorted(inside, key=lambda p: (p.candidate.plan is None, p.y))[:_MOST_POINTS]


def _dot(point: _Point, frame: _Frame) -> Dot:
    one = point.candidate
    compiled = one.plan is not None
    return Dot(
        x=frame.x(point.x),
        y=frame.y(point.y),
        kind="compiled" if compiled else "estimated",
        over=point.over,
        radius=5.5 if compiled else 3.5,
        title=f"{point.rank}. {one.name}\n{one.outcome}\n"
        f"{format_seconds(point.y)}, {format_bytes(point.x)}",
    )


def _ranks(drawn: Sequence[_Point], frame: _Frame) -> Iterator[tuple[float, float, int]]:
    """Yields the numbers of compiled candidates, as far as there is room for them."""
    placed: list[tuple[float, float]] = []
    for point in sorted(drawn, key=lambda p: p.rank):
        x, y = frame.x(point.x) + 9, frame.y(point.y) - 7
        crowded = any(abs(x - a) < 16 and abs(y - b) < 13 for a, b in placed)
        if point.candidate.plan is None or crowded:
            continue
        placed.append((x, y))
        yield x, y, point.rank
