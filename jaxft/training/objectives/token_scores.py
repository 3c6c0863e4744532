"""The log-probability of every trained target, without ever holding the logits of a whole row.

A target without weight changes no loss, so that nothing is computed for it: each device puts its
trained positions first and makes logits for these alone, some at a time. Of conversations that
train a third of their tokens the head costs a third.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxft.models.config import DecoderConfig
from jaxft.models.layers import Routing
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.training.loops import loop_up_to
from jaxft.training.objectives.contract import Scores, Terms


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
    model: Predictor,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Scores:
    """Returns the log-probability of each trained target, and whether no token is likelier.

    Both are 0 where the weight is 0. Each device makes the logits of a few of its positions at a
    time, and makes them again in the backward pass. It gathers the head once in each pass, adds the
    head's gradient up in float32 over its positions, and then that is reduced once over devices.
    Where the vocabulary is split, a device makes the logits of its part; of all parts only sums and
    maxima of a position travel.

    Args:
      model: Gives the head.
      hidden: What its logits are made of.
      targets: Ids.
      weights: Of the targets. Only whether they are 0 matters here.
      chunk: Positions of a device that are computed at once; 0: all.
    """
    head = _Head(model, targets.shape, chunk)

    @jax.custom_vjp
    def scores(hidden: Array, w: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        return head.forward(hidden, w, targets, weights)[:2]

    def keep(*inputs: Any) -> tuple[tuple[Array, Array], tuple]:
        arrays = tuple(x.value for x in inputs)
        log_probs, correct, log_z = head.forward(*arrays)
        return (log_probs, correct), (*arrays, log_z, _marked(inputs[1].perturbed))

    def transpose(kept: tuple, d: tuple[Any, Any]) -> tuple[Array | None, ...]:
        *arrays, log_z, learns = kept
        if isinstance(d[0], jax.custom_derivatives.SymbolicZero):
            return (None,) * 4
        # Whether a target is the likeliest token has no gradient.
        return (*head.backward(*arrays, log_z, d[0], learns=learns is not None), None, None)

    scores.defvjp(keep, transpose, symbolic_zeros=True)
    return Scores(*scores(hidden, model.head_table, targets, weights))


def cross_entropy(
    model: Predictor,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
) -> Terms:
    """Returns the weighted nats of all targets, summed, with the share of them that are right.

    Its gradient by a target's logits is known as soon as they are: softmax less one-hot, times the
    weight. So where a gradient is asked for it is made with the sum, and logits are made once
    (Hsu et al., arXiv:2410.10989): three products with the head in place of four.

    Args:
      model: As of `token_scores`, and so are the others.
      hidden: What its logits are made of.
      targets: Ids.
      weights: Of the targets; they have no gradient.
      chunk: Positions of a device that are computed at once; 0: all.
    """
    head = _Head(model, targets.shape, chunk)

    @jax.custom_vjp
    def sums(hidden: Array, w: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        log_probs, correct, _ = head.forward(hidden, w, targets, weights)
        return jnp.sum(-log_probs * weights), jnp.sum(correct * weights)

    def keep(*inputs: Any) -> tuple[tuple[Array, Array], tuple]:
        arrays = tuple(x.value for x in inputs)
        log_probs, correct, *gradients = head.with_gradients(*arrays, learns=inputs[1].perturbed)
        weights = arrays[3]
        return (jnp.sum(-log_probs * weights), jnp.sum(correct * weights)), tuple(gradients)

    def transpose(gradients: tuple, d: tuple[Any, Any]) -> tuple[Array | None, ...]:
        if isinstance(d[0], jax.custom_derivatives.SymbolicZero):
            return (None,) * 4
        scaled = (None if x is None else (d[0] * x).astype(x.dtype) for x in gradients)
        return (*scaled, None, None)

    sums.defvjp(keep, transpose, symbolic_zeros=True)
    nats, right = sums(hidden, model.head_table, targets, weights)
    count = jnp.sum(weights)
    return Terms(nats, count, {"token_accuracy": (right, count)})


def _marked(flag: bool) -> tuple | None:
    """Returns a flag as the structure of a tree, which passes from a forward to a backward pass."""
    return () if flag else None


class _Head:
    """The computation on whole arrays: each device has its own positions and part of the head."""

    def __init__(self, model: Predictor, shape: tuple[int, ...], chunk: int):
        self.plan = plan_weight(("vocab", "embed"), model.head_table.shape, shape)
        with model.precision():
            precision = jax.config.jax_default_matmul_precision
        self.local = _Local(self.plan, chunk, model.config, precision)
        self.of_tokens = self.plan.of_tokens()
        self.of_hidden = self.plan.of_tokens(self.plan.held[1])
        self.inputs = (self.of_hidden, self.plan.of_weight, self.of_tokens, self.of_tokens)

    def forward(self, *arrays: Array) -> tuple[Array, Array, Array]:
        return self.plan.map(self.local.forward, self.inputs, (self.of_tokens,) * 3)(*arrays)

    def backward(self, *arrays: Array, learns: bool) -> tuple[Array, Array | None]:
        def local(*arrays: Array) -> tuple[Array, Array | None]:
            return self.local.backward(*arrays, learns=learns)

        inputs = (*self.inputs, self.of_tokens, self.of_tokens)
        return self.plan.map(local, inputs, self._gradients(learns))(*arrays)

    def with_gradients(
        self, *arrays: Array, learns: bool
    ) -> tuple[Array, Array, Array, Array | None]:
        def local(*arrays: Array) -> tuple[Array, Array, Array, Array | None]:
            return self.local.with_gradients(*arrays, learns=learns)

        outputs = (self.of_tokens, self.of_tokens, *self._gradients(learns))
        return self.plan.map(local, self.inputs, outputs)(*arrays)

    def _gradients(self, learns: bool) -> tuple[Any, Any]:
        return self.of_hidden, self.plan.of_gradient if learns else None


class _Local:
    """The computation of each device for its own positions and its own part of the vocabulary."""

    def __init__(self, plan: WeightPlan, chunk: int, config: DecoderConfig, precision: Any):
        self.plan, self.chunk, self.precision = plan, chunk, precision
        self.cap, self.scale = config.logit_cap, config.logit_scale
        self.vocab_over, self.embed_over = plan.held

    def forward(
        self, hidden: Array, w: Array, targets: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        """Returns log-probability, whether none is larger, and log Z of each position."""
        w = self.plan.gather(w.astype(hidden.dtype))
        trained = TrainedFirst.of(weights, self.chunk)

        def body(chunk: _Chunk, found: Array) -> Array:
            logits, ids = self._logits(chunk.take(hidden), w)
            made = jnp.stack(self._judge(logits, ids, chunk.take(targets)))
            return chunk.put(found, made, axis=1)

        with jax.default_matmul_precision(self.precision):
            found = trained.over(body, jnp.zeros((3, trained.order.size), jnp.float32))
        log_probs, correct, log_z = trained.restored(found, axis=1)
        return log_probs, correct, log_z

    def backward(
        self,
        hidden: Array,
        w: Array,
        targets: Array,
        weights: Array,
        log_z: Array,
        d_log_probs: Array,
        *,
        learns: bool,
    ) -> tuple[Array, Array | None]:
        """Returns the gradients of hidden states and of the head."""
        dtype, w = w.dtype, self.plan.gather(w.astype(hidden.dtype))
        trained = TrainedFirst.of(weights, self.chunk)

        def body(chunk: _Chunk, sums: _Gradients) -> _Gradients:
            taken = chunk.take(hidden)
            logits, ids = self._logits(taken, w)
            d = self._pulled(logits, ids, chunk.take(targets), chunk.take(log_z))
            return self._add(sums, chunk, d * -chunk.take(d_log_probs)[:, None], taken, w)

        with jax.default_matmul_precision(self.precision):
            sums = trained.over(body, self._no_gradients(trained, hidden, w, learns))
        return self._gradients(trained, sums, dtype)

    def with_gradients(
        self, hidden: Array, w: Array, targets: Array, weights: Array, *, learns: bool
    ) -> tuple[Array, Array, Array, Array | None]:
        """Returns the first two of `forward`, and gradients of the weighted sum of the nats."""
        dtype, w = w.dtype, self.plan.gather(w.astype(hidden.dtype))
        trained = TrainedFirst.of(weights, self.chunk)

        def body(chunk: _Chunk, carry: tuple[Array, _Gradients]) -> tuple[Array, _Gradients]:
            taken, wanted = chunk.take(hidden), chunk.take(targets)
            logits, ids = self._logits(taken, w)
            log_probs, correct, log_z = self._judge(logits, ids, wanted)
            made = jnp.stack([log_probs, correct])
            d = self._pulled(logits, ids, wanted, log_z) * chunk.take(weights)[:, None]
            return chunk.put(carry[0], made, axis=1), self._add(carry[1], chunk, d, taken, w)

        found = jnp.zeros((2, trained.order.size), jnp.float32)
        with jax.default_matmul_precision(self.precision):
            carry = found, self._no_gradients(trained, hidden, w, learns)
            found, sums = trained.over(body, carry)
        log_probs, correct = trained.restored(found, axis=1)
        return log_probs, correct, *self._gradients(trained, sums, dtype)

    def _logits(self, hidden: Array, w: Array) -> tuple[Array, Array]:
        """Returns float32 logits of this device's part of the vocabulary, and its ids."""
        logits = jnp.einsum("td,vd->tv", hidden, w, preferred_element_type=jnp.float32)
        logits = _over(jax.lax.psum, logits, self.embed_over)
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = self.cap * jnp.tanh(logits / self.cap)
        first = w.shape[0] * jax.lax.axis_index(self.vocab_over) if self.vocab_over else 0
        return logits, (first + jnp.arange(w.shape[0], dtype=jnp.int32))[None]

    def _judge(self, logits: Array, ids: Array, targets: Array) -> tuple[Array, Array, Array]:
        """Returns log-probability, whether none is larger, and log Z."""
        largest = _over(jax.lax.pmax, jnp.max(logits, axis=-1), self.vocab_over)
        exps = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
        log_z = largest + jnp.log(_over(jax.lax.psum, exps, self.vocab_over))
        at_target = jnp.sum(jnp.where(ids == targets[:, None], logits, 0.0), axis=-1)
        at_target = _over(jax.lax.psum, at_target, self.vocab_over)
        # Nothing more is read or exchanged for it: a likeliest token that ties counts as right.
        correct = (at_target == largest).astype(jnp.float32)
        return at_target - log_z, correct, log_z

    def _pulled(self, logits: Array, ids: Array, targets: Array, log_z: Array) -> Array:
        """Returns the gradient of a target's nats by the product of which logits are made."""
        d = jnp.exp(logits - log_z[:, None]) - (ids == targets[:, None])
        if self.cap:
            d = d * (1.0 - jnp.square(logits / self.cap))
        return d if self.scale == 1 else d * self.scale

    def _no_gradients(
        self, trained: "TrainedFirst", hidden: Array, w: Array, learns: bool
    ) -> "_Gradients":
        d_hidden = jnp.zeros((trained.order.size, hidden.shape[-1]), hidden.dtype)
        # In the order of its reduction, which begins with the dimension that is cut.
        return _Gradients(d_hidden, jnp.zeros(w.shape[::-1], jnp.float32) if learns else None)

    def _add(
        self, sums: "_Gradients", chunk: "_Chunk", d: Array, hidden: Array, w: Array
    ) -> "_Gradients":
        """Adds what one chunk gives, of which `d` is the gradient of its logits."""
        d = jnp.where(chunk.real[:, None], d, 0.0).astype(hidden.dtype)
        d_hidden = _over(jax.lax.psum, jnp.einsum("tv,vd->td", d, w), self.vocab_over)
        d_w = sums.w
        if d_w is not None:
            d_w += jnp.einsum("tv,td->dv", d, hidden, preferred_element_type=jnp.float32)
        return _Gradients(chunk.put(sums.hidden, d_hidden), d_w)

    def _gradients(
        self, trained: "TrainedFirst", sums: "_Gradients", dtype: Any
    ) -> tuple[Array, Array | None]:
        d_hidden, d_w = trained.restored(sums.hidden), sums.w
        if d_w is not None:
            # Like the gradients of all weights it travels in the type of the products.
            d_w = self.plan.reduce(d_w.T.astype(d_hidden.dtype)).astype(dtype)
        return d_hidden, d_w


class _Gradients(NamedTuple):
    """Sums over the chunks of a device.

    Attributes:
      hidden: Gradient of hidden states, in the order of the chunks, `[N, D]`.
      w: Gradient of the head, float32 `[D, V]`; None if it does not learn.
    """

    hidden: Array
    w: Array | None


class TrainedFirst(NamedTuple):
    """The positions of a device in an order in which those that are trained come first.

    Attributes:
      shape: `[B, T]` of the device.
      order: Positions, int32 `[N]`, filled up to whole chunks.
      count: Number of trained ones.
      size: Positions of a chunk.
    """

    shape: tuple[int, int]
    order: Array
    count: Array
    size: int

    @classmethod
    def of(cls, weights: Array, chunk: int) -> "TrainedFirst":
        """Orders the positions of `weights`, for chunks of so many; 0: one chunk of all."""
        rows, length = weights.shape
        size = min(chunk or rows * length, rows * length)
        flat = weights.reshape(-1) != 0
        order = jnp.argsort(~flat, stable=True)
        order = jnp.pad(order, (0, -order.size % size))
        return cls((rows, length), order, jnp.sum(flat), size)

    def over(self, body: Any, carry: Any) -> Any:
        """Calls `body(chunk, carry) -> carry` for each chunk with a trained position."""

        def at(index: Array, carry: Any) -> Any:
            start = index * self.size
            order = jax.lax.dynamic_slice_in_dim(self.order, start, self.size)
            real = start + jnp.arange(self.size) < self.count
            return body(_Chunk(start, order, real), carry)

        chunks = -(-self.count // self.size)
        return loop_up_to(self.order.size // self.size, chunks, at, carry)

    def restored(self, x: Array, axis: int = 0) -> Array:
        """Lays `[…, N, …]` of chunks out as `[…, B, T, …]` of positions."""
        rows, length = self.shape
        places = jnp.argsort(self.order[: rows * length])
        x = jnp.take(x, places, axis=axis)
        return x.reshape(*x.shape[:axis], rows, length, *x.shape[axis + 1 :])


class _Chunk(NamedTuple):
    """Positions that are computed at once.

    Attributes:
      start: Place of the first in the order of all.
      order: Positions, int32 `[C]`.
      real: Whether they are trained; the others fill the last chunk.
    """

    start: Array
    order: Array
    real: Array

    def take(self, x: Array) -> Array:
        """Returns `[C, …]` of `[B, T, …]`."""
        flat = jnp.asarray(x).reshape(-1, *x.shape[2:])
        return flat.at[self.order].get(mode="promise_in_bounds")

    def put(self, whole: Array, x: Array, *, axis: int = 0) -> Array:
        """Writes the results of trained positions into those of all."""
        real = jnp.expand_dims(self.real, [i for i in range(x.ndim) if i != axis])
        x = jnp.where(real, x, 0).astype(whole.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, x, self.start, axis)


def _over(reduce: Any, x: Array, names: tuple[str, ...]) -> Array:
    return reduce(x, names) if names else x
