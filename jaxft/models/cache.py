"""Keys and values of documents that are being written, and attention to them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.attention import attention_weights
from jaxft.models.config import Scoring


class KVCache(NamedTuple):
    """Keys and values of what was read so far, for generation.

    Each layer's are arrays of their own, heads before slots: the products of attention then read
    them where they lie, and a token is written in place.

    Attributes:
      k: Keys of each layer, `[B, K, S, H]` in the compute dtype. Slot s of a row holds its token s;
        what lies behind a row's last token is never seen.
      v: Values, laid out like `k`.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]

    @property
    def slots(self) -> int:
        """Tokens for which a row has room."""
        return self.k[0].shape[2]


def seen_slots(
    positions: Int[Array, "R T"], real: Bool[Array, "R T"], slots: int, *, window: int = 0
) -> Bool[Array, "R 1 T S"]:
    """True where a token sees a slot: not a later one, and within the window if any."""
    behind = positions[:, :, None] - jnp.arange(slots)[None, None]
    visible = (behind >= 0) & real[:, :, None]
    if window:
        visible &= behind < window
    return visible[:, None]


def write(
    old: Float[Array, "B K S H"],
    new: Float[Array, "R T K H"],
    positions: Int[Array, "R T"],
    real: Bool[Array, "R T"],
    rows: Int[Array, " R"] | None,
) -> Float[Array, "B K S H"]:
    """Puts keys or values of tokens into the slots of their positions, but those of padding."""
    if rows is None:
        rows = jnp.arange(new.shape[0])
    outside = old.shape[2] + jnp.arange(new.shape[1])[None]
    slots = jnp.where(real, positions, outside)
    new = new.astype(old.dtype)
    written = old.at[rows[:, None], :, slots].set(new, mode="drop", unique_indices=True)
    # Written once for all who read it: XLA would do it again in each, and copy the cache for it.
    return jax.lax.optimization_barrier(written)


def cached_attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R K S H"],
    v: Float[Array, "R K S H"],
    mask: Bool[Array, "R 1 T S"],
    *,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N H"]:
    """`masked_attention` for keys and values in the layout of the cache."""
    (rows, length, heads, head_dim), (_, kv_heads, slots, _) = q.shape, k.shape
    groups = heads // kv_heads
    # One product for each row and head of keys, of matrices as they lie in the cache.
    k, v = (x.reshape(rows * kv_heads, slots, head_dim) for x in (k, v))
    q = q.reshape(rows, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows * kv_heads, groups * length, head_dim)
    products = jnp.einsum("nsh,nqh->nqs", k, q, preferred_element_type=jnp.float32)
    products = products.reshape(rows, kv_heads, groups, length, slots)
    weights = attention_weights(products, mask, scores=scores, sinks=sinks).astype(v.dtype)
    out = jnp.einsum("nqs,nsh->nqh", weights.reshape(rows * kv_heads, -1, slots), v)
    out = out.reshape(rows, kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, heads, head_dim)
