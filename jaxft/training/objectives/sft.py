"""Supervised fine-tuning: cross entropy of the tokens that carry weight, in nats per token."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.training.objectives.contract import Objective, Policy, Terms


@dataclass(kw_only=True, slots=True)
class Keys:
    """It has no keys of its own."""


def loss(policy: Policy, batch: Batch, _: Any) -> Terms:
    """Returns the cross entropy, summed, with the share of trained tokens that were guessed."""
    return policy.cross_entropy(batch)


def rows(policy: Policy, batch: Batch, _: Any) -> Terms:
    """Returns `loss` for each row."""
    scores = policy.scores(batch)
    total, correct, weight = (
        jnp.sum(x, axis=-1)
        for x in (
            -scores.log_probs * batch.weights,
            scores.correct * batch.weights,
            batch.weights,
        )
    )
    return Terms(total, weight, {"token_accuracy": (correct, weight)})


OBJECTIVE = Objective(keys=Keys, loss=loss, rows=rows, is_cross_entropy=True)
