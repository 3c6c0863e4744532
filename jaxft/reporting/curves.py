"""Draws a run: the charts of all figures that it recorded."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.reporting.charts import Chart, Series, format_value
from jaxft.reporting.figures import GROUPS, Group, Record, Run, interval_of, value_of

# Records of a run beyond which means of neighbours are drawn before them.
_RECORDS_DRAWN = 60
_MOST_DATASETS = 5


def make_charts(run: Run) -> list[Chart]:
    """Returns the charts of all that was recorded; a step stands at one place in all of them."""
    groups: dict[str, list[str]] = {}
    for name in run.names():
        if run.figure(name).course != "table":
            groups.setdefault(run.figure(name).group or name, []).append(name)
    drawn = []
    for group, names in groups.items():
        if group == "loss":
            drawn += [_loss_chart(run), _evaluation_loss_chart(run)]
        elif group in GROUPS:
            drawn.append(_shared_chart(run, GROUPS[group], names))
        else:
            drawn.append(_chart(run, group))
    steps = _extent(run)
    return [dataclasses.replace(chart, steps=steps) for chart in drawn if chart is not None]


def _extent(run: Run) -> tuple[float, float] | None:
    """Returns the first and last step of a run."""
    records = [*run.metrics, *(record for points in run.evaluations.values() for record in points)]
    steps = [r["step"] for r in records if isinstance(r.get("step"), int)]
    return (min(steps), max(steps)) if steps else None


def _loss_chart(run: Run) -> Chart | None:
    series, mark = [*_noisy(run, "loss")], None
    name, records = run.primary
    scored = _points(records, "loss")
    if scored:
        series.append(Series(name=name, points=scored, color=1, style="points"))
        finite = [p for p in scored if math.isfinite(p[1])]
        if len(finite) > 1:
            step, loss = min(finite, key=lambda p: p[1])
            mark = (step, loss, f"best {format_value(loss, 'number')}")
    if not series:
        return None
    note = run.loss_unit
    return Chart(title="Loss", note=note, series=series, decades=True, wide=True, mark=mark)


def _evaluation_loss_chart(run: Run) -> Chart | None:
    series = [*_held_out(run, "loss")]
    if len(series) < 2:
        return None
    note = f"{run.loss_unit}, 95 % intervals"
    return Chart(title="Evaluation loss", note=note, series=series, decades=True)


def _chart(run: Run, name: str) -> Chart | None:
    """Returns the chart of one figure: in training, and on each data set."""
    figure = run.figure(name)
    noisy = figure.course == "objective"
    trained = [*(_noisy(run, name) if noisy else _trained(run, name, figure.title.lower()))]
    held_out = [*_held_out(run, name)]
    if not trained and not any(len(series.points) > 1 for series in held_out):
        return None
    series = [*trained, *held_out]
    note = [series[0].name if held_out and len(series) == 1 else figure.note]
    if any(each.intervals for each in held_out):
        note.append("95 % intervals")
    return Chart(
        title=figure.title,
        note=", ".join(filter(None, note)),
        series=series,
        unit=figure.unit,
        from_zero=figure.from_zero,
    )


def _shared_chart(run: Run, group: Group, names: Sequence[str]) -> Chart | None:
    """Returns a chart of several figures: in training, and on the primary data set."""
    dataset, records = run.primary
    series = []
    for name in names:
        figure = run.figure(name)
        series += _trained(run, name, figure.legend, figure.color)
        if scored := _points(records, name):
            series.append(
                Series(
                    name=f"{figure.legend}, {dataset}",
                    points=scored,
                    color=figure.color,
                    style="points",
                    intervals=_intervals(records, name),
                )
            )
    if all(len(each.points) < 2 for each in series):
        return None
    return Chart(
        title=group.title,
        note=f"{series[0].name}, {group.note}" if len(series) == 1 else group.note,
        series=series,
        unit=run.figure(names[0]).unit,
        from_zero=group.from_zero,
    )


def _trained(run: Run, name: str, legend: str, color: int = 0) -> Iterator[Series]:
    """Yields the line of a figure in training, of many varying records the means of neighbours."""
    figure = run.figure(name)
    points = [(x, y / figure.scale) for x, y in _points(run.metrics, name)]
    if not points:
        return
    style = "line" if len(points) > 1 else "points"
    if figure.course == "last":
        yield Series(name=legend, points=points, style=style, color=color)
        return
    means = _means(run.metrics, name)
    if figure.course == "objective" and len(means) > _RECORDS_DRAWN:
        means = _joined(means)
    yield _series_of_means(legend, means, style, color)


def _held_out(run: Run, name: str) -> Iterator[Series]:
    for color, (dataset, records) in enumerate(
        list(run.evaluations.items())[:_MOST_DATASETS], start=1
    ):
        if points := _points(records, name):
            intervals = _intervals(records, name)
            yield Series(
                name=dataset, points=points, color=color, style="points", intervals=intervals
            )


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean over the steps of a record, or of several.

    Attributes:
      first: First of the steps.
      last: Last of the steps.
      value: The mean.
      weight: Weight of the value in a mean of several.
    """

    first: int
    last: int
    value: float
    weight: float

    @property
    def place(self) -> float:
        """The place among evaluations, which are of the weights after a number of steps.

        The loss of a step is that of the weights before it.
        """
        return (self.first + self.last) / 2 - 1


def _means(metrics: Iterable[Record], name: str) -> list[_Mean]:
    """Returns the values of a figure that is a mean over the steps since the record before."""
    found, before, tokens = [], 0, 0
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int) or name not in record:
            continue
        trained = record.get("trained_tokens", 0)
        weight = max(trained - tokens, 1)
        found.append(_Mean(before + 1, step, value_of(record, name), weight))
        before, tokens = step, trained
    return found


def _series_of_means(name: str, means: list[_Mean], style: Any, color: int = 0) -> Series:
    return Series(
        name=name,
        points=[(mean.place, mean.value) for mean in means],
        spans={mean.place: (mean.first, mean.last) for mean in means},
        style=style,
        color=color,
    )


def _noisy(run: Run, name: str) -> Iterator[Series]:
    """Yields what records say, and of many records the means of neighbours before them.

    A mean is of few records where there are few before it, so that an early fall is drawn as it
    was, and stands in the middle of the steps that it is of.
    """
    means = _means(run.metrics, name)
    if len(means) > _RECORDS_DRAWN:
        yield _series_of_means("training, each record", means, "faint")
        yield _series_of_means("training, means of neighbours", _joined(means), "line")
    elif means:
        style = "line" if len(means) >= 10 else "points"
        yield _series_of_means("training", means, style)


def _joined(means: list[_Mean]) -> list[_Mean]:
    """Returns means over stretches: single ones at first, then an eighth of what is before."""
    joined, start = [], 0
    largest = max(len(means) // 40, 1)
    while start < len(means):
        size = min(max(start // 8, 1), largest)
        part = means[start : start + size]
        known = [mean for mean in part if math.isfinite(mean.value)]
        weight = sum(mean.weight for mean in known)
        value = sum(mean.value * mean.weight for mean in known) / weight if known else math.nan
        joined.append(_Mean(part[0].first, part[-1].last, value, weight))
        start += size
    return joined


def _points(records: Iterable[Record], name: str) -> list[tuple[float, float]]:
    """Returns `(step, value)` of the records that have the figure; null becomes nan."""
    return [
        (record["step"], value_of(record, name))
        for record in records
        if name in record and isinstance(record.get("step"), int)
    ]


def _intervals(records: Iterable[Record], name: str) -> tuple[tuple[float, float, float], ...]:
    found = ((record["step"], interval_of(record, name)) for record in records)
    return tuple((step, *ends) for step, ends in found if ends is not None)
