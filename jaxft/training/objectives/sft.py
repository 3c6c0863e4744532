"""Supervised fine-tuning: cross entropy of the tokens that carry weight, in nats per token."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.training.objectives.contract import Objective, Policy, Scores, Terms


@dataclass(kw_only=True, slots=True)
class Keys:
    """It has no keys of its own."""


def cross_entropy(scores: Scores, batch: Batch) -> Terms:
    """Returns the sums of each row, `[B]`: nats of trained tokens, and their number."""
    total = jnp.sum(-scores.log_probs * batch.weights, axis=-1)
    return Terms(total, jnp.sum(batch.weights, axis=-1))


def loss(policy: Policy, batch: Batch, _: Any) -> Terms:
    """Returns the summed cross entropy, normalised by the number of trained tokens."""
    return cross_entropy(policy.scores(batch), batch).summed()


def rows(policy: Policy, batch: Batch, _: Any) -> Terms:
    """Returns `loss` for each row, with the share of trained tokens that were the first choice."""
    scores = policy.scores(batch)
    terms = cross_entropy(scores, batch)
    correct = jnp.sum(scores.correct * batch.weights, axis=-1)
    return terms._replace(figures={"token_accuracy": (correct, terms.weight)})


OBJECTIVE = Objective(keys=Keys, loss=loss, rows=rows, is_cross_entropy=True)
