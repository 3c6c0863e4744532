"""The contract of an objective: what it asks of a model and of the data, and what it gives."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from jaxft.data.batch import Batch
from jaxft.data.units import UNITS
from jaxft.errors import ConfigError


class Terms(NamedTuple):
    """Sums over a batch, or over each row or unit of it; normalised once, after accumulation.

    Then packing, accumulation, ragged last batches and any device count give the same gradient.

    Attributes:
      total: float32, the loss, summed.
      weight: float32, what the sum is divided by: trained tokens, or units.
      figures: Sum and count of each further figure, by name. Names are those of metrics.jsonl and
        eval.jsonl, of the bar and of the report, so that those in
        `recorded.RECORDED` are taken.
    """

    total: Any
    weight: Any
    figures: Mapping[str, tuple[Any, Any]] = {}

    def __add__(self, other: Any) -> "Terms":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds term by term (a tuple's own `+` would concatenate)."""
        return jax.tree.map(lambda a, b: a + b, self, other)

    def summed(self) -> "Terms":
        """Returns the sums over all rows and units."""
        return jax.tree.map(jax.numpy.sum, self)


class Scores(NamedTuple):
    """A model's judgement of each target that carries weight; 0 at the others.

    Attributes:
      log_probs: Log-probability in nats; gradients pass.
      correct: 1 where no token is likelier than the target, else 0.
    """

    log_probs: Float[Array, "B T"]
    correct: Float[Array, "B T"]


@runtime_checkable
class Policy(Protocol):
    """The model that learns, as an objective sees it.

    Attributes:
      max_units: Most units of documents in one row.
    """

    max_units: int

    def scores(self, batch: Batch) -> Scores:
        """Returns the scores of trained targets, from one pass through the model."""
        ...

    def cross_entropy(self, batch: Batch) -> Terms:
        """Returns the weighted nats of all targets, from one pass through the model.

        Its figure is `token_accuracy`, the share of targets that were the first choice. For a loss
        that is these nats and no more it is cheaper than `scores`.
        """
        ...


def no_expectations(_: Any) -> dict[str, float]:
    """Returns nothing that must hold at the start of a run."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A thing that can be learnt. A file defines one as `OBJECTIVE`.

    Attributes:
      keys: Dataclass of its configuration keys, made with `jaxft.config.key`. A method `problems`
        may yield texts on keys that do not go together.
      loss: `(policy, batch, keys) -> Terms` of scalars. Gradients are taken of `total`.
      rows: The same of each row, `[B]`, or of each unit, `[B, U]`; for evaluation, where every
        number gets an interval over these.
      units: Units of the data: `documents`, `pairs` of a preferred and a rejected answer, or
        `labelled` answers, each beside one that belongs to another prompt.
      reference: Whether the loss reads `batch["reference"]`, the log-probability that the model
        which training began with gives each target.
      is_cross_entropy: Whether the loss is in nats per trained token of text, from which perplexity
        and bits per byte follow.
      whole: `(policy, batch, keys) -> {name: (sum, count)}`, what the loss must know of all
        micro-batches: made without gradients before it, and given to it as a column of that name,
        the ratio of the sums.
      start: `(keys) -> {figure: value}`, what must hold while the policy is the reference.

    Raises:
      ConfigError: For units that there are not, and keys that cannot be configured.
    """

    keys: type
    loss: Callable[[Policy, Batch, Any], Terms]
    rows: Callable[[Policy, Batch, Any], Terms]
    units: str = "documents"
    reference: bool = False
    is_cross_entropy: bool = False
    whole: Callable[[Policy, Batch, Any], dict[str, tuple[Any, Any]]] | None = None
    start: Callable[[Any], dict[str, float]] = no_expectations

    def __post_init__(self):
        problems = list(_key_problems(self.keys))
        if self.units not in UNITS:
            expected = ", ".join(map(repr, UNITS))
            problems.append(f"Objective.units is {self.units!r}; expected one of {expected}.")
        if problems:
            raise ConfigError(problems)


def _key_problems(keys: Any) -> Iterator[str]:
    if not isinstance(keys, type) or not dataclasses.is_dataclass(keys):
        yield f"Objective.keys is {keys!r}; expected a dataclass, which may be empty."
        return
    for item in dataclasses.fields(keys):
        if "meaning" not in item.metadata:
            yield f"{keys.__name__}.{item.name} is no key; declare it with jaxft.config.key(…)."
        elif item.type not in (bool, int, float, str):
            yield (
                f"{keys.__name__}.{item.name} has the type {item.type!r}; expected bool, int, "
                "float or str, in a file without 'from __future__ import annotations'."
            )
