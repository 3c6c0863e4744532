"""Products of few rows on a CPU, as generation has them, shared out over its cores."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.sharding.rules import active_placement

# XLA gives each core a product of a batch, but of a single one only pieces of work, for which it
# copies the weight into blocks first: of 256 rows on, that no longer counts.
_MOST_ROWS = 256


def on_one_cpu() -> bool:
    """Whether what is traced is for one device, and that is a CPU."""
    placement = active_placement()
    if placement is None:
        return jax.default_backend() == "cpu"
    return placement.mesh.size == 1 and placement.mesh.devices.flat[0].platform == "cpu"


def product(
    x: Float[Array, "R K"], w: Float[Array, "N K"], dtype: Any = None
) -> Float[Array, "R N"]:
    """Multiplies rows with a weight on one CPU, in `dtype` or that of `x`."""
    rows, outputs = x.shape[0], w.shape[0]
    if rows > _MOST_ROWS:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    parts = next(n for n in range(_cores(), 0, -1) if outputs % n == 0)
    w, x = w.reshape(parts, -1, w.shape[1]), jnp.broadcast_to(x, (parts, *x.shape))
    along = (((2,), (2,)), ((0,), (0,)))
    if rows == 1:
        # The other order would be simplified to one product with a vector, on one core.
        return jax.lax.dot_general(x, w, along, preferred_element_type=dtype).reshape(1, outputs)
    out = jax.lax.dot_general(w, x, along, preferred_element_type=dtype)
    return out.reshape(outputs, rows).T


def _cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
