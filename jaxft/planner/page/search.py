"""The parts of a page that show a search: memory against step time, and the ranking."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner.page.parts import html_table, percent, section
from jaxft.planner.plan import describe_shape
from jaxft.reporting import charts

if TYPE_CHECKING:
    from jaxft.planner.search import Candidate, Search

_MOST_POINTS = 400
_MOST_CANDIDATES = 300
# Candidates that were not compiled and are still shown without a click.
_FIRST_CANDIDATES = 12


def search_section(found: "Search") -> str:
    """Returns what a search found: verdict, plot and ranking."""
    topology = found.topology
    text = (
        f"{found.considered:,} candidates were estimated in closed form and {found.compiled:,} "
        f"{_made(found)} in {format_seconds(found.seconds)} for {describe_shape(topology)}. "
    )
    best = found.best
    verdict = "None of them fits." if found.compiled else f"None was {_made(found)}."
    if best is not None:
        verdict = f"The best: {best.name}, {format_seconds(best.seconds)} a step by estimate."
    return (
        f'<h2 class="plan">Search on {escape(topology.name)}</h2>'
        f'<p class="remark"><b>{escape(verdict)}</b><br>{escape(text)}</p>'
        f"{_pareto_plot(found)}{_ranking(found)}"
    )


def _made(found: "Search") -> str:
    return "compiled" if found.topology.can_compile else "planned"


def _ranking(found: "Search") -> str:
    columns = [">#", "Candidate", "Outcome", ">Step, estimate", ">In closed form"]
    columns += [">Memory", ">In closed form", ">Tokens/s a chip", ">MFU"]
    numbered = [(number, one) for number, one in enumerate(found.candidates, start=1)]
    real = [(number, one) for number, one in numbered if math.isfinite(one.seconds)]
    first = [item for item in real if item[1].plan is not None]
    others = [item for item in real if item[1].plan is None]
    first += others[:_FIRST_CANDIDATES]
    rest = others[_FIRST_CANDIDATES:]
    content = html_table(columns, [_ranked(*item) for item in first], marks="ranked")
    if rest:
        more = f" of {len(rest):,}" if len(rest) > _MOST_CANDIDATES else ""
        rows = [_ranked(*item) for item in rest[:_MOST_CANDIDATES]]
        content += (
            f"<details><summary>{len(rows):,}{more} more</summary>"
            f"{html_table(columns, rows, marks='ranked')}</details>"
        )
    refused = [one for _, one in numbered if not math.isfinite(one.seconds)]
    text = (
        "Compiled steps and memory come from the program; columns “in closed form” are what was "
        "estimated before compiling."
        if found.topology.can_compile
        else "Nothing was compiled: all figures are estimates."
    )
    return section("Ranking", text, content + _refusals(refused))


def _ranked(number: int, one: "Candidate") -> list[str]:
    plan = one.plan
    speed = plan.speed if plan is not None else None
    fits = plan is not None and plan.fits
    tone = "better" if fits else "worse" if "fit" in one.outcome else "dim"
    timed = plan is not None and plan.time is not None
    return [
        str(number),
        escape(one.name),
        f'<span class="{tone}">{escape(one.outcome)}</span>',
        f"<b>{format_seconds(one.seconds)}</b>" if timed else "–",
        format_seconds(one.estimate_seconds),
        f"<b>{format_bytes(one.bytes)}</b>" if plan is not None else "–",
        format_bytes(one.estimate_bytes),
        f"{speed.tokens_per_second_per_chip:,.0f}" if speed else "–",
        percent(speed.mfu, 1) if speed else "–",
    ]


def _refusals(refused: "Sequence[Candidate]") -> str:
    """Returns why the strategies refused candidates, each reason once."""
    reasons: dict[str, int] = {}
    for one in refused:
        reasons[one.outcome] = reasons.get(one.outcome, 0) + 1
    if not reasons:
        return ""
    listed = sorted(reasons.items(), key=lambda item: -item[1])[:20]
    rows = [[f"{count:,}", escape(reason.removeprefix("refused: "))] for reason, count in listed]
    return (
        f"<details><summary>{len(refused):,} refused</summary>"
        f"{html_table(['>Candidates', 'Reason'], rows)}</details>"
    )


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


def _pareto_plot(found: "Search") -> str:
    limit = found.topology.chip.core.limit
    points = [
        _Point(one.bytes, one.seconds, rank, one, _is_over(one, limit))
        for rank, one in enumerate(found.candidates, start=1)
        if math.isfinite(one.seconds) and one.bytes > 0
    ]
    if not points:
        return ""
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
    svg = _plot(drawn, front, frame, limit)
    return section(
        "Memory against step time", text, f'<div class="scroll">{svg}</div>', estimate=True
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


def _plot(drawn: Sequence[_Point], front: Sequence[_Point], frame: _Frame, limit: int) -> str:
    shapes = [*_grid(frame)]
    if limit:
        x = frame.x(limit)
        shapes.append(
            f'<path class="limit" d="M{x:.1f} {frame.head}V{frame.height - frame.foot}"/>'
            f'<text class="limit" x="{x:.1f}" y="{frame.head - 9}">limit '
            f"{format_bytes(limit)}</text>"
        )
    if len(front) > 1:
        line = "L".join(f"{frame.x(p.x):.1f} {frame.y(p.y):.1f}" for p in front)
        shapes.append(f'<path class="front" d="M{line}"/>')
    # Those that were compiled lie on top.
    shapes += [_dot(point, frame) for point in reversed(drawn)]
    shapes += _ranks(drawn, frame)
    return (
        f'<svg class="pareto" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="Memory of a device against step time">{"".join(shapes)}</svg>'
    )


def _grid(frame: _Frame) -> Iterator[str]:
    foot = frame.height - frame.foot
    gib = 1 << 30
    for value in charts.ticks(0.0, frame.right / gib, 7):
        x = frame.x(value * gib)
        yield f'<text class="x" x="{x:.1f}" y="{foot + 17}">{value:g}</text>'
    for value in charts.ticks(frame.bottom, frame.top, 6):
        y = frame.y(value)
        yield (
            f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.width - 16}"/>'
            f'<text class="y" x="{frame.left - 8}" y="{y + 4:.1f}">{value:g}</text>'
        )
    middle, foot = frame.width / 2, frame.height - 8
    yield f'<text class="x" x="{middle}" y="{foot}">memory of a device, GiB</text>'
    yield f'<text x="4" y="{frame.head - 9}">step, s</text>'


def _dot(point: _Point, frame: _Frame) -> str:
    one = point.candidate
    names = [
        "dot",
        "compiled" if one.plan is not None else "estimated",
        "over" if point.over else "",
    ]
    title = (
        f"{point.rank}. {one.name}\n{one.outcome}\n"
        f"{format_seconds(point.y)}, {format_bytes(point.x)}"
    )
    return (
        f'<circle class="{" ".join(filter(None, names))}" cx="{frame.x(point.x):.1f}" '
        f'cy="{frame.y(point.y):.1f}" r="{5.5 if one.plan is not None else 3.5}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _ranks(drawn: Sequence[_Point], frame: _Frame) -> Iterator[str]:
    """Yields the numbers of compiled candidates, as far as there is room for them."""
    placed: list[tuple[float, float]] = []
    for point in sorted(drawn, key=lambda p: p.rank):
        x, y = frame.x(point.x) + 9, frame.y(point.y) - 7
        crowded = any(abs(x - a) < 16 and abs(y - b) < 13 for a, b in placed)
        if point.candidate.plan is None or crowded:
            continue
        placed.append((x, y))
        yield f'<text class="rank" x="{x:.1f}" y="{y:.1f}">{point.rank}</text>'
