"""The memory of layers for documents that are being written, and attention to it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.attention import attention_weights
from jaxft.models.config import DecoderConfig, LayerKind, Scoring


class KeysValues(NamedTuple):
    """Keys and values of a layer, `[B, K, S, H]` in the compute dtype.

    Slot s of a row holds its token s; what lies behind a row's last token is never seen. Heads come
    before slots: the products of attention then read them where they lie, and a token is written in
    place.
    """

    k: Any
    v: Any


class Latents(NamedTuple):
    """The latent and the turned key of a layer whose keys and values are made of them.

    Attributes:
      kept: `[B, 1, S, R + Q]` in the compute dtype, the latent before the key: as keys of one head,
        whose first R dimensions are its values.
    """

    kept: Any


class Recurrent(NamedTuple):
    """The memory of a recurrent layer for the documents that rows hold.

    Attributes:
      inputs: Last inputs of the convolutions, one array `[B, heads, taps - 1, size]` each for
        queries, keys and values, in the compute dtype.
      state: float32 `[B, V, H, W]`, which maps keys to values.
    """

    inputs: tuple[Any, ...]
    state: Any


class Cache(NamedTuple):
    """The memory of all layers, for generation, of each in arrays of its own.

    Layers that read keys and values of one before have none.
    """

    layers: tuple[KeysValues | Latents | Recurrent, ...]

    @property
    def slots(self) -> int:
        """Tokens for which a row has room; 0 if no layer keeps tokens."""
        kept = (layer for layer in self.layers if not isinstance(layer, Recurrent))
        return next((layer[0].shape[2] for layer in kept), 0)

    def with_slots(self, slots: int) -> "Cache":
        """Returns the cache with room for `slots` tokens a row; with fewer, for the first ones."""
        added = ((0, 0), (0, 0), (0, max(0, slots - self.slots)), (0, 0))
        return Cache(
            tuple(
                layer
                if isinstance(layer, Recurrent)
                else jax.tree.map(lambda x: jnp.pad(x[:, :, :slots], added), layer)
                for layer in self.layers
            )
        )


class Memory(NamedTuple):
    """The way recurrent layers come to what they kept of some rows, and keep more.

    Attributes:
      rows: `[R]`, where in the cache the rows are; None as they stand.
      real: bool `[R, T]`, False on padding, which follows the tokens.
      is_new: bool `[R]`, whether a row's first token begins its document.
    """

    rows: Any
    real: Any
    is_new: Any

    def read(self, layer: Recurrent) -> Recurrent:
        """Returns what was kept of the rows, nothing of those whose document begins."""

        def of_rows(x: Array) -> Array:
            x = x if self.rows is None else x[self.rows]
            return jnp.where(self.is_new.reshape(-1, *(1,) * (x.ndim - 1)), 0, x)

        return jax.tree.map(of_rows, layer)

    def write(self, old: Recurrent, new: Recurrent) -> Recurrent:
        """Puts what is kept from now on in the place of what was."""
        if self.rows is None:
            return jax.tree.map(lambda old, new: new.astype(old.dtype), old, new)
        return jax.tree.map(
            lambda old, new: old.at[self.rows].set(new.astype(old.dtype), unique_indices=True),
            old,
            new,
        )


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """Returns a cache in which nothing was read, with room for `slots` tokens in each row."""

    def of_layer(kind: LayerKind) -> KeysValues | Latents | Recurrent:
        if config.latent is not None:
            kept = config.latent.rank + config.latent.turned_dim
            return Latents(jnp.zeros((rows, 1, slots, kept), dtype))
        if not kind.recurrent:
            c = config.of_kind(kind)
            empty = jnp.zeros((rows, c.kv_heads, slots, c.head_dim), dtype)
            return KeysValues(empty, empty)
        d = config.delta
        assert d is not None
        sizes = ((d.key_heads, d.key_dim),) * 2 + ((d.value_heads, d.value_dim),)
        inputs = (jnp.zeros((rows, heads, d.taps - 1, size), dtype) for heads, size in sizes)
        state = jnp.zeros((rows, d.value_heads, d.key_dim, d.value_dim), jnp.float32)
        return Recurrent(tuple(inputs), state)

    kinds = (config.kinds[index] for index in config.pattern)
    return Cache(tuple(of_layer(kind) for kind in kinds if not kind.reads))


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


def written(
    old: KeysValues | Latents,
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K U"],
    positions: Int[Array, "R T"],
    real: Bool[Array, "R T"],
    rows: Int[Array, " R"] | None,
) -> tuple[KeysValues | Latents, Array, Array]:
    """Returns a layer's cache with tokens added, and keys and values of the rows.

    Args:
      old: The cache before.
      k: Keys of the tokens; of latents, with the turned key behind.
      v: Values; latents.
      positions: In the document.
      real: False on padding, which is not kept.
      rows: Where in the cache the rows are; as they stand if absent.
    """
    if isinstance(old, Latents):
        new = Latents(write(old.kept, k, positions, real, rows))
        kept = new.kept if rows is None else new.kept[rows]
        return new, kept, kept[..., : v.shape[-1]]
    pairs = zip(old, (k, v), strict=True)
    new = KeysValues(*(write(before, added, positions, real, rows) for before, added in pairs))
    return new, *read(new, rows)


def read(kept: KeysValues, rows: Int[Array, " R"] | None) -> tuple[Array, Array]:
    """Returns keys and values of some rows of a layer's cache; of all as they stand if absent."""
    k, v = kept if rows is None else (x[rows] for x in kept)
    return k, v


def cached_attention(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R K S H"],
    v: Float[Array, "R K S U"],
    mask: Bool[Array, "R 1 T S"],
    *,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N U"]:
    """`masked_attention` for keys and values in the layout of the cache."""
    (rows, length, heads, head_dim), (_, kv_heads, slots, _) = q.shape, k.shape
    groups = heads // kv_heads
    # One product for each row and head of keys, of matrices as they lie in the cache.
    k, v = (x.reshape(rows * kv_heads, slots, -1) for x in (k, v))
    q = q.reshape(rows, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows * kv_heads, groups * length, head_dim)
    products = jnp.einsum("nsh,nqh->nqs", k, q, preferred_element_type=jnp.float32)
    products = products.reshape(rows, kv_heads, groups, length, slots)
    weights = attention_weights(products, mask, scores=scores, sinks=sinks).astype(v.dtype)
    out = jnp.einsum("nqs,nsh->nqh", weights.reshape(rows * kv_heads, -1, slots), v)
    out = out.reshape(rows, kv_heads, groups, length, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, heads, -1)
