"""The parts that decoder families share: projections, embedding, norms, rotary positions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxft.models.module import Param
from jaxft.sharding.rules import constrain


class Linear(nnx.Module):
    """A bias-free projection between groups of named dimensions, such as D to (N, H).

    Kept in the layout in which it is used, so that heads and head size are axes of their own.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: tuple[str, ...],
        dtype,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.inputs = len(inputs)
        value = jax.random.normal(rngs.params(), (*inputs, *outputs), jnp.float32) * scale
        self.w = Param(value.astype(dtype), axes=axes)

    def __call__(self, x: Array) -> Array:
        """Contracts the last dimensions of `x` with the first of the weight, in `x`'s dtype."""
        w = self.w[...].astype(x.dtype)
        return jnp.tensordot(x, w, axes=self.inputs)


class Embedding(nnx.Module):
    """Token vectors, `[V, D]`."""

    def __init__(self, vocab: int, embed: int, *, dtype, scale: float, rngs: nnx.Rngs):
        value = jax.random.normal(rngs.params(), (vocab, embed), jnp.float32) * scale
        self.w = Param(value.astype(dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Looks tokens up, in `dtype`."""
        # Cast after the gather: the gradient of a frequent token, a sum of many, is then added up
        # in the table's own type.
        return self.w[...][tokens].astype(dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits against the same table, for tied embeddings."""
        w = self.w[...].astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, size: int, *, epsilon: float, dtype):
        self.epsilon = epsilon
        self.scale = Param(jnp.ones(size, dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last dimension; the result has the type of `x`."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        # Rounded before the scale is applied, as in the reference implementation.
        normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        scale = self.scale[...].astype(x.dtype)
        return normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


class SwiGLU(nnx.Module):
    """Gated feed-forward part, `down(silu(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202)."""

    def __init__(self, embed: int, mlp: int, *, dtype, scale: float, rngs: nnx.Rngs):
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        kwargs = {"dtype": dtype, "scale": scale, "rngs": rngs}
        self.gate = Linear((embed,), (mlp,), axes=inward, **kwargs)
        self.up = Linear((embed,), (mlp,), axes=inward, **kwargs)
        self.down = Linear((mlp,), (embed,), axes=outward, **kwargs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what is added to the residual stream."""
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "batch", "seq", "act_mlp"))


def rope_frequencies(
    head_dim: int, theta: float, scaling: Callable[[Array], Array] | None
) -> Float[Array, " half"]:
    """Radians a position for each pair of dimensions (Su et al., arXiv:2104.09864)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return frequencies if scaling is None else scaling(frequencies)


def rotary_angles(
    positions: Int[Array, "B T"], frequencies: Float[Array, " half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of each position's angles in float32, to meet `[B, T, heads, half]`."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2): the half-split layout of Hugging Face weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
