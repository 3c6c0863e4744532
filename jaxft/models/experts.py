"""Mixture of experts: a router in float32, and two ways of bringing tokens to their experts."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.config import DecoderConfig, ExpertsConfig, Numerics
from jaxft.models.dispatch import (
    Gating,
    grouped,
    in_slots,
    on_devices,
    slots_of,
)
from jaxft.models.expert_weights import ExpertWeights, Projection
from jaxft.models.layers import GatedMLP, Linear, Routing
from jaxft.models.module import Param
from jaxft.models.nonlinearity import gelu_tanh
from jaxft.models.weights import Weight, refuse_columns
from jaxft.sharding.rules import Placement, active_placement


def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def geglu(gate: Array, up: Array) -> Array:
    """GEGLU of the same paper, with the approximation of GELU by tanh."""
    return gelu_tanh(gate) * up


class Routes(NamedTuple):
    """A router's decisions for each token.

    Attributes:
      experts: int32 `[B, T, k]`, the chosen experts, the most likely first.
      weights: float32 `[B, T, k]`, of their outputs.
      probabilities: float32 `[B, T, E]`, scores over their sum.
    """

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]
    probabilities: Float[Array, "B T E"]


class ExpertLinear(Weight):
    """One projection for each expert, `[E, outputs, inputs]`, with a bias `[E, outputs]`."""

    takes_columns = False  # experts take tokens of all rows together

    def __init__(self, *shape: int, axes, dtype, scale: float, rngs: nnx.Rngs, bias: bool):
        super().__init__(shape, axes=axes, inputs=1, lead=1, dtype=dtype, scale=scale, rngs=rngs)
        self.b = Param(jnp.zeros(shape[:2], dtype), axes=axes[:2]) if bias else None

    def projection(self, dtype: Any) -> Projection:
        """Returns its arrays as tokens meet them, in `dtype`."""
        if self.codes is None:
            arrays = {"w": self.value(dtype)}
        else:
            arrays = {"codes": self.codes[...], "scales": self.scales[...]}
        if self.b is not None:
            arrays["b"] = self.b[...].astype(dtype)
        if self.site is not None:
            refuse_columns()
            arrays["lora_a"] = self.lora_a[...].astype(dtype)
            arrays["lora_b"] = (self.lora_b[...] * self.site.scale).astype(dtype)
            if self.site.start:
                arrays["start_a"] = self.start_a[...].astype(dtype)
                arrays["start_b"] = (self.start_b[...] * self.site.scale).astype(dtype)
        return Projection(self.axes, self.matmul, **arrays)


def tokens_of_expert(experts: ExpertsConfig, capacity: float, length: int) -> int:
    """Returns how many tokens of a row an expert takes: `capacity` times an even share."""
    share = length * experts.chosen / experts.count
    return min(length, math.ceil(capacity * share))


class Experts(nnx.Module):
    """A feed-forward part of which each token uses a few experts.

    Without a capacity no token is dropped: tokens are sorted by expert and one grouped product
    multiplies each group with its expert (Gale et al., MegaBlocks, arXiv:2211.15841): on TPU by the
    kernels of `models/grouped.py`, elsewhere by `jax.lax.ragged_dot_general`. Where XLA has no such
    product, on CPU, every expert is multiplied with every token and masked, so that work grows with
    E. With `numerics.expert_capacity` each expert takes a bounded number of each row's tokens
    (Lepikhin et al., GShard, arXiv:2006.16668); what exceeds it passes by on the residual stream.

    A strategy may split experts over mesh axes that tokens are split over too. Tokens then go to
    the device that holds their expert, and results come back, by all-to-all. With a capacity both
    are arrays of equal parts. Without one only real tokens travel, but a device must have room for
    the case that every token of its p peers chooses the experts it has: p * N * min(k, E / p) rows
    of D and of F, with N tokens of each device, where N * k are used on average.

    Args:
      config: Sizes.
      numerics: Types and capacity.
      rngs: Random keys.
      bias: Whether router and projections have one.
      gating: Makes the hidden activation.
      scaled: Whether what an expert gives is multiplied by a number of its own.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        gating: Gating = swiglu,
        scaled: bool = False,
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
        # Whatever the others' type is: rounded, it would choose other experts.
        correction = Param(jnp.zeros(e, jnp.float32), axes=("router",))
        self.correction = correction if config.experts.corrected else None
        self.gate = ExpertLinear(e, f, d, axes=("experts", "mlp", "embed"), **kwargs)
        self.up = ExpertLinear(e, f, d, axes=("experts", "mlp", "embed"), **kwargs)
        self.down = ExpertLinear(e, d, f, axes=("experts", "embed", "mlp"), **kwargs)
        ones = jnp.ones(e, numerics.param_dtype)
        self.expert_scale = Param(ones, axes=("router",)) if scaled else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        judged: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns what is added to the residual stream, nothing on padding, and the routing.

        Args:
          x: What experts read.
          real: False on padding.
          judged: What the router reads, where it is not that.
        """
        placement = active_placement()
        if placement is not None:
            check_experts(placement, capacity=self.capacity)
        # Few operations whose errors would change which experts are chosen: never in fewer bits.
        with jax.default_matmul_precision("highest"):
            routes = self._route(x if judged is None else judged)
        count = self.config.count
        if self.capacity:
            capacity = tokens_of_expert(self.config, self.capacity, x.shape[1])
            chosen = slots_of(routes.experts, real, capacity, count)
            kept = chosen < count * capacity
            apply = functools.partial(in_slots, capacity=capacity, gating=self.gating)
        else:
            chosen = jnp.where(real[..., None], routes.experts, count)
            kept = chosen < count
            apply = functools.partial(grouped, gating=self.gating)
        mix, weights = routes.weights * kept, self._weights(x.dtype)
        out = on_devices(placement, apply, x, chosen, mix, weights)
        return out.astype(x.dtype), self._routing(routes, real, kept)

    def _route(self, x: Array) -> Routes:
        logits = self.router(x.astype(jnp.float32))
        if self.config.scoring == "sigmoid":
            scores = jax.nn.sigmoid(logits)
            # DeepSeek-V3 (arXiv:2412.19437), equation 18: what its balance is judged by.
            probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
        else:
            scores = probabilities = jax.nn.softmax(logits, axis=-1)
        ranks = None
        if self.correction is not None:
            ranks = jax.lax.stop_gradient(scores + self.correction[...][None, None])
        weights, experts = _best(scores, ranks, self.config)
        if self.config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[...].astype(jnp.float32)[experts]
        if self.config.scale != 1:
            weights = weights * self.config.scale
        return Routes(experts, weights, probabilities)

    def _weights(self, dtype: Any) -> ExpertWeights:
        return ExpertWeights(*(p.projection(dtype) for p in (self.gate, self.up, self.down)))

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


class ExpertsAndShared(nnx.Module):
    """Experts, and one that every token goes through.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      gated: Whether a token goes through the latter as far as a gate of its own lets it.
    """

    def __init__(
        self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs, *, gated: bool = True
    ):
        assert config.experts is not None
        self.routed = Experts(config, numerics, rngs)
        self.shared = GatedMLP(config, numerics, rngs, width=config.experts.shared)
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        gate = Linear((1,), (config.embed,), axes=("router", "embed"), **kwargs) if gated else None
        self.shared_gate = gate

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns what is added to the residual stream, and the routing."""
        out, routing = self.routed(x, real)
        shared, _ = self.shared(x, real)
        if self.shared_gate is None:
            return out + shared, routing
        gate = jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32))
        return out + (gate * shared.astype(jnp.float32)).astype(out.dtype), routing


def _best(
    scores: Float[Array, "B T E"], ranks: Float[Array, "B T E"] | None, config: ExpertsConfig
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """Returns scores and numbers of the chosen experts, the best first.

    Each device chooses for its own tokens; XLA would gather all of them first.

    Args:
      scores: Of all experts.
      ranks: By which experts are chosen; None for their scores.
      config: How many there are, and in which groups.
    """

    def local(scores: Array, *ranks: Array) -> tuple[Array, Array]:
        [ranked] = ranks or [scores]
        if config.groups > 1:
            ranked = jnp.where(_in_best_groups(ranked, config), ranked, -jnp.inf)
        best, experts = jax.lax.top_k(ranked, config.chosen)
        return jnp.take_along_axis(scores, experts, axis=-1) if ranks else best, experts

    arrays = (scores,) if ranks is None else (scores, ranks)
    placement = active_placement()
    if placement is None:
        return local(*arrays)
    stream = placement.spec(("batch", "stream_seq"), scores.shape[:2], "tokens of experts")
    return placement.shard_map(local, (stream,) * len(arrays), (stream, stream))(*arrays)


def _in_best_groups(ranks: Float[Array, "B T E"], config: ExpertsConfig) -> Bool[Array, "B T E"]:
    """Whether an expert is of a group that a token may choose of.

    DeepSeek-V2 (arXiv:2405.04434), section 2.2.2, and DeepSeek-V3, section 2.1.2, whose groups are
    those of one node.
    """
    groups = jax.lax.stop_gradient(ranks).reshape(*ranks.shape[:2], config.groups, -1)
    best = jnp.sum(jax.lax.top_k(groups, config.ranking)[0], axis=-1)
    chosen = jax.lax.top_k(best, config.chosen_groups)[1]
    allowed = jnp.sum(jax.nn.one_hot(chosen, config.groups, dtype=jnp.int32), axis=2) > 0
    return jnp.repeat(allowed, groups.shape[-1], axis=-1)


def check_experts(placement: Placement, *, capacity: float) -> None:
    """Refuses placements that experts cannot be applied under.

    Args:
      placement: Of the run.
      capacity: `numerics.expert_capacity`.

    Raises:
      ConfigError: With all that is wrong.
    """
    over_tokens = {*placement.split("batch"), *placement.split("seq")}
    problems = [
        f"strategy {placement.name!r} splits act_experts over mesh axis {name!r}, which splits "
        f"neither batch nor seq: no token could travel along it. Split batch over it too."
        for name in placement.split("act_experts")
        if name not in over_tokens
    ]
    if capacity and placement.split("seq"):
        problems.append(
            f"model.expert_capacity {capacity} counts the tokens of a whole row, of which strategy "
            f"{placement.name!r} gives each device a part. Set "
            f"--config.model.expert_capacity=0, which drops no token, or use a "
            "strategy that does not split rows."
        )
    if problems:
        raise ConfigError(problems)


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
