"""Evaluation results as tables for a terminal and as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft.evaluation import Comparison, Evaluation
from jaxft.intervals import Estimate
from jaxft.workdir import write_text

# Results go to stdout; progress goes to stderr.
output = Console()


def print_evaluation(results: Mapping[str, Evaluation]) -> None:
    """Prints a line for each data set, intervals in brackets."""
    answered = [e.answers for e in results.values() if e.answers is not None]
    columns = ["data", "tokens", "loss (nats)", "perplexity", "token accuracy"]
    columns += [answered[0].metric.replace("_", " ")] if answered else []
    table = _table(columns)
    for name, evaluation in results.items():
        rows = evaluation.rows
        cells = [name, f"{rows.weight.sum():,.0f}", _number(rows.loss)]
        cells += [_number(rows.perplexity, "{:.4g}"), _share(rows.token_accuracy)]
        if answered:
            cells.append(_share(evaluation.answers.accuracy) if evaluation.answers else "–")
        table.add_row(*cells)
    output.print(table)
    output.print("[dim]In brackets: 95 % intervals, over rows or answers.[/dim]")


def print_comparison(results: Mapping[str, Comparison], name_a: str, name_b: str) -> None:
    """Prints both models with the paired difference; retention says what was lost elsewhere."""
    output.print(f"A: {name_a}\nB: {name_b}", markup=False, highlight=False)
    table = _table(["data", "measure", "A", "B", "B - A"])
    for name, comparison in results.items():
        a, b = comparison.a, comparison.b
        loss = comparison.loss
        table.add_row(name, "loss", _number(a.rows.loss), _number(b.rows.loss), _signed(loss))
        if comparison.answers is not None and a.answers and b.answers:
            metric = a.answers.metric.replace("_", " ")
            shares = _share(a.answers.accuracy), _share(b.answers.accuracy)
            table.add_row("", metric, *shares, _signed(comparison.answers, percent=True))
    output.print(table)
    if "retention" in results and len(results) > 1:
        output.print(_gain_and_loss(results))


def _gain_and_loss(results: Mapping[str, Comparison]) -> str:
    task = next(name for name in results if name != "retention")
    gained, lost = -results[task].loss.value, results["retention"].loss.value
    return (
        f"On {task} B gains {gained:+.4f} nats a token over A; outside its task it "
        f"{'loses' if lost > 0 else 'gains'} {abs(lost):.4f}."
    )


def write_json(
    file: str,
    results: Mapping[str, Mapping[str, Evaluation]],
    differences: Mapping[str, Comparison] | None = None,
) -> None:
    """Writes all figures, the generated answers, and the paired differences, to a file."""
    content: dict[str, Any] = {
        model: {name: _jsonable(evaluation) for name, evaluation in evaluations.items()}
        for model, evaluations in results.items()
    }
    if differences:
        content["b - a"] = {
            name: {
                "loss": dataclasses.asdict(comparison.loss),
                "answers": comparison.answers and dataclasses.asdict(comparison.answers),
            }
            for name, comparison in differences.items()
        }
    write_text(Path(file), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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


def _table(columns: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _number(estimate: Estimate, form: str = "{:.4f}") -> str:
    value, low, high = (form.format(x) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _signed(estimate: Estimate, *, percent: bool = False) -> str:
    form = "{:+.1%}" if percent else "{:+.4f}"
    low, high = form.format(estimate.low), form.format(estimate.high)
    return f"{form.format(estimate.value)} [{low}, {high}]"
