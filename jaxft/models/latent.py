"""Attention whose keys and values are made of one latent vector of each token."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxft.models import activations
from jaxft.models.cache import Latents
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.layers import LayerInputs, Linear, RMSNorm
from jaxft.models.rope import rotate
from jaxft.sharding.rules import constrain

# Of norms of latents, whatever the other norms of a model have.
_EPSILON = 1e-6
_HEADS = ("act_heads", "act_head_dim")


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Of each token two things are made for all heads: a latent, and a key that is turned by its
    position. A head's key is made of the latent, the turned key behind it; its value of the latent
    alone. Rows that hold their documents whole have keys and values of each head. What is kept for
    generation are latent and turned key: there the matrix that makes keys is multiplied with
    queries in their place, and that of values with what heads read of latents.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        assert config.latent is not None
        sizes, d, n, dtype = config.latent, config.embed, config.heads, numerics.param_dtype
        kwargs = {"dtype": dtype, "scale": config.init_scale, "rngs": rngs}
        of_stream, of_latent = (("heads", "head_dim", end) for end in ("embed", "latent"))

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, epsilon=_EPSILON, dtype=dtype)

        self.sizes = sizes
        queries, rank = (n, config.head_dim), sizes.query_rank
        if rank:
            self.q_down = Linear((rank,), (d,), axes=("to_latent", "embed"), **kwargs)
            self.q_norm = norm(rank)
            self.q_up = Linear(queries, (rank,), axes=of_latent, **kwargs)
        else:
            self.q = Linear(queries, (d,), axes=of_stream, **kwargs)
        made = (sizes.rank + sizes.turned_dim,)
        self.kv_down = Linear(made, (d,), axes=("to_latent", "embed"), **kwargs)
        self.kv_norm = norm(sizes.rank)
        made = (n, sizes.plain_dim + sizes.value_dim)
        self.kv_up = Linear(made, (sizes.rank,), axes=of_latent, **kwargs)
        self.kv_up.takes_columns = False  # its matrix meets queries, as one for all rows
        values = (n, sizes.value_dim)
        self.o = Linear((d,), values, axes=("embed", "heads", "head_dim"), **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs, cache: Latents | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what is added to the residual stream, and the layer's cache."""
        x = constrain(x, "batch", "seq", "act_embed")
        q = self._queries(x)
        down = checkpoint_name(self.kv_down(x), activations.QKV)
        latent, turned = jnp.split(down, [self.sizes.rank], axis=-1)
        latent, turned = self.kv_norm(latent), turned[:, :, None]
        plain, turning = jnp.split(q, [self.sizes.plain_dim], axis=-1)
        if inputs.rope is not None:
            turning, turned = (
                rotate(x, *inputs.rope, interleaved=self.sizes.interleaved)
                for x in (turning, turned)
            )
        if cache is None:
            out, cache = self._by_heads(plain, turning, latent, turned, inputs)
        else:
            out, cache = self._by_latents(plain, turning, latent, turned, inputs, cache)
        return checkpoint_name(self.o(out), activations.ATTENTION_OUT), cache

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        if not self.sizes.query_rank:
            return self.q(x)
        return self.q_up(self.q_norm(checkpoint_name(self.q_down(x), activations.QKV)))

    def _by_heads(
        self,
        plain: Float[Array, "B T N P"],
        turning: Float[Array, "B T N Q"],
        latent: Float[Array, "B T R"],
        turned: Float[Array, "B T 1 Q"],
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "B T N U"], Any]:
        """Returns what heads read of rows that hold their documents from the start."""
        k, v = jnp.split(self.kv_up(latent), [self.sizes.plain_dim], axis=-1)
        q = jnp.concatenate([plain, turning], axis=-1)
        turned = jnp.broadcast_to(turned, (*k.shape[:3], turned.shape[-1]))
        k = jnp.concatenate([k, turned], axis=-1)
        q, k, v = (
            checkpoint_name(constrain(x, "batch", "seq", *_HEADS), activations.QKV)
            for x in (q, k, v)
        )
        return inputs.attention(q, k, v, None, None)

    def _by_latents(
        self,
        plain: Float[Array, "B T N P"],
        turning: Float[Array, "B T N Q"],
        latent: Float[Array, "B T R"],
        turned: Float[Array, "B T 1 Q"],
        inputs: LayerInputs,
        cache: Latents,
    ) -> tuple[Float[Array, "B T N U"], Any]:
        """Returns what heads read of latents of texts whose beginning the cache holds."""
        to_k, to_v = jnp.split(self.kv_up.adapted(plain.dtype), [self.sizes.plain_dim], axis=1)
        q = jnp.concatenate([jnp.einsum("btnp,npr->btnr", plain, to_k), turning], axis=-1)
        kept = jnp.concatenate([latent[:, :, None], turned], axis=-1)
        read, cache = inputs.attention(q, kept, latent[:, :, None], cache, None)
        return jnp.einsum("btnr,nur->btnu", read, to_v), cache
