"""The timeline of a step as a page shows it: to scale, its lanes under one another."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxft.formatting import format_seconds
from jaxft.planner import timeline as lanes
from jaxft.planner.page.parts import Share, css_class, percent, shares
from jaxft.planner.plan import Plan
from jaxft.planner.timeline import Loop, Span, Timeline
from jaxft.reporting import charts

_LANES = (lanes.CORE, lanes.ICI, lanes.DCN, lanes.TO_HOST, lanes.COPY, lanes.SPARSE)
_LANE_NAMES = {
    lanes.ICI: "links within a slice",
    lanes.DCN: "network between slices",
    lanes.TO_HOST: "way to the host",
    lanes.COPY: "copies between memories",
    lanes.SPARSE: "SparseCore",
}
# A timeline is this many pixels wide on a screen; what is narrower is joined.
_PIXELS = 1000
_MOST_BLOCKS = 300
# Things that run at once on one lane get rows of their own: both ways to the host, both directions
# of a link.
_MOST_ROWS = 3
_MOST_LOOPS = 3


@dataclass(frozen=True, slots=True)
class Block:
    """A box on a lane: a span, or several that are drawn as one.

    Attributes:
      classes: Names that colour it.
      left: Start in per cent of the track.
      width: Length in per cent of the track.
      title: The words on hover.
      label: The text in it; empty where there is no room.
    """

    classes: str
    left: float
    width: float
    title: str
    label: str


@dataclass(frozen=True, slots=True)
class LoopBlock:
    """A loop on one lane.

    Attributes:
      left: Start in per cent of the track.
      width: Length in per cent of the track.
      title: The words on hover.
      fill: `(classes, height in per cent)` of each kind that takes time in one run.
    """

    left: float
    width: float
    title: str
    fill: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a lane; things that run at once on a lane have rows of their own.

    Attributes:
      lane: Name of the lane; empty below its first row.
      title: The name in words.
      blocks: The spans of the row.
      loops: The loops that use the lane.
    """

    lane: str
    title: str
    blocks: list[Block]
    loops: list[LoopBlock]


@dataclass(frozen=True, slots=True)
class LoopName:
    """The name of a loop above the lanes.

    Attributes:
      left: Start of the loop in per cent of the track.
      width: Length in per cent of the track.
      words: The number of runs, their phase, and the time of one run.
      shown: The part of these words that there is room for.
    """

    left: float
    width: float
    words: str
    shown: str


@dataclass(frozen=True, slots=True)
class Track:
    """A timeline to scale.

    Attributes:
      title: The name of the part of the step.
      names: Names of loops.
      rows: The lanes.
      ticks: Times along the axis.
    """

    title: str
    names: list[LoopName]
    rows: list[Row]
    ticks: list[charts.Tick]


@dataclass(frozen=True, slots=True)
class TimelinePicture:
    """A step as it was scheduled.

    Attributes:
      lanes: `(name, shares)` of each lane that is used: its seconds by kind.
      tracks: The whole step, and one run of each of its longest loops.
    """

    lanes: list[tuple[str, list[Share]]]
    tracks: list[Track]


def timeline_of(plan: Plan) -> TimelinePicture | None:
    """Draws the step of a plan; returns None if its timeline is not known."""
    step = plan.timeline
    if step is None or not step.seconds:
        return None
    tracks = [_track(step, "The whole step")]
    tracks += [_iteration(loop, times, step.seconds) for loop, times in _longest(step)]
    return TimelinePicture(list(_by_lane(step)), tracks)


def _by_lane(step: Timeline) -> Iterator[tuple[str, list[Share]]]:
    """Yields the seconds of each lane by kind, most first."""
    sums: dict[str, dict[str, float]] = {}
    for span, times in step.every():
        kinds = sums.setdefault(span.lane, {})
        kinds[span.kind] = kinds.get(span.kind, 0.0) + span.seconds * times
    for lane in _LANES:
        kinds = dict(sorted(sums.get(lane, {}).items(), key=lambda item: -item[1]))
        if found := shares(kinds, whole=step.seconds, form=format_seconds):
            yield lane, found


def _longest(step: Timeline) -> list[tuple[Loop, int]]:
    """Returns the loops in which most of the step passes, and how often each of them runs."""
    found = list(_loops(step, 1))
    by_time = sorted(found, key=lambda item: -item[1] * item[0].trips * item[0].body.seconds)
    chosen = [
        item
        for item in by_time[:_MOST_LOOPS]
        if item[1] * item[0].trips * item[0].body.seconds > 0.02 * step.seconds
    ]
    return [item for item in found if item in chosen]


def _loops(timeline: Timeline, times: int) -> Iterator[tuple[Loop, int]]:
    for loop in timeline.loops:
        if loop.trips > 1:
            yield loop, times
        yield from _loops(loop.body, times * loop.trips)


def _iteration(loop: Loop, times: int, whole: float) -> Track:
    phase = _phase(loop)
    seconds = loop.body.seconds
    often = f"{times:,} × {loop.trips:,}" if times > 1 else f"{loop.trips:,}"
    loop_of = f"{phase} loop" if phase else "loop"
    title = (
        f"One of {often} runs of the {loop_of}: {format_seconds(seconds)}, "
        f"{percent(seconds * loop.trips * times / whole)} of the step in all"
    )
    return _track(loop.body, title)


def _phase(loop: Loop) -> str:
    """Names a loop by what most of the core's work in it was traced from."""
    backward = forward = 0.0
    for span, times in loop.body.every():
        if span.lane == lanes.CORE and "transpose(" in span.origin:
            backward += span.seconds * times
        elif span.lane == lanes.CORE and "jvp(" in span.origin:
            forward += span.seconds * times
    if backward == forward:
        return ""
    return "backward" if backward > forward else "forward"


def _track(timeline: Timeline, title: str) -> Track:
    """Draws one timeline, its lanes under one another."""
    flat = _inlined(timeline)
    rows = []
    for lane in _LANES:
        spans = [span for span in flat.spans if span.lane == lane and span.seconds > 0]
        found = (_loop_block(loop, lane, flat.seconds) for loop in flat.loops)
        loops = [block for block in found if block is not None]
        for number, row in enumerate(_packed(spans) or ([[]] if loops else [])):
            blocks = [_block(block, flat.seconds) for block in _merged(row, flat.seconds)]
            first = number == 0
            title_of = _LANE_NAMES.get(lane, lane)
            rows.append(Row(lane if first else "", title_of, blocks, loops if first else []))
    return Track(title, list(_loop_names(flat)), rows, list(_ticks(flat.seconds)))


def _inlined(timeline: Timeline, start: float = 0.0) -> Timeline:
    """Returns a timeline in which bodies that run once are part of what they are in."""
    spans = [dataclasses.replace(span, start=start + span.start) for span in timeline.spans]
    loops = []
    for loop in timeline.loops:
        if loop.trips == 1:
            inner = _inlined(loop.body, start + loop.start)
            spans += inner.spans
            loops += inner.loops
        else:
            loops.append(dataclasses.replace(loop, start=start + loop.start))
    return Timeline(timeline.seconds, tuple(spans), tuple(loops))


def _packed(spans: Sequence[Span]) -> list[list[Span]]:
    """Puts spans that run at once into rows of their own, as far as there are rows."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start):
        # Starts and ends are sums of the same numbers in another order.
        free = [row for row in rows if _end(row[-1]) <= span.start + 1e-6 * span.seconds + 1e-12]
        if free:
            free[0].append(span)
        elif len(rows) < _MOST_ROWS:
            rows.append([span])
        else:
            rows[-1].append(span)
    return rows


def _end(span: Span) -> float:
    return span.start + span.seconds


def _merged(spans: Sequence[Span], whole: float) -> list[list[Span]]:
    """Joins neighbours that could not be told apart on a screen."""
    least = whole / _PIXELS
    while len(blocks := _neighbours(spans, least)) > _MOST_BLOCKS:
        least *= 2
    return blocks


def _neighbours(spans: Sequence[Span], least: float) -> list[list[Span]]:
    blocks: list[list[Span]] = []
    for span in spans:
        block = blocks[-1] if blocks else []
        joins = (
            bool(block)
            and span.seconds < least
            and block[0].seconds < least
            and span.start - _end(block[-1]) < least
            and (span.kind == block[0].kind or _end(span) - block[0].start <= least)
        )
        if joins:
            block.append(span)
        else:
            blocks.append([span])
    return blocks


def _block(spans: Sequence[Span], whole: float) -> Block:
    """Draws one span, or several as one."""
    start, end = spans[0].start, max(_end(span) for span in spans)
    first = max(spans, key=lambda span: span.seconds)
    seconds = format_seconds(sum(span.seconds for span in spans))
    title = f"{first.kind} {seconds}\n{first.name}"
    if first.origin:
        title += f"\n{_origin(first.origin)}"
    if len(spans) > 1:
        title = f"{len(spans)} instructions {seconds}, the longest {title}"
    return Block(
        classes=css_class(first.kind),
        left=100 * start / whole,
        width=100 * (end - start) / whole,
        title=title,
        label=first.kind if end - start > 0.07 * whole else "",
    )


def _origin(origin: str) -> str:
    text = origin.replace("\\'", "'").removeprefix("jit(step)/").replace("eval_jaxpr/", "")
    return text if len(text) <= 120 else f"{text[:50]} … {text[-65:]}"


def _loop_block(loop: Loop, lane: str, whole: float) -> LoopBlock | None:
    """Draws a loop on one lane, filled in proportion with what the lane does in one run."""
    sums: dict[str, float] = {}
    for span, times in loop.body.every():
        if span.lane == lane:
            sums[span.kind] = sums.get(span.kind, 0.0) + span.seconds * times
    busy, each = sum(sums.values()), loop.body.seconds
    if not busy or not each:
        return None
    # Both ways of a lane may be busy at once; it is full then.
    room = max(each, busy)
    parts = sorted(sums.items(), key=lambda item: (item[0].startswith(lanes.WAIT), -item[1]))
    kinds = ", ".join(f"{kind} {percent(size / each)}" for kind, size in parts)
    return LoopBlock(
        left=100 * loop.start / whole,
        width=100 * loop.trips * each / whole,
        title=f"{_loop_words(loop)}\n{lane}: {kinds}",
        fill=[(css_class(kind), 100 * size / room) for kind, size in parts if size > 0.001 * room],
    )


def _loop_words(loop: Loop) -> str:
    each = format_seconds(loop.body.seconds)
    return f"×{loop.trips:,} {_phase(loop)}".rstrip() + f", {each} each"


def _loop_names(timeline: Timeline) -> Iterator[LoopName]:
    whole = timeline.seconds
    for loop in timeline.loops:
        seconds, words = loop.trips * loop.body.seconds, _loop_words(loop)
        if seconds < 0.03 * whole:
            continue
        shown = words if seconds > 0.16 * whole else f"×{loop.trips:,}"
        yield LoopName(100 * loop.start / whole, 100 * seconds / whole, words, shown)


def _ticks(seconds: float) -> Iterator[charts.Tick]:
    size, unit = next(
        ((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs")
    )
    marks = charts.ticks(0.0, seconds / size, 6)
    for mark in marks:
        text = f"{mark:g} {unit}" if mark == marks[-1] else f"{mark:g}"
        yield charts.Tick(100 * mark * size / seconds, text)
