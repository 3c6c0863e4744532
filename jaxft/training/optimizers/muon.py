"""Muon's direction: momentum made orthogonal, matrix by matrix (Jordan et al. 2024)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.sharding.axes import dimensions
from jaxft.sharding.rules import Placement, active_placement

# Of the quintic Newton-Schulz iteration of the authors: it begins steeply at 0, and takes singular
# values to between 0.7 and 1.2 in five turns.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TURNS = 5
_ADDED = 1e-7
# Root mean square of AdamW's steps, to which those of Muon are scaled (arXiv:2502.16982).
_SIZE = 0.2


def is_muons(axes: tuple[str, ...]) -> bool:
    """Returns whether a parameter is a matrix of layers, and not of embeddings or of the head."""
    return axes[0] == "layers" and dimensions(axes).inputs > 0


def orthogonalise(axes: Mapping[str, tuple[str, ...]]) -> optax.GradientTransformation:
    """Replaces each matrix by the nearest one with equal singular values, nearly.

    Heads and their size are one dimension; layers and experts are matrices of their own. The result
    is scaled by 0.2 sqrt(max(outputs, inputs)), so that rate and decay of AdamW hold.

    Args:
      axes: Names of each parameter's dimensions by path.
    """

    def change(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, value: _orthogonal(value, axes[path[-1].key]), updates
        )

    return optax.stateless(change)


def layers_over(placement: Placement, layers: int) -> tuple[str, ...]:
    """Returns the mesh axes over which layers are shared out, so that each is made once, whole.

    They are those that the strategy splits layers over, and of the others as many as divide them.
    """
    mesh, found = placement.mesh.shape, list(placement.split("layers"))
    for name, size in mesh.items():
        if size > 1 and name not in found:
            whole = layers % (size * math.prod(mesh[one] for one in found)) == 0
            found += [name] if whole else []
    return tuple(found)


def matrix_shape(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a parameter's shape with one dimension of outputs and one of inputs."""
    kind = dimensions(axes)
    middle = kind.lead + kind.outputs
    return (*shape[: kind.lead], math.prod(shape[kind.lead : middle]), math.prod(shape[middle:]))


def _orthogonal(value: Array, axes: tuple[str, ...]) -> Array:
    matrices = value.reshape(matrix_shape(axes, value.shape))
    placement = active_placement()
    over = layers_over(placement, matrices.shape[0]) if placement is not None else ()
    function = _each_layer
    if placement is not None and over:
        # Left to itself the compiler splits matrices, and sums products of parts in each turn.
        function = placement.shard_map(_each_layer, PartitionSpec(over), PartitionSpec(over))
    found = function(matrices)
    return (_SIZE * math.sqrt(max(matrices.shape[-2:]))) * found.reshape(value.shape)


def _each_layer(matrices: Array) -> Array:
    """Makes one layer after the other orthogonal, so that what is in hand is of one."""
    return jax.lax.map(newton_schulz, matrices)


def newton_schulz(x: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
    """Takes the singular values of matrices to about 1, without taking them apart."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.matrix_transpose(x) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + _ADDED)
    first, third, fifth = COEFFICIENTS
    for _ in range(TURNS):
        squared = x @ jnp.matrix_transpose(x)
        x = first * x + (third * squared + fifth * squared @ squared) @ x
    return jnp.matrix_transpose(x) if tall else x
