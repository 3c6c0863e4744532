"""Attention by the Pallas kernel of JAX for TPU, over rows that are whole or split."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxft.hardware.chips import Chip, chip_of
from jaxft.models.activations import ATTENTION
from jaxft.models.config import Scoring
from jaxft.models.row_split import split_rows
from jaxft.sharding.rules import active_placement
from jaxft.sharding.sequence import document_order

# Most queries, and most keys, that the kernel takes at a time. Every block is a step of its own,
# but of one that the diagonal of a row crosses half is for nothing: the larger one is for rows of
# four of it and more. Published runs of MaxText take 1,024 to 2,048 on v5p, v6e and tpu7x (its
# default is 512); 2,048 does not fit the 16 MiB that libtpu 0.0.50 gives a kernel on v5e.
BLOCK, LARGE_BLOCK = 512, 1024
# One kernel that makes all gradients (`Chip.fuses`) leaves a part of queries' gradients for each
# block of keys, which are added up outside. Most such parts, each of the size of the queries in
# memory.
_MOST_PARTS = 8
# Widest head of which the larger block fits beside its gradients: one of 512 does not on v5e.
_WIDE = 256


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K U"],
    segments: Int[Array, "B T"],
    scores: Scoring,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N U"]:
    """Attention of rows over themselves, as `attention.attend` describes it.

    The kernel is mapped over rows, and each device runs it on its rows, heads and queries. Where
    rows are split, a device gathers all keys and values and puts them in order.
    """
    placement = active_placement()
    if placement is None:
        slots, chip = np.arange(q.shape[1], dtype=np.int32), chip_of(jax.devices()[0].device_kind)
        kernel = _make_kernel(slots, q.shape[2:], 1, scores, chip)
        return _rows(kernel, scores, q, k, v, segments, segments, sinks)
    split, k, v = split_rows(placement, q, k, v)
    heads = NamedSharding(split.placement.mesh, split.rows).shard_shape(q.shape)[2]
    chip = chip_of(placement.mesh.devices.flat[0].device_kind)
    sizes = (heads, q.shape[3])
    kernel = _make_kernel(placement.slots(q.shape[1]), sizes, split.parts, scores, chip)

    def local(
        kernel: Any, q: Array, k: Array, v: Array, segments: Array, sinks: Array | None
    ) -> Array:
        k, v, of_keys = (document_order(split.gather(x), split.parts) for x in (k, v, segments))
        return _rows(kernel, scores, q, k, v, of_keys, segments, sinks)

    # What the kernel knows of its queries differs from device to device.
    of_kernel = kernel.manual_sharding_spec(
        NamedSharding(split.placement.mesh, P(None, split.axes or None))
    )
    specs = (of_kernel, split.rows, split.rows, split.rows, split.segments, split.heads)
    return split.placement.shard_map(local, specs, split.rows)(kernel, q, k, v, segments, sinks)


class RowMask(splash_attention_mask.Mask):
    """The keys that queries see by their places alone, computed where they are asked for.

    The kernel calls `mask_function` on blocks of `q_sequence`, of which each device has its part.

    Args:
      slots: Place of each query in its row; keys are in order. int32 `[T]`.
      window: Positions that a query sees back, its own included; 0 for all.
    """

    def __init__(self, slots: np.ndarray, window: int):
        self.q_sequence, self.window = slots, window

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return len(self.q_sequence), len(self.q_sequence)

    def mask_function(self, queries: Any, keys: Any) -> Any:
        """True where the query at a place sees the key at a place."""
        visible = queries >= keys
        return visible & (queries - keys < self.window) if self.window else visible

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """Returns a block, `[queries, keys]`."""
        queries = self.q_sequence[index[0]][:, None]
        keys = np.arange(*index[1].indices(len(self.q_sequence)), dtype=np.int32)[None, :]
        # Most blocks are alike throughout; there are many of them in a long row.
        nearest, furthest = queries.min() - keys[0, -1], queries.max() - keys[0, 0]
        if furthest < 0 or 0 < self.window <= nearest:
            return np.zeros((queries.size, keys.size), np.bool_)
        if nearest >= 0 and (not self.window or furthest < self.window):
            return np.ones((queries.size, keys.size), np.bool_)
        return self.mask_function(queries, keys)

    def __eq__(self, other: object) -> bool:
        """Compares what is hidden: the work on masks is cached."""
        return isinstance(other, RowMask) and self._identity() == other._identity()

    def __hash__(self) -> int:
        """Goes with equality."""
        return hash(self._identity())

    def _identity(self) -> tuple[bytes, int]:
        return self.q_sequence.tobytes(), self.window


def _make_kernel(
    slots: np.ndarray, sizes: Sequence[int], parts: int, scores: Scoring, chip: Chip | None
) -> Any:
    """Returns the kernel of one row, whose arrays are for all `parts` that a row is split into.

    Args:
      slots: As for `RowMask`.
      sizes: Number of query heads, and the size of one.
      parts: That the row is split into.
      scores: As for `attention.attend`.
      chip: On which it runs, if it is known.
    """
    heads, head_dim = sizes
    window = scores.window if scores.window < len(slots) else 0
    return splash.make_splash_mha(
        splash.MultiHeadMask([RowMask(slots, window)] * heads),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=_block_sizes(len(slots), len(slots) // parts, window, chip, head_dim),
        attn_logits_soft_cap=scores.cap or None,
        residual_checkpoint_name=ATTENTION,
    )


def _block_sizes(
    length: int, part: int, window: int, chip: Chip | None, head_dim: int
) -> splash.BlockSizes:
    """Returns how much of a row, of which a device has `part` queries, kernels take at a time."""
    large = length >= 4 * LARGE_BLOCK and head_dim <= _WIDE

    def block(size: int) -> int:
        return LARGE_BLOCK if large and size % LARGE_BLOCK == 0 else min(BLOCK, size)

    queries, keys = block(part), block(length)
    fused = _is_fused(length // keys, window or length / 2, chip)
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=min(BLOCK, keys),
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=min(BLOCK, keys),
        block_q_dq=None if fused else queries,
        block_kv_dq=None if fused else keys,
        use_fused_bwd_kernel=fused,
    )


def _is_fused(parts: int, seen: float, chip: Chip | None) -> bool:
    """Whether one kernel makes all gradients.

    Args:
      parts: Blocks of keys.
      seen: Keys that a query sees, the mean.
      chip: On which it runs, if it is known.
    """
    if chip is None or not chip.fuses or parts > _MOST_PARTS:
        return False
    # Two products of every pair, at half of the peak, against writing and reading the parts.
    return parts == 1 or seen * chip.bandwidth > parts * chip.bfloat16 / 2


def _rows(
    kernel: Callable[..., Any],
    scores: Scoring,
    q: Array,
    k: Array,
    v: Array,
    key_segments: Array,
    segments: Array,
    sinks: Array | None,
) -> Array:
    """Runs the kernel on each row, `[B, T, heads, H]`; keys may be more than queries."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * scores.scale, k, v))
    ids = splash.SegmentIds(q=segments, kv=key_segments)
    if sinks is None:
        out = jax.vmap(kernel)(q, k, v, ids)
    else:
        out = jax.vmap(lambda *row: kernel(*row, sinks.astype(jnp.float32)))(q, k, v, ids)
    return cast(Array, out).transpose(0, 2, 1, 3)
