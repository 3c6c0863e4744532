"""Bringing tokens to their experts and results back, on one device and over several."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.activations import MLP
from jaxft.models.expert_weights import ExpertWeights, Product, Projection
from jaxft.models.grouped import chip_with_kernel, multiply_groups
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.sharding.rules import Placement

# Maps gate and up projections of the same shape to the hidden activation.
Gating = Callable[[Array, Array], Array]


class Peers(NamedTuple):
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
_Apply = Callable[[Array, Array, Array, ExpertWeights, Peers], Array]


def on_devices(
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
        return apply(x, chosen, mix, weights, Peers())
    plans = ExpertWeights(*(_planned(projection, x.shape[:2]) for projection in weights))
    if plans.down.b is not None:
        plans.down.b = _whole(plans.down.b)
    axes, hidden, *_ = plans.gate.matrix.held
    peers = Peers(
        axes,
        math.prod(placement.mesh.shape[name] for name in axes),
        # XLA has this collective for TPU and GPU alone.
        ragged=placement.mesh.devices.flat[0].platform != "cpu",
    )
    rows, positions = plans.gate.matrix.tokens
    # Positions of the residual stream may be split further than those of tokens are here.
    shared = tuple(name for name in placement.split("stream_seq") if name not in positions)
    tokens, stream = P(rows, positions), P(rows, (*positions, *shared))

    def local(
        x: Array, chosen: Array, mix: Array, parts: ExpertWeights, weights: ExpertWeights
    ) -> Array:
        if shared:
            x = jax.lax.all_gather(x, shared, axis=1, tiled=True)
        whole = jax.tree.map(_gathered, plans, parts, weights, is_leaf=_is_plan)
        for projection, plan in zip(whole, plans, strict=True):
            projection.cuts = plan.matrix.held[1:]
        if hidden and whole.down.b is not None:
            # The outputs of these devices are added up: the bias counts once.
            first = jax.lax.axis_index(hidden) == 0
            whole.down.b = jnp.where(first, whole.down.b, 0)
        out = apply(x, chosen, mix, whole, peers)
        if not hidden:
            return out
        out = out.astype(x.dtype)  # it travels like the sums of dense layers
        if hidden == shared:
            return jax.lax.psum_scatter(out, hidden, scatter_dimension=1, tiled=True)
        return jax.lax.psum(out, hidden)

    of_parts, of_weights = (
        jax.tree.map(spec, plans, is_leaf=_is_plan)
        for spec in (lambda plan: plan.of_gradient, lambda plan: plan.of_weight)
    )
    return plans.gate.matrix.map(
        # Gathered weights are not kept for the backward pass, which gathers them again.
        jax.checkpoint(local, policy=_not_gathered, prevent_cse=False),
        (stream, tokens, tokens, of_parts, of_weights),
        stream if hidden == shared else tokens,
    )(x, chosen, mix, weights, jax.lax.stop_gradient(weights))


def _not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # What has no gradient is gathered inside the function that says how its gradient would be made.
    return primitive.name not in ("all_gather", "custom_vjp_call")


def _planned(projection: Projection, tokens: tuple[int, ...]) -> Projection:
    plans = {
        leaf: plan_weight(projection.axes_of(leaf), x.shape, tokens)
        for leaf, x in projection.leaves().items()
    }
    return Projection(projection.axes, projection.matmul, **plans)


def _is_plan(node: Any) -> bool:
    return isinstance(node, WeightPlan)


def _whole(plan: WeightPlan) -> WeightPlan:
    """Returns the plan of a weight that every device needs of all experts."""
    nothing = ((),) * len(plan.held)
    gathered, scattered = (
        tuple(a + b for a, b in zip(plan.held, more, strict=True))
        for more in (plan.gathered, plan.scattered)
    )
    return plan._replace(held=nothing, gathered=gathered, scattered=scattered)


def _gathered(plan: WeightPlan, part: Array, w: Array) -> Array:
    """Gathers a weight in a `shard_map`; its gradient goes to `part`, cut as gradients are."""

    @jax.custom_vjp
    def whole(part: Array, w: Array) -> Array:
        return plan.gather(w)

    def backward(_: None, gradient: Array) -> tuple[Array, None]:
        # Other devices' gradients of the same part are added where the `shard_map` ends.
        return plan.scatter(gradient), None

    whole.defvjp(lambda part, w: (plan.gather(w), None), backward)
    return whole(part, w)


class Places(NamedTuple):
    """The places of copies of tokens, each beside others for the same expert.

    Attributes:
      of_copy: int32 `[N, k]`, the place of each copy of a token; M for one that is dropped.
      copies: int32 `[M]`, which copy lies at each place, n * k + choice; N * k where none does.
    """

    of_copy: Int[Array, "N k"]
    copies: Int[Array, " M"]

    @property
    def tokens(self) -> Int[Array, " M"]:
        """The token at each place; N where there is none."""
        return self.copies // self.of_copy.shape[1]


def spread(x: Float[Array, "N D"], places: Places) -> Float[Array, "M D"]:
    """Puts copies of tokens at their places; zero where there is none.

    A token's gradient is read from its places, and added up in float32: left to itself it would be
    added to the token place by place, which accelerators do slowly.
    """

    @jax.custom_vjp
    def copied(x: Array, places: Places) -> Array:
        return _rows(x, places.tokens)

    def backward(places: Places, dy: Array) -> tuple[Array, None]:
        of_copies = _rows(dy, places.of_copy).astype(jnp.float32)
        return jnp.sum(of_copies, axis=1).astype(dy.dtype), None

    copied.defvjp(lambda x, places: (copied(x, places), places), backward)
    return copied(x, places)


def combine(
    out: Float[Array, "M D"], mix: Float[Array, "N k"], places: Places
) -> Float[Array, "N D"]:
    """Weighted sums of what the copies of a token got, in float32; what is dropped adds nothing.

    The backward pass brings the gradient of each token to its places, and asks there what it is to
    the copy and to its weight.
    """

    @jax.custom_vjp
    def mixed(out: Array, mix: Array, places: Places) -> Array:
        back = _rows(out, places.of_copy).astype(jnp.float32)
        return jnp.sum(back * mix[..., None], axis=1)

    def backward(kept: tuple[Array, Array, Places], dy: Array) -> tuple[Array, Array, None]:
        out, mix, places = kept
        # No bits are lost: what is made of the sum is of the type of `out`.
        dy = _rows(dy.astype(out.dtype), places.tokens).astype(jnp.float32)
        d_mix = jnp.sum(dy * out.astype(jnp.float32), axis=1)
        d_out = dy * _rows(mix.reshape(-1), places.copies)[:, None]
        return d_out.astype(out.dtype), _rows(d_mix, places.of_copy), None

    mixed.defvjp(lambda *kept: (mixed(*kept), kept), backward)
    return mixed(out, mix, places)


def _rows(x: Array, places: Array) -> Array:
    """Returns rows of an array by number; zero for a number past the last."""
    return jnp.take(x, places, axis=0, mode="fill", fill_value=0)


def in_slots(
    x: Float[Array, "B T D"],
    slots: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
    peers: Peers,
    *,
    capacity: int,
    gating: Gating,
) -> Float[Array, "B T D"]:
    """Tokens in a bounded number of slots of each expert; float32."""
    (rows, _, embed), count = x.shape, peers.count * weights.gate.matrix.shape[0]
    # The slots of an expert lie together, so that no product has to bring them there.
    room, row = rows * capacity, jnp.arange(rows)[:, None, None]
    place = slots // capacity * room + row * capacity + slots % capacity
    place = jnp.where(slots < count * capacity, place, count * room).reshape(-1, slots.shape[2])
    copies = jnp.full(count * room, place.size, jnp.int32)
    copies = copies.at[place.reshape(-1)].set(jnp.arange(place.size), mode="drop")
    places = Places(place, copies)
    taken = spread(x.reshape(-1, embed), places).reshape(count, room, embed)
    taken = peers.all_to_all(taken, 0, 1)

    gate = checkpoint_name(weights.gate.applied(SLOTS, taken), MLP)
    up = checkpoint_name(weights.up.applied(SLOTS, taken), MLP)
    if weights.gate.b is not None:
        gate += weights.gate.b[:, None]
        up += weights.up.b[:, None]
    out = weights.down.applied(SLOTS, gating(gate, up))
    out = peers.all_to_all(checkpoint_name(out, MLP), 1, 0).reshape(-1, embed)
    return _mixed(out, slots // capacity, mix, places, weights.down.b)


def grouped(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    weights: ExpertWeights,
    peers: Peers,
    *,
    gating: Gating,
) -> Float[Array, "B T D"]:
    """Copies of tokens, sorted by expert, each group with its weights; float32.

    Experts are numbered from 0 to E - 1; E stands for none.
    """
    (rows, length, k), here = experts.shape, weights.gate.matrix.shape[0]
    of_copy, count = experts.reshape(-1), peers.count * here
    order = jnp.argsort(of_copy)
    sizes = jnp.bincount(of_copy, length=count).astype(jnp.int32)
    # Copies for no expert are sorted behind all others. Back to where tokens were: the inverse of a
    # permutation is its argsort.
    used = jnp.arange(order.size) < jnp.sum(sizes)
    place = jnp.where(of_copy < count, jnp.argsort(order), order.size)
    places = Places(place.reshape(-1, k), jnp.where(used, order, order.size))
    copies = spread(x.reshape(rows * length, -1), places)
    if peers.axes:
        there, back, sizes = journeys(sizes, peers)
        room = rows * length * min(k, here)
        copies = exchange(copies, there, peers, room, peers.count * room)
        out = exchange(_by_expert(copies, sizes, weights, gating), back, peers, room, order.size)
    else:
        out = _by_expert(copies, sizes, weights, gating)
    return _mixed(out, experts, mix, places, weights.down.b)


def _by_expert(
    x: Float[Array, "N D"], sizes: Int[Array, " E"], weights: ExpertWeights, gating: Gating
) -> Float[Array, "N D"]:
    """Consecutive groups of rows through an expert each; not defined after the last group."""
    used = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    expert = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=x.shape[0])

    def through(projection: Projection, x: Array, b: Array | None) -> Array:
        out = checkpoint_name(projection.applied(GROUPS, x, sizes, used, expert), MLP)
        return out if b is None else jnp.where(used, out + b[expert], 0)

    gate = through(weights.gate, x, weights.gate.b)
    up = through(weights.up, x, weights.up.b)
    return through(weights.down, gating(gate, up), None)


def _multiply_slots(x: Array, w: Array, sums: Any = None) -> Array:
    return jnp.einsum("ecd,efd->ecf", x, w, preferred_element_type=sums)


def _multiply_groups(
    x: Array, w: Array, sizes: Array, used: Array, expert: Array, sums: Any = None
) -> Array:
    chip = chip_with_kernel(x.dtype) if sums is None else None
    if chip is not None:
        return multiply_groups(x, w, sizes, chip)
    out = jax.lax.ragged_dot_general(x, w, sizes, _BY_EXPERT, preferred_element_type=sums)
    # Gradients may read rows of no group, in which a product leaves what is not defined.
    return jnp.where(used, out, 0)


# Of tokens in slots, `[E, slots, in]`; and of rows in consecutive groups, `[N, in]`, given the
# size of each group, which rows are in one, and in which.
SLOTS = Product(_multiply_slots, lambda numbers: numbers[:, None])
GROUPS = Product(_multiply_groups, lambda numbers, sizes, used, expert: numbers[expert])

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


def journeys(
    sizes: Int[Array, " E"], peers: Peers
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


def exchange(
    x: Float[Array, "N D"], journey: _Journey, peers: Peers, room: int, rows: int
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


def slots_of(
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


def _mixed(
    out: Float[Array, "M D"],
    experts: Int[Array, "B T k"],
    mix: Float[Array, "B T k"],
    places: Places,
    bias: Float[Array, "E D"] | None,
) -> Float[Array, "B T D"]:
    """Weighted sum of what a token's experts give, and of their biases, in float32."""
    mixed = combine(out, mix.reshape(places.of_copy.shape), places)
    mixed = mixed.reshape(*mix.shape[:2], -1)
    if bias is None:
        return mixed
    chosen = jax.nn.one_hot(experts, bias.shape[0], dtype=jnp.float32)
    by_expert = jnp.einsum("btke,btk->bte", chosen, mix)
    return mixed + jnp.einsum("bte,ed->btd", by_expert, bias.astype(jnp.float32))
