"""Supervised fine-tuning: cross entropy of the tokens that carry weight."""

import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.models.experts import balance_loss
from jaxft.training.objectives.cross_entropy import chunked_cross_entropy
from jaxft.training.objectives.terms import LossTerms, Predictor


def row_terms(model: Predictor, batch: Batch, *, chunk: int) -> LossTerms:
    """Returns the sums of each row, `[B]`, of a batch of `[B, T]` arrays.

    Args:
      model: Gives hidden states and logits.
      batch: Rows; weights multiply the loss of each target.
      chunk: Positions of each row whose float32 logits exist at once; 0 for all.
    """
    hidden, _ = model.hidden(batch.tokens, batch.positions, batch.segments)
    return chunked_cross_entropy(model, hidden, batch.targets, batch.weights, chunk=chunk)


def loss(model: Predictor, batch: Batch, *, chunk: int, balance: float = 0.0) -> LossTerms:
    """As `row_terms`, summed over rows, with what experts add.

    Args:
      model: Gives hidden states and logits.
      batch: Rows.
      chunk: As above.
      balance: Weight of the load-balancing loss. It is judged over the tokens of this batch: with
        accumulation, of each micro-batch.
    """
    hidden, routing = model.hidden(batch.tokens, batch.positions, batch.segments)
    rows = chunked_cross_entropy(model, hidden, batch.targets, batch.weights, chunk=chunk)
    total, weight, correct = map(jnp.sum, rows[:3])
    auxiliary = jnp.zeros((), jnp.float32)
    if routing is not None and balance:
        auxiliary = balance * weight * balance_loss(routing)
    return LossTerms(total, weight, correct, auxiliary, routing)
