"""Moments kept in fewer bits between steps than they are computed in."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft.sharding.axes import dimensions
from jaxft.training.optimizers.placing import owner_of
from jaxft.training.optimizers.rounding import key_of, round_stochastically

# Numbers of a block at least, and fewer than twice as many where the dimension has enough twos.
_BLOCK = 64


class Stored(NamedTuple):
    """The state of `store_moments`.

    Attributes:
      inner: State whose moments are in other types.
      count: Steps done.
    """

    inner: Any
    count: Any


class Blocks(NamedTuple):
    """Numbers in 8 bits.

    Attributes:
      codes: int8, of the shape of the numbers; uint8 where none is negative.
      scales: float32, the largest size of each block of the last dimension.
    """

    codes: Any
    scales: Any


def stored_types(
    params: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]], moments: str
) -> dict[str, Any]:
    """Returns the type in which moments of each parameter are kept.

    Args:
      params: `{path: shape and dtype}`.
      axes: Names of each parameter's dimensions by path.
      moments: As `optim.moments`.
    """

    def of(path: str) -> Any:
        if moments == "int8" and not dimensions(axes[path]).inputs:
            return jnp.dtype(jnp.float32)
        return jnp.dtype(moments or params[path].dtype)

    return {path: of(path) for path in params}


def store_moments(
    inner: optax.GradientTransformation, types: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Keeps the moments of a transformation in other types; it computes in float32.

    Averages of squares become bfloat16 by chance, up or down, so that the mean is right: a step
    changes them by less than the distance of two numbers of that type, so that the nearest would
    be the old one. What else there is has a sign, decays faster, and becomes the nearest.

    Args:
      inner: Its state has, keyed by the parameter's path, arrays of the parameter's shape. Those
        that it calls `nu` are never negative.
      types: Type of the moments of each parameter.
    """
    if set(types.values()) == {jnp.dtype(jnp.float32)}:
        return inner

    def pack(state: Any, count: Any) -> Stored:
        def of(path: tuple, leaf: Array) -> Any:
            owner = owner_of(path, types)
            return _pack(leaf, types[owner], owner, _is_square(path), count) if owner else leaf

        return Stored(jax.tree_util.tree_map_with_path(of, state), count)

    def init(params: Any) -> Stored:
        return pack(inner.init(params), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Stored]:
        updates, after = inner.update(updates, _unpack(state.inner), params)
        return updates, pack(after, optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _is_square(path: tuple) -> bool:
    return jax.tree_util.GetAttrKey("nu") in path


def _pack(x: Array, dtype: Any, owner: str, is_square: bool, count: Any) -> Any:
    if dtype == jnp.int8:
        return to_blocks(x, signed=not is_square)
    if dtype == jnp.bfloat16 and is_square:
        return round_stochastically(x, key_of(f"{owner}.nu", count))
    return x.astype(dtype)


def _unpack(state: Any) -> Any:
    def of(node: Any) -> Any:
        if isinstance(node, Blocks):
            return from_blocks(node)
        return node.astype(jnp.float32) if node.dtype == jnp.bfloat16 else node

    return jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, Blocks))


def block_count(size: int) -> int:
    """Returns how many blocks a dimension has: a power of two, so that meshes divide it."""
    count = 1
    while size % (2 * count) == 0 and size // (2 * count) >= _BLOCK:
        count *= 2
    return count


def to_blocks(x: Float[Array, "..."], *, signed: bool) -> Blocks:
    """Rounds numbers to 8 bits, relative to the largest of their block.

    Codes are roots, so that small numbers keep more of their size: square roots of moments with a
    sign, fourth roots of those without. On gradients of stories260K AdamW's directions are then off
    by 2 to 6 % (root mean square, betas 0.9 and 0.95); by 3 to 9 % with the dynamic code of
    Dettmers et al. (arXiv:2110.02861), which needs a table as well, and by multiples of themselves
    with linear codes. A second moment that is not 0 does not become 0, or its step would explode.
    """
    parts = _parted(x)
    scales = jnp.max(jnp.abs(parts), axis=-1, keepdims=True)
    share = jnp.abs(parts) / jnp.where(scales > 0, scales, 1.0)
    if signed:
        codes = (jnp.sign(parts) * jnp.round(127.0 * jnp.sqrt(share))).astype(jnp.int8)
    else:
        found = jnp.round(255.0 * jnp.sqrt(jnp.sqrt(share)))
        codes = jnp.where(parts > 0, jnp.maximum(found, 1.0), 0.0).astype(jnp.uint8)
    return Blocks(codes.reshape(x.shape), scales.squeeze(-1))


def from_blocks(blocks: Blocks) -> Float[Array, "..."]:
    """Returns the numbers, float32: the inverse of `to_blocks`, but for rounding."""
    codes = _parted(blocks.codes).astype(jnp.float32)
    if blocks.codes.dtype == jnp.int8:
        share = codes * jnp.abs(codes) / 127.0**2
    else:
        share = jnp.square(jnp.square(codes / 255.0))
    return (share * blocks.scales[..., None]).reshape(blocks.codes.shape)


def _parted(x: Array) -> Array:
    """Parts the last dimension into blocks."""
    count = block_count(x.shape[-1])
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
