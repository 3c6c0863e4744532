"""Mixture of experts: a router in float32, and two ways of bringing tokens to their experts."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.activations import MLP
from jaxft.models.config import DecoderConfig, ExpertsConfig, Numerics
from jaxft.models.layers import Linear, Routing
from jaxft.models.module import Param
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.sharding.rules import Placement, active_placement

# Maps gate and up projections of the same shape to the hidden activation.
Gating = Callable[[Array, Array], Array]


def swiglu(gate: Array, up: Array) -> Array:
    """SwiGLU (Shazeer, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


class Routes(NamedTuple):
    """A router's decisions for each token.

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
      down_bias: `[E, D]`.
    """

    gate: Any
    up: Any
    down: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any


_INWARD, _OUTWARD = ("experts", "mlp", "embed"), ("experts", "embed", "mlp")
_AXES = ExpertWeights(_INWARD, _INWARD, _OUTWARD, _INWARD[:2], _INWARD[:2], _OUTWARD[:2])


class ExpertLinear(nnx.Module):
    """One projection for each expert, `[E, outputs, inputs]`, with a bias `[E, outputs]`."""

    def __init__(self, *shape: int, axes, dtype, scale: float, rngs: nnx.Rngs, bias: bool):
        value = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
        self.w = Param(value.astype(dtype), axes=axes)
        self.b = Param(jnp.zeros(shape[:2], dtype), axes=axes[:2]) if bias else None


def tokens_of_expert(experts: ExpertsConfig, capacity: float, length: int) -> int:
    """Returns how many tokens of a row an expert takes: `capacity` times an even share."""
    share = length * experts.chosen / experts.count
    return min(length, math.ceil(capacity * share))


class Experts(nnx.Module):
    """A feed-forward part of which each token uses a few experts.

    Without a capacity no token is dropped: tokens are sorted by expert and one grouped product
    (`jax.lax.ragged_dot_general`) multiplies each group with its expert (Gale et al., MegaBlocks,
    arXiv:2211.15841). XLA has such a product for TPU; where it has none, on CPU, every expert is
    multiplied with every token and masked, so that work grows with E. With
    `numerics.expert_capacity` each expert takes a bounded number of each row's tokens (Lepikhin et
    al., GShard, arXiv:2006.16668); what exceeds it passes by on the residual stream.

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
        self.gate = ExpertLinear(e, f, d, axes=_AXES.gate, **kwargs)
        self.up = ExpertLinear(e, f, d, axes=_AXES.up, **kwargs)
        self.down = ExpertLinear(e, d, f, axes=_AXES.down, **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns what is added to the residual stream, nothing on padding, and the routing."""
        placement = active_placement()
        if placement is not None:
            check_experts(placement, capacity=self.capacity)
        # Few operations whose errors would change which experts are chosen: never in fewer bits.
        with jax.default_matmul_precision("highest"):
            routes = self._route(x)
        count = self.config.count
        if self.capacity:
            capacity = tokens_of_expert(self.config, self.capacity, x.shape[1])
            chosen = _slots_of(routes.experts, real, capacity, count)
            kept = chosen < count * capacity
            apply = functools.partial(_in_slots, capacity=capacity, gating=self.gating)
        else:
            chosen = jnp.where(real[..., None], routes.experts, count)
            kept = chosen < count
            apply = functools.partial(_grouped, gating=self.gating)
        mix, weights = routes.weights * kept, self._weights(x.dtype)
        out = _on_devices(placement, apply, x, chosen, mix, weights)
        return out.astype(x.dtype), self._routing(routes, real, kept)

    def _route(self, x: Array) -> Routes:
        logits = self.router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = _top_k(probabilities, self.config.chosen)
        if self.config.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routes(experts, weights, probabilities)

    def _weights(self, dtype: Any) -> ExpertWeights:
        layers = self.gate, self.up, self.down
        return ExpertWeights(
            *(layer.w[...].astype(dtype) for layer in layers),
            *(None if layer.b is None else layer.b[...].astype(dtype) for layer in layers),
        )

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


def _top_k(
    probabilities: Float[Array, "B T E"], k: int
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """Does `jax.lax.top_k`, each device for its own tokens; XLA would gather all of them first."""

    def local(probabilities: Array) -> tuple[Array, Array]:
        weights, experts = jax.lax.top_k(probabilities, k)
        return weights, experts

    placement = active_placement()
    if placement is None:
        return local(probabilities)
    stream = placement.spec(("batch", "stream_seq"), probabilities.shape[:2], "tokens of experts")
    return jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=stream,
        out_specs=(stream, stream),
        check_vma=False,
    )(probabilities)


class _Peers(NamedTuple):
    """Devices that have the other experts of a layer; empty `axes` if each device has all.

    Attributes:
      axes: Mesh axes that experts are split over.
      count: Devices along them.
      ragged: Whether they can exchange parts of unequal size.
    """

    axes: tuple[str, ...] = ()
    count: int = 1
    ragged: bool = False

    def all_to_all(self, x: Array, split: int, concat: int) -> Array:
        """Cuts a dimension into parts for the peers, and joins what they sent along another."""
        return jax.lax.all_to_all(x, self.axes, split, concat, tiled=True) if self.axes else x


# Maps x, chosen, mix, weights and peers to what a device's own tokens get, in float32.
_Apply = Callable[[Array, Array, Array, ExpertWeights, _Peers], Array]


def _on_devices(
    placement: Placement | None,
    apply: _Apply,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
) -> Float[Array, "B T D"]:
    """Applies experts on each device to its tokens; float32.

    Weights enter in their own placement and are gathered here, so that their gradient leaves by a
    reduce-scatter. The hidden width may stay split: the parts of the output are then added up.
    """
    if placement is None:
        return apply(x, chosen, mix, weights, _Peers())
    plans = ExpertWeights(
        *(
            w if w is None else plan_weight(axes, w.shape, x.shape[:2])
            for w, axes in zip(weights, _AXES, strict=True)
        )
    )
    if plans.down_bias is not None:
        plans = plans._replace(down_bias=_whole(plans.down_bias))
    axes, hidden, *_ = plans.gate.held
    peers = _Peers(
        axes,
        math.prod(placement.mesh.shape[name] for name in axes),
        # XLA has this collective for TPU and GPU alone.
        ragged=placement.mesh.devices.flat[0].platform != "cpu",
    )
    rows, positions = plans.gate.tokens
    # Positions of the residual stream may be split further than those of tokens are here.
    shared = tuple(name for name in placement.split("stream_seq") if name not in positions)
    tokens, stream = P(rows, positions), P(rows, (*positions, *shared))

    def local(
        x: Array, chosen: Array, mix: Array, parts: ExpertWeights, weights: ExpertWeights
    ) -> Array:
        if shared:
            x = jax.lax.all_gather(x, shared, axis=1, tiled=True)
        whole = ExpertWeights(*map(_gathered, plans, parts, weights))
        if hidden and whole.down_bias is not None:
            # The outputs of these devices are added up: the bias counts once.
            first = jax.lax.axis_index(hidden) == 0
            whole = whole._replace(down_bias=jnp.where(first, whole.down_bias, 0))
        out = apply(x, chosen, mix, whole, peers)
        if not hidden:
            return out
        out = out.astype(x.dtype)  # it travels like the sums of dense layers
        if hidden == shared:
            return jax.lax.psum_scatter(out, hidden, scatter_dimension=1, tiled=True)
        return jax.lax.psum(out, hidden)

    of_parts, of_weights = (
        ExpertWeights(*(plan if plan is None else spec(plan) for plan in plans))
        for spec in (lambda plan: plan.of_gradient, lambda plan: plan.of_weight)
    )
    return plans.gate.map(
        # Gathered weights are not kept for the backward pass, which gathers them again.
        jax.checkpoint(local, policy=_not_gathered, prevent_cse=False),
        (stream, tokens, tokens, of_parts, of_weights),
        stream if hidden == shared else tokens,
    )(x, chosen, mix, weights, jax.lax.stop_gradient(weights))


def _not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name != "all_gather"


def _whole(plan: WeightPlan) -> WeightPlan:
    """Returns the plan of a weight that every device needs of all experts."""
    nothing = ((),) * len(plan.held)
    gathered, scattered = (
        tuple(a + b for a, b in zip(plan.held, more, strict=True))
        for more in (plan.gathered, plan.scattered)
    )
    return plan._replace(held=nothing, gathered=gathered, scattered=scattered)


def _gathered(plan: WeightPlan | None, part: Array | None, w: Array | None) -> Array | None:
    """Gathers a weight in a `shard_map`; its gradient goes to `part`, cut as gradients are."""
    if plan is None or part is None or w is None:
        return None

    @jax.custom_vjp
    def whole(part: Array, w: Array) -> Array:
        return plan.gather(w)

    def backward(_: None, gradient: Array) -> tuple[Array, None]:
        # Other devices' gradients of the same part are added where the `shard_map` ends.
        return plan.scatter(gradient), None

    whole.defvjp(lambda part, w: (plan.gather(w), None), backward)
    return whole(part, w)


def _in_slots(
    x: Float[Array, "B T D"],
    slots: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
    peers: _Peers,
    *,
    capacity: int,
    gating: Gating,
) -> Float[Array, "B T D"]:
    """Tokens in a bounded number of slots of each expert; float32."""
    (rows, length, embed), count = x.shape, peers.count * weights.gate.shape[0]
    row = jnp.arange(rows)[:, None, None]
    token = jnp.broadcast_to(jnp.arange(length)[None, :, None], slots.shape)
    # An empty slot reads the zero after the last token; the slot after the last takes what is
    # dropped.
    source = jnp.full((rows, count * capacity + 1), length).at[row, slots].set(token)[:, :-1]
    taken = jnp.take_along_axis(_with_zero(x), source[..., None], axis=1)
    taken = peers.all_to_all(taken.reshape(rows, count, capacity, embed), 1, 0)
    gate = checkpoint_name(jnp.einsum("becd,efd->becf", taken, weights.gate), MLP)
    up = checkpoint_name(jnp.einsum("becd,efd->becf", taken, weights.up), MLP)
    if weights.gate_bias is not None:
        gate += weights.gate_bias[None, :, None]
        up += weights.up_bias[None, :, None]
    out = jnp.einsum("becf,edf->becd", gating(gate, up), weights.down)
    out = peers.all_to_all(checkpoint_name(out, MLP), 0, 1)
    out = _with_zero(out.reshape(rows, count * capacity, embed))
    back = jnp.take_along_axis(out, slots.reshape(rows, -1, 1), axis=1)
    return _mixed(back.reshape(*slots.shape, embed), slots // capacity, mix, weights.down_bias)


def _grouped(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
    peers: _Peers,
    *,
    gating: Gating,
) -> Float[Array, "B T D"]:
    """Copies of tokens, sorted by expert, each group with its weights; float32.

    Experts are numbered from 0 to E - 1; E stands for none.
    """
    (rows, length, k), here = experts.shape, weights.gate.shape[0]
    of_copy = experts.reshape(-1)
    order = jnp.argsort(of_copy)
    sizes = jnp.bincount(of_copy, length=peers.count * here).astype(jnp.int32)
    copies = x.reshape(rows * length, -1)[order // k]
    if peers.axes:
        there, back, sizes = _journeys(sizes, peers)
        room = rows * length * min(k, here)
        copies = _exchange(copies, there, peers, room, peers.count * room)
        out = _exchange(_by_expert(copies, sizes, weights, gating), back, peers, room, order.size)
    else:
        out = _by_expert(copies, sizes, weights, gating)
    # Back to where the tokens were: the inverse of a permutation is its argsort.
    out = out[jnp.argsort(order)].reshape(rows, length, k, -1)
    return _mixed(out, experts, mix, weights.down_bias)


def _by_expert(
    x: Float[Array, "N D"], sizes: Int[Array, " E"], weights: ExpertWeights, gating: Gating
) -> Float[Array, "N D"]:
    """Consecutive groups of rows through an expert each; zero after the last group."""
    used = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    expert = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=x.shape[0])

    def product(x: Array, w: Array, b: Array | None) -> Array:
        out = checkpoint_name(jax.lax.ragged_dot_general(x, w, sizes, _BY_EXPERT), MLP)
        # What a product leaves in rows of no group is not defined.
        return jnp.where(used, out if b is None else out + b[expert], 0)

    x = jnp.where(used, x, 0)
    gate = product(x, weights.gate, weights.gate_bias)
    up = product(x, weights.up, weights.up_bias)
    return product(gating(gate, up), weights.down, None)


# [tokens, in] x [experts, out, in] -> [tokens, out], tokens in consecutive groups.
_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


class _Journey(NamedTuple):
    """Slices of rows that travel, int32 `[E]` each, as `jax.lax.ragged_all_to_all` takes them."""

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


def _journeys(
    sizes: Int[Array, " E"], peers: _Peers
) -> tuple[_Journey, _Journey, Int[Array, " here"]]:
    """Plans the way of copies, sorted by expert, to the devices that have these, and back.

    Copies arrive sorted by expert and, for each, by the device that they came from.

    Args:
      sizes: Copies of this device for each expert.
      peers: Among which experts are split.

    Returns:
      The way there, the way back, and how many copies arrive for each expert of this device.
    """
    count, here = peers.count, sizes.size // peers.count
    me = jax.lax.axis_index(peers.axes)
    # [source, expert]: how many copies, where they begin at the source, and where they arrive.
    of_source = jax.lax.all_gather(sizes, peers.axes)
    begin = jnp.cumsum(of_source, axis=1) - of_source
    arriving = of_source.T.reshape(count, here * count)
    arrive = (jnp.cumsum(arriving, axis=1) - arriving).reshape(-1, count).T

    def mine(table: Array) -> Array:
        return table[me]

    def to_me(table: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(table, me * here, here, axis=1).reshape(-1)

    there = _Journey(mine(begin), mine(of_source), mine(arrive), to_me(of_source))
    back = _Journey(to_me(arrive), to_me(of_source), to_me(begin), mine(of_source))
    return there, back, jnp.sum(to_me(of_source).reshape(count, here), axis=0)


def _exchange(
    x: Float[Array, "N D"], journey: _Journey, peers: _Peers, room: int, rows: int
) -> Float[Array, "rows D"]:
    """Sends slices of rows to peers; rows that nothing arrives for are zero.

    Args:
      x: Rows of this device.
      journey: Which of them go where.
      peers: Who takes part.
      room: Most rows from one device to another.
      rows: Of the result.
    """
    if peers.ragged:
        out = jnp.zeros((rows, x.shape[1]), x.dtype)
        return jax.lax.ragged_all_to_all(x, out, *journey, axis_name=peers.axes)

    def places(offsets: Array, sizes: Array, missing: int) -> Array:
        """Row numbers of the slices to or from each peer, `[peers, room]`."""
        sizes, place = sizes.reshape(peers.count, -1), jnp.arange(room)
        ends = jnp.cumsum(sizes, axis=1)
        of_slice = jnp.sum(place[None, :, None] >= ends[:, None], axis=2)
        shift = jnp.pad(offsets.reshape(sizes.shape) - (ends - sizes), ((0, 0), (0, 1)))
        row = place[None] + jnp.take_along_axis(shift, of_slice, axis=1)
        return jnp.where(of_slice < sizes.shape[1], row, missing)

    source = places(journey.input_offsets, journey.send_sizes, x.shape[0])
    landing = peers.all_to_all(journey.output_offsets, 0, 0)
    target = places(landing, journey.recv_sizes, rows)
    parcels = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
    out = jnp.zeros((rows, x.shape[1]), x.dtype)
    return out.at[target].add(peers.all_to_all(parcels, 0, 0), mode="drop")


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


def _mixed(
    out: Float[Array, "B T k D"],
    experts: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    bias: Float[Array, "E D"] | None,
) -> Float[Array, "B T D"]:
    """Weighted sum of what a token's experts give, and of their biases, in float32."""
    mixed = jnp.sum(out.astype(jnp.float32) * mix[..., None], axis=2)
    if bias is None:
        return mixed
    chosen = jax.nn.one_hot(experts, bias.shape[0], dtype=jnp.float32)
    by_expert = jnp.einsum("btke,btk->bte", chosen, mix)
    return mixed + jnp.einsum("bte,ed->btd", by_expert, bias.astype(jnp.float32))


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
