"""Held-out data, and what the evaluation step makes of it: sums of rows or of units."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxft import data
from jaxft.data import Batch, TokenRows
from jaxft.models.module import Params
from jaxft.reporting.figures import figure_of, words_of
from jaxft.reporting.intervals import Estimate, ratio
from jaxft.training.feeding import put
from jaxft.training.program import Evaluator

NAN = float("nan")


@dataclass(frozen=True)
class HeldOut:
    """The rows of a data set that are evaluated: all of them, or a sample.

    Attributes:
      rows: All rows.
      numbers: Numbers of the rows that are evaluated, in order.
      bytes: Length of the trained text of each, int64 `[numbers]`; None of preferences, whose
        loss is not of text.
    """

    rows: TokenRows
    numbers: Sequence[int]
    bytes: np.ndarray | None

    @functools.cached_property
    def documents(self) -> int:
        """Documents that stand in these rows."""
        return self.rows.count_documents(self.numbers)

    @property
    def digest(self) -> str:
        """Hash of all that is evaluated: figures with other digests are of other data."""
        return f"{self.rows.digest[:12]}-{len(self.numbers)}"

    @property
    def is_sample(self) -> bool:
        """Whether there are more rows."""
        return len(self.numbers) < len(self.rows)

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of it."""
        return {
            "rows": len(self.numbers),
            "of_rows": len(self.rows),
            "documents": self.documents,
            "digest": self.digest,
        }


def take_rows(rows: TokenRows, tokenizer: Any, *, maximum: int, seed: int) -> HeldOut:
    """Returns the rows to evaluate.

    Args:
      rows: Held-out data.
      tokenizer: The one that made them.
      maximum: Size of a sample; 0 takes all rows.
      seed: Of the sample.
    """
    numbers = data.sample_numbers(len(rows), maximum, seed=seed)
    is_text = rows.unit_size == 1
    return HeldOut(rows, numbers, data.count_bytes(rows, tokenizer, numbers) if is_text else None)


@dataclass(frozen=True)
class UnitSums:
    """The evaluation step's sums of each unit, float64 `[n]`, and the means made of them.

    Intervals are over units: over rows, which documents share, where nothing but documents is
    learnt, and over pairs or labelled answers in preferences.

    Attributes:
      total: Loss of each unit.
      weight: Divisor of losses: trained tokens of a row, or 1.
      figures: Sum and count of every other figure, by name.
      bytes: Length of each row's trained text; None where the loss is not in nats per token.
      numbers: Place of each unit: number of the row, and of the unit in it, int64 `[n, 2]`.
      shared: Names of figures of which all units have one, such as KTO's `kl`.
    """

    total: np.ndarray
    weight: np.ndarray
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    bytes: np.ndarray | None = None
    numbers: np.ndarray | None = None
    shared: frozenset[str] = frozenset()

    @functools.cached_property
    def loss(self) -> Estimate:
        """Nats per trained token, or loss per unit."""
        return ratio(self.total, self.weight)

    @functools.cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every figure with its interval, by name: `loss`, the objective's own and what follows.

        Of a loss in nats per token these are `perplexity`, the exponential of it and of its
        interval, and `bits_per_byte`, bits for each byte of the trained text, whatever its tokens:
        not a number where trained tokens stand for no text.
        """
        own = {name: self._estimate(name) for name in self.figures}
        if self.bytes is None:
            return {"loss": self.loss, **own}
        bits = ratio(self.total / math.log(2), self.bytes)
        return {"loss": self.loss, "perplexity": self._perplexity, **own, "bits_per_byte": bits}

    def _estimate(self, name: str) -> Estimate:
        found = ratio(*self.figures[name])
        # One number of all units together has no spread over units.
        return found if name not in self.shared else Estimate(found.value, NAN, NAN, found.count)

    @property
    def by_name(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Sums and counts of the loss and of every figure, `[n]` each, by name."""
        return {"loss": (self.total, self.weight), **self.figures}

    @property
    def _perplexity(self) -> Estimate:
        loss = self.loss
        value, low, high = (math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
        return Estimate(value, low, high, loss.count)

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of it."""
        record: dict[str, Any] = {"weight": float(self.weight.sum())}
        for name, estimate in self.estimates.items():
            record |= {
                name: estimate.value,
                f"{name}_low": estimate.low,
                f"{name}_high": estimate.high,
            }
        return record


def evaluate_rows(
    evaluator: Evaluator, params: Params, held_out: HeldOut, *, batch_size: int
) -> UnitSums:
    """Runs the evaluation step over rows; memory does not grow with their number.

    Args:
      evaluator: Step and placement.
      params: In the evaluator's shardings.
      held_out: The rows.
      batch_size: Rows at a time; rounded up to what the mesh splits evenly. It does not change
        the result.
    """
    columns = _whole_columns(evaluator, params, held_out, batch_size)
    parts = list(_run(evaluator, evaluator.eval_step, params, held_out, batch_size, columns))
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays).astype(np.float64), *parts)
    count = len(held_out.numbers)
    total, weight, figures = jax.tree.map(lambda x: x[:count], joined)
    numbers = np.asarray(held_out.numbers, np.int64)
    if total.ndim == 1:  # of rows
        places = np.stack([numbers, np.zeros_like(numbers)], axis=1)
        sizes = held_out.bytes if evaluator.objective.objective.is_cross_entropy else None
        sizes = None if sizes is None else sizes.astype(np.float64)
        return UnitSums(total, weight, figures, sizes, places)
    is_unit = weight > 0
    row, unit = np.nonzero(is_unit)
    places = np.stack([numbers[row], unit], axis=1)
    figures = {name: (a[is_unit], b[is_unit]) for name, (a, b) in figures.items()}
    shared = frozenset(columns)
    return UnitSums(total[is_unit], weight[is_unit], figures, None, places, shared)


def _whole_columns(
    evaluator: Evaluator, params: Params, held_out: HeldOut, batch_size: int
) -> dict[str, float]:
    """Returns what the loss must know of all rows, by the name of its column."""
    if evaluator.objective.objective.whole is None:
        return {}
    parts = list(_run(evaluator, evaluator.whole_step, params, held_out, batch_size, {}))
    sums = jax.tree.map(lambda *values: float(np.sum(values, dtype=np.float64)), *parts)
    return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}


def _run(
    evaluator: Evaluator,
    step: Any,
    params: Params,
    held_out: HeldOut,
    batch_size: int,
    columns: Mapping[str, float],
) -> Iterator[Any]:
    """Yields what a step makes of each batch of rows, on the host.

    Args:
      evaluator: Gives the placement.
      step: `(params, batch) -> arrays`.
      params: In the evaluator's shardings.
      held_out: The rows.
      batch_size: Rows at a time, before it is rounded up.
      columns: Values of further columns, the same everywhere.
    """
    placement = evaluator.placement
    batch_size = placement.whole_rows(batch_size)
    places = placement.held_rows(batch_size)
    waiting = None
    for batch in data.eval_batches(
        held_out.rows, batch_size=batch_size, numbers=held_out.numbers, places=places
    ):
        batch = _with_values(batch, columns)
        found = step(params, put(batch, placement.rows, places=places, rows=batch_size))
        if waiting is not None:
            yield jax.device_get(waiting)
        # Read one batch late, so that the device always has the next one.
        waiting = found
    yield jax.device_get(waiting)


def _with_values(batch: Batch, values: Mapping[str, float]) -> Batch:
    shape = batch.tokens.shape
    return batch.with_columns(
        **{name: np.full(shape, value, np.float32) for name, value in values.items()}
    )


def score_rows(
    evaluator: Evaluator, params: Params, held_out: HeldOut, *, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields the log-probabilities of all targets, float32 `[rows of a batch, T]`.

    The last batch is filled up with rows that are not there.
    """
    yield from _run(evaluator, evaluator.score_step, params, held_out, batch_size, {})


_IN_A_LINE = ("loss", "perplexity", "token_accuracy", "accuracy", "margin")


def describe_figures(sums: UnitSums, units: str) -> list[str]:
    """Returns the figures that a line about an evaluation holds.

    Args:
      sums: The evaluation.
      units: Units of the objective that it is by.
    """
    found = sums.estimates
    return [
        f"{words_of(name, units)} {figure_of(name, units).form.format(found[name].value)}"
        for name in _IN_A_LINE
        if name in found
    ]
