"""Places the values of line charts: where ticks, lines and markers lie, in per cent of the plot.

templates/charts.html draws what `plot` returns. Its script shows values on hover and knows nothing
of numbers and units.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_MAX_POINTS = 800  # per series; a screen has few more columns
_DECADE = 10.0  # values that span less are as readable on a linear axis

Unit = Literal["number", "percent", "count", "rate"]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Values over steps.

    Attributes:
      name: The name in the legend and beside hover values.
      points: `(step, value)` in order of steps; values that are not finite leave a gap.
      color: Number of the colour, from 0; it belongs to the entity and not to the rank.
      style: "line", "points" for joined markers, or "faint" for what lies behind a line of means.
      intervals: `(step, low, high)` of each whisker.
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
      title: Words in bold above the plot.
      note: Words beside the title: the unit, or what the values are of.
      series: The lines and markers.
      unit: The way in which values are written.
      from_zero: Whether the axis of values begins at 0.
      decades: Whether that axis is logarithmic if positive values span a decade and more.
      wide: Whether the chart takes the whole width of the page.
      mark: `(step, value, text)`, a point with a text beside it.
      steps: First and last step of the axis; None for those of the points.
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


@dataclass(frozen=True, slots=True)
class Tick:
    """A label of an axis.

    Attributes:
      at: Per cent of the axis from its start.
      text: The value there.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Shape:
    """A path in the plot.

    Attributes:
      classes: Names that style it.
      path: SVG path data, in tenths of a per cent.
    """

    classes: str
    path: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with a text beside it.

    Attributes:
      x: Per cent of the width, from the left edge.
      y: Per cent of the height, from the top edge.
      text: The words.
    """

    x: float
    y: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A chart whose values have places.

    Attributes:
      title: The chart's.
      note: The chart's, which says if the axis is logarithmic.
      wide: The chart's.
      series: The chart's.
      grid: SVG path data of the grid.
      up: Labels of the axis of values, from the top.
      across: Labels of the axis of steps, from the left.
      shapes: Lines and markers from back to front; none if no value is finite.
      mark: The marked point, if any.
      hover: Places and ready texts of all points, by series.
    """

    title: str
    note: str
    wide: bool
    series: list[Series]
    grid: str = ""
    up: tuple[Tick, ...] = ()
    across: tuple[Tick, ...] = ()
    shapes: tuple[Shape, ...] = ()
    mark: Mark | None = None
    hover: tuple[dict[str, Any], ...] = ()


def plot(chart: Chart) -> Plot:
    """Gives a chart's values their places; a chart without a finite value has no shapes."""
    if not any(math.isfinite(y) for series in chart.series for _, y in series.points):
        return Plot(title=chart.title, note=chart.note, wide=chart.wide, series=chart.series)
    scale = _Scale(chart)
    across = [t for t in ticks(scale.left, scale.right, 6) if t == round(t)]  # whole steps
    up = log_ticks(scale.low, scale.high) if scale.log else ticks(scale.low, scale.high, 5)
    spacing = up[1] - up[0] if len(up) > 1 else abs(up[0]) or 1.0
    thinned = [(series, thin(series.points)) for series in chart.series]
    mark = None
    if chart.mark is not None:
        x, y, text = chart.mark
        mark = Mark(scale.x(x), scale.y(y), text)
    return Plot(
        title=chart.title,
        note=f"{chart.note}, logarithmic" if scale.log else chart.note,
        wide=chart.wide,
        series=chart.series,
        grid="".join(f"M0 {10 * scale.y(t):.1f}H1000" for t in up),
        up=tuple(Tick(scale.y(t), _tick(t, t if scale.log else spacing, chart.unit)) for t in up),
        across=tuple(Tick(scale.x(t), _step(t)) for t in across),
        shapes=tuple(shape for each in thinned for shape in _shapes(*each, scale)),
        mark=mark,
        hover=tuple(_hover(*each, scale, chart.unit) for each in thinned),
    )


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
    if unit == "rate":
        return _scientific(value, 3)
    sign, value = "\N{MINUS SIGN}" if value < 0 else "", abs(value)
    if unit == "percent":
        return f"{sign}{100 * value:.1f} %"
    if unit == "count":
        return f"{sign}{value:,.0f}"
    digits = ".4g" if value >= 100 or 0 < value < 0.01 else ".3f"
    return f"{sign}{value:{digits}}"


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


def _shapes(series: Series, points: list[Point], scale: _Scale) -> Iterator[Shape]:
    line, color = _path(points, scale), f"c{series.color}"
    if series.style != "points":
        yield Shape(f"{series.style} {color}", line)
        return
    whiskers = "".join(
        f"M{10 * scale.x(x):.1f} {10 * scale.y(low):.1f}V{10 * scale.y(high):.1f}"
        for x, low, high in series.intervals
    )
    # A stroke of no length with round ends is a disc, whatever the box does to its contents.
    dots = "".join(
        f"M{10 * scale.x(x):.1f} {10 * scale.y(y):.1f}h0" for x, y in points if math.isfinite(y)
    )
    yield Shape(f"line {color}", line)
    if whiskers:
        yield Shape(f"line {color}", whiskers)
    yield Shape("ring", dots)
    yield Shape(f"dots {color}", dots)


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


def _hover(series: Series, points: list[Point], scale: _Scale, unit: Unit) -> dict[str, Any]:
    """Returns places and ready texts."""
    return {
        "name": series.name,
        "color": series.color,
        "faint": series.style == "faint",
        "points": [
            [
                round(scale.x(x), 3),
                round(scale.y(y), 2) if math.isfinite(y) else None,
                series.where(x),
                format_value(y, unit),
            ]
            for x, y in points
        ],
    }


def _tick(value: float, spacing: float, unit: Unit) -> str:
    if unit == "rate":
        return _scientific(value, 2)
    if unit == "percent":
        text = f"{100 * value:.{_decimals(100 * spacing)}f} %"
    elif abs(value) >= 10_000:
        text = _step(value)
    else:
        text = f"{value:,.{_decimals(spacing)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


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
