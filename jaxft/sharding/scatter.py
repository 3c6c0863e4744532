"""Sums over a mesh axis of which each device keeps its part, by what its network does best."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxft.hardware.chips import chip_of
from jaxft.sharding.mesh import rings
from jaxft.sharding.rules import Placement


class Product(NamedTuple):
    """The gradient of a weight from a device's tokens, `[*outputs, *inputs]`, yet to be computed.

    Attributes:
      dy: Gradient of its output, `[B, T, *outputs]`.
      x: Input of the weight, `[B, T, *inputs]`.
    """

    dy: Array
    x: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.dy.shape[2:], *self.x.shape[2:])

    def compute(self) -> Array:
        """Returns all of it."""
        return jax.lax.dot_general(self.dy, self.x, (((0, 1), (0, 1)), ((), ())))

    def parts(self, dimension: int, starts: Sequence[Any], width: int) -> list[Array]:
        """Computes parts along a dimension, with one product, which reads what they share once."""
        outputs = self.dy.ndim - 2
        cut = ("dy", dimension + 2) if dimension < outputs else ("x", dimension - outputs + 2)
        operand = jnp.concatenate(_parts(getattr(self, cut[0]), cut[1], starts, width), cut[1])
        made = self._replace(**{cut[0]: operand}).compute()
        return jnp.split(made, len(starts), dimension)


def computed(gradient: Array | Product) -> Array:
    """Returns a gradient, which may be yet to be computed."""
    return gradient.compute() if isinstance(gradient, Product) else gradient


def _parts(x: Array, dimension: int, starts: Sequence[Any], width: int) -> list[Array]:
    return [jax.lax.dynamic_slice_in_dim(x, start, width, dimension) for start in starts]


def reduce_scatter(x: Array | Product, name: str, dimension: int, placement: Placement) -> Array:
    """Sums `x` over a mesh axis, in a `shard_map`; each device keeps its part.

    SparseCores make the sum at once (`training/compiler_options.py`). Elsewhere it goes along one
    dimension of the TPU's network after the other: for more than one at a time the compiler has no
    reduce-scatter and takes an all-reduce, of twice the bytes; as it does where parts would be
    narrower than its tiles, so that a dimension of their own tells them apart.
    """
    chip = chip_of(placement.mesh.devices.flat[0].device_kind)
    sizes = rings(placement.mesh, name)
    if chip and chip.hops:
        # Two parts are computed at a time. Narrower ones take longer to read than to compute.
        wide = 2 * x.shape[dimension] // sizes[0] * chip.bandwidth >= chip.bfloat16
        total = _by_hops(x if wide else computed(x), name, dimension, sizes, 0)
        for ring in range(1, len(sizes)):
            total = _by_hops(total, name, dimension, sizes, ring)
        return total
    if chip and chip.offloads:
        sizes = (math.prod(sizes),)
    total = computed(x)
    for ring in range(len(sizes)):
        total = _at_once(total, name, dimension, sizes, ring)
    return total


def _at_once(x: Array, name: str, dimension: int, sizes: tuple[int, ...], ring: int) -> Array:
    """Does what `reduce_scatter` does along one ring, as one collective."""
    x = jnp.moveaxis(x, dimension, 0)
    rest = x.shape[1:]
    groups = np.moveaxis(_places(sizes), ring, -1).reshape(-1, sizes[ring]).tolist()
    x = jax.lax.psum_scatter(
        x.reshape(sizes[ring], -1, math.prod(rest)),
        name,
        scatter_dimension=0,
        axis_index_groups=groups if len(sizes) > 1 else None,
    )
    return jnp.moveaxis(x.reshape(-1, *rest), 0, dimension)


def _by_hops(
    x: Array | Product, name: str, dimension: int, sizes: tuple[int, ...], ring: int
) -> Array:
    """Does what `_at_once` does by copies to the neighbours, from both sides.

    A part sets out from the two devices that are furthest from the one that keeps it, and each on
    the way adds its own.
    """
    size, places = sizes[ring], _places(sizes)
    if size == 1:
        return computed(x)
    here = jax.lax.axis_index(name) // math.prod(sizes[ring + 1 :]) % size
    width = x.shape[dimension] // size

    def parts(*ahead: Any) -> list[Array]:
        starts = [(here + way) % size * width for way in ahead]
        if isinstance(x, Product):
            return x.parts(dimension, starts, width)
        return _parts(x, dimension, starts, width)

    def sent(total: Array, way: int) -> Array:
        ends = zip(places.flat, np.roll(places, -way, ring).flat, strict=True)
        return jax.lax.ppermute(total, name, [(int(a), int(b)) for a, b in ends])

    most, odd = size // 2, size % 2

    def hop(turn: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        left = most - turn
        up, down = parts(left, 1 - left - odd)
        return sent(totals[0], 1) + up, sent(totals[1], -1) + down

    totals = tuple(parts(most, 1 - most - odd))
    if isinstance(x, Product):
        # A loop, or the compiler computes all parts first and waits for one copy after another.
        totals = jax.lax.fori_loop(1, most, hop, totals)
    else:
        for turn in range(1, most):
            totals = hop(turn, totals)
    up, down = totals
    if odd:
        down = sent(down, -1) + parts(0)[0]
    return sent(up, 1) + down


def _places(sizes: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(sizes)).reshape(sizes)
