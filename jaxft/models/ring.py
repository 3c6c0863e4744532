"""Exact attention over rows that are split over devices, whose keys and values go round a ring.

Liu et al., Ring Attention, arXiv:2310.01889. Of c devices, device i holds chunks i and 2c - 1 - i
of each row (`sharding/sequence.py`). At step r it has the keys and values of device s = i - r, and
scores two pairs of chunks, whatever i and r are: its late queries with the early keys, and its
early queries with the early keys if s < i, else its late queries with the late keys. What the
causal mask would hide is never scored, and no device waits for another. Step 0 has a third pair.

Scores are computed a block of queries and a block of keys at a time and forgotten; the backward
pass computes them again from the logarithm of each query's softmax sum (Dao et al.,
arXiv:2205.14135). There the gradients of keys and values travel with them, and are at home after
the last step.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxft.models.activations import ATTENTION
from jaxft.models.config import Scoring
from jaxft.models.row_split import RowSplit, split_rows
from jaxft.sharding.rules import active_placement

# Most queries, and most keys, that are scored at a time.
BLOCK = 512
HIDDEN = float(jnp.finfo(jnp.float32).min)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K U"],
    segments: Int[Array, "B T"],
    scores: Scoring,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N U"]:
    """Attention of rows over themselves, as `attention.attend` describes it.

    The arrays are those of all devices, positions in the order of `Placement.slots`; the active
    placement says how they are split.
    """
    placement = active_placement()
    assert placement is not None, "choose_backend allows it where a strategy splits rows"
    split, k, v = split_rows(placement, q, k, v)
    return _attention(Ring(split, scores), q, k, v, segments, sinks)


def block_size(chunk: int) -> int:
    """Returns how many positions of a chunk are scored at a time."""
    return chunk if chunk <= BLOCK else math.gcd(chunk, BLOCK)


@dataclass(frozen=True, slots=True)
class Ring:
    """The facts that are known when the program is traced.

    Attributes:
      split: Placement of rows on devices.
      scores: The way queries score keys.
    """

    split: RowSplit
    scores: Scoring

    @property
    def size(self) -> int:
        """Number c of devices that share a row."""
        return self.split.parts

    @property
    def logs(self) -> P:
        """Placement of logarithms `[B, N, T]`."""
        batch, seq, heads = self.split.spec
        return P(batch, heads, seq)

    def steps(self, chunk: int) -> list[int]:
        """Returns the steps at which a query of any device sees a key, for chunks of this size.

        Without a window all c; with one those that bring chunks near enough.
        """
        if not self.scores.window:
            return list(range(self.size))
        # Chunks before its own that the first query of a chunk sees.
        reach = -(-(self.scores.window - 1) // chunk)
        return [r for r in range(self.size) if min(r, self.size - r) <= reach]

    def pairs(self, device: Array, r: Array, *, first: bool) -> Int[Array, "pairs 2"]:
        """Returns which chunks of queries and of keys, 0 early and 1 late, are scored at step r."""
        same = jnp.where((device - r) % self.size < device, 0, 1)
        return jnp.array([(0, 0)] * first + [(1, 0), (same, same)])

    def places(self, device: Array, r: Array | int, shape: tuple[int, ...]) -> Int[Array, "2 n b"]:
        """Returns the place in its row of each position that a device has at step r.

        Args:
          device: Its number.
          r: The step.
          shape: Of the segments of these positions, `[2, n, B, b]`.
        """
        source = (device - r) % self.size
        _, count, _, block = shape
        starts = jnp.stack([source, 2 * self.size - 1 - source]) * (count * block)
        return starts[:, None, None] + jnp.arange(count * block).reshape(1, count, block)

    def shift(self, tree: Any, jump: int) -> Any:
        """Sends arrays to the device that has them `jump` steps later."""
        if not jump:
            return tree
        to = [(i, (i + jump) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.split.axes, to), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    ring: Ring, q: Array, k: Array, v: Array, segments: Array, sinks: Array | None
) -> Array:
    return _attention_forward(ring, q, k, v, segments, sinks)[0]


def _attention_forward(
    ring: Ring, q: Array, k: Array, v: Array, segments: Array, sinks: Array | None
) -> tuple[Array, tuple]:
    rows, of_segments, heads = ring.split.rows, ring.split.segments, ring.split.heads
    forward = ring.split.placement.shard_map(
        functools.partial(_forward, ring), (rows, rows, rows, of_segments, heads), (rows, ring.logs)
    )
    out, logs = forward(q, k, v, segments, sinks)
    out, logs = checkpoint_name(out, ATTENTION), checkpoint_name(logs, ATTENTION)
    return out, (q, k, v, segments, sinks, out, logs)


def _attention_backward(ring: Ring, kept: tuple, d_out: Array) -> tuple:
    rows, of_segments, heads = ring.split.rows, ring.split.segments, ring.split.heads
    backward = ring.split.placement.shard_map(
        functools.partial(_backward, ring),
        (rows, rows, rows, of_segments, heads, rows, ring.logs, rows),
        (rows, rows, rows, heads),
    )
    dq, dk, dv, d_sinks = backward(*kept, d_out)
    return dq, dk, dv, None, d_sinks


_attention.defvjp(_attention_forward, _attention_backward)


class Queries(NamedTuple):
    """The part that stays on its device: two chunks of n blocks of b positions.

    Attributes:
      q: `[2, n, B, K, G, b, H]`; G query heads read one key head.
      segments: `[2, n, B, b]`.
      places: `[2, n, b]`; see `Ring.places`.
    """

    q: Array
    segments: Array
    places: Array


class Keys(NamedTuple):
    """The part that goes round.

    Attributes:
      k: `[2, n, B, K, b, H]`.
      v: Values, laid out like `k`, `[2, n, B, K, b, U]`.
      segments: `[2, n, B, b]`.
    """

    k: Array
    v: Array
    segments: Array


class Seen(NamedTuple):
    """The softmax of each query over the keys that it has seen so far, float32.

    Attributes:
      largest: Largest score, `[2, n, B, K, G, b]`.
      total: Sum of `exp(score - largest)`, as `largest`.
      out: Sum of values with these weights, `[2, n, B, K, G, b, U]`.
    """

    largest: Array
    total: Array
    out: Array


class Pull(NamedTuple):
    """The backward pass's knowledge of each query.

    Attributes:
      logs: Logarithm of its softmax sum, `[2, n, B, K, G, b]`.
      d_out: Gradient of its output, `[2, n, B, K, G, b, U]`.
      mean: Mean over its keys of the products of `d_out` and values, as `logs`.
    """

    logs: Array
    d_out: Array
    mean: Array


def _forward(
    ring: Ring, q: Array, k: Array, v: Array, segments: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """Returns the output of a device's queries, and the logarithm of each one's softmax sum."""
    device, queries, keys = _cut_all(ring, q, k, v, segments)

    def step(r: Array, carry: tuple[Keys, Seen], came: int, goes: int) -> tuple[Keys, Seen]:
        keys, seen = carry
        sent = ring.shift(keys, goes)  # first, and read by nothing here: it can go on meanwhile
        places = ring.places(device, r, keys.segments.shape)

        def pair(seen: Seen, which: Array) -> tuple[Seen, None]:
            chunk = _take((keys, places), which[1])
            new = jax.lax.map(
                lambda block: _see(ring.scores, *block, *chunk), _take((queries, seen), which[0])
            )
            return _put(seen, new, which[0]), None

        return sent, jax.lax.scan(pair, seen, ring.pairs(device, r, first=not came))[0]

    start = (keys, _nothing_seen(queries, keys, sinks))
    _, seen = _go_round(ring.steps(q.shape[1] // 2), step, start)
    out = (seen.out / seen.total[..., None]).astype(q.dtype)
    return _join(out), _join_logs(seen.largest + jnp.log(seen.total))


def _backward(
    ring: Ring,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    sinks: Array | None,
    out: Array,
    logs: Array,
    d_out: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Returns the gradients of a device's queries, keys and values, and that of the sinks."""
    device, queries, keys = _cut_all(ring, q, k, v, segments)
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    shape = queries.q.shape
    of_out = (*shape[:-1], d_out.shape[-1])
    pull = Pull(_cut_logs(logs, shape), _cut(d_out, of_out), _cut_logs(mean, shape))
    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))

    def step(r: Array, carry: Any, came: int, goes: int) -> Any:
        keys, gradients, dq = carry
        sent = ring.shift(keys, goes)
        arrived = ring.shift(gradients, came)  # the sum of earlier steps, while this makes its own
        places = ring.places(device, r, keys.segments.shape)

        def pair(carry: Any, which: Array) -> tuple[Any, None]:
            own, dq = carry
            chunk = _take((keys, places), which[1])
            own_chunk, dq_chunk = jax.lax.scan(
                lambda own, block: _pull(ring.scores, own, *block, *chunk),
                _take(own, which[1]),
                _take((dq, queries, pull), which[0]),
            )
            return (_put(own, own_chunk, which[1]), _put(dq, dq_chunk, which[0])), None

        pairs = ring.pairs(device, r, first=not came)
        (own, dq), _ = jax.lax.scan(pair, (nothing, dq), pairs)
        return sent, jax.tree.map(jnp.add, arrived, own), dq

    steps = ring.steps(q.shape[1] // 2)
    start = (keys, nothing, jnp.zeros(shape, jnp.float32))
    _, gradients, dq = _go_round(steps, step, start)
    dk, dv = ring.shift(gradients, -steps[-1] % ring.size)
    dk, dv = (_join(x[:, :, :, :, None]).astype(k.dtype) for x in (dk, dv))
    return _join(dq).astype(q.dtype), dk, dv, _pull_sinks(ring, sinks, logs, mean)


def _go_round(steps: Sequence[int], step: Callable, carry: Any) -> Any:
    """Runs `step(r, carry, came, goes)` for each r, those that are alike as one loop.

    Args:
      steps: From 0 upwards.
      step: Returns the next carry. It came `came` places along the ring, 0 if it is the first, and
        the next one is `goes` away, 0 if it is the last.
      carry: The first.
    """
    jumps = [0, *(b - a for a, b in itertools.pairwise(steps)), 0]
    around = zip(itertools.pairwise(jumps), steps, strict=True)
    for (came, goes), alike in itertools.groupby(around, key=lambda pair: pair[0]):
        group = [r for _, r in alike]
        body = functools.partial(step, came=came, goes=goes)
        carry = jax.lax.fori_loop(group[0], group[-1] + 1, body, carry)
    return carry


def _see(scores: Scoring, queries: Queries, seen: Seen, keys: Keys, places: Array) -> Seen:
    """Adds a chunk of keys, block by block, to what a block of queries has seen."""

    def block(seen: Seen, of_keys: tuple[Keys, Array]) -> tuple[Seen, None]:
        products, _ = _score(scores, queries, *of_keys)
        # Until a query sees a key, its largest score and what it sums up are of hidden ones. The
        # first that it sees fades them to zero, and each sees at least its own key.
        largest = jnp.maximum(seen.largest, jnp.max(products, axis=-1))
        weights = jnp.exp(products - largest[..., None])
        fade = jnp.exp(seen.largest - largest)
        v = of_keys[0].v
        values = _einsum("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v)
        total = seen.total * fade + jnp.sum(weights, axis=-1)
        return Seen(largest, total, seen.out * fade[..., None] + values), None

    return jax.lax.scan(block, seen, (keys, places))[0]


def _pull(
    scores: Scoring,
    dkv: tuple[Array, Array],
    dq: Array,
    queries: Queries,
    pull: Pull,
    keys: Keys,
    places: Array,
) -> tuple[tuple[Array, Array], Array]:
    """Adds what a block of queries and a chunk of keys give to their gradients."""

    def block(dq: Array, of_keys: tuple) -> tuple[Array, tuple[Array, Array]]:
        keys, places, dk, dv = of_keys
        products, slopes = _score(scores, queries, keys, places)
        weights = jnp.exp(products - pull.logs[..., None])
        d_weights = _einsum("bkgqh,bksh->bkgqs", pull.d_out, keys.v)
        d_products = weights * (d_weights - pull.mean[..., None]) * slopes
        weights, d_products = (x.astype(queries.q.dtype) for x in (weights, d_products))
        dv += _einsum("bkgqs,bkgqh->bksh", weights, pull.d_out)
        dk += _einsum("bkgqs,bkgqh->bksh", d_products, queries.q)
        dq += _einsum("bkgqs,bksh->bkgqh", d_products, keys.k)
        return dq, (dk, dv)

    dq, dkv = jax.lax.scan(block, dq, (keys, places, *dkv))
    return dkv, dq


def _score(
    scores: Scoring, queries: Queries, keys: Keys, places: Array
) -> tuple[Float[Array, "B K G q s"], Float[Array, "B K G q s"] | float]:
    """Returns scores, `HIDDEN` where the mask hides, and their derivative by the bare products."""
    behind = queries.places[:, None] - places[None, :]
    visible = behind >= 0
    if scores.window:
        visible &= behind < scores.window
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    visible = (visible[None] & same)[:, None, None]
    products = _einsum("bkgqh,bksh->bkgqs", queries.q, keys.k) * scores.scale
    slopes: Array | float = scores.scale
    if scores.cap:
        bounded = jnp.tanh(products / scores.cap)
        products, slopes = scores.cap * bounded, scores.scale * (1.0 - jnp.square(bounded))
    return jnp.where(visible, products, HIDDEN), slopes


def _nothing_seen(queries: Queries, keys: Keys, sinks: Array | None) -> Seen:
    shape = queries.q.shape
    largest, total = jnp.full(shape[:-1], HIDDEN), jnp.zeros(shape[:-1])
    if sinks is not None:
        # A sink is a key that every query sees first, and that has no value.
        of_heads = sinks.astype(jnp.float32).reshape(*shape[3:5], 1)
        largest, total = jnp.broadcast_to(of_heads, shape[:-1]), jnp.ones(shape[:-1])
    return Seen(largest, total, jnp.zeros((*shape[:-1], keys.v.shape[-1]), jnp.float32))


def _pull_sinks(ring: Ring, sinks: Array | None, logs: Array, mean: Array) -> Array | None:
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - logs)
    total = -jnp.sum(weights * mean, axis=(0, 2))
    split = [entry for entry in ring.split.spec[:2] if entry is not None]
    return jax.lax.psum(total, tuple(jax.tree.leaves(split))).astype(sinks.dtype)


def _einsum(formula: str, a: Array, b: Array) -> Array:
    """Contracts in the inputs' type, float32 in full, and adds up in float32.

    The precision is stated because the backward pass is traced outside of every context that the
    model sets one in.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, precision=exact, preferred_element_type=jnp.float32)


def _cut_all(
    ring: Ring, q: Array, k: Array, v: Array, segments: Array
) -> tuple[Array, Queries, Keys]:
    """Returns the number of the device, and its parts of rows in chunks and blocks."""
    # The masks of all blocks are the same in every layer. Without this JAX would make them all
    # ahead of the loop over layers, and keep them: they must seem to need this layer's queries.
    device = jax.lax.axis_index(ring.split.axes)
    q, segments, device = jax.lax.optimization_barrier((q, segments, device))
    (rows, length, heads, size), kv_heads = q.shape, k.shape[2]
    block = block_size(length // 2)
    shape = (2, length // 2 // block, rows, kv_heads, heads // kv_heads, block, size)
    segments = segments.reshape(rows, 2, -1, block).transpose(1, 2, 0, 3)
    k, v = (_cut(x, (*shape[:4], 1, block, x.shape[-1]))[:, :, :, :, 0] for x in (k, v))
    queries = Queries(_cut(q, shape), segments, ring.places(device, 0, segments.shape))
    return device, queries, Keys(k, v, segments)


def _cut(x: Float[Array, "B t N H"], shape: tuple[int, ...]) -> Float[Array, "2 n B K G b H"]:
    chunks, count, rows, kv_heads, groups, block, size = shape
    x = x.reshape(rows, chunks, count, block, kv_heads, groups, size)
    return x.transpose(1, 2, 0, 4, 5, 3, 6)


def _join(x: Float[Array, "2 n B K G b H"]) -> Float[Array, "B t N H"]:
    chunks, count, rows, kv_heads, groups, block, size = x.shape
    x = x.transpose(2, 0, 1, 5, 3, 4, 6)
    return x.reshape(rows, chunks * count * block, kv_heads * groups, size)


def _cut_logs(x: Float[Array, "B N t"], shape: tuple[int, ...]) -> Float[Array, "2 n B K G b"]:
    chunks, count, rows, kv_heads, groups, block, _ = shape
    x = x.reshape(rows, kv_heads, groups, chunks, count, block)
    return x.transpose(3, 4, 0, 1, 2, 5)


def _join_logs(x: Float[Array, "2 n B K G b"]) -> Float[Array, "B N t"]:
    chunks, count, rows, kv_heads, groups, block = x.shape
    x = x.transpose(2, 3, 4, 0, 1, 5)
    return x.reshape(rows, kv_heads * groups, chunks * count * block)


def _take(tree: Any, index: Array) -> Any:
    """Returns one of the two chunks."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, chunk: Any, index: Array) -> Any:
    """Replaces one of the two chunks."""
    return jax.tree.map(lambda x, new: x.at[index].set(new), tree, chunk)
