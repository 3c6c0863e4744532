"""The common part of preferences: sums over answers, figures, and how both become terms.

An answer is a document of a row, and its number of unit says which answers belong together. Every
sum is over the tokens of one answer in one row, so rows need nothing of each other; where devices
share the positions of a row, the sums are theirs together.

The weight of a unit is 1, whatever its length, and averages over tokens are of one answer. So
packing, accumulation and ragged last batches change no loss and no gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.data.batch import Batch
from jaxft.data.units import CHOSEN, REJECTED
from jaxft.errors import ConfigError
from jaxft.training.objectives.contract import (
    Objective,
    Policy,
    Scores,
    Terms,
    no_expectations,
)


class Answers(NamedTuple):
    """Sums over the scored tokens of one answer of each unit, float32.

    Attributes:
      log_prob: The policy's log-probability of the answer, in nats.
      score: Log-probability less the reference's, or alone where the objective has no reference.
        The difference is taken token by token: it is exactly 0 while both models agree.
      length: Scored tokens.
    """

    log_prob: Float[Array, "B U"]
    score: Float[Array, "B U"]
    length: Float[Array, "B U"]

    def mean(self) -> Float[Array, "B U"]:
        """Returns the score of a token, averaged over the answer; 0 where there is none."""
        return self.score / jnp.maximum(self.length, 1.0)


class Pairs(NamedTuple):
    """The two answers of each unit."""

    chosen: Answers
    rejected: Answers


class PairLoss(NamedTuple):
    """An objective's judgement of pairs.

    Attributes:
      loss: Loss of a pair, which is minimised.
      chosen_reward: Implicit reward of the chosen answer: what the loss compares.
      rejected_reward: Implicit reward of the rejected answer.
      figures: Further figures of each pair, by name.
    """

    loss: Float[Array, "B U"]
    chosen_reward: Float[Array, "B U"]
    rejected_reward: Float[Array, "B U"]
    figures: Mapping[str, Float[Array, "B U"]] = {}


def make_pair_objective(
    keys: type,
    pair_loss: Callable[[Pairs, Any], PairLoss],
    *,
    reference: bool,
    start: Callable[[Any], dict[str, float]] = no_expectations,
) -> Objective:
    """Returns the objective of a loss of single pairs.

    Its figures are averages over pairs: `accuracy`, the share whose chosen answer has the larger
    reward, equal ones counting half (TRL counts them as failures); `margin`, by how much it is
    larger; `chosen_reward`, `rejected_reward`; `chosen_log_prob` and `rejected_log_prob`, the
    policy's log-probabilities of whole answers in nats; `likelihood_accuracy`, the share whose
    chosen answer is the likelier one per token, whatever the reference says.

    Args:
      keys: Dataclass of its configuration keys.
      pair_loss: `(pairs, keys) -> PairLoss`, finite for a unit without tokens too.
      reference: Whether scores are relative to the reference model.
      start: What must hold while the policy is the reference.
    """

    def rows(policy: Policy, batch: Batch, keys: Any) -> Terms:
        scores, count = policy.scores(batch), policy.max_units
        chosen, rejected = (
            sum_answers(scores, batch, label=label, count=count, reference=reference)
            for label in (CHOSEN, REJECTED)
        )
        found = pair_loss(Pairs(chosen, rejected), keys)
        _check_shapes(found, chosen.length.shape, f"{pair_loss.__module__}.{pair_loss.__name__}")
        margin = found.chosen_reward - found.rejected_reward
        figures = {
            "accuracy": above_zero(margin),
            "margin": margin,
            "chosen_reward": found.chosen_reward,
            "rejected_reward": found.rejected_reward,
            "chosen_log_prob": chosen.log_prob,
            "rejected_log_prob": rejected.log_prob,
            "likelihood_accuracy": above_zero(
                chosen.log_prob / jnp.maximum(chosen.length, 1.0)
                - rejected.log_prob / jnp.maximum(rejected.length, 1.0)
            ),
            **found.figures,
        }
        exists = (chosen.length > 0) & (rejected.length > 0)
        return Terms(
            *averaged(found.loss, exists),
            {name: averaged(value, exists) for name, value in figures.items()},
        )

    def loss(policy: Policy, batch: Batch, keys: Any) -> Terms:
        return rows(policy, batch, keys).summed()

    return Objective(
        keys=keys, loss=loss, rows=rows, units="pairs", reference=reference, start=start
    )


def _check_shapes(found: PairLoss, expected: tuple[int, ...], what: str) -> None:
    """Raises `ConfigError` unless there is a value for each pair, of everything."""
    values = {**found._asdict(), **found.figures}
    values.pop("figures")
    shapes = {name: jnp.shape(value) for name, value in values.items()}
    wrong = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape != expected]
    if wrong:
        raise ConfigError(
            f"The loss of pairs {what} has the shapes {', '.join(wrong)}; expected "
            f"{list(expected)}, rows and pairs of a row. Return a value for each pair: sums and "
            "means are made of them later."
        )


def above_zero(margin: Float[Array, "B U"]) -> Float[Array, "B U"]:
    """Returns 1 where a margin is above 0, and a half where it is 0."""
    return (margin > 0) + 0.5 * (margin == 0)


def sum_answers(
    scores: Scores, batch: Batch, *, label: int, count: int, reference: bool
) -> Answers:
    """Returns sums over the answers of one label; zeros for a unit that has none.

    Args:
      scores: The policy's.
      batch: Rows with the columns `units` and `labels`, and `reference` where that is asked for.
      label: Of the answers that are summed.
      count: Most units of a row.
      reference: Whether the reference's log-probabilities are taken off the score.
    """
    weights = jnp.where(batch["labels"] == label, batch.weights, 0.0)
    log_probs = scores.log_probs
    relative = log_probs - batch["reference"] if reference else log_probs
    units = batch["units"]
    log_prob, length = (sum_units(x, units, count) for x in (log_probs * weights, weights))
    score = sum_units(relative * weights, units, count) if reference else log_prob
    return Answers(log_prob, score, length)


def sum_units(
    values: Float[Array, "B T"], units: Int[Array, "B T"], count: int
) -> Float[Array, "B U"]:
    """Returns the sum over the tokens of each unit of a row, from the first to number `count`."""
    numbers = 1 + jnp.arange(count, dtype=units.dtype)
    members = units[..., None] == numbers[None, None]
    # A sum of float32: a matrix product would round to bfloat16 on TPU.
    return jnp.sum(jnp.where(members, values[..., None], 0.0), axis=1)


def averaged(
    values: Float[Array, "B U"] | Bool[Array, "B U"], where: Bool[Array, "B U"]
) -> tuple[Float[Array, "B U"], Float[Array, "B U"]]:
    """Returns sum and count of a value that only some units have."""
    return jnp.where(where, values, 0.0), where.astype(jnp.float32)
