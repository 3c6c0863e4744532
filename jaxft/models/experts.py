"""Mixture of experts: a router in float32, and two ways of bringing tokens to their experts."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.layers import Linear, Routing
from jaxft.models.module import Param
from jaxft.sharding.rules import active_placement, constrain

# Maps gate and up projections of the same shape to the hidden activation.
Gating = Callable[[Array, Array], Array]


def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


class Choice(NamedTuple):
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
    arXiv:2211.15841). With `numerics.expert_capacity` each expert takes a bounded number of each
    row's tokens, in an array with an axis of experts that a mesh can split (Lepikhin et al.,
    GShard, arXiv:2006.16668); what exceeds it passes by on the residual stream.

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
        choice = self._route(x)
        weights = ExpertWeights(
            *(layer.w[...].astype(x.dtype) for layer in (self.gate, self.up, self.down)),
            *(None if b is None else b[...].astype(x.dtype) for b in (self.gate.b, self.up.b)),
        )
        kept = jnp.broadcast_to(real[..., None], choice.experts.shape)
        if self.capacity:
            places = _places(choice.experts, real, self._slots(x.shape[1]), self.config.count)
            kept = jnp.any(places, axis=(-1, -2))
            out = self._in_slots(x, choice, weights, places)
        else:
            out = self._grouped(x, choice, weights)
        if self.down.b is not None:
            mixed = self._mix(choice, kept if self.capacity else None)
            out += jnp.einsum("bte,ed->btd", mixed, self.down.b[...].astype(jnp.float32))
        return out.astype(x.dtype), self._routing(choice, real, kept)

    def _route(self, x: Array) -> Choice:
        logits = self.router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.config.chosen)
        if self.config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Choice(experts, weights, probabilities)

    def _mix(self, choice: Choice, kept: Array | None) -> Float[Array, "B T E"]:
        """Weight of each expert for each token, 0 for those it does not go through."""
        weights = choice.weights if kept is None else choice.weights * kept
        chosen = jax.nn.one_hot(choice.experts, self.config.count, dtype=jnp.float32)
        return jnp.einsum("btke,btk->bte", chosen, weights)

    def _routing(self, choice: Choice, real: Array, kept: Array) -> Routing:
        probabilities = jax.lax.stop_gradient(real[..., None].astype(jnp.float32))
        chosen = jax.nn.one_hot(choice.experts, self.config.count, dtype=jnp.float32)
        asked = real[..., None].astype(jnp.float32)
        return Routing(
            counts=jnp.einsum("btke,btk->e", chosen, jnp.broadcast_to(asked, kept.shape)),
            probabilities=jnp.sum(choice.probabilities * probabilities, axis=(0, 1)),
            tokens=jnp.sum(real.astype(jnp.float32)),
            dropped=jnp.sum(asked * (1.0 - kept)),
        )

    def _grouped(self, x: Array, choice: Choice, weights: ExpertWeights) -> Array:
        """Every token through its experts, each device its own tokens; float32."""
        placement = active_placement()
        if placement is None:
            return _grouped_mlp(x, choice.experts, choice.weights, weights, self.gating)
        tokens = placement.spec(("batch", "seq", "act_embed"), x.shape, "tokens of experts")
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
        )(x, choice.experts, choice.weights, weights)

    def _slots(self, length: int) -> int:
        """Tokens of a row that an expert takes."""
        share = length * self.config.chosen / self.config.count
        return min(length, math.ceil(self.capacity * share))

    def _in_slots(
        self, x: Array, choice: Choice, weights: ExpertWeights, places: Bool[Array, "B T k E C"]
    ) -> Array:
        """Tokens in a bounded number of slots of each expert; float32."""
        dispatch = jnp.any(places, axis=2).astype(x.dtype)
        combine = jnp.einsum("btkec,btk->btec", places.astype(jnp.float32), choice.weights)
        slots = jnp.einsum("btec,btd->ebcd", dispatch, x)
        slots = constrain(slots, "act_experts", "batch", "act_slots", "act_embed")
        gate = jnp.einsum("ebcd,efd->ebcf", slots, weights.gate)
        up = jnp.einsum("ebcd,efd->ebcf", slots, weights.up)
        if weights.gate_bias is not None and weights.up_bias is not None:
            gate += weights.gate_bias[:, None, None]
            up += weights.up_bias[:, None, None]
        hidden = constrain(self.gating(gate, up), "act_experts", "batch", "act_slots", "act_mlp")
        out = jnp.einsum("ebcf,edf->ebcd", hidden, weights.down)
        out = constrain(out, "act_experts", "batch", "act_slots", "act_embed")
        return jnp.einsum("btec,ebcd->btd", combine, out.astype(jnp.float32))


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
        out = jax.lax.ragged_dot_general(x, w, sizes, _BY_EXPERT)
        return out if b is None else out + b[of_copy[order]]

    gate = product(copies, weights.gate, weights.gate_bias)
    up = product(copies, weights.up, weights.up_bias)
    out = product(gating(gate, up), weights.down, None)
    # Back to where the tokens were: the inverse of a permutation is its argsort.
    out = out[jnp.argsort(order)].reshape(rows, length, chosen, -1)
    return jnp.einsum("btkd,btk->btd", out.astype(jnp.float32), mix)


# [tokens, in] x [experts, out, in] -> [tokens, out], tokens in consecutive groups.
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def _places(
    experts: Int[Array, "B T k"], real: Bool[Array, "B T"], slots: int, count: int
) -> Bool[Array, "B T k E C"]:
    """Gives each choice of a token a slot of its expert, first choices before second ones.

    Padding takes no slot; a choice that finds its expert full is False everywhere.
    """
    rows, length, chosen = experts.shape
    asked = jax.nn.one_hot(experts, count, dtype=jnp.int32) * real[..., None, None]
    by_choice = asked.transpose(0, 2, 1, 3).reshape(rows, chosen * length, count)
    before = jnp.cumsum(by_choice, axis=1) - by_choice
    before = before.reshape(rows, chosen, length, count).transpose(0, 2, 1, 3)
    return jax.nn.one_hot(before, slots, dtype=jnp.bool_) & (asked > 0)[..., None]


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
