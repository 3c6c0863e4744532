"""Writes a run's report.html: one page with curves, answers, configuration and environment.

The page needs no network and no script to be read; the script in it only shows values on hover.
Every piece of a run may be missing.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig, to_dict, walk
from jaxft.files import read_jsonl, write_text
from jaxft.formatting import format_duration
from jaxft.reporting import charts
from jaxft.reporting.charts import Chart, Series, Unit
from jaxft.workdir.workdir import Workdir

_PRIMARY = "validation"
_ANSWERS = {"label_accuracy": "Label accuracy", "exact_match": "Exact match"}
_MEASURES: tuple[tuple[str, str, Unit], ...] = (
    ("loss", "loss, nats per token", "number"),
    ("perplexity", "perplexity", "number"),
    ("bits_per_byte", "bits per byte of text", "number"),
    ("token_accuracy", "token accuracy", "percent"),
    *((name, title.lower(), "percent") for name, title in _ANSWERS.items()),
)

Record = dict[str, Any]

# Records of a run beyond which means of neighbours are drawn before them.
_RECORDS_DRAWN = 60


@dataclass(frozen=True, slots=True)
class Exported:
    """The checkpoint of a run that an export takes.

    Attributes:
      step: Its step.
      measure: What it is the best by: `loss`, `answers`, or empty if none was evaluated.
    """

    step: int
    measure: str

    @property
    def reason(self) -> str:
        """Why it is this one."""
        names = {"loss": "the best by validation loss", "answers": "the best by right answers"}
        return names.get(self.measure, "the newest; none was evaluated")


def write_report(workdir: Workdir, exported: Exported | None = None) -> Path:
    """Writes the page from what the run has written so far, and returns its path.

    Args:
      workdir: The run.
      exported: The checkpoint that an export would take, if it is known.

    Raises:
      TrainingError: If the file cannot be written.
    """
    metrics = list(read_jsonl(workdir.metrics))
    evaluations, others = _by_dataset(read_jsonl(workdir.evaluations))
    sections = [
        _headline(metrics, evaluations, exported),
        _curves(metrics, evaluations),
        _evaluation_table(evaluations, others),
        _samples(read_jsonl(workdir.samples), exported),
        _configuration(_read_json(workdir.config)),
        _environment(_read_json(workdir.environment)),
    ]
    write_text(workdir.report, page(workdir.path.name, _subtitle(workdir), sections))
    return workdir.report


def page(title: str, subtitle: str, sections: Iterable[str], *, style: str = "") -> str:
    """Returns a page that needs nothing else, light and dark.

    Args:
      title: Plain text.
      subtitle: HTML, as the sections are; empty sections are left out.
      sections: In their order.
      style: What they need beside the style of reports.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)} · jaxft</title>\n'
        f"<style>{_STYLE}{charts.STYLE}{style}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{subtitle}</p></header>\n"
        + "\n".join(filter(None, sections))
        + f"\n</main>\n<script>{charts.SCRIPT}</script>\n</body></html>\n"
    )


def _subtitle(workdir: Workdir) -> str:
    config, machine = _read_json(workdir.config), _read_json(workdir.environment)
    parts = []
    if config.get("model.path"):
        verb = "trained from random weights as" if config.get("model.random_init") else "fine-tuned"
        parts.append(f"<b>{escape(short_name(config['model.path']))}</b> {verb}")
    if config.get("data.train"):
        parts.append(f"on <b>{escape(short_name(config['data.train']))}</b>")
    if machine.get("devices"):
        parts.append(f"· {machine['devices']} × {escape(str(machine.get('device_kind')))}")
    if machine.get("time"):
        parts.append(f"· {escape(str(machine['time'])[:10])}")
    return " ".join(parts)


def short_name(path: str) -> str:
    """Shortens local paths to their last part; hub ids and lists keep theirs."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path.count("/") > 1 else path


def _headline(
    metrics: list[Record], evaluations: dict[str, list[Record]], exported: Exported | None
) -> str:
    name, points = _primary(evaluations)
    tiles = [
        *_loss_tiles(name, points, metrics),
        *_answer_tiles(points, exported),
        *_export_tiles(exported),
        *_run_tiles(metrics),
    ]
    if not tiles:
        return '<p class="empty">This run has written no records yet.</p>'
    trouble = "".join(f'<p class="trouble">{escape(t)}</p>' for t in _troubles(metrics, points))
    return f'<section class="tiles">{"".join(tiles)}</section>{trouble}'


def _loss_tiles(name: str, points: list[Record], metrics: list[Record]) -> list[str]:
    scored = [p for p in points if _finite(p.get("loss"))]
    if scored:
        first, best = scored[0], min(scored, key=lambda p: p["loss"])
        change = best["loss"] - first["loss"]
        note = f"at step {best['step']:,}"
        if len(scored) > 1:
            note += f" · from {_number(first['loss'])}, {_signed(change)}"
        return [tile(f"Best {name} loss", _number(best["loss"]), note, lead=True)]
    losses = [r["loss"] for r in metrics if _finite(r.get("loss"))]
    if not losses:
        return []
    note = f"at the last step · first {_number(losses[0])}; no evaluation"
    return [tile("Training loss", _number(losses[-1]), note, lead=True)]


def _answer_tiles(points: list[Record], exported: Exported | None) -> list[str]:
    """Returns what the checkpoint that is exported gets right, or the last one evaluated."""
    tiles = []
    for name, title in _ANSWERS.items():
        scored = [p for p in points if _finite(_value(p.get(name)))]
        if not scored:
            continue
        shown = next((p for p in scored if exported and p["step"] == exported.step), scored[-1])
        note = f"at step {shown['step']:,} · 95 % interval {_interval(shown[name])}"
        if len(scored) > 1:
            note += f" · from {charts.format_value(_value(scored[0][name]), 'percent')}"
        value = charts.format_value(_value(shown[name]), "percent")
        tiles.append(tile(title, value, note, lead=True))
    return tiles


def _export_tiles(exported: Exported | None) -> list[str]:
    if exported is None:
        return []
    return [tile("Checkpoint to export", f"Step {exported.step:,}", exported.reason)]


def _run_tiles(metrics: list[Record]) -> list[str]:
    if not metrics:
        return []
    last = metrics[-1]
    speeds = [r["tokens_per_second"] for r in metrics if _finite(r.get("tokens_per_second"))]
    usages = [r["mfu"] for r in metrics if _finite(r.get("mfu"))]
    tiles = []
    if _finite(last.get("seconds")):
        length = format_duration(last["seconds"])
        tiles.append(tile("Training time", length, f"{last['step']:,} steps"))
    if _finite(last.get("tokens")):
        note = f"{_short(last.get('trained_tokens', 0))} of them trained"
        tiles.append(tile("Tokens", _short(last["tokens"]), note))
    if speeds:
        note = "tokens per second, median"
        if usages:
            note += f" · MFU {charts.format_value(statistics.median(usages), 'percent')}"
        tiles.append(tile("Throughput", f"{statistics.median(speeds):,.0f}", note))
    return tiles


def tile(title: str, value: str, note: str, *, lead: bool = False) -> str:
    """Returns a box with one figure, large."""
    return (
        f'<div class="tile{" lead" if lead else ""}"><h3>{escape(title)}</h3>'
        f"<strong>{escape(value)}</strong><p>{escape(note)}</p></div>"
    )


def _troubles(metrics: list[Record], points: list[Record]) -> Iterator[str]:
    steps = [r["step"] for r in metrics if "loss" in r and not _finite(r["loss"])]
    if steps:
        yield (
            f"The training loss was not finite in {len(steps)} record(s), first at step "
            f"{steps[0]:,}."
        )
    scored = [p for p in points if _finite(p.get("loss"))]
    if len(scored) > 1 and min(scored, key=lambda p: p["loss"])["step"] == 0:
        yield (
            "The validation loss was lowest before training, at step 0: by it no checkpoint is as "
            "good as the model that the run began with."
        )


def _curves(metrics: list[Record], evaluations: dict[str, list[Record]]) -> str:
    steps = _extent(metrics, evaluations)
    drawn = [
        _loss_chart(metrics, evaluations),
        *_evaluation_charts(evaluations),
        _metric_chart(metrics, "learning_rate", "Learning rate", "", "rate", from_zero=True),
        _metric_chart(metrics, "grad_norm", "Gradient norm", "before clipping", "number"),
        _throughput_chart(metrics),
        _mfu_chart(metrics),
        _memory_chart(metrics),
    ]
    figures = "".join(
        charts.render(dataclasses.replace(chart, steps=steps))
        for chart in drawn
        if chart is not None
    )
    return f'<section class="charts">{figures}</section>' if figures else ""


def _extent(
    metrics: list[Record], evaluations: dict[str, list[Record]]
) -> tuple[float, float] | None:
    """Returns the first and last step of all charts: a step stands at one place on the page."""
    records = [*metrics, *(record for points in evaluations.values() for record in points)]
    steps = [r["step"] for r in records if isinstance(r.get("step"), int)]
    return (min(steps), max(steps)) if steps else None


def _loss_chart(metrics: list[Record], evaluations: dict[str, list[Record]]) -> Chart | None:
    series, mark = [*_training_loss(metrics)], None
    name, records = _primary(evaluations)
    scored = _points(records, "loss")
    if scored:
        series.append(Series(name=name, points=scored, color=1, style="points"))
        finite = [p for p in scored if math.isfinite(p[1])]
        if len(finite) > 1:
            step, loss = min(finite, key=lambda p: p[1])
            mark = (step, loss, f"best {_number(loss)}")
    if not series:
        return None
    note = "nats per token"
    return Chart(title="Loss", note=note, series=series, decades=True, wide=True, mark=mark)


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean over the steps of a record, or of several.

    Attributes:
      first: First of the steps.
      last: Last of the steps.
      value: The mean.
      weight: Of the value in a mean of several.
    """

    first: int
    last: int
    value: float
    weight: float

    @property
    def place(self) -> float:
        """Where it stands among evaluations, which are of the weights after a number of steps.

        The loss of a step is that of the weights before it.
        """
        return (self.first + self.last) / 2 - 1


def _means(metrics: list[Record], name: str) -> list[_Mean]:
    """Returns the values of a figure that is a mean over the steps since the record before."""
    found, before, tokens = [], 0, 0
    for record in metrics:
        step = record.get("step")
        if not isinstance(step, int) or name not in record:
            continue
        value = record[name] if _finite(record[name]) else math.nan
        trained = record.get("trained_tokens", 0)
        found.append(_Mean(before + 1, step, value, max(trained - tokens, 1)))
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


def _training_loss(metrics: list[Record]) -> Iterator[Series]:
    """Yields what records say, and of many records the means of neighbours before them.

    A mean is of few records where there are few before it, so that an early fall is drawn as it
    was, and stands in the middle of the steps that it is of.
    """
    means = _means(metrics, "loss")
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


def _evaluation_charts(evaluations: dict[str, list[Record]]) -> list[Chart]:
    """Returns one chart per measure: loss if there are several data sets, and what was scored."""
    titles = {"loss": "Evaluation loss", "token_accuracy": "Token accuracy"} | _ANSWERS
    drawn = []
    for name, title in titles.items():
        series = [
            Series(
                name=dataset,
                points=_points(records, name),
                color=color,
                style="points",
                intervals=_intervals(records, name),
            )
            for color, (dataset, records) in enumerate(list(evaluations.items())[:5], start=1)
            if _points(records, name)
        ]
        enough = len(series) > 1 if name == "loss" else any(len(s.points) > 1 for s in series)
        if enough:
            unit = "number" if name == "loss" else "percent"
            note = "nats per token" if name == "loss" else "share"
            if len(series) == 1:
                note = series[0].name
            note += ", 95 % intervals"
            drawn.append(
                Chart(title=title, note=note, series=series, unit=unit, decades=name == "loss")
            )
    return drawn


def _metric_chart(
    metrics: list[Record], name: str, title: str, note: str, unit: Unit, *, from_zero: bool = False
) -> Chart | None:
    points = _points(metrics, name)
    if not points:
        return None
    style = "line" if len(points) > 1 else "points"
    series = Series(name=title.lower(), points=points, style=style)
    return Chart(title=title, note=note, series=[series], unit=unit, from_zero=from_zero)


def _throughput_chart(metrics: list[Record]) -> Chart | None:
    means = _means(metrics, "tokens_per_second")
    if not means:
        return None
    style = "line" if len(means) > 1 else "points"
    series = _series_of_means("throughput", means, style)
    return Chart(
        title="Throughput", note="tokens per second", series=[series], unit="count", from_zero=True
    )


def _mfu_chart(metrics: list[Record]) -> Chart | None:
    # Colours 0 and 1 are training and validation all over the page.
    names = {"mfu": ("causal attention counted once", 0), "mfu_full": ("counted in full", 3)}
    series = [
        _series_of_means(text, _means(metrics, name), "line", color)
        for name, (text, color) in names.items()
        if _means(metrics, name)
    ]
    if not series:
        return None
    note = "model FLOP/s of the devices' peak"
    return Chart(title="MFU", note=note, series=series, unit="percent", from_zero=True)


def _memory_chart(metrics: list[Record]) -> Chart | None:
    names = {"device_memory_peak": ("device, peak", 0), "host_memory": ("host", 3)}
    series = [
        Series(name=text, points=[(x, y / 2**30) for x, y in _points(metrics, name)], color=color)
        for name, (text, color) in names.items()
        if len(_points(metrics, name)) > 1
    ]
    if not series:
        return None
    return Chart(title="Memory", note="GiB", series=series, from_zero=True)


def _evaluation_table(evaluations: dict[str, list[Record]], others: dict[str, int]) -> str:
    rows = []
    scopes = [_scope(name, records[-1]) for name, records in evaluations.items()]
    scopes += [
        f"{count:,} earlier evaluation(s) of {name} were of other data, and are left out"
        for name, count in others.items()
    ]
    scope = "".join(f"{escape(text)}.<br>" for text in scopes if text)
    for dataset, records in evaluations.items():
        for name, title, unit in _MEASURES:
            scored = [r for r in records if _finite(_value(r.get(name)))]
            if scored:
                rows.append(_evaluation_row(dataset, title, unit, name, scored))
                dataset = ""
    if not rows:
        return ""
    return (
        f'<section><h2>Evaluation</h2><p class="dim">{scope}</p>'
        '<div class="scroll"><table class="numbers"><thead><tr>'
        "<th>Data set<th>Measure<th>First<th>Best<th>at step<th>Last<th>Change</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _scope(name: str, record: Record) -> str:
    """Says how much of a data set was evaluated; empty if the record does not know."""
    if "rows" not in record:
        return ""
    rows, of_rows = record["rows"], record.get("of_rows", record["rows"])
    text = f"{name}: {rows:,} rows" if rows == of_rows else f"{name}: {rows:,} of {of_rows:,} rows"
    sampled = "" if rows == of_rows else ", drawn at random"
    return (
        f"{text}{sampled}, {record.get('documents', 0):,} documents, "
        f"{record.get('weight', 0):,.0f} trained tokens"
    )


def _evaluation_row(dataset: str, title: str, unit: Unit, name: str, scored: list[Record]) -> str:
    values = [_value(r[name]) for r in scored]
    pick = max if unit == "percent" else min
    best = values.index(pick(values))
    change = values[-1] - values[0]
    signed = _signed(100 * change, 1) + " points" if unit == "percent" else _signed(change)
    better = change > 0 if unit == "percent" else change < 0
    tone = f' class="{"better" if better else "worse"}"' if change else ""
    cells = [charts.format_value(values[i], unit) for i in (0, best, -1)]
    if isinstance(scored[-1][name], dict):
        cells[2] += f" ({_interval(scored[-1][name])})"
    return (
        f"<tr><th>{escape(dataset)}<td>{escape(title)}<td>{cells[0]}<td>{cells[1]}"
        f"<td>{scored[best]['step']:,}<td>{cells[2]}"
        f"<td{tone}>{signed if len(values) > 1 else ''}</tr>"
    )


def _samples(records: Iterable[Record], exported: Exported | None) -> str:
    """Shows the first answer to each prompt beside that of the checkpoint that is exported."""
    prompts: dict[str, list[Record]] = {}
    for record in records:
        if isinstance(record.get("step"), int) and "prompt" in record:
            prompts.setdefault(str(record["prompt"]), []).append(record)
    cards = []
    for prompt, answers in prompts.items():
        answers.sort(key=lambda r: r["step"])
        first = answers[0]
        last = next((r for r in answers if exported and r["step"] == exported.step), answers[-1])
        panes = [_answer(f"Step {first['step']:,}", first.get("output"), "answer")]
        if last["step"] > first["step"]:
            title = f"Step {last['step']:,}"
            if exported is not None and last["step"] == exported.step:
                title += f", {exported.reason}"
            panes.append(_answer(title, last.get("output"), "answer last"))
        reference = last.get("reference")
        if reference is not None:
            panes.append(_answer("Reference", reference, "answer reference"))
        cards.append(
            f'<article><pre class="prompt">{escape(prompt)}</pre>'
            f'<div class="answers">{"".join(panes)}</div></article>'
        )
    if not cards:
        return ""
    return (
        "<section><h2>Answers before and after</h2>"
        f'<div class="samples">{"".join(cards)}</div></section>'
    )


def _answer(title: str, text: Any, classes: str) -> str:
    body = escape(str(text)) if text else "<em>empty</em>"
    return f'<div class="{classes}"><h3>{escape(title)}</h3><pre>{body}</pre></div>'


def _configuration(values: Record) -> str:
    if not values:
        return ""
    defaults, meanings = to_dict(RunConfig()), {i.path: i.meaning for i in walk(RunConfig())}
    changed = [key for key in values if values[key] != defaults.get(key)]
    chosen = "".join(
        f"<tr><th><code>{escape(key)}</code><td><code>{_literal(values[key])}</code>"
        f'<td class="dim"><code>{_literal(defaults.get(key))}</code>'
        f"<td>{escape(meanings.get(key, 'Not known to this version.'))}</tr>"
        for key in changed
    )
    every = "".join(
        f"<tr{' class=changed' if key in changed else ''}><th><code>{escape(key)}</code>"
        f"<td><code>{_literal(values[key])}</code><td>{escape(meanings.get(key, ''))}</tr>"
        for key in values
    )
    return (
        '<section><h2>Configuration</h2><p class="dim">Keys that differ from their default.</p>'
        '<div class="scroll"><table class="config"><thead><tr><th>Key<th>Value<th>Default'
        f"<th>Meaning</tr></thead><tbody>{chosen}</tbody></table></div><details><summary>All "
        f'{len(values)} keys</summary><div class="scroll"><table class="config"><tbody>{every}'
        "</tbody></table></div></details></section>"
    )


def _environment(values: Record) -> str:
    if not values:
        return ""
    packages = values.get("packages") or {}
    machine = {
        "Devices": f"{values.get('devices')} × {values.get('device_kind')}",
        "Back end": values.get("backend"),
        "Processes": values.get("processes"),
        "Host": f"{values.get('system')}, {values.get('cpus')} CPUs"
        + (f", {values['host_memory'] / 2**30:.0f} GiB" if values.get("host_memory") else ""),
        "Python": values.get("python"),
        "Started": str(values.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
        "Commit of jaxft": values.get("commit"),
    }
    rows = [
        f"<div><dt>{escape(str(name))}<dd>{escape(str(value))}</div>"
        for name, value in (*machine.items(), *packages.items())
        if value not in (None, "")
    ]
    return f'<section><h2>Environment</h2><dl class="facts">{"".join(rows)}</dl></section>'


def _by_dataset(records: Iterable[Record]) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Groups evaluations, the primary set first; of two at one step the later one counts.

    Returns:
      Those of the data that was evaluated last, and how many there are of other data.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            groups.setdefault(str(record.get("dataset", _PRIMARY)), {})[record["step"]] = record
    kept, others = {}, {}
    for name in sorted(groups, key=lambda name: name != _PRIMARY):
        found = [groups[name][step] for step in sorted(groups[name])]
        digest = found[-1].get("digest")
        kept[name] = [record for record in found if record.get("digest") == digest]
        if len(kept[name]) < len(found):
            others[name] = len(found) - len(kept[name])
    return kept, others


def _primary(evaluations: dict[str, list[Record]]) -> tuple[str, list[Record]]:
    return next(iter(evaluations.items()), (_PRIMARY, []))


def _points(records: list[Record], name: str) -> list[tuple[float, float]]:
    """Returns `(step, value)` of the records that have the figure; null becomes nan."""
    return [
        (record["step"], value if _finite(value := _value(record[name])) else math.nan)
        for record in records
        if name in record and isinstance(record.get("step"), int)
    ]


def _intervals(records: list[Record], name: str) -> tuple[tuple[float, float, float], ...]:
    found = []
    for record in records:
        figure = record.get(name)
        low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
        if isinstance(figure, dict):
            low, high = figure.get("low"), figure.get("high")
        if _finite(low) and _finite(high):
            found.append((record["step"], low, high))
    return tuple(found)


def _value(figure: Any) -> Any:
    return figure.get("value") if isinstance(figure, dict) else figure


def _interval(figure: Any) -> str:
    if not isinstance(figure, dict) or not _finite(figure.get("low")):
        return "unknown"
    count, of_rows = figure.get("count"), figure.get("of_rows")
    of = f" of {of_rows:,}" if of_rows and of_rows != count else ""
    count = f", {count:,}{of} rows" if count else ""
    return f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f} %{count}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float) -> str:
    return charts.format_value(value, "number")


def _signed(value: float, decimals: int = 3) -> str:
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _short(count: float) -> str:
    """Returns 12,345 as it is, and 1.23 M from a million on."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def _literal(value: Any) -> str:
    return escape(str(value)) if value != "" and value is not None else "–"


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


_STYLE = """
:root { --page: #f6f6f3; --surface: #fff; --ink: #14140f; --second: #52514e; --muted: #7d7b74;
  --grid: #ebeae5; --axis: #c6c5bd; --good: #157f3c; --bad: #b3261e; --tint: #eef4fc;
  --c0: #2a78d6; --c1: #e0602a; --c2: #1a9a6c; --c3: #7a5fd0; --c4: #c98500; --c5: #c9487e; }
@media (prefers-color-scheme: dark) { :root { --page: #0f0f0e; --surface: #1a1a19; --ink: #f5f5f2;
  --second: #c3c2b7; --muted: #918f86; --grid: #2a2a28; --axis: #45443f; --good: #57c17b;
  --bad: #f2857c; --tint: #1b2735; --c0: #4a94ea; --c1: #ee7a45; --c2: #2cb583; --c3: #9d8cf0;
  --c4: #d9a020; --c5: #e0709c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }
header { margin-bottom: 1.6rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
header p { margin: .35rem 0 0; color: var(--second); overflow-wrap: anywhere; }
header b { color: var(--ink); font-weight: 600; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.2rem; letter-spacing: -.01em; }
h3 { margin: 0; font-size: .82rem; font-weight: 500; color: var(--second); }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.tile, .chart, article, .scroll, .facts { background: var(--surface); border-radius: 12px;
  box-shadow: 0 0 0 1px var(--grid); }
.tile { padding: 1rem 1.15rem; break-inside: avoid; }
.tile strong { display: block; margin: .15rem 0; font-size: 1.75rem; line-height: 1.2;
  font-weight: 650; letter-spacing: -.02em; }
.tile.lead { background: var(--tint); }
.tile p { margin: 0; font-size: .82rem; color: var(--muted); }
.trouble { padding: .8rem 1.15rem; border-left: 4px solid var(--bad); background: var(--surface); }
.charts { display: grid; gap: 1rem; margin-top: 1rem; grid-template-columns: 1fr 1fr; }
.chart { padding: 1.1rem 1.15rem .4rem; }
.chart.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .55rem 1.15rem .55rem 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--grid); font-weight: 400; }
th:first-child, td:first-child { padding-left: 1.15rem; }
thead th { border-top: 0; color: var(--muted); font-size: .82rem; white-space: nowrap; }
tbody th { font-weight: 600; }
.numbers td:nth-child(n+3), .numbers th:nth-child(n+3) { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.better { color: var(--good); } .worse { color: var(--bad); }
code, pre { font-family: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: .86em; }
code { overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; }
.config th { white-space: nowrap; }
.config td:nth-child(2) { min-width: 8em; max-width: 22em; }
.config td:last-child { color: var(--second); min-width: 16em; }
.changed th, .changed td { background: var(--tint); }
.dim { color: var(--muted); } p.dim { margin: -.5rem 0 .8rem; font-size: .86rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--second); margin-bottom: .7rem; }
.samples { display: grid; gap: 1rem; }
article { overflow: hidden; break-inside: avoid; }
.prompt { padding: .9rem 1.15rem; max-height: 16em; overflow: auto; }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  border-top: 1px solid var(--grid); }
.answer { padding: .8rem 1.15rem 1rem; max-height: 22em; overflow: auto; }
.answer + .answer { border-left: 1px solid var(--grid); }
.answer h3 { margin-bottom: .3rem; } .answer.last { background: var(--tint); }
.answer em { color: var(--muted); } .reference pre { color: var(--second); }
.facts { display: grid; gap: .9rem 1.5rem; margin: 0; padding: 1.1rem 1.15rem;
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
dt { font-size: .8rem; color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere;
  font-size: .92rem; }
@media (max-width: 720px) { main { padding: 1.4rem .9rem 3rem; } .charts { grid-template-columns:
  minmax(0, 1fr); } .tiles { grid-template-columns: 1fr 1fr; gap: .7rem; } .tile strong {
  font-size: 1.4rem; } .answers { grid-auto-flow: row; } .answer + .answer { border-left: 0;
  border-top: 1px solid var(--grid); } .config td:last-child { min-width: 12em; } }
@media print { :root { --page: #fff; --surface: #fff; --ink: #000; --second: #333; --muted: #555;
  --grid: #ddd; --axis: #999; --tint: #f1f4f8; } main { max-width: none; padding: 0; }
  .prompt, .answer { max-height: none; } .scroll { overflow: visible; } }
"""
