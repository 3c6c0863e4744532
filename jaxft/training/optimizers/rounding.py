"""Numbers in bfloat16 that take many small updates, rounded so that none are lost."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Key


def apply_updates(params: Mapping[str, Any], updates: Any, step: Any) -> Any:
    """Adds updates to parameters; sums that become bfloat16 are rounded stochastically.

    Rounding to nearest would lose each update under a 256th or so of its parameter. The bits depend
    on step, path and element alone: not on the number of devices, and not on where a run resumed.

    Args:
      params: `{path: array}`.
      updates: The same, float32 where the parameter is bfloat16.
      step: Steps done.
    """
    return {path: _sum(value, updates[path], path, step) for path, value in params.items()}


def _sum(value: Array, update: Array, path: str, step: Any) -> Array:
    if value.dtype != jnp.bfloat16:
        return (value + update).astype(value.dtype)
    return round_stochastically(value.astype(jnp.float32) + update, key_of(path, step))


def key_of(name: str, step: Any) -> Key[Array, ""]:
    """Returns the source of the bits with which what has this name is rounded in a step."""
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def round_stochastically(x: Float32[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """Rounds to a neighbour in bfloat16, to each as often as makes the mean x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # Bits of a float are those of its size: what is added to the lower half carries by chance.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
