"""The order of positions in rows that are split over devices."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """Returns the position at each place, int32 `[T]`, of a row that lies in equal parts.

    Of 2 `parts` chunks, part i holds chunks i and 2 `parts` - 1 - i: a causal query of an early
    chunk sees few keys and one of the mirrored late chunk many, so that all parts have equal work.
    One part is in order.

    Args:
      length: T, a multiple of 2 `parts`, or of any size for one part.
      parts: Devices that share a row.
    """
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    pairs = [np.concatenate([chunks[i], chunks[2 * parts - 1 - i]]) for i in range(parts)]
    return np.concatenate(pairs)


def document_order(x: Array, parts: int) -> Array:
    """Puts `[B, T, …]` in the order of `zigzag_order` back into that of the row."""
    if parts == 1:
        return x
    chunks = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    early, late = chunks[:, :, 0], jnp.flip(chunks[:, :, 1], axis=1)
    return jnp.concatenate([early, late], axis=1).reshape(x.shape)


def split_order(x: Array, parts: int) -> Array:
    """Puts `[B, T, …]` in the order of the row into that of `zigzag_order`."""
    if parts == 1:
        return x
    chunks = x.reshape(x.shape[0], 2, parts, -1, *x.shape[2:])
    early, late = chunks[:, 0], jnp.flip(chunks[:, 1], axis=1)
    return jnp.stack([early, late], axis=2).reshape(x.shape)
