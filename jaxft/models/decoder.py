"""A decoder-only transformer: embedding, a scanned stack of one family's blocks, norm and head."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxft.models.attention import attend, causal_mask, masked_attention
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.layers import Embedding, Linear, RMSNorm, rope_frequencies, rotary_angles
from jaxft.models.module import merge, split, stack
from jaxft.sharding.rules import constrain

# Maps q, k, v and a layer's cache to the attention output and the cache with k and v added.
AttentionFn = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


class KVCache(NamedTuple):
    """Keys and values of what was read so far, for generation.

    Attributes:
      k: `[L, B, S, K, H]` in the compute dtype; S slots are allocated, `used` are filled.
      v: As `k`.
      segments: int32 `[B, S]`; 0 in slots that hold padding or nothing.
      used: int32 scalar, the next free slot, the same in every row.
    """

    k: Any
    v: Any
    segments: Any
    used: Any


class Decoder(nnx.Module):
    """The body that families share; `block` builds one layer of the family."""

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        *,
        block: Callable[[DecoderConfig, Numerics, nnx.Rngs], nnx.Module],
        rngs: nnx.Rngs,
    ):
        self.config, self.numerics = config, numerics
        dtype, scale = numerics.param_dtype, config.init_scale
        self.embed = Embedding(config.vocab, config.embed, dtype=dtype, scale=scale, rngs=rngs)
        self.layers = stack(lambda r: block(config, numerics, r), config.layers, rngs)
        self.norm = RMSNorm(config.embed, epsilon=config.norm_epsilon, dtype=dtype)
        if not config.tied:
            self.head = Linear(
                (config.embed,),
                (config.vocab,),
                axes=("embed", "vocab"),
                dtype=dtype,
                scale=scale,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits; without positions and segments a row is one document."""
        return self.logits(self.hidden(tokens, positions, segments))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalised residual stream that `logits` reads, in the compute dtype."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        document = jnp.ones_like(tokens) if segments is None else segments

        def attention(q: Array, k: Array, v: Array, cache: None):
            return attend(q, k, v, document, backend=self.numerics.attention), cache

        return self._run(tokens, positions, attention, None)[0]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of any positions of `hidden`."""
        with self._precision():
            if self.config.tied:
                logits = self.embed.attend(hidden)
            else:
                w = self.head.w[...].astype(hidden.dtype)
                logits = jnp.einsum("btd,dv->btv", hidden, w, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "seq", "act_vocab")

    def init_cache(self, rows: int, slots: int) -> KVCache:
        """Allocates an empty cache for `rows` rows of up to `slots` tokens."""
        c = self.config
        shape = (c.layers, rows, slots, c.kv_heads, c.head_dim)
        empty = jnp.zeros(shape, self.numerics.compute_dtype)
        return KVCache(empty, empty, jnp.zeros((rows, slots), jnp.int32), jnp.int32(0))

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As `hidden`, for tokens that follow what the cache holds.

        Reads a prompt (T tokens into an empty cache) and decodes (T = 1) alike.
        """
        length, slots = tokens.shape[1], cache.segments.shape[1]
        known = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.used, 1)
        query_slots = cache.used + jnp.arange(length)
        mask = causal_mask(query_slots, jnp.arange(slots), segments, known)

        def attention(q: Array, k: Array, v: Array, layer: tuple[Array, Array]):
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.used, 1)
                for old, new in zip(layer, (k, v), strict=True)
            )
            return masked_attention(q, k, v, mask), (k, v)

        hidden, (k, v) = self._run(tokens, positions, attention, (cache.k, cache.v))
        return hidden, KVCache(k, v, known, cache.used + length)

    def _run(
        self, tokens: Array, positions: Array, attention: AttentionFn, caches: Any
    ) -> tuple[Array, Any]:
        c = self.config
        x = self.embed(tokens, self.numerics.compute_dtype)
        x = constrain(x, "batch", "seq", "act_embed")
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        rope = rotary_angles(positions, frequencies)
        graphdef, stacked = split(self.layers)

        def layer(x: Array, scanned: tuple[dict, Any]) -> tuple[Array, Any]:
            params, cache = scanned
            return merge(graphdef, params)(x, rope, attention, cache)

        with self._precision():
            x, caches = jax.lax.scan(_remat(layer, self.numerics.remat), x, (stacked, caches))
        return self.norm(x), caches

    def _precision(self) -> contextlib.AbstractContextManager:
        """Asks for whole products of float32, which accelerators round to fewer bits by default."""
        exact = self.numerics.compute_dtype == jnp.float32
        return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def _remat(layer: Callable, policy: str) -> Callable:
    """Wraps a scanned layer so that only what `policy` names is kept for the backward pass."""
    if policy == "none":
        return layer
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    # Inside a scan nothing can merge the two passes, so the costly guard against it is not needed.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)
