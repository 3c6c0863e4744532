"""Line charts as HTML and SVG without any library: sharp at every width, readable on hover.

The plot area is an SVG stretched to its box (strokes do not scale), the labels are HTML placed in
per cent, so nothing is redrawn when the page changes its width. `STYLE` and `SCRIPT` go once into
a page; the script adds hover values only.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Literal

_MAX_POINTS = 800  # per series; a screen has few more columns
_DECADE = 10.0  # values that span less are as readable on a linear axis

Unit = Literal["number", "percent", "count", "rate", "seconds"]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Values over steps.

    Attributes:
      name: In the legend and beside hover values.
      points: `(step, value)` in order of steps; values that are not finite leave a gap.
      color: Number of the colour, from 0; it belongs to the entity and not to the rank.
      style: "faint" is what lies behind a line of means; "points" are joined markers.
      intervals: `(step, low, high)` drawn as whiskers.
      spans: First and last step of the points that stand for several, by their place.
    """

    name: str
    points: list[Point]
    color: int = 0
    style: Literal["line", "faint", "points"] = "line"
    intervals: tuple[tuple[float, float, float], ...] = ()
    spans: Mapping[float, tuple[int, int]] = field(default_factory=dict)

    def where(self, x: float) -> str:
        """Returns the place of a point for readers."""
        first, last = self.spans.get(x, (x, x))
        return f"step {last:,.0f}" if first == last else f"steps {first:,.0f} to {last:,.0f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One pair of axes.

    Attributes:
      title: In bold above the plot.
      note: Beside the title: unit, or what the values are of.
      series: What is drawn.
      unit: How values are written.
      from_zero: Whether the axis of values begins at 0.
      decades: Whether that axis is logarithmic if positive values span a decade and more.
      wide: Whether the chart takes the whole width of the page.
      mark: `(step, value, text)`, a point with a text beside it.
      steps: First and last step of the axis, if not those of the points.
    """

    title: str
    note: str
    series: list[Series]
    unit: Unit = "number"
    from_zero: bool = False
    decades: bool = False
    wide: bool = False
    mark: tuple[float, float, str] | None = None
    steps: tuple[float, float] | None = None


def render(chart: Chart) -> str:
    """Returns the chart as an HTML figure, with a line of text if there is nothing to draw."""
    known = any(math.isfinite(y) for series in chart.series for _, y in series.points)
    scale = _Scale(chart) if known else None
    note = f"{chart.note}, logarithmic" if scale is not None and scale.log else chart.note
    head = f"<b>{escape(chart.title)}</b> <span>{escape(note)}</span>{_legend(chart)}"
    figure = f'<figure class="chart{" wide" if chart.wide else ""}"><figcaption>{head}</figcaption>'
    if scale is None:
        return f'{figure}<p class="empty">No finite values.</p></figure>'
    return f"{figure}{_plot(chart, scale)}</figure>"


def thin(points: list[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """Returns at most about `limit` points; each stretch keeps its smallest and largest value."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit / 2))
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = [p for p in points[start : start + size] if math.isfinite(p[1])]
        if stretch:
            ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
            kept += sorted(ends)
        else:
            kept.append((points[start][0], math.nan))
    return [*dict.fromkeys(kept), *([points[-1]] if kept[-1] != points[-1] else [])]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers that lie between `low` and `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns a few round numbers between `low` and `high`, both positive, evenly in decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in steps if low <= f * 10.0**p <= high]
        if len(found) <= 8:
            return found
    return found[:: math.ceil(len(found) / 8)]


def format_value(value: float, unit: Unit) -> str:
    """Returns a value as a reader wants it beside a curve."""
    if not math.isfinite(value):
        return "not finite"
    if unit == "percent":
        return f"{100 * value:.1f} %"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "rate":
        return _scientific(value, 3)
    if unit == "seconds":
        return f"{value:.1f} s"
    return f"{value:.4g}" if abs(value) >= 100 or 0 < abs(value) < 0.01 else f"{value:.3f}"


class _Scale:
    """Maps steps and values to per cent of the plot, from its top left corner.

    Attributes:
      log: Whether the axis of values is logarithmic; what is not positive stands at its foot.
    """

    def __init__(self, chart: Chart):
        xs = [x for series in chart.series for x, _ in series.points]
        ys = [y for series in chart.series for _, y in series.points if math.isfinite(y)]
        ys += [y for series in chart.series for _, *ends in series.intervals for y in ends]
        self.left, self.right = chart.steps or (min(xs), max(xs))
        if self.left <= 0.1 * self.right:
            self.left = 0
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        positive = [y for y in ys if y > 0]
        self.log = chart.decades and bool(positive) and max(positive) >= _DECADE * min(positive)
        if self.log:
            low, high = math.log10(min(positive)), math.log10(max(positive))
            room = 0.06 * (high - low)
            self.low, self.high = 10 ** (low - room), 10 ** (high + room)
            return
        low, high = min(ys), max(ys)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low = 0.0 if chart.from_zero and low >= 0 else low - room
        if low >= 0 > self.low:
            self.low = 0.0
        self.high = high + room

    def x(self, value: float) -> float:
        return 100 * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            return 100 * math.log(self.high / value) / math.log(self.high / self.low)
        return 100 * (self.high - value) / (self.high - self.low)


def _plot(chart: Chart, scale: _Scale) -> str:
    across = [t for t in ticks(scale.left, scale.right, 6) if t == round(t)]  # whole steps
    up = log_ticks(scale.low, scale.high) if scale.log else ticks(scale.low, scale.high, 5)
    grid = "".join(f"M0 {10 * scale.y(t):.1f}H1000" for t in up)
    spacing = up[1] - up[0] if len(up) > 1 else abs(up[0]) or 1.0
    labels = [
        f'<i class="y" style="top:{scale.y(t):.2f}%">'
        f"{_tick(t, t if scale.log else spacing, chart.unit)}</i>"
        for t in up
    ]
    labels += [
        f'<i class="x{" odd" if i % 2 else ""}" style="left:{scale.x(t):.2f}%">{_step(t)}</i>'
        for i, t in enumerate(across)
    ]
    labels.append('<i class="x name">step</i>')
    series = [(item, thin(item.points)) for item in chart.series]
    shapes = "".join(_shape(item, points, scale) for item, points in series)
    names = ", ".join(item.name for item in chart.series)
    return (
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(chart.title)}: '
        f'{escape(names)} over steps"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="grid" d="{grid}"/><path class="axis" d="M0 1000H1000"/>'
        f"{shapes}</svg>{''.join(labels)}{_mark(chart, scale)}"
        f'<script type="application/json">{_hover(chart, series, scale)}</script></div>'
    )


def _shape(series: Series, points: list[Point], scale: _Scale) -> str:
    name = f"{series.style} c{series.color}"
    path = _path(points, scale)
    if series.style != "points":
        return f'<path class="{name}" d="{path}"/>'
    # A stroke of no length with round ends is a disc, whatever the box does to its contents.
    dots = "".join(
        f"M{10 * scale.x(x):.1f} {10 * scale.y(y):.1f}h0" for x, y in points if math.isfinite(y)
    )
    whiskers = "".join(
        f"M{10 * scale.x(x):.1f} {10 * scale.y(low):.1f}V{10 * scale.y(high):.1f}"
        for x, low, high in series.intervals
    )
    return (
        f'<path class="line c{series.color}" d="{path}"/><path class="line c{series.color}" '
        f'd="{whiskers}"/><path class="ring" d="{dots}"/><path class="dots c{series.color}" '
        f'd="{dots}"/>'
    )


def _path(points: list[Point], scale: _Scale) -> str:
    parts, pen = [], "M"
    alone = ""
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            parts.append(alone)
            alone = ""
            continue
        alone = "h0" if pen == "M" else ""  # a value between two gaps is still seen, as a dot
        parts.append(f"{pen}{10 * scale.x(x):.1f} {10 * scale.y(y):.1f}")
        pen = "L"
    return "".join([*parts, alone])


def _mark(chart: Chart, scale: _Scale) -> str:
    if chart.mark is None:
        return ""
    x, y, text = chart.mark
    left, top = scale.x(x), scale.y(y)
    side = " left" if left > 70 else ""
    return (
        f'<i class="mark{side}" style="left:{left:.2f}%;top:{top:.2f}%">'
        f"<span>{escape(text)}</span></i>"
    )


def _hover(chart: Chart, series: list[tuple[Series, list[Point]]], scale: _Scale) -> str:
    """Returns positions and ready texts: the script knows nothing of numbers and units."""
    data = [
        {
            "name": item.name,
            "color": item.color,
            "faint": item.style == "faint",
            "points": [
                [
                    round(scale.x(x), 3),
                    round(scale.y(y), 2) if math.isfinite(y) else None,
                    item.where(x),
                    format_value(y, chart.unit),
                ]
                for x, y in points
            ],
        }
        for item, points in series
    ]
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _legend(chart: Chart) -> str:
    if len(chart.series) < 2:
        return ""
    keys = "".join(
        f'<span><i class="key {item.style} c{item.color}"></i>{escape(item.name)}</span>'
        for item in chart.series
    )
    return f'<span class="legend">{keys}</span>'


def _tick(value: float, spacing: float, unit: Unit) -> str:
    if unit == "rate":
        return _scientific(value, 2)
    if unit == "percent":
        return f"{100 * value:.{_decimals(100 * spacing)}f} %"
    if abs(value) >= 10_000:
        return _step(value)
    return f"{value:,.{_decimals(spacing)}f}"


def _decimals(spacing: float) -> int:
    """Returns how many decimals tell values apart that lie `spacing` from each other."""
    return next((n for n in range(7) if abs(round(spacing, n) - spacing) < 1e-6 * spacing), 7)


def _step(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{value / size:g}{letter}"
    return f"{value:,.10g}"


def _scientific(value: float, digits: int) -> str:
    """Returns 2e-5 and not 2e-05."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


STYLE = """
.chart { margin: 0; min-width: 0; break-inside: avoid; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .2em .7em; align-items: baseline;
  margin-bottom: .9em; }
.chart figcaption > span { color: var(--muted); font-size: .86em; }
.legend { margin-left: auto; display: flex; flex-wrap: wrap; gap: .1em 1.1em; }
.chart .legend > span { color: var(--second); white-space: nowrap; }
.key { display: inline-block; width: 1.1em; height: 0; border-top: 2px solid; margin-right: .45em;
  vertical-align: .25em; }
.key.faint { opacity: .5; }
.key.points { width: 8px; height: 8px; border: 0; border-radius: 50%; vertical-align: 0;
  background: currentColor; }
.plot { position: relative; height: 190px; margin: 0 .6em 1.9em 3.6em; outline: none;
  touch-action: pan-y; cursor: crosshair; }
.wide .plot { height: 320px; }
.plot:focus-visible { box-shadow: 0 0 0 2px var(--c0); }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
.plot .grid { stroke: var(--grid); stroke-width: 1; }
.plot .axis { stroke: var(--axis); stroke-width: 1; }
.plot .line, .plot .points { stroke: currentColor; stroke-width: 2; }
.plot .faint { stroke: currentColor; stroke-width: 1; opacity: .45; }
.plot .dots { stroke: currentColor; stroke-width: 8; }
.plot .ring { stroke: var(--surface); stroke-width: 12; }
.plot > i { position: absolute; font-style: normal; font-size: 12px; color: var(--muted);
  font-variant-numeric: tabular-nums; white-space: nowrap; pointer-events: none; }
.plot > .y { left: -.7em; transform: translate(-100%, -50%); }
.plot > .x { bottom: -1.9em; transform: translateX(-50%); }
.plot > .name { left: -3.6em; transform: none; }
.plot > .mark { width: 0; height: 0; color: var(--ink); }
.mark::before { content: ""; position: absolute; width: 14px; height: 14px; margin: -9px;
  border: 2px solid var(--ink); border-radius: 50%; }
.mark span { position: absolute; left: 12px; bottom: 10px; padding: 0 .4em; border-radius: 4px;
  background: var(--surface); font-weight: 600; }
.mark.left span { left: auto; right: 12px; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.plot > .rule { top: 0; bottom: 0; width: 1px; background: var(--axis); }
.plot > .dot { width: 14px; height: 14px; margin: -7px; border-radius: 50%;
  background: currentColor; border: 2px solid var(--surface); box-sizing: border-box; }
.plot > .dot.c0 { color: var(--c0); } .plot > .dot.c1 { color: var(--c1); }
.plot > .dot.c2 { color: var(--c2); } .plot > .dot.c3 { color: var(--c3); }
.plot > .dot.c4 { color: var(--c4); } .plot > .dot.c5 { color: var(--c5); }
.tip { position: absolute; top: 0; z-index: 2; padding: .5em .75em; border-radius: 8px;
  background: var(--surface); border: 1px solid var(--axis); font-size: 12.5px;
  box-shadow: 0 4px 16px #0002; pointer-events: none; white-space: nowrap; color: var(--second); }
.tip b { font-variant-numeric: tabular-nums; color: var(--ink); margin-right: .5em; }
.empty { color: var(--muted); }
@media (max-width: 560px) { .wide .plot { height: 240px; } .plot > .odd { visibility: hidden; } }
"""

SCRIPT = """
document.querySelectorAll(".plot").forEach((plot) => {
  const series = JSON.parse(plot.querySelector("script").textContent);
  const steps = [...new Map(series.flatMap((s) => s.points).map((p) => [p[0], p])).values()]
    .sort((a, b) => a[0] - b[0]);
  const nearest = (points, x) => points.reduce((best, p) =>
    !best || Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best, null);
  const add = (parent, tag, name, text) => {
    const node = document.createElement(tag);
    node.className = name;
    if (text) node.textContent = text;
    return parent.appendChild(node);
  };
  let shown = [], at = -1;
  const clear = () => { shown.forEach((node) => node.remove()); shown = []; };
  const show = (x) => {
    clear();
    const here = nearest(steps, x);
    at = steps.indexOf(here);
    const rule = add(plot, "i", "rule");
    rule.style.left = here[0] + "%";
    const tip = add(plot, "div", "tip");
    add(tip, "div", "", here[2]);
    shown = [rule, tip];
    for (const s of series) {
      const p = nearest(s.points, here[0]);
      if (!p || Math.abs(p[0] - here[0]) > 1) continue;
      const row = add(tip, "div", "");
      add(row, "i", "key c" + s.color + (s.faint ? " faint" : ""));
      add(row, "b", "", p[3]);
      row.append(s.name);
      if (p[1] === null || s.faint) continue;
      const dot = add(plot, "i", "dot c" + s.color);
      dot.style.left = p[0] + "%";
      dot.style.top = p[1] + "%";
      shown.push(dot);
    }
    tip.style[here[0] < 50 ? "left" : "right"] =
      "calc(" + (here[0] < 50 ? here[0] : 100 - here[0]) + "% + 12px)";
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(100 * (event.clientX - box.left) / box.width);
  });
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("blur", clear);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    show(steps[Math.min(steps.length - 1, Math.max(0, at + move))][0]);
  });
});
"""
