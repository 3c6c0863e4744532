"""Writes a page with pictures of plans: memory, the step's timeline, exchange, mesh and searches.

One file that needs no network and no script, with the details on hover. Estimates are marked.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxft import charts
from jaxft.chips import Switch
from jaxft.config import RunConfig, to_dict, walk
from jaxft.errors import ConfigError
from jaxft.planner import timeline as lanes
from jaxft.planner.plan import Plan, StepTime, describe_shape
from jaxft.planner.show import flag, format_seconds
from jaxft.planner.timeline import Loop, Span, Timeline
from jaxft.report import page, short_name, tile
from jaxft.sharding.rules import load_strategy
from jaxft.shardings import format_bytes
from jaxft.workdir import write_text

if TYPE_CHECKING:
    from jaxft.planner.search import Candidate, Search

# What the compiled program states; the rest of the memory is split by its schedule.
_FACTS = ("parameters", "optimizer", "program")
# Of a program that does not fit only its arguments and gradients are known.
_FACTS_WITHOUT_PROGRAM = ("parameters", "optimizer", "gradients")
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
_MOST_DEVICES = 1024
_MOST_COLUMNS = 64
_MOST_POINTS = 400
_MOST_CANDIDATES = 300
# Candidates that were not compiled and are still shown without a click.
_FIRST_CANDIDATES = 12


def write_page(file: str, plans: Sequence[Plan], searches: "Sequence[Search]" = ()) -> Path:
    """Writes the page and returns its path.

    Args:
      file: Where.
      plans: One section each; several are compared first.
      searches: One section each.

    Raises:
      TrainingError: If the file cannot be written.
    """
    sections = [_comparison(plans)] if len(plans) > 1 else []
    sections += [_search(found) for found in searches]
    for number, plan in enumerate(plans, start=1):
        sections += _sections(number, plan)
    sections.append(_versions())
    path = Path(file)
    write_text(path, page(_title(plans), _subtitle(plans), sections, style=_STYLE))
    return path


def _title(plans: Sequence[Plan]) -> str:
    models = dict.fromkeys(short_name(plan.model) for plan in plans)
    return f"Plan of {', '.join(models)}" if len(models) in (1, 2) else "Plans"


def _subtitle(plans: Sequence[Plan]) -> str:
    if any(plan.source == "compiled" for plan in plans):
        return (
            "Nothing was run. Memory and collectives are what the compiled program says; "
            "<b>times, and all that follows from them, are estimates</b>."
        )
    return "Nothing was run. <b>All figures are estimates.</b>"


def _sections(number: int, plan: Plan) -> Iterator[str]:
    heading = f"{_model(plan)}: {escape(plan.strategy)} on {escape(plan.topology.name)}"
    yield f'<h2 class="plan" id="plan-{number}">{heading}</h2>'
    yield _tiles(plan)
    yield _notes(plan)
    yield _memory(plan)
    yield _remedies(plan)
    yield _timeline(plan)
    yield _time(plan)
    yield _exchanges(plan)
    yield _mesh(plan)
    yield _evaluation(plan)
    yield _configuration(plan)


def _part(title: str, text: str, content: str, *, estimate: bool = False) -> str:
    mark = ' <span class="estimate">estimate</span>' if estimate else ""
    note = f'<p class="dim">{text}</p>' if text else ""
    return f'<section><h3 class="part">{escape(title)}{mark}</h3>{note}{content}</section>'


def _model(plan: Plan) -> str:
    return escape(short_name(plan.model))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, marks: str = "") -> str:
    """Returns a table of cells of HTML; columns that begin with `>` are of numbers.

    Args:
      columns: Their heads.
      rows: Of the body.
      marks: Classes of the table.
    """
    classes = [' class="n"' if column.startswith(">") else "" for column in columns]
    head = "".join(
        f"<th{name}>{escape(column.removeprefix('>'))}"
        for name, column in zip(classes, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{name}>{cell}" for name, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{marks}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _some_percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.005 else _percent(share)


def _interval(time: StepTime) -> str:
    low, high = format_seconds(time.low), format_seconds(time.high)
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"


def _fits(plan: Plan) -> str:
    """Returns by how much a plan fits, or does not, in words."""
    memory = plan.memory
    if not memory.limit:
        return "limit not known"
    size = format_bytes(abs(memory.headroom))
    return f"fits, {size} left" if memory.fits else f"does not fit, by {size}"


def _mesh_words(plan: Plan) -> str:
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return " × ".join(axes) or "one device"


def _money(amount: float, currency: str) -> str:
    return f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.3g} {currency}"


def _comparison(plans: Sequence[Plan]) -> str:
    columns = ["Model", "Slice", "Strategy and mesh", "Memory of a device"]
    columns += [">Step", ">Tokens/s a chip", ">MFU", ">A million tokens"]
    rows = [_compared(number, plan) for number, plan in enumerate(plans, start=1)]
    note = "Steps and what follows from them are estimates; MFU counts each visible pair once."
    return (
        f'<section><h2>Comparison</h2><p class="dim">{note}</p>'
        f"{_table(columns, rows, marks='compared')}</section>"
    )


def _compared(number: int, plan: Plan) -> list[str]:
    memory, time, speed = plan.memory, plan.time, plan.speed
    limit = format_bytes(memory.limit) if memory.limit else "?"
    step, rate, mfu, price = ("–",) * 4
    if time is not None:
        step = f"<b>{format_seconds(time.seconds)}</b><br><small>{_interval(time)}</small>"
    if speed is not None:
        rate = f"<b>{speed.tokens_per_second_per_chip:,.0f}</b>"
        mfu = _percent(speed.mfu, 1)
        if speed.price_per_hour:
            price = _money(speed.price_per_million_tokens, speed.currency)
    return [
        f'<a href="#plan-{number}"><b>{_model(plan)}</b></a>',
        escape(plan.topology.name),
        f"{escape(plan.strategy)}<br><small>{escape(_mesh_words(plan))}</small>",
        f'<span class="{"better" if plan.fits else "worse"}">{_fits(plan)}</span>'
        f"<br><small>{format_bytes(memory.used)} / {limit}</small>",
        *(step, rate, mfu, price),
    ]


def _tiles(plan: Plan) -> str:
    memory, topology = plan.memory, plan.topology
    verdict, _, margin = _fits(plan).partition(", ")
    of = f" of {format_bytes(memory.limit)}" if memory.limit else ""
    note = f"{margin}: " if margin else ""
    source = ", an estimate" if plan.source != "compiled" else ""
    fits = tile(
        "Memory", verdict.capitalize(), f"{note}{format_bytes(memory.used)}{of}{source}", lead=True
    )
    names = [describe_shape(topology), topology.sold_as and f"sold as {topology.sold_as}"]
    if topology.device_count != topology.chips:
        names.append(f"{topology.device_count:,} devices")
    boxes = [
        fits if plan.fits else fits.replace('class="tile', 'class="tile bad'),
        *_speed_tiles(plan),
        tile("Parameters", _short(plan.parameters), f"{plan.parameters:,}"),
        tile("Chips", f"{topology.chips:,}", ", ".join(filter(None, names))),
    ]
    return f'<section class="tiles">{"".join(boxes)}</section>'


def _speed_tiles(plan: Plan) -> Iterator[str]:
    time, speed = plan.time, plan.speed
    if time is None:
        return
    yield tile("Step time", format_seconds(time.seconds), f"estimate, {_interval(time)}", lead=True)
    if speed is None:
        return
    rate = f"estimate, {speed.tokens_per_second:,.0f} of all chips"
    yield tile("Tokens/s a chip", f"{speed.tokens_per_second_per_chip:,.0f}", rate)
    full = f"estimate, attention once a visible pair; {_percent(speed.mfu_full, 1)} in full"
    yield tile("MFU", _percent(speed.mfu, 1), full)
    if not speed.price_per_hour:
        yield tile("A million tokens", "–", "no price of this chip is known")
        return
    hourly = _money(speed.price_per_hour, speed.currency)
    yield tile(
        "A million tokens",
        _money(speed.price_per_million_tokens, speed.currency),
        f"estimate, {hourly} an hour by the price of {speed.priced}",
    )


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def _notes(plan: Plan) -> str:
    return "".join(f'<p class="remark">{escape(note)}</p>' for note in plan.notes)


class _Share(NamedTuple):
    """A part of a bar."""

    name: str
    size: float


def _bar(shares: Sequence[_Share], whole: float, form: Any, *, over: str = "") -> str:
    """Returns a stacked bar whose widths are shares of `whole`.

    Args:
      shares: From left to right.
      whole: What the full width stands for.
      form: Turns a size into words.
      over: HTML that lies over it.
    """
    parts = "".join(
        f'<i class="{_class(share.name)}" style="width:{_number(100 * share.size / whole)}%" '
        f'title="{escape(share.name)} {form(share.size)}"></i>'
        for share in shares
        if share.size > 0
    )
    return f'<div class="bar">{parts}{over}</div>'


def _legend(shares: Iterable[_Share], whole: float, form: Any) -> str:
    keys = "".join(
        f'<span><i class="{_class(share.name)}"></i>{escape(share.name)} <b>{form(share.size)}</b> '
        f"{_some_percent(share.size / whole)}</span>"
        for share in shares
        if share.size > 0
    )
    return f'<div class="keys">{keys}</div>'


def _class(kind: str) -> str:
    """Returns the class that colours a kind; all waits look alike."""
    return "k wait" if kind.startswith(lanes.WAIT) else f"k k-{_slug(kind)}"


def _slug(kind: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in kind)


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _memory(plan: Plan) -> str:
    memory = plan.memory
    kinds = {kind: size for kind, size in memory.kinds.items() if size > 0}
    known = _FACTS if plan.fits else _FACTS_WITHOUT_PROGRAM
    facts = [_Share(kind, kinds[kind]) for kind in known if kind in kinds]
    rest = [_Share(kind, size) for kind, size in kinds.items() if kind not in known]
    whole = max(memory.limit, memory.used, sum(kinds.values()), 1)
    bar = _bar([*facts, *rest], whole, format_bytes, over=_limit(plan, whole))
    used = f"{format_bytes(memory.used)} used"
    host = ""
    if memory.host:
        width = _number(min(100.0, 100 * memory.host / whole))
        cut = " cut" if memory.host > whole else ""
        note = ", longer than drawn" if cut else ""
        host = (
            f'<div class="row"><b>host</b><div class="bar host{cut}"><i class="k k-host" '
            f'style="width:{width}%" title="host {format_bytes(memory.host)}"><u>'
            f"{format_bytes(memory.host)} of the host's memory for this device{note}</u></i>"
            "</div></div>"
        )
    picture = (
        f'<div class="card memory"><div class="row"><b>device</b><div>{_limit_label(plan, whole)}'
        f"{bar}</div></div>{host}{_memory_legend(plan, facts, rest)}</div>"
    )
    return _part("Memory of one device", f"{used}; {_fits(plan)}.", picture)


def _memory_legend(plan: Plan, facts: list[_Share], rest: list[_Share]) -> str:
    used = max(plan.memory.used, 1)
    if plan.source != "compiled":
        return "<h4>Estimates</h4>" + _legend([*facts, *rest], used, format_bytes)
    names = ", ".join(share.name for share in facts)
    first = f"Facts of the compiled program, as is the total: {names}"
    second = "Split by the schedule at its fullest moment, scaled to the compiler's sum"
    if not plan.fits:
        first = f"Known without a program: {names}; the compiler says the total"
        second = "The rest, which the compiler does not split"
    return (
        f"<h4>{first}</h4>{_legend(facts, used, format_bytes)}"
        f"<h4>{second}</h4>{_legend(rest, used, format_bytes)}"
    )


def _limit(plan: Plan, whole: float) -> str:
    """Marks what is left, or what is over the limit."""
    memory = plan.memory
    if not memory.limit:
        return ""
    at = 100 * memory.limit / whole
    if memory.fits:
        width = _number(100 * memory.headroom / whole)
        return (
            f'<span class="left" style="width:{width}%" '
            f'title="{format_bytes(memory.headroom)} left"></span>'
        )
    over = format_bytes(-memory.headroom)
    return (
        f'<span class="over" style="left:{_number(at)}%;width:{_number(100 - at)}%" '
        f'title="{over} over the limit"></span>'
    )


def _limit_label(plan: Plan, whole: float) -> str:
    memory = plan.memory
    if not memory.limit:
        return ""
    at = _number(100 * memory.limit / whole)
    text = f"limit {format_bytes(memory.limit)}"
    if not memory.fits:
        text += f" <em>+ {format_bytes(-memory.headroom)}</em>"
    return f'<div class="limit"><span style="right:{_number(100 - float(at))}%">{text}</span></div>'


def _remedies(plan: Plan) -> str:
    if not plan.remedies:
        return ""
    rows = [
        [
            escape(remedy.change),
            " ".join(
                f"<code>{escape(flag(key, value))}</code>" for key, value in remedy.flags.items()
            ),
            '<span class="better">fits</span>'
            if remedy.fits
            else '<span class="worse">does not fit</span>',
            format_bytes(remedy.used),
            format_seconds(remedy.seconds) if remedy.seconds else "–",
        ]
        for remedy in plan.remedies
    ]
    columns = ["Change", "Flags", "Then", ">Memory", ">Step, estimate"]
    how = "compiled" if plan.source == "compiled" else "estimated"
    text = f"Each was {how} to see whether the run then fits."
    return _part("What would make it fit", text, _table(columns, rows, marks="remedies"))


def _timeline(plan: Plan) -> str:
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
    return _part("Timeline of a step", text, f'<div class="card">{cards}</div>', estimate=True)


def _kinds(step: Timeline) -> str:
    """Returns the legend of the timeline: seconds by what the core does, and by lane and kind."""
    sums: dict[tuple[str, str], float] = {}
    for span, times in step.every():
        key = span.lane, span.kind
        sums[key] = sums.get(key, 0.0) + span.seconds * times
    legends = []
    for lane in _LANES:
        shares = [_Share(kind, size) for (at, kind), size in sums.items() if at == lane]
        shares.sort(key=lambda share: -share.size)
        if any(share.size > 0 for share in shares):
            keys = _legend(shares, step.seconds, format_seconds)
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
        f"{_percent(seconds * loop.trips * times / whole)} of the step in all"
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
        f'<i class="{_class(first.kind)}" style="{_place(start, end - start, whole)}" '
        f'title="{escape(title)}">{label}</i>'
    )


def _origin(origin: str) -> str:
    text = origin.replace("\\'", "'").removeprefix("jit(step)/").replace("eval_jaxpr/", "")
    return text if len(text) <= 120 else f"{text[:50]} … {text[-65:]}"


def _place(start: float, seconds: float, whole: float) -> str:
    return f"left:{_number(100 * start / whole)}%;width:{_number(100 * seconds / whole)}%"


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
        f'<i class="{_class(kind)}" style="height:{_number(100 * size / room)}%"></i>'
        for kind, size in parts
        if size > 0.001 * room
    )
    shares = ", ".join(f"{kind} {_percent(size / each)}" for kind, size in parts)
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
        f'<span style="left:{_number(100 * mark * size / seconds)}%">{mark:g}'
        f"{' ' + unit if mark == marks[-1] else ''}</span>"
        for mark in marks
    )
    return f'<div class="row"><b></b><div class="axis">{labels}</div></div>'


def _time(plan: Plan) -> str:
    time = plan.time
    if time is None or not time.seconds:
        return ""
    spent = [_Share(kind, size) for kind, size in time.spent.items()]
    spent.sort(key=lambda share: -share.size)
    whole = max(time.seconds, sum(share.size for share in spent))
    bar = _bar(spent, whole, format_seconds) + _legend(spent, whole, format_seconds)
    cycles = ""
    if time.by_cycles:
        cycles = (
            f'<p class="held">By the compiler\'s own cycles of matrix products a step would take '
            f"{format_seconds(time.by_cycles)}.</p>"
        )
    title = f"What the core does, most first; adds up to the step, {format_seconds(time.seconds)}"
    if (hidden := sum(share.size for share in spent) - time.seconds) > 0.01 * time.seconds:
        title = f"What is in it; {format_seconds(hidden)} of it is hidden behind the rest"
    content = (
        f'<div class="card"><h4>{title}</h4>{bar}'
        f"<h4>What each resource needs on its own</h4>{_terms(time)}{cycles}</div>"
    )
    return _part("Where the time goes", "", content, estimate=True)


def _terms(time: StepTime) -> str:
    terms = {name: size for name, size in time.terms.items() if size > 0}
    whole = max(time.seconds, *terms.values(), 0.0)
    rows = "".join(
        f'<div class="row"><b>{escape(name)}</b><div class="term"><i style="width:'
        f'{_number(100 * size / whole)}%"></i><span>{format_seconds(size)} '
        f"<small>{_some_percent(size / time.seconds)}</small></span></div></div>"
        for name, size in terms.items()
    )
    return f'<div class="terms">{rows}</div>'


def _exchanges(plan: Plan) -> str:
    if not plan.exchanges:
        return ""
    rows = [
        [
            f"<b>{escape(one.kind)}</b>",
            escape(", ".join(one.axes)) or "–",
            escape(one.network),
            f"{'' if one.exact else 'at least '}{one.count:,}" if one.count else "–",
            format_bytes(one.bytes),
            format_bytes(one.wire_bytes),
            format_seconds(one.seconds),
            _percent(one.overlapped),
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
    return _part("Collectives", text, _table(columns, rows), estimate=estimated)


class _Domains(NamedTuple):
    """What fast links join: slices of TPUs, NVLink domains of GPUs.

    Attributes:
      name: Of one.
      between: Of what joins them.
      within: Of the links in one.
      parts: For each mesh axis, how many of them it spans.
    """

    name: str
    between: str
    within: str
    parts: dict[str, int]

    def of(self, at: Sequence[int], mesh: dict[str, int]) -> int:
        """Returns the number of the domain of the device at a place of the mesh."""
        number = 0
        for index, (axis, size) in zip(at, mesh.items(), strict=True):
            parts = self.parts[axis]
            number = number * parts + index * parts // size
        return number


def _domains(plan: Plan) -> _Domains | None:
    """Returns None if it is not known which axis joins slices."""
    topology, mesh = plan.topology, plan.mesh
    parts = dict.fromkeys(mesh, 1)
    network = topology.chip.network
    if isinstance(network, Switch):
        stride = math.prod(mesh.values())
        for axis, size in mesh.items():
            stride //= size
            parts[axis] = min(size, -(-size * stride // network.size))
        return _Domains("NVLink domain", "network between domains", "NVLink", parts)
    links = "links of the slice (ici)" if network else "links of this machine"
    found = _Domains("slice", "data centre network (dcn)", links, parts)
    if topology.slices == 1:
        return found
    try:
        across = load_strategy(plan.strategy).across_slices
    except ConfigError:
        return None
    if mesh.get(across, 1) % topology.slices:
        return None
    parts[across] = topology.slices
    return found


def _mesh(plan: Plan) -> str:
    count = math.prod(plan.mesh.values())
    if count == 1:
        return ""
    domains = _domains(plan)
    axes = "".join(
        f'<p class="held"><b>{escape(axis)} {size:,}</b>: '
        f"{escape(_axis_words(axis, size, domains))}</p>"
        for axis, size in plan.mesh.items()
        if size > 1
    )
    picture, caption = _mesh_picture(plan.mesh, domains)
    return _part("Mesh", escape(caption), f'<div class="card">{picture}{axes}</div>')


def _axis_words(axis: str, size: int, domains: _Domains | None) -> str:
    if domains is None:
        return "how it lies on slices is not known"
    parts = domains.parts[axis]
    if parts == 1:
        return domains.within
    if parts == size:
        return domains.between
    return f"{domains.between}, {parts} parts; {size // parts} devices of each by {domains.within}"


def _mesh_picture(mesh: dict[str, int], domains: _Domains | None) -> tuple[str, str]:
    """Returns the devices in the mesh's order, and what the picture shows in words."""
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    names, count = list(sizes), math.prod(sizes.values())
    first = _first_across(list(sizes.values()))
    width = math.prod(list(sizes.values())[first:])
    columns, drawn = min(width, _MOST_COLUMNS), min(count, _MOST_DEVICES)
    side = max(9, min(34, 1000 // columns))
    several = domains is not None and math.prod(domains.parts.values()) > 1
    cells = []
    for place in range(drawn):
        at = _unravel(place, list(sizes.values()))
        text = ", ".join(f"{axis} {index}" for axis, index in zip(names, at, strict=True))
        hue, of = at[0] if len(at) > 1 else place, next(iter(sizes.values()))
        if domains is not None and several:
            hue, of = domains.of(at, sizes), math.prod(domains.parts.values())
            text += f" · {domains.name} {hue}"
        x, y = place % columns * side, place // columns * side
        cells.append(
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" style="--h:{_hue(hue, of)}">'
            f"<title>{text}</title></rect>"
        )
    height = math.ceil(drawn / columns) * side
    picture = (
        f'<svg class="mesh" viewBox="0 0 {columns * side} {height}" width="{columns * side}" '
        f'role="img" aria-label="Devices of the mesh">{"".join(cells)}</svg>'
    )
    caption = f"Across: {' × '.join(names[first:])}."
    if names[:first]:
        caption += f" Down: {' × '.join(names[:first])}."
    if width > columns:
        caption += f" Continued every {columns} devices."
    if several and domains is not None:
        caption += f" Each colour is one {domains.name}."
    elif len(names) > 1:
        caption += f" Each colour is one index of {names[0]}."
    if drawn < count:
        caption += f" The first {drawn:,} of {count:,} devices are drawn."
    return picture, caption


def _first_across(sizes: Sequence[int]) -> int:
    """Returns from which axis on they go across: as many as make it no higher than wide."""
    count = math.prod(sizes)
    return next((i for i in reversed(range(len(sizes))) if math.prod(sizes[i:]) ** 2 >= count), 0)


def _unravel(place: int, sizes: Sequence[int]) -> list[int]:
    at = []
    for size in reversed(sizes):
        place, index = divmod(place, size)
        at.append(index)
    return at[::-1]


def _hue(place: int, count: int) -> int:
    # A whole turn would end in the colour that it began with.
    return round(200 + 300 * place / count) % 360


def _evaluation(plan: Plan) -> str:
    if not plan.evaluation_memory:
        return ""
    size = format_bytes(plan.evaluation_memory)
    if plan.evaluation is None:
        text = f"It would take {size} on a device and does not fit."
        return _part("Evaluation step", "", f'<p class="remark bad">{text}</p>')
    time = plan.evaluation
    text = (
        f"<b>{format_seconds(time.seconds)}</b> by estimate, {_interval(time)}; it takes "
        f"<b>{size}</b> on a device."
    )
    return _part("Evaluation step", "", f'<p class="remark">{text}</p>')


def _configuration(plan: Plan) -> str:
    defaults = to_dict(RunConfig())
    meanings = {item.path: item.meaning for item in walk(RunConfig())}
    rows = [
        [
            f"<code>{escape(key)}</code>",
            f"<code>{_literal(value)}</code>",
            f'<code class="dim">{_literal(defaults.get(key))}</code>',
            escape(meanings.get(key, "Not known to this version.")),
        ]
        for key, value in plan.settings.items()
        if value != defaults.get(key)
    ]
    if not rows:
        return ""
    table = _table(["Key", "Value", "Default", "Meaning"], rows, marks="config")
    return _part("Configuration", "Keys that differ from their default.", table)


def _literal(value: Any) -> str:
    return escape(str(value)).replace(",", ",<wbr>") if value not in ("", None) else "–"


def _versions() -> str:
    found = []
    for name in ("jaxft", "jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f'<footer class="dim">{escape(" · ".join(found))}</footer>'


def _search(found: "Search") -> str:
    topology = found.topology
    text = (
        f"{found.considered:,} candidates were estimated in closed form and {found.compiled:,} "
        f"compiled in {format_seconds(found.seconds)} for {describe_shape(topology)}. "
    )
    best = found.best
    verdict = "None of them fits." if found.compiled else "None was compiled."
    if best is not None:
        verdict = f"The best: {best.name}, {format_seconds(best.seconds)} a step by estimate."
    return (
        f'<h2 class="plan">Search on {escape(topology.name)}</h2>'
        f'<p class="remark"><b>{escape(verdict)}</b><br>{escape(text)}</p>'
        f"{_pareto_plot(found)}{_ranking(found)}"
    )


def _ranking(found: "Search") -> str:
    columns = [">#", "Candidate", "Outcome", ">Step, estimate", ">In closed form"]
    columns += [">Memory", ">In closed form", ">Tokens/s a chip", ">MFU"]
    numbered = [(number, one) for number, one in enumerate(found.candidates, start=1)]
    real = [(number, one) for number, one in numbered if math.isfinite(one.seconds)]
    first = [item for item in real if item[1].plan is not None]
    others = [item for item in real if item[1].plan is None]
    first += others[:_FIRST_CANDIDATES]
    rest = others[_FIRST_CANDIDATES:]
    content = _table(columns, [_ranked(*item) for item in first], marks="ranked")
    if rest:
        more = f" of {len(rest):,}" if len(rest) > _MOST_CANDIDATES else ""
        rows = [_ranked(*item) for item in rest[:_MOST_CANDIDATES]]
        content += (
            f"<details><summary>{len(rows):,}{more} more</summary>"
            f"{_table(columns, rows, marks='ranked')}</details>"
        )
    refused = [one for _, one in numbered if not math.isfinite(one.seconds)]
    text = (
        "Compiled steps and memory come from the program; columns “in closed form” are what was "
        "estimated before compiling."
    )
    return _part("Ranking", text, content + _refusals(refused))


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
        _percent(speed.mfu, 1) if speed else "–",
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
        f"{_table(['>Candidates', 'Reason'], rows)}</details>"
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
    limit = found.topology.chip.core.usable or found.topology.chip.core.memory
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
    text = (
        "Filled: compiled. Hollow: estimated in closed form. Red: over the limit. The line joins "
        f"{'compiled candidates' if compiled else 'estimates'} that no other beats in both; "
        "numbers are ranks."
    )
    if missing := len(points) - len(drawn):
        text += f" {missing:,} slower or larger estimates are not drawn."
    svg = _plot(drawn, front, frame, limit)
    return _part(
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


_STYLE = """
:root { --block: .77; --depth: .115; --over: #d5281d; }
@media (prefers-color-scheme: dark) { :root { --block: .64; --depth: .115; --over: #ff6a5e; } }
h2.plan { margin-top: 3.2rem; padding-top: 1.4rem; border-top: 2px solid var(--axis);
  font-size: 1.4rem; overflow-wrap: anywhere; }
h3.part { margin: 2.2rem 0 .7rem; font-size: 1.08rem; font-weight: 650; color: var(--ink); }
h3.part + p.dim { max-width: 62rem; }
h4 { margin: 1.1rem 0 .45rem; font-size: .84rem; font-weight: 500; color: var(--second); }
.card > h4:first-child { margin-top: 0; }
.estimate { margin-left: .5em; padding: .1em .55em; border-radius: 99px; background: var(--tint);
  color: var(--second); font-size: .72rem; font-weight: 500; vertical-align: .15em; }
.tile.bad strong, .remark.bad { color: var(--bad); }
.remark { margin: 1rem 0 0; padding: .75rem 1.15rem; border-left: 4px solid var(--axis);
  background: var(--surface); color: var(--second); }
.remark b { color: var(--ink); }
.card { padding: 1.1rem 1.15rem; background: var(--surface); border-radius: 12px;
  box-shadow: 0 0 0 1px var(--grid); break-inside: avoid; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { color: var(--muted); } .compared small { white-space: nowrap; }
.ranked td:nth-child(2) { min-width: 19rem; } .compared td:nth-child(4) { min-width: 11rem; }
.compared td, .compared th { padding-right: 1rem; } .compared td:first-child { min-width: 7rem; }
.remedies td:first-child { min-width: 11rem; } .remedies td:nth-child(2) { min-width: 17rem; }
.config td:first-child { white-space: nowrap; } .config td:nth-child(2) { min-width: 17em;
  overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--axis); }
footer { margin-top: 2.6rem; font-size: .82rem; }
.held { margin: .7rem 0 0; font-size: .84rem; color: var(--second); }
.row { display: grid; grid-template-columns: 5.4em minmax(0, 1fr); align-items: center; }
.row > b { font-size: .78rem; font-weight: 500; color: var(--second); }
.k { --h: 0; background: oklch(var(--block) var(--depth) var(--h)); font-style: normal;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.k-parameters, .k-matmul, .k-compute { --h: 255; } .k-ici { --h: 50; } .k-dcn { --h: 350; }
.k-optimizer, .k-attention { --h: 305; }
.k-program { --h: 205; } .k-batch { --h: 340; } .k-gradients { --h: 45; }
.k-activations, .k-memory { --h: 160; } .k-logits { --h: 10; } .k-weights { --h: 92; }
.k-temporaries, .k-copy, .k-host { background: oklch(var(--block) .025 85); }
.k-all-gather { --h: 92; } .k-reduce-scatter { --h: 50; } .k-all-reduce { --h: 350; }
.k-all-to-all, .k-ragged-all-to-all { --h: 205; } .k-collective-permute { --h: 130; }
.k-sparsecore { --h: 190; }
.wait { background: repeating-linear-gradient(135deg, var(--over) 0 2px, transparent 2px 5px);
  box-shadow: inset 0 0 0 1px var(--over); }
.k u { display: block; padding: 0 .4em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; text-decoration: none; font-size: 11px; color: #000c; }
.wait u { margin-left: 4px; border-radius: 3px; background: var(--surface); color: var(--ink); }
.bar { position: relative; display: flex; height: 34px; overflow: hidden; border-radius: 5px;
  background: var(--grid); }
.bar > .k { flex: none; border-right: 1px solid var(--surface); }
.bar > .left { flex: none; background: var(--grid); }
.bar > .over { position: absolute; top: 0; bottom: 0; border: 2px solid var(--over);
  background: repeating-linear-gradient(135deg, var(--over) 0 2px, transparent 2px 7px); }
.bar.host { height: 22px; margin-top: .6rem; } .bar.host u { line-height: 22px; }
.bar.cut > .k { border-right: 4px dotted var(--surface); }
.limit { position: relative; height: 1.5em; font-size: .78rem; color: var(--second); }
.limit span { position: absolute; padding-right: .4em; border-right: 2px solid var(--ink);
  white-space: nowrap; line-height: 1.5em; }
.limit em { font-style: normal; color: var(--bad); }
.keys { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; font-size: .84rem;
  color: var(--muted); font-variant-numeric: tabular-nums; }
.keys > span { white-space: nowrap; } .keys b { color: var(--ink); font-weight: 600; }
.keys i { display: inline-block; width: .85em; height: .85em; margin-right: .45em;
  border-radius: 3px; vertical-align: -.08em; }
.bar + .keys { margin-top: .6rem; }
.lanes { padding-bottom: .3rem; } .lanes .row { align-items: baseline; padding: .1rem 0; }
.track { margin-top: 1.5rem; overflow-x: auto; } .track h4 { margin-top: 0; }
.track .wide { min-width: 620px; }
.lane { position: relative; height: 17px; margin: 2px 0; background: var(--grid); }
.lane.core { height: 46px; }
.lane > * { position: absolute; top: 0; bottom: 0; min-width: 1px; overflow: hidden; }
.lane > .k:hover, .loop:hover { outline: 2px solid var(--ink); z-index: 1; }
.lane > .k { display: flex; align-items: center; } .lane > .k u { line-height: 1.5; }
.lane > .k + .k { box-shadow: -1px 0 var(--surface); }
.lane > .wait { box-shadow: inset 0 0 0 1px var(--over) !important; }
.loop { display: flex; flex-direction: column-reverse; box-shadow: inset 0 0 0 1px var(--muted); }
.loop > .k { flex: none; }
.names { position: relative; height: 1.6em; font-size: .78rem; color: var(--second); }
.names span { position: absolute; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  padding-left: .35em; border-left: 1px solid var(--muted); line-height: 1.6em; }
.axis { position: relative; height: 1.5em; font-size: 11px; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; }
.terms .row { padding: .1rem 0; }
.term { display: flex; align-items: center; gap: .6em; font-size: .84rem; padding-right: 8.5em;
  font-variant-numeric: tabular-nums; }
.term i { flex: none; height: 14px; min-width: 1px; border-radius: 3px; background: var(--c0); }
.term span { white-space: nowrap; } .term small { color: var(--muted); }
svg.mesh { max-width: 100%; height: auto; display: block; }
svg.mesh rect { fill: oklch(var(--block) var(--depth) var(--h)); stroke: var(--surface); }
svg.mesh rect:hover { stroke: var(--ink); stroke-width: 2; }
svg.pareto { display: block; width: 100%; min-width: 680px; padding: .8rem 1rem .4rem; }
.pareto text { font-size: 11.5px; fill: var(--muted); } .pareto .x { text-anchor: middle; }
.pareto .y { text-anchor: end; } .pareto .rank { fill: var(--ink); font-weight: 600;
  stroke: var(--surface); stroke-width: 3px; paint-order: stroke; pointer-events: none; }
.pareto .grid { stroke: var(--grid); } .pareto path { fill: none; }
.pareto path.limit { stroke: var(--over); stroke-dasharray: 5 3; stroke-width: 1.5; }
.pareto text.limit { fill: var(--over); text-anchor: middle; }
.pareto .front { stroke: var(--c0); stroke-width: 2; stroke-linejoin: round; }
.dot { stroke: var(--surface); stroke-width: 1.5; }
.dot.compiled { fill: var(--c0); } .dot.compiled.over { fill: var(--over); }
.dot.estimated { fill: none; stroke: var(--c0); pointer-events: all; opacity: .75; }
.dot.estimated.over { stroke: var(--over); }
.dot:hover { stroke: var(--ink); }
@media (max-width: 720px) { .row { grid-template-columns: 4.4em minmax(0, 1fr); }
  .keys { gap: .15rem .9rem; } .lane > .k u { font-size: 10px; } }
"""
