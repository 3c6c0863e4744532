"""Mixture of experts: a router in float32, and two ways of bringing tokens to their experts."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.layers import Linear, Routing
from jaxft.models.module import Param
from jaxft.sharding.rules import active_placement, constrain

# Name of products with experts' weights, for rematerialisation to keep them.
PRODUCT = "expert_product"

# Maps gate and up projections of the same shape to the hidden activation.
Gating = Callable[[Array, Array], Array]


def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


class Routes(NamedTuple):
    """What a router decided for each token.

    Attributes:
      experts: int32 `[B, T, k]`, the chosen experts, the most likely first.
      weights: float32 `[B, T, k]`, of their outputs.
      probabilities: float32 `[B, T, E]`, softmax over all experts.
    """

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]
    probabilities: Float[Array, "B T E"]


class ExpertWeights(NamedTuple):
    """Weights of all experts in the compute dtype; biases are None where there are none.

    Attributes:
      gate: `[E, F, D]`.
      up: `[E, F, D]`.
      down: `[E, D, F]`.
      gate_bias: `[E, F]`.
      up_bias: `[E, F]`.
    """

    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None
    up_bias: Array | None


class ExpertLinear(nnx.Module):
    """One projection for each expert, `[E, outputs, inputs]`, with a bias `[E, outputs]`."""

    def __init__(self, *shape: int, axes, dtype, scale: float, rngs: nnx.Rngs, bias: bool):
        value = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
        self.w = Param(value.astype(dtype), axes=axes)
        self.b = Param(jnp.zeros(shape[:2], dtype), axes=axes[:2]) if bias else None


class Experts(nnx.Module):
    """A feed-forward part of which each token uses a few experts.

    Without a capacity no token is dropped: tokens are sorted by expert and one grouped product
    (`jax.lax.ragged_dot_general`) multiplies each group with its expert (Gale et al., MegaBlocks,
    arXiv:2211.15841). XLA has such a product for TPU; where it has none, on CPU, every expert is
    multiplied with every token and masked, so that work grows with E. With
    `numerics.expert_capacity` each expert takes a bounded number of each row's tokens, in an array
    with an axis of experts that a mesh can split (Lepikhin et al., GShard, arXiv:2006.16668); what
    exceeds it passes by on the residual stream.

    Args:
      config: Sizes.
      numerics: Types and capacity.
      rngs: Random keys.
      bias: Whether router and projections have one.
      gating: Makes the hidden activation.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        gating: Gating = swiglu,
    ):
        assert config.experts is not None
        self.config, self.gating, self.capacity = config.experts, gating, numerics.expert_capacity
        e, d, f = config.experts.count, config.embed, config.mlp
        kwargs = {
            "dtype": numerics.param_dtype,
            "scale": config.init_scale,
            "rngs": rngs,
            "bias": bias,
        }
        self.router = Linear((e,), (d,), axes=("router", "embed"), **kwargs)
        inward, outward = ("experts", "mlp", "embed"), ("experts", "embed", "mlp")
        self.gate = ExpertLinear(e, f, d, axes=inward, **kwargs)
        self.up = ExpertLinear(e, f, d, axes=inward, **kwargs)
        self.down = ExpertLinear(e, d, f, axes=outward, **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns what is added to the residual stream, and what the router did."""
        # Few operations whose errors would change which experts are chosen: never in fewer bits.
        with jax.default_matmul_precision("highest"):
            routes = self._route(x)
        weights = ExpertWeights(
            *(layer.w[...].astype(x.dtype) for layer in (self.gate, self.up, self.down)),
            *(None if b is None else b[...].astype(x.dtype) for b in (self.gate.b, self.up.b)),
        )
        kept, mix = jnp.broadcast_to(real[..., None], routes.experts.shape), routes.weights
        if self.capacity:
            capacity = self._slots(x.shape[1])
            slots = _slots_of(routes.experts, real, capacity, self.config.count)
            kept = slots < self.config.count * capacity
            mix = mix * kept
            out = self._in_slots(x, slots, capacity, mix, weights)
        else:
            out = self._grouped(x, routes, weights)
        if self.down.b is not None:
            chosen = jax.nn.one_hot(routes.experts, self.config.count, dtype=jnp.float32)
            by_expert = jnp.einsum("btke,btk->bte", chosen, mix)
            out += jnp.einsum("bte,ed->btd", by_expert, self.down.b[...].astype(jnp.float32))
        return out.astype(x.dtype), self._routing(routes, real, kept)

    def _route(self, x: Array) -> Routes:
        logits = self.router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.config.chosen)
        if self.config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routes(experts, weights, probabilities)

    def _routing(self, routes: Routes, real: Array, kept: Array) -> Routing:
        counted = real.astype(jnp.float32)
        chosen = jax.nn.one_hot(routes.experts, self.config.count, dtype=jnp.float32)
        dropped = counted[..., None] * (1.0 - kept.astype(jnp.float32))
        return Routing(
            counts=jnp.sum(chosen * counted[..., None, None], axis=(0, 1, 2)),
            probabilities=jnp.sum(routes.probabilities * counted[..., None], axis=(0, 1)),
            tokens=jnp.sum(counted),
            dropped=jnp.sum(dropped),
        )

    def _grouped(self, x: Array, routes: Routes, weights: ExpertWeights) -> Array:
        """Every token through its experts, each device its own tokens; float32."""
        placement = active_placement()
        if placement is None:
            return _grouped_mlp(x, routes.experts, routes.weights, weights, self.gating)
        rows, length = placement.spec(("batch", "seq"), x.shape[:2], "tokens of experts")
        tokens = P(rows, length, None)
        hidden = placement.spec(("act_mlp",), weights.gate.shape[1:2], "experts")[0]
        inward, outward = P(None, hidden, None), P(None, None, hidden)
        bias = None if weights.gate_bias is None else P(None, hidden)

        def local(x: Array, experts: Array, mix: Array, weights: ExpertWeights) -> Array:
            out = _grouped_mlp(x, experts, mix, weights, self.gating)
            # Each device of these axes holds a part of the hidden width: their sum is the output.
            return out if hidden is None else jax.lax.psum(out, hidden)

        return jax.shard_map(
            local,
            mesh=placement.mesh,
            in_specs=(
                tokens,
                tokens,
                tokens,
                ExpertWeights(inward, inward, outward, bias, bias),  # pyright: ignore
            ),
            out_specs=tokens,
            check_vma=False,
        )(x, routes.experts, routes.weights, weights)

    def _slots(self, length: int) -> int:
        """Tokens of a row that an expert takes."""
        share = length * self.config.chosen / self.config.count
        return min(length, math.ceil(self.capacity * share))

    def _in_slots(
        self,
        x: Float[Array, "B T D"],
        slots: Int[Array, "B T k"],
        capacity: int,
        mix: Float[Array, "B T k"],
        weights: ExpertWeights,
    ) -> Float[Array, "B T D"]:
        """Tokens in a bounded number of slots of each expert; float32."""
        (rows, length, embed), places = x.shape, self.config.count * capacity
        row = jnp.arange(rows)[:, None, None]
        token = jnp.broadcast_to(jnp.arange(length)[None, :, None], slots.shape)
        # An empty slot reads the zero after the last token; the slot after the last takes what is
        # dropped.
        source = jnp.full((rows, places + 1), length).at[row, slots].set(token)[:, :places]
        taken = jnp.take_along_axis(_with_zero(x), source[..., None], axis=1)
        taken = taken.reshape(rows, self.config.count, capacity, embed)
        taken = constrain(taken, "batch", "act_experts", "act_slots", "act_embed")
        gate = checkpoint_name(jnp.einsum("becd,efd->becf", taken, weights.gate), PRODUCT)
        up = checkpoint_name(jnp.einsum("becd,efd->becf", taken, weights.up), PRODUCT)
        if weights.gate_bias is not None and weights.up_bias is not None:
            gate += weights.gate_bias[None, :, None]
            up += weights.up_bias[None, :, None]
        hidden = constrain(self.gating(gate, up), "batch", "act_experts", "act_slots", "act_mlp")
        out = checkpoint_name(jnp.einsum("becf,edf->becd", hidden, weights.down), PRODUCT)
        out = constrain(out, "batch", "act_experts", "act_slots", "act_embed")
        out = _with_zero(out.reshape(rows, places, embed))
        back = jnp.take_along_axis(out, slots.reshape(rows, -1, 1), axis=1)
        return _mixed(back.reshape(*slots.shape, embed), mix)


def _grouped_mlp(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
    gating: Gating,
) -> Float[Array, "B T D"]:
    """Sorts copies of tokens by expert and multiplies each group with its weights; float32."""
    rows, length, chosen = experts.shape
    of_copy = experts.reshape(-1)
    order = jnp.argsort(of_copy)
    sizes = jnp.bincount(of_copy, length=weights.gate.shape[0]).astype(jnp.int32)
    copies = x.reshape(rows * length, -1)[order // chosen]

    def product(x: Array, w: Array, b: Array | None) -> Array:
        out = checkpoint_name(jax.lax.ragged_dot_general(x, w, sizes, _BY_EXPERT), PRODUCT)
        return out if b is None else out + b[of_copy[order]]

    gate = product(copies, weights.gate, weights.gate_bias)
    up = product(copies, weights.up, weights.up_bias)
    out = product(gating(gate, up), weights.down, None)
    # Back to where the tokens were: the inverse of a permutation is its argsort.
    out = out[jnp.argsort(order)].reshape(rows, length, chosen, -1)
    return _mixed(out, mix)


# [tokens, in] x [experts, out, in] -> [tokens, out], tokens in consecutive groups.
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def _slots_of(
    experts: Int[Array, "B T k"], real: Bool[Array, "B T"], capacity: int, count: int
) -> Int[Array, "B T k"]:
    """Gives each choice of a token a slot of its expert, first choices before second ones.

    Returns:
      Slot c of expert e as `e * capacity + c`; `count * capacity` for padding and where the expert
      is full.
    """
    rows, length, chosen = experts.shape
    asked = jax.nn.one_hot(experts, count, dtype=jnp.int32) * real[..., None, None]
    by_choice = asked.transpose(0, 2, 1, 3).reshape(rows, chosen * length, count)
    queue = jnp.cumsum(by_choice, axis=1) - by_choice
    queue = queue.reshape(rows, chosen, length, count).transpose(0, 2, 1, 3)
    place = jnp.sum(queue * asked, axis=-1)
    fits = real[..., None] & (place < capacity)
    return jnp.where(fits, experts * capacity + place, count * capacity)


def _with_zero(x: Float[Array, "B T D"]) -> Float[Array, "B T1 D"]:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0)))


def _mixed(out: Float[Array, "B T k D"], mix: Float[Array, "B T k"]) -> Float[Array, "B T D"]:
    """Weighted sum of the outputs of a token's experts, in float32."""
    return jnp.sum(out.astype(jnp.float32) * mix[..., None], axis=2)


def balance_loss(routing: Routing) -> Float[Array, ""]:
    """Load-balancing loss of Switch Transformers (Fedus et al., arXiv:2101.03961, equation 4).

    E times the sum over experts of the share of tokens sent to it and of its mean probability,
    both over the tokens of all layers; k with perfect balance. Gradients flow through the
    probabilities.

    Args:
      routing: Sums with a leading axis of layers.
    """
    tokens = jnp.maximum(jnp.sum(routing.tokens), 1.0)
    shares = jax.lax.stop_gradient(jnp.sum(routing.counts, axis=0)) / tokens
    probabilities = jnp.sum(routing.probabilities, axis=0) / tokens
    return routing.counts.shape[-1] * jnp.sum(shares * probabilities)
