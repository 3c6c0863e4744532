"""Cross entropy of every token, without ever holding the logits of a whole row."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.training.objectives.terms import LossTerms, Predictor


def chunked_cross_entropy(
    model: Predictor,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> LossTerms:
    """Cross entropy of each row, `[B]`.

    Each device makes the logits of a few of its positions at a time, and makes them again in the
    backward pass. It gathers the head once in each pass, adds the head's gradient up in float32
    over its positions, and then that is reduced once over devices. Where the vocabulary is split,
    a device makes the logits of its part; of all parts only sums and maxima of a position travel.

    Args:
      model: Gives the head.
      hidden: What its logits are made of.
      targets: Ids.
      weights: Multiply the loss of each target.
      chunk: Positions of a device's part of each row whose float32 logits exist at once; 0: all.
    """
    w = model.head_table
    plan = plan_weight(("vocab", "embed"), w.shape, targets.shape)
    with model.precision():
        local = _Local(plan, chunk, model.config.logit_cap, jax.config.jax_default_matmul_precision)
    of_hidden, of_tokens, of_rows = (
        plan.of_tokens(plan.held[1]),
        plan.of_tokens(),
        plan.of_rows,
    )
    inputs = (of_hidden, plan.of_weight, of_tokens, of_tokens)
    sums = (of_rows, of_rows, of_rows)
    forward = plan.map(local.forward, inputs, (sums, of_tokens))
    backward = plan.map(
        local.backward, (*inputs, of_tokens, of_rows), (of_hidden, plan.of_gradient)
    )

    @jax.custom_vjp
    def terms(
        hidden: Array, w: Array, targets: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        return forward(hidden, w, targets, weights)[0]

    def keep(*arrays: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        sums, log_z = forward(*arrays)
        return sums, (*arrays, log_z)

    def transpose(kept: tuple[Array, ...], d_sums: tuple[Array, ...]) -> tuple:
        # Counts have no gradient.
        return (*backward(*kept, d_sums[0]), None, None)

    terms.defvjp(keep, transpose)
    total, weight, correct = terms(hidden, w, targets, weights)
    return LossTerms(total, weight, correct)


class _Local:
    """What each device computes of its own positions and its own part of the vocabulary."""

    def __init__(self, plan: WeightPlan, chunk: int, cap: float, precision: Any):
        self.plan, self.chunk, self.cap, self.precision = plan, chunk, cap, precision
        self.vocab_over, self.embed_over = plan.held
        self.positions_over = plan.tokens[1]

    def forward(
        self, hidden: Array, w: Array, targets: Array, weights: Array
    ) -> tuple[tuple[Array, Array, Array], Array]:
        """Returns loss, weight and hits of each row, `[B]`, and log Z of each position."""
        w = self.plan.gather(w.astype(hidden.dtype))

        def body(_: None, part: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
            hidden, targets = part
            logits, ids = self._logits(hidden, w)
            largest = _over(jax.lax.pmax, jnp.max(logits, axis=-1), self.vocab_over)
            exps = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
            log_z = largest + jnp.log(_over(jax.lax.psum, exps, self.vocab_over))
            at_target = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
            at_target = _over(jax.lax.psum, at_target, self.vocab_over)
            first = jnp.where(logits == largest[..., None], ids, jnp.iinfo(jnp.int32).max)
            first = _over(jax.lax.pmin, jnp.min(first, axis=-1), self.vocab_over)
            return None, (log_z, log_z - at_target, first == targets)

        with jax.default_matmul_precision(self.precision):
            _, found = jax.lax.scan(body, None, self._chunks(hidden, targets))
        log_z, nats, hits = (self._joined(x, targets.shape[1]) for x in found)
        sums = [jnp.sum(x * weights, axis=-1) for x in (nats, jnp.ones_like(nats), hits)]
        total, weight, correct = (_over(jax.lax.psum, x, self.positions_over) for x in sums)
        return (total, weight, correct), log_z

    def backward(
        self,
        hidden: Array,
        w: Array,
        targets: Array,
        weights: Array,
        log_z: Array,
        d_total: Array,
    ) -> tuple[Array, Array]:
        """Returns the gradients of hidden states and of the head."""
        dtype = w.dtype
        w = self.plan.gather(w.astype(hidden.dtype))
        scale = weights * d_total[:, None]

        def body(dw: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            hidden, targets, scale, log_z = part
            logits, ids = self._logits(hidden, w)
            d = jnp.exp(logits - log_z[..., None]) - (ids == targets[..., None])
            d *= scale[..., None]
            if self.cap:
                d *= 1.0 - jnp.square(logits / self.cap)
            d = d.astype(hidden.dtype)
            dw += jnp.einsum("btv,btd->dv", d, hidden, preferred_element_type=jnp.float32)
            return dw, _over(jax.lax.psum, jnp.einsum("btv,vd->btd", d, w), self.vocab_over)

        with jax.default_matmul_precision(self.precision):
            chunks = self._chunks(hidden, targets, scale, log_z)
            # In the order of its reduction, which begins with the dimension that is cut.
            dw, d_hidden = jax.lax.scan(body, jnp.zeros(w.shape[::-1], jnp.float32), chunks)
        # Like the gradients of all weights it travels in the type of the products.
        dw = self.plan.reduce(dw.T.astype(hidden.dtype)).astype(dtype)
        return self._joined(d_hidden, targets.shape[1]), dw

    def _logits(self, hidden: Array, w: Array) -> tuple[Array, Array]:
        """Returns float32 logits of this device's part of the vocabulary, and its ids."""
        logits = jnp.einsum("btd,vd->btv", hidden, w, preferred_element_type=jnp.float32)
        logits = _over(jax.lax.psum, logits, self.embed_over)
        if self.cap:
            logits = self.cap * jnp.tanh(logits / self.cap)
        first = w.shape[0] * jax.lax.axis_index(self.vocab_over) if self.vocab_over else 0
        return logits, (first + jnp.arange(w.shape[0], dtype=jnp.int32))[None, None]

    def _chunks(self, *arrays: Array) -> tuple[Array, ...]:
        """Cuts `[B, T, …]` along T into `[T / chunk, B, chunk, …]`, filled up with zeros."""
        length = arrays[0].shape[1]
        size = self.chunk if 0 < self.chunk < length else length

        def cut(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

        return tuple(map(cut, arrays))

    def _joined(self, x: Array, length: int) -> Array:
        """Inverse of `_chunks`."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _over(reduce: Any, x: Array, names: tuple[str, ...]) -> Array:
    return reduce(x, names) if names else x
