"""Supervised fine-tuning: cross entropy of the tokens that carry weight."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder
from jaxft.models.experts import balance_loss
from jaxft.objectives.terms import LossTerms


def row_terms(model: Decoder, batch: Batch, *, chunk: int) -> LossTerms:
    """Returns the sums of each row, `[B]`, of a batch of `[B, T]` arrays.

    Args:
      model: Gives hidden states and logits.
      batch: Rows; weights multiply the loss of each target.
      chunk: Positions of each row whose float32 logits exist at once; 0 for all.
    """
    hidden, _ = model.hidden(batch.tokens, batch.positions, batch.segments)
    return chunked_cross_entropy(model, hidden, batch.targets, batch.weights, chunk=chunk)


def loss(model: Decoder, batch: Batch, *, chunk: int, balance: float = 0.0) -> LossTerms:
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


def chunked_cross_entropy(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> LossTerms:
    """Cross entropy of each row, `[B]`, without ever holding `[B, T, V]` logits.

    Each chunk's logits are made again in the backward pass. Chunks run along positions, so that
    rows stay where the mesh has put them.
    """
    rows, length = targets.shape
    if not 0 < chunk < length:
        return _cross_entropy(model, hidden, targets, weights)
    padding = -length % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(sums: LossTerms, part: tuple[Array, Array, Array]) -> tuple[LossTerms, None]:
        return sums + _cross_entropy(model, *part), None

    zero = jnp.zeros(rows, jnp.float32)
    parts = (chunks(hidden), chunks(targets), chunks(weights))
    return jax.lax.scan(body, LossTerms(zero, zero, zero), parts)[0]


def _cross_entropy(model: Decoder, hidden: Array, targets: Array, weights: Array) -> LossTerms:
    logits = model.logits(hidden)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - at_target
    hits = jnp.argmax(logits, axis=-1) == targets
    return LossTerms(
        total=jnp.sum(nats * weights, axis=-1),
        weight=jnp.sum(weights, axis=-1),
        correct=jnp.sum(hits * weights, axis=-1),
    )
