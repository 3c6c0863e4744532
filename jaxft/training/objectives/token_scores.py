"""The log-probability of every target, without ever holding the logits of a whole row."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxft.models.config import DecoderConfig
from jaxft.models.layers import Routing
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.training.objectives.contract import Scores


@runtime_checkable
class Predictor(Protocol):
    """A model, whether its layers run here or in the stages of a pipeline."""

    config: DecoderConfig

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        seeds: UInt32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns the normalised residual stream, and what the routers of all layers did."""
        ...

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The weight that logits are made with."""
        ...

    def precision(self) -> AbstractContextManager:
        """Returns the context of matrix products."""
        ...


def token_scores(
    model: Predictor, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, chunk: int
) -> Scores:
    """Returns the log-probability of each target, and whether it is the most likely token.

    Each device makes the logits of a few of its positions at a time, and makes them again in the
    backward pass. It gathers the head once in each pass, adds the head's gradient up in float32
    over its positions, and then that is reduced once over devices. Where the vocabulary is split,
    a device makes the logits of its part; of all parts only sums and maxima of a position travel.

    Args:
      model: Gives the head.
      hidden: What its logits are made of.
      targets: Ids.
      chunk: Positions of a device's part of each row whose float32 logits exist at once; 0: all.
    """
    w = model.head_table
    plan = plan_weight(("vocab", "embed"), w.shape, targets.shape)
    with model.precision():
        local = _Local(plan, chunk, model.config.logit_cap, jax.config.jax_default_matmul_precision)
    of_hidden, of_tokens = plan.of_tokens(plan.held[1]), plan.of_tokens()
    inputs = (of_hidden, plan.of_weight, of_tokens)
    forward = plan.map(local.forward, inputs, (of_tokens,) * 3)
    backward = plan.map(
        local.backward, (*inputs, of_tokens, of_tokens), (of_hidden, plan.of_gradient)
    )

    @jax.custom_vjp
    def scores(hidden: Array, w: Array, targets: Array) -> tuple[Array, Array]:
        return forward(hidden, w, targets)[:2]

    def keep(*arrays: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        *found, log_z = forward(*arrays)
        return tuple(found), (*arrays, log_z)

    def transpose(kept: tuple[Array, ...], d: tuple[Array, Array]) -> tuple:
        # Which token is the most likely has no gradient.
        return (*backward(*kept, d[0]), None)

    scores.defvjp(keep, transpose)
    return Scores(*scores(hidden, w, targets))


class _Local:
    """The computation of each device for its own positions and its own part of the vocabulary."""

    def __init__(self, plan: WeightPlan, chunk: int, cap: float, precision: Any):
        self.plan, self.chunk, self.cap, self.precision = plan, chunk, cap, precision
        self.vocab_over, self.embed_over = plan.held

    def forward(self, hidden: Array, w: Array, targets: Array) -> tuple[Array, Array, Array]:
        """Returns log-probability, whether it is the largest, and log Z of each position."""
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
            return None, (at_target - log_z, (first == targets).astype(jnp.float32), log_z)

        with jax.default_matmul_precision(self.precision):
            _, found = jax.lax.scan(body, None, self._chunks(hidden, targets))
        log_probs, correct, log_z = (self._joined(x, targets.shape[1]) for x in found)
        return log_probs, correct, log_z

    def backward(
        self, hidden: Array, w: Array, targets: Array, log_z: Array, d_log_probs: Array
    ) -> tuple[Array, Array]:
        """Returns the gradients of hidden states and of the head."""
        dtype = w.dtype
        w = self.plan.gather(w.astype(hidden.dtype))

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
            chunks = self._chunks(hidden, targets, -d_log_probs, log_z)
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
