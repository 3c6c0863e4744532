"""The parts of a page that show a step: its timeline, where the time goes, its collectives."""

import dataclasses
from collections.abc import Iterator, Sequence
from html import escape

from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner import timeline as lanes
from jaxft.planner.page.parts import (
    Share,
    css_class,
    css_number,
    html_table,
    legend,
    percent,
    section,
    some_percent,
    stacked_bar,
)
from jaxft.planner.plan import Plan, StepTime
from jaxft.planner.show import network_name
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
# A timeline is this many pixels wide on a screen; what is narrower is put together.
_PIXELS = 1000
_MOST_BLOCKS = 300
# Things that run at once on one lane get rows of their own: both ways to the host, both directions
# of a link.
_MOST_ROWS = 3
_MOST_LOOPS = 3


def timeline_section(plan: Plan) -> str:
    """Returns the step as it was scheduled, and one run of its longest loops."""
    step = plan.timeline
    if step is None or not step.seconds:
        return ""
    text = (
        "The compiled program in the order in which it was scheduled. Loops are blocks: their "
        "colours show in proportion what the core does in them and, on other lanes, how long these "
        "are busy, not when. What runs below the core's own work costs no time; hatched is waiting."
    )
    pictures = [_track(step, "The whole step")]
    pictures += [_iteration(loop, times, step.seconds) for loop, times in _longest(step)]
    cards = _kinds(step) + "".join(pictures)
    return section("Timeline of a step", text, f'<div class="card">{cards}</div>', estimate=True)


def _kinds(step: Timeline) -> str:
    """Returns the legend of the timeline: seconds by what the core does, and by lane and kind."""
    sums: dict[tuple[str, str], float] = {}
    for span, times in step.every():
        key = span.lane, span.kind
        sums[key] = sums.get(key, 0.0) + span.seconds * times
    legends = []
    for lane in _LANES:
        shares = [Share(kind, size) for (at, kind), size in sums.items() if at == lane]
        shares.sort(key=lambda share: -share.size)
        if any(share.size > 0 for share in shares):
            keys = legend(shares, step.seconds, format_seconds)
            legends.append(f'<div class="row"><b>{escape(lane)}</b>{keys}</div>')
    return f'<div class="lanes">{"".join(legends)}</div>'


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


def _iteration(loop: Loop, times: int, whole: float) -> str:
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


def _track(timeline: Timeline, title: str) -> str:
    """Returns one timeline to scale, its lanes under one another."""
    flat = _inlined(timeline)
    rows = []
    for lane in _LANES:
        spans = [span for span in flat.spans if span.lane == lane and span.seconds > 0]
        blocks = [_loop_block(loop, lane, flat.seconds) for loop in flat.loops]
        packed = _packed(spans) or ([[]] if any(blocks) else [])
        for number, row in enumerate(packed):
            drawn = "".join(_block(block, flat.seconds) for block in _merged(row, flat.seconds))
            drawn += "".join(blocks) if number == 0 else ""
            name = f'<b title="{escape(_LANE_NAMES.get(lane, lane))}">{lane}</b>'
            rows.append(
                f'<div class="row"><b></b><div class="lane">{drawn}</div></div>'
                if number
                else f'<div class="row">{name}<div class="lane {lane}">{drawn}</div></div>'
            )
    return (
        f'<div class="track" role="img" aria-label="{escape(title)}"><h4>{escape(title)}</h4>'
        f'<div class="wide">{_loop_names(flat)}{"".join(rows)}{_axis(flat.seconds)}</div></div>'
    )


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
    """Puts neighbours together that could not be told apart on a screen."""
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


def _block(spans: Sequence[Span], whole: float) -> str:
    """Returns the box of one span, or of several that are drawn as one."""
    start, end = spans[0].start, max(_end(span) for span in spans)
    first = max(spans, key=lambda span: span.seconds)
    seconds = format_seconds(sum(span.seconds for span in spans))
    title = f"{first.kind} {seconds}\n{first.name}"
    if first.origin:
        title += f"\n{_origin(first.origin)}"
    if len(spans) > 1:
        title = f"{len(spans)} instructions {seconds}, the longest {title}"
    label = f"<u>{escape(first.kind)}</u>" if end - start > 0.07 * whole else ""
    return (
        f'<i class="{css_class(first.kind)}" style="{_place(start, end - start, whole)}" '
        f'title="{escape(title)}">{label}</i>'
    )


def _origin(origin: str) -> str:
    text = origin.replace("\\'", "'").removeprefix("jit(step)/").replace("eval_jaxpr/", "")
    return text if len(text) <= 120 else f"{text[:50]} … {text[-65:]}"


def _place(start: float, seconds: float, whole: float) -> str:
    return f"left:{css_number(100 * start / whole)}%;width:{css_number(100 * seconds / whole)}%"


def _loop_block(loop: Loop, lane: str, whole: float) -> str:
    """Returns a loop on one lane, filled in proportion with what the lane does in one run."""
    sums: dict[str, float] = {}
    for span, times in loop.body.every():
        if span.lane == lane:
            sums[span.kind] = sums.get(span.kind, 0.0) + span.seconds * times
    busy, each = sum(sums.values()), loop.body.seconds
    if not busy or not each:
        return ""
    # Both ways of a lane may be busy at once; it is full then.
    room = max(each, busy)
    parts = sorted(sums.items(), key=lambda item: (item[0].startswith(lanes.WAIT), -item[1]))
    fill = "".join(
        f'<i class="{css_class(kind)}" style="height:{css_number(100 * size / room)}%"></i>'
        for kind, size in parts
        if size > 0.001 * room
    )
    shares = ", ".join(f"{kind} {percent(size / each)}" for kind, size in parts)
    title = f"{_loop_words(loop)}\n{lane}: {shares}"
    return (
        f'<span class="loop" style="{_place(loop.start, loop.trips * each, whole)}" '
        f'title="{escape(title)}">{fill}</span>'
    )


def _loop_words(loop: Loop) -> str:
    each = format_seconds(loop.body.seconds)
    return f"×{loop.trips:,} {_phase(loop)}".rstrip() + f", {each} each"


def _loop_names(timeline: Timeline) -> str:
    names, whole = "", timeline.seconds
    for loop in timeline.loops:
        seconds, words = loop.trips * loop.body.seconds, _loop_words(loop)
        if seconds < 0.03 * whole:
            continue
        shown = words if seconds > 0.16 * whole else f"×{loop.trips:,}"
        names += (
            f'<span style="{_place(loop.start, seconds, whole)}" title="{escape(words)}">'
            f"{escape(shown)}</span>"
        )
    return f'<div class="row"><b></b><div class="names">{names}</div></div>' if names else ""


def _axis(seconds: float) -> str:
    size, unit = next(
        ((size, unit) for size, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs")
    )
    marks = charts.ticks(0.0, seconds / size, 6)
    labels = "".join(
        f'<span style="left:{css_number(100 * mark * size / seconds)}%">{mark:g}'
        f"{' ' + unit if mark == marks[-1] else ''}</span>"
        for mark in marks
    )
    return f'<div class="row"><b></b><div class="axis">{labels}</div></div>'


def time_section(plan: Plan) -> str:
    """Returns what the core does in a step, and what each resource needs on its own."""
    time = plan.time
    if time is None or not time.seconds:
        return ""
    spent = [Share(kind, size) for kind, size in time.spent.items()]
    spent.sort(key=lambda share: -share.size)
    bar = stacked_bar(spent, time.seconds, format_seconds)
    bar += legend(spent, time.seconds, format_seconds)
    cycles = ""
    if time.by_cycles:
        cycles = (
            f'<p class="held">By the compiler\'s own cycles of matrix products a step would take '
            f"{format_seconds(time.by_cycles)}.</p>"
        )
    title = f"What the core does, most first; adds up to the step, {format_seconds(time.seconds)}"
    content = (
        f'<div class="card"><h4>{title}</h4>{bar}'
        f"<h4>What each resource needs on its own</h4>{_terms(time)}{cycles}</div>"
    )
    return section("Where the time goes", "", content, estimate=True)


def _terms(time: StepTime) -> str:
    terms = {name: size for name, size in time.terms.items() if size > 0}
    whole = max(time.seconds, *terms.values(), 0.0)
    rows = "".join(
        f'<div class="row"><b>{escape(name)}</b><div class="term"><i style="width:'
        f'{css_number(100 * size / whole)}%"></i><span>{format_seconds(size)} '
        f"<small>{some_percent(size / time.seconds)}</small></span></div></div>"
        for name, size in terms.items()
    )
    return f'<div class="terms">{rows}</div>'


def collectives_section(plan: Plan) -> str:
    """Returns a table of what a device exchanges in a step."""
    if not plan.exchanges:
        return ""
    rows = [
        [
            f"<b>{escape(one.kind)}</b>",
            escape(", ".join(one.axes)) or "–",
            escape(network_name(plan.topology.chip, one.network)),
            f"{'' if one.exact else 'at least '}{one.count:,}" if one.count else "–",
            format_bytes(one.bytes),
            format_bytes(one.wire_bytes),
            format_seconds(one.seconds),
            percent(one.overlapped),
        ]
        for one in plan.exchanges
    ]
    columns = ["Collective", "Mesh axes", "Network", ">Count", ">Payload", ">Sent in rings"]
    columns += [">Time, estimate", ">Overlapped, estimate"]
    text = (
        "In one step, for each device. Overlapped is the share of the time in which the core has "
        "other work."
    )
    estimated = plan.source != "compiled"
    return section("Collectives", text, html_table(columns, rows), estimate=estimated)
