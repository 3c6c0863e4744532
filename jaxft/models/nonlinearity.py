"""Functions of single numbers between the weights of a feed-forward part."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.models.config import Numerics
from jaxft.models.module import Param


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies GELU in its approximation with tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


def squared_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squares what is positive (So et al., Primer, arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


class XIELU(nnx.Module):
    """xIELU (Huang and Schlag, arXiv:2411.13010), in float32; `beta` and `eps` are never learnt."""

    def __init__(self, numerics: Numerics):
        dtype = numerics.param_dtype
        # softplus(alpha) is 0.8 on the positive side, and 0.8 - beta on the other.
        self.alpha_p, self.alpha_n = (
            Param(jnp.log(jnp.expm1(jnp.full(1, start))).astype(dtype), axes=("norm",))
            for start in (0.8, 0.3)
        )
        self.beta, self.eps = (Param(jnp.asarray(x, dtype), axes=()) for x in (0.5, -1e-6))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns x (alpha_p x + beta) where x is positive, else alpha_n (e^x - 1 - x) + beta x."""
        wide = x.astype(jnp.float32)
        beta, eps = (
            jax.lax.stop_gradient(p[...].astype(jnp.float32)) for p in (self.beta, self.eps)
        )
        alpha_p, alpha_n = (
            jax.nn.softplus(p[...].astype(jnp.float32))[0] for p in (self.alpha_p, self.alpha_n)
        )
        low = (jnp.expm1(jnp.minimum(wide, eps)) - wide) * (beta + alpha_n)
        out = jnp.where(wide > 0, alpha_p * jnp.square(wide), low) + beta * wide
        return out.astype(x.dtype)
