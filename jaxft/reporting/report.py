"""Writes a run's report.html: one page with curves, answers, configuration and environment.

The page needs no network and no script to be read; the script in it only shows values on hover.
Every piece of a run may be missing.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.config import ObjectiveConfig
from jaxft.errors import ConfigError
from jaxft.files import read_jsonl, write_text
from jaxft.formatting import format_count, format_duration
from jaxft.reporting.charts import Unit, format_value, plot
from jaxft.reporting.curves import make_charts
from jaxft.reporting.figures import (
    PRIMARY,
    Record,
    Run,
    interval_of,
    is_finite,
    value_of,
    words_of,
)
from jaxft.reporting.goodput import spent
from jaxft.reporting.pages import Key, Tile, keys_of, render, short_name
from jaxft.workdir.goodput import add_up
from jaxft.workdir.workdir import Workdir

# Shares that a reader looks for first.
_LEADING = ("accuracy", "label_accuracy", "exact_match")


@dataclass(frozen=True, slots=True)
class Exported:
    """The checkpoint of a run that an export takes.

    Attributes:
      step: The step that it was written after.
      measure: The figure by which it is the best: `loss`, `answers`; empty if none was evaluated.
    """

    step: int
    measure: str

    @property
    def reason(self) -> str:
        """The reason why it is this one."""
        if not self.measure:
            return "the newest; none was evaluated"
        names = {"loss": "validation loss", "answers": "right answers"}
        return f"the best by {names.get(self.measure, self.measure)}"


def write_report(workdir: Workdir, exported: Exported | None = None) -> Path:
    """Writes the page from what the run has written so far, and returns its path.

    Args:
      workdir: The run.
      exported: The checkpoint that an export would take, if it is known.

    Raises:
      TrainingError: If the file cannot be written.
    """
    config, machine = _read_json(workdir.config), _read_json(workdir.environment)
    evaluations, others = _by_dataset(read_jsonl(workdir.evaluations))
    objective = str(config.get("objective.name") or "sft")
    run = Run(
        metrics=list(read_jsonl(workdir.metrics)),
        evaluations=evaluations,
        units=_units(objective),
        is_sft=objective == "sft",
    )
    tiles_shown = [
        *_loss_tiles(run),
        *_share_tiles(run, exported),
        *_export_tiles(exported),
        *_speed_tiles(run.metrics),
    ]
    keys = keys_of(config)
    page = render(
        "report.html",
        title=workdir.name(config),
        model=short_name(config.get("model.path") or ""),
        verb="trained from random weights as" if config.get("model.random_init") else "fine-tuned",
        method="" if run.is_sft else objective,
        method_keys=_method_keys(keys, objective),
        data=short_name(config.get("data.train") or ""),
        where=list(_where(machine)),
        tiles_shown=tiles_shown,
        troubles=list(_troubles(run)),
        spent=list(spent(add_up(read_jsonl(workdir.goodput)))),
        plots=[plot(chart) for chart in make_charts(run)],
        measures=list(_measures(run)),
        scopes=list(_scopes(run, others)),
        samples=_samples(read_jsonl(workdir.samples), exported, run.units),
        keys=keys,
        facts=_facts(machine),
    )
    write_text(workdir.report, page)
    return workdir.report


def _units(objective: str) -> str:
    """Returns what an objective takes from the data; empty if this installation lacks it."""
    try:
        return ObjectiveConfig(name=objective).objective.units
    except ConfigError:
        return ""


def _method_keys(keys: Iterable[Key], objective: str) -> str:
    """Returns the keys of the objective that differ from their default: `beta 0.2, robust True`."""
    prefix = f"objective.{objective.rpartition('.')[2]}."
    changed = [key for key in keys if key.changed and key.path.startswith(prefix)]
    return ", ".join(f"{key.path.removeprefix(prefix)} {key.value}" for key in changed)


def _where(machine: Record) -> Iterator[str]:
    if machine.get("devices"):
        yield f"· {machine['devices']} × {machine.get('device_kind')}"
    if machine.get("time"):
        yield f"· {str(machine['time'])[:10]}"


def _loss_tiles(run: Run) -> Iterator[Tile]:
    name, points = run.primary
    scored = [p for p in points if is_finite(p.get("loss"))]
    if scored:
        first, best = scored[0], min(scored, key=lambda p: p["loss"])
        change = best["loss"] - first["loss"]
        note = f"at step {best['step']:,}"
        if len(scored) > 1:
            note += f" · from {_number(first['loss'])}, {_signed(change)}"
        yield Tile(f"Best {name} loss", _number(best["loss"]), note, lead=True)
        return
    losses = [r["loss"] for r in run.metrics if is_finite(r.get("loss"))]
    if losses:
        note = f"at the last step · first {_number(losses[0])}; no evaluation"
        yield Tile("Training loss", _number(losses[-1]), note, lead=True)


def _share_tiles(run: Run, exported: Exported | None) -> Iterator[Tile]:
    """Yields what the checkpoint that is exported gets right, or the last one evaluated."""
    _, points = run.primary
    for name in _LEADING:
        title = run.figure(name).title
        scored = [p for p in points if math.isfinite(value_of(p, name))]
        if scored:
            shown = next((p for p in scored if exported and p["step"] == exported.step), scored[-1])
            value = format_value(value_of(shown, name), "percent")
            yield Tile(title, value, _share_note(name, shown, scored[0]), lead=True)
            continue
        trained = [value_of(r, name) for r in run.metrics if math.isfinite(value_of(r, name))]
        if trained:
            note = "in training, at the last record; no evaluation"
            yield Tile(title, format_value(trained[-1], "percent"), note, lead=True)


def _share_note(name: str, shown: Record, first: Record) -> str:
    parts = [f"at step {shown['step']:,}"]
    if interval := _interval(shown, name, "percent"):
        parts.append(f"95 % interval {interval}")
    if first is not shown:
        when = f"at step {first['step']:,}" if first["step"] else "before training"
        parts.append(f"{when} {format_value(value_of(first, name), 'percent')}")
    return " · ".join(parts)


def _export_tiles(exported: Exported | None) -> Iterator[Tile]:
    if exported is not None:
        yield Tile("Checkpoint to export", f"Step {exported.step:,}", exported.reason)


def _speed_tiles(metrics: list[Record]) -> Iterator[Tile]:
    if not metrics:
        return
    last = metrics[-1]
    speeds = [r["tokens_per_second"] for r in metrics if is_finite(r.get("tokens_per_second"))]
    usages = [r["mfu"] for r in metrics if is_finite(r.get("mfu"))]
    if is_finite(last.get("seconds")):
        yield Tile("Training time", format_duration(last["seconds"]), f"{last['step']:,} steps")
    if is_finite(last.get("tokens")):
        note = f"{format_count(last.get('trained_tokens', 0))} of them trained"
        yield Tile("Tokens", format_count(last["tokens"]), note)
    if speeds:
        note = "tokens per second, median"
        if usages:
            note += f" · MFU {format_value(statistics.median(usages), 'percent')}"
        yield Tile("Throughput", f"{statistics.median(speeds):,.0f}", note)


def _troubles(run: Run) -> Iterator[str]:
    steps = [r["step"] for r in run.metrics if "loss" in r and not is_finite(r["loss"])]
    if steps:
        yield (
            f"The training loss was not finite in {len(steps)} record(s), first at step "
            f"{steps[0]:,}."
        )
    scored = [p for p in run.primary[1] if is_finite(p.get("loss"))]
    if len(scored) > 1 and min(scored, key=lambda p: p["loss"])["step"] == 0:
        yield (
            "The validation loss was lowest before training, at step 0: by it no checkpoint is as "
            "good as the model that the run began with."
        )


@dataclass(frozen=True, slots=True)
class _Measure:
    """A row of the table of evaluations: one figure on one data set, as text.

    Attributes:
      dataset: Name of the data set; empty below its first row.
      title: Name of the figure.
      first: The first value.
      best: The best value; empty if neither high nor low is better.
      best_step: Step of the best value.
      last: The last value.
      interval: The interval of the last value; empty if it has none.
      change: The last value less the first; empty if there is only one.
      tone: "better", "worse" or empty.
    """

    dataset: str
    title: str
    first: str
    best: str
    best_step: str
    last: str
    interval: str
    change: str
    tone: str


def _measures(run: Run) -> Iterator[_Measure]:
    names = run.names()
    for dataset, records in run.evaluations.items():
        shown = dataset
        for name in names:
            scored = [r for r in records if math.isfinite(value_of(r, name))]
            if scored:
                yield _measure(run, shown, name, scored)
                shown = ""


def _measure(run: Run, dataset: str, name: str, scored: list[Record]) -> _Measure:
    figure = run.figure(name)
    values = [value_of(record, name) for record in scored]
    texts = [format_value(value, figure.unit) for value in values]
    best = None
    if figure.better:
        best = values.index(max(values) if figure.better == "high" else min(values))
    change = values[-1] - values[0]
    tone = ""
    if change and figure.better:
        tone = "better" if (change > 0) == (figure.better == "high") else "worse"
    percent = figure.unit == "percent"
    signed = f"{_signed(100 * change, 1)} points" if percent else _signed(change)
    title = words_of(name, run.units)
    return _Measure(
        dataset=dataset,
        title=f"{title}, {run.loss_unit}" if name == "loss" else title,
        first=texts[0],
        best="" if best is None else texts[best],
        best_step="" if best is None else f"{scored[best]['step']:,}",
        last=texts[-1],
        interval=_interval(scored[-1], name, figure.unit),
        change=signed if len(values) > 1 else "",
        tone=tone,
    )


def _scopes(run: Run, others: dict[str, int]) -> Iterator[str]:
    """Yields how much of each data set was evaluated, where its records know."""
    for name, records in run.evaluations.items():
        if "rows" in records[-1]:
            yield _scope(name, records[-1], run.unit)
    for name, count in others.items():
        yield f"{count:,} earlier evaluation(s) of {name} were of other data, and are left out"


def _scope(name: str, record: Record, unit: str) -> str:
    rows, of_rows = record["rows"], record.get("of_rows", record["rows"])
    text = f"{name}: {rows:,} rows" if rows == of_rows else f"{name}: {rows:,} of {of_rows:,} rows"
    sampled = "" if rows == of_rows else ", drawn at random"
    return (
        f"{text}{sampled}, {record.get('documents', 0):,} documents, "
        f"{record.get('weight', 0):,.0f} {unit}"
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """A text beside others of the same prompt.

    Attributes:
      title: The words above it.
      text: The text; may be empty.
      kind: The style: empty, "last" or "reference".
    """

    title: str
    text: str
    kind: str = ""


def _samples(
    records: Iterable[Record], exported: Exported | None, units: str
) -> list[dict[str, Any]]:
    """Returns the first answer to each prompt beside that of the checkpoint that is exported."""
    prompts: dict[str, list[Record]] = {}
    for record in records:
        if isinstance(record.get("step"), int) and "prompt" in record:
            prompts.setdefault(str(record["prompt"]), []).append(record)
    return [
        {"prompt": prompt, "answers": list(_answers(answers, exported, units))}
        for prompt, answers in prompts.items()
    ]


def _answers(answers: list[Record], exported: Exported | None, units: str) -> Iterator[_Answer]:
    answers.sort(key=lambda r: r["step"])
    first = answers[0]
    last = next((r for r in answers if exported and r["step"] == exported.step), answers[-1])
    yield _Answer(f"Step {first['step']:,}", _text(first.get("output")))
    if last["step"] > first["step"]:
        title = f"Step {last['step']:,}"
        if exported is not None and last["step"] == exported.step:
            title += f", {exported.reason}"
        yield _Answer(title, _text(last.get("output")), "last")
    if last.get("reference") is not None:
        title = "Chosen answer" if units == "pairs" else "Reference"
        yield _Answer(title, _text(last["reference"]), "reference")


def _text(value: Any) -> str:
    return str(value) if value else ""


def _facts(values: Record) -> dict[str, Any]:
    """Returns what is known of the machine and the packages, by name."""
    if not values:
        return {}
    memory = values.get("host_memory")
    machine = {
        "Devices": f"{values.get('devices')} × {values.get('device_kind')}",
        "Back end": values.get("backend"),
        "Processes": values.get("processes"),
        "Host": f"{values.get('system')}, {values.get('cpus')} CPUs"
        + (f", {memory / 2**30:.0f} GiB" if memory else ""),
        "Python": values.get("python"),
        "Started": str(values.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
        "Commit of jaxft": values.get("commit"),
        **(values.get("packages") or {}),
    }
    return {name: value for name, value in machine.items() if value not in (None, "")}


def _by_dataset(records: Iterable[Record]) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Groups evaluations, the primary set first; of two at one step the later one counts.

    Returns:
      Those of the data that was evaluated last, and how many there are of other data.
    """
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        if isinstance(record.get("step"), int):
            groups.setdefault(str(record.get("dataset", PRIMARY)), {})[record["step"]] = record
    kept, others = {}, {}
    for name in sorted(groups, key=lambda name: name != PRIMARY):
        found = [groups[name][step] for step in sorted(groups[name])]
        digest = found[-1].get("digest")
        kept[name] = [record for record in found if record.get("digest") == digest]
        if len(kept[name]) < len(found):
            others[name] = len(found) - len(kept[name])
    return kept, others


def _interval(record: Record, name: str, unit: Unit) -> str:
    """Returns `70.0 to 80.0 %, 200 of 1,000 rows`; empty if the figure has no interval."""
    ends = interval_of(record, name)
    if ends is None:
        return ""
    low, high = (format_value(end, unit) for end in ends)
    text = f"{low.removesuffix(' %')} to {high}"
    figure = record[name]
    if not isinstance(figure, dict) or not figure.get("count"):
        return text
    count, of_rows = figure["count"], figure.get("of_rows")
    of = f" of {of_rows:,}" if of_rows and of_rows != count else ""
    return f"{text}, {count:,}{of} rows"


def _number(value: float) -> str:
    return format_value(value, "number")


def _signed(value: float, decimals: int = 3) -> str:
    return f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
