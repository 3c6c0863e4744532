"""The placement of an optimizer's state: each array beside the parameter it belongs to."""

import math
from collections.abc import Collection, Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.errors import ConfigError
from jaxft.sharding.rules import Placement, as_names


def owner_of(path: tuple, params: Collection[str]) -> str:
    """Returns the parameter that a leaf of the state belongs to; empty if to none.

    Args:
      path: Of the leaf, as `jax.tree_util` gives it; the parameter's is the last key of it.
      params: Paths of parameters.
    """
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return names[-1] if names and names[-1] in params else ""


def sharding_of(
    path: tuple,
    leaf: jax.ShapeDtypeStruct,
    params: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    placement: Placement,
) -> NamedSharding:
    """Returns where a leaf lives: split as its owner is, dimension by dimension.

    A dimension of a leaf has the size of its owner's, or 1 where that was summed over, or that of a
    number of blocks. Scalars of no parameter, such as counters, are on every device.

    Args:
      path: Of the leaf, as `jax.tree_util` gives it.
      leaf: Its shape.
      params: `{path: shape}`.
      shardings: `{path: sharding}` of leaves with their owner's shape.
      placement: Gives the mesh.

    Raises:
      ConfigError: If the leaf belongs to no parameter and is no scalar, or its shape does not go
        with its owner's or with the mesh.
    """
    name = jax.tree_util.keystr(path)
    owner = owner_of(path, params)
    if not owner:
        if leaf.shape:
            raise ConfigError(
                f"The optimizer's state {name} {list(leaf.shape)} belongs to no parameter, so that "
                "no strategy says where it lives. Key it by the parameter's path."
            )
        return placement.replicated
    shape, sharding = params[owner].shape, shardings[owner]
    if leaf.shape == shape:
        return sharding
    if len(leaf.shape) != len(shape) or any(a % b for a, b in zip(shape, leaf.shape, strict=True)):
        raise ConfigError(
            f"The optimizer's state {name} {list(leaf.shape)} does not follow the dimensions of "
            f"{owner} {list(shape)}: expected for each its size, a divisor of it or 1."
        )
    entries = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    kept = [None if size == 1 else entry for size, entry in zip(leaf.shape, entries, strict=True)]
    for size, entry in zip(leaf.shape, kept, strict=True):
        parts = math.prod(sharding.mesh.shape[axis] for axis in as_names(entry))
        if size % parts:
            raise ConfigError(
                f"strategy {placement.name!r} splits {owner} {list(shape)} over {parts} devices "
                f"along a dimension of which the optimizer's state {name} {list(leaf.shape)} has "
                f"{size} blocks. Use a mesh size that divides {size}, or "
                "--config.optim.moments=bfloat16."
            )
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
