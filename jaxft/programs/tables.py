"""Evaluation results as tables for a terminal and as JSON."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxft.config import RunConfig, to_dict
from jaxft.console import make_table, stdout
from jaxft.data.units import units_of
from jaxft.programs.comparison import Comparison
from jaxft.programs.evaluation import Evaluation
from jaxft.reporting.figures import figure_of, loss_unit, unit_words, words_of
from jaxft.reporting.intervals import Estimate
from jaxft.workdir.source import Source

# What decides which figures a model gets, beside the model and the data.
_SETTINGS = (
    "data.format",
    "data.columns",
    "data.text_split",
    "data.bad_rows",
    "data.control_tokens",
    "data.template",
    "data.thinking",
    "data.train_on",
    "data.max_length",
    "data.overlength",
    "data.packing",
    "eval.max_rows",
    "eval.answers",
    "eval.answer_rows",
    "eval.max_new_tokens",
    "train.seed",
    "model.dtypes",
    "model.quantise",
)


def print_evaluation(results: Mapping[str, Evaluation], config: RunConfig) -> None:
    """Prints what was evaluated on what, and a line for each figure with its interval.

    Args:
      results: By data set.
      config: As it was evaluated with.
    """
    first = next(iter(results.values()))
    _print_line(f"Model: {first.model.name}")
    _print_scope(results, config)
    table = make_table(["data", "measure", "value", "95 % interval", "over"], left=2)
    for name, evaluation in results.items():
        units = _units(name, config)
        noun = "rows" if units == "documents" else unit_words(units)
        for measure, estimate in evaluation.sums.estimates.items():
            title, form = _title(measure, evaluation, units), figure_of(measure, units).form
            over = f"{estimate.count:,} {noun}"
            table.add_row(name, title, form.format(estimate.value), _range(estimate, form), over)
            name = ""
        if (answers := evaluation.answers) is not None:
            share, form = answers.accuracy, figure_of(answers.metric, units).form
            title, over = words_of(answers.metric, units), f"{share.count:,} answers"
            table.add_row("", title, form.format(share.value), _range(share, form), over)
    stdout.print(table)


def print_comparison(
    results: Mapping[str, Comparison], name_a: str, name_b: str, config: RunConfig
) -> None:
    """Prints both models with the paired difference; retention says what was lost elsewhere."""
    first = next(iter(results.values()))
    _print_line(f"A: {name_a if first.a.model.checkpoints is None else first.a.model.name}")
    _print_line(f"B: {name_b if first.b.model.checkpoints is None else first.b.model.name}")
    _print_scope({name: comparison.a for name, comparison in results.items()}, config)
    for name, comparison in results.items():
        if comparison.documents:
            tokens = comparison.b.sums.weight.sum()
            _print_line(f"{name}: to B the same documents are {tokens:,.0f} trained tokens")
    table = make_table(["data", "measure", "A", "B", "B - A", "95 % interval"], left=2)
    for name, comparison in results.items():
        units = _units(name, config)
        for measure, difference in _differences(comparison):
            form = figure_of(measure, units).form
            a, b = (_figure(evaluation, measure) for evaluation in (comparison.a, comparison.b))
            signed = form.replace(":", ":+")
            cells = (form.format(a), form.format(b), signed.format(difference.value))
            title = _title(measure, comparison.a, units)
            table.add_row(name, title, *cells, _range(difference, signed))
            name = ""
    stdout.print(table)
    paired = [f"{c.documents:,} of {name}" for name, c in results.items() if c.documents]
    if paired:
        _print_line(
            "The models read the data as different tokens: bits per byte of the trained text are "
            f"paired by document ({', '.join(paired)}), and losses per token are not comparable."
        )
    if "retention" in results and len(results) > 1:
        _print_line(_gain_and_loss(results, config))


def _print_scope(results: Mapping[str, Evaluation], config: RunConfig) -> None:
    """Prints how much of which data was evaluated, and with which settings."""
    for path in dict.fromkeys(e.reference.path for e in results.values() if e.reference):
        _print_line(f"Reference: {path}")
    for name, evaluation in results.items():
        held_out, answers = evaluation.held_out, evaluation.answers
        rows, of_rows = len(held_out.numbers), len(held_out.rows)
        text = f"{name}: {', '.join(held_out.rows.statistics.read.sources)}; {rows:,} "
        text += f"of {of_rows:,} rows, drawn at random" if held_out.is_sample else "rows"
        text += f", {held_out.documents:,} documents"
        text += f", {evaluation.sums.weight.sum():,.0f} {unit_words(_units(name, config))}"
        if answers is not None and len(answers.right) < answers.of_rows:
            text += f"; answers to {len(answers.right):,} of {answers.of_rows:,} rows"
        _print_line(text)
    values, defaults = to_dict(config), to_dict(RunConfig())
    objective = [name for name in values if name.startswith("objective.")]
    settings = [
        f"{name}={values[name]}"
        for name in (*_SETTINGS, *objective)
        if values[name] != defaults.get(name)
    ]
    if settings:
        _print_line(f"Settings: {', '.join(settings)}")


def _print_line(text: str) -> None:
    stdout.print(text, markup=False, highlight=False)


def _units(name: str, config: RunConfig) -> str:
    return units_of(name, config.objective.objective.units)


def _differences(comparison: Comparison) -> Iterator[tuple[str, Estimate]]:
    yield from comparison.differences.items()
    if comparison.answers is not None and comparison.a.answers is not None:
        yield comparison.a.answers.metric, comparison.answers


def _figure(evaluation: Evaluation, measure: str) -> float:
    if measure in evaluation.sums.estimates:
        return evaluation.sums.estimates[measure].value
    return evaluation.answers.accuracy.value if evaluation.answers else float("nan")


def _title(measure: str, evaluation: Evaluation, units: str) -> str:
    words = words_of(measure, units)
    if measure == "loss":
        words += f", {loss_unit(units, is_sft=evaluation.sums.bytes is not None)}"
    return words


def _gain_and_loss(results: Mapping[str, Comparison], config: RunConfig) -> str:
    task = next(name for name in results if name != "retention")
    gained, lost = results[task], results["retention"]
    if gained.a.sums.bytes is None and "accuracy" in gained.differences:
        return _preference_and_loss(task, gained, lost, _units(task, config))
    name = "loss" if {"loss"} <= gained.differences.keys() & lost.differences.keys() else ""
    unit, name = ("nats a token", name) if name else ("bits a byte", "bits_per_byte")
    change = gained.differences[name].value, lost.differences[name].value
    verbs = ["loses" if value > 0 else "gains" for value in change]
    return (
        f"On {task} B {verbs[0]} {abs(change[0]):.4f} {unit} over A; outside its task it "
        f"{verbs[1]} {abs(change[1]):.4f}."
    )


def _preference_and_loss(task: str, gained: Comparison, lost: Comparison, units: str) -> str:
    name = "accuracy" if "accuracy" in gained.differences else "loss"
    change, bits = gained.differences[name].value, lost.differences["bits_per_byte"].value
    amount = f"{100 * abs(change):.1f} points" if name == "accuracy" else f"{abs(change):.4f}"
    verb = "loses" if bits > 0 else "gains"
    return (
        f"On {task} B is {amount} {'above' if change > 0 else 'below'} A in "
        f"{_title(name, gained.a, units)}; outside its task it {verb} {abs(bits):.4f} bits a byte."
    )


def record(
    results: Mapping[str, Mapping[str, Evaluation]],
    differences: Mapping[str, Comparison] | None = None,
    *,
    config: RunConfig,
) -> dict[str, Any]:
    """Returns for JSON all figures, the generated answers and the paired differences.

    Args:
      results: By model and by data set.
      differences: Of two models, by data set.
      config: As they were evaluated with.
    """
    content: dict[str, Any] = {
        model: {name: _jsonable(evaluation) for name, evaluation in evaluations.items()}
        for model, evaluations in results.items()
    }
    if differences:
        content["b - a"] = {
            name: {
                **{
                    measure: dataclasses.asdict(difference)
                    for measure, difference in comparison.differences.items()
                },
                "answers": comparison.answers and dataclasses.asdict(comparison.answers),
                "paired_documents": comparison.documents,
            }
            for name, comparison in differences.items()
        }
    content["models"] = {
        model: _model_record(next(iter(evaluations.values())).model)
        for model, evaluations in results.items()
    }
    content["config"] = to_dict(config)
    return content


def _model_record(source: Source) -> dict[str, Any]:
    """Says which model it was; `step` is null for one that is no checkpoint of a run."""
    if source.checkpoints is None:
        return {"path": source.path or str(source.folder), "step": None}
    path = str(source.checkpoints.parent)
    return {"path": path, "step": source.step, "choice": source.choice}


def _jsonable(evaluation: Evaluation) -> dict[str, Any]:
    record = evaluation.record()
    if evaluation.answers is not None:
        fields = dataclasses.asdict(evaluation.answers)
        record["answers"] = [
            {"prompt": prompt, "output": output, "reference": reference, "right": bool(right)}
            for prompt, output, reference, right in zip(
                fields["prompts"],
                fields["outputs"],
                fields["references"],
                fields["right"],
                strict=True,
            )
        ]
    return record


def _range(estimate: Estimate, form: str) -> str:
    """Returns the interval, or a dash where one row says nothing of the spread."""
    if not math.isfinite(estimate.low):
        return "–"
    return f"{form.format(estimate.low)} to {form.format(estimate.high)}"
