"""The state that a training step hands to the next, as pure arrays."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import ConfigError
from jaxft.models.module import Params
from jaxft.sharding.rules import Placement


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TrainState:
    """A registered dataclass of pure dicts; no module, function, mesh or key inside.

    Attributes:
      step: int32 scalar, optimizer steps done.
      trainable: `{path: array}` that the optimizer changes.
      frozen: `{path: array}` that it does not; disjoint from `trainable`.
      opt_state: optax's state over `trainable`.
    """

    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any

    @property
    def params(self) -> Params:
        """All parameters of the model."""
        return {**self.trainable, **self.frozen}


def partition(params: Mapping[str, Any], freeze: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates what trains from what does not.

    Args:
      params: `{path: anything}`.
      freeze: Regular expression searched in paths; empty freezes nothing.

    Raises:
      ConfigError: If it matches no path, or all.
    """
    frozen = {path for path in params if freeze and re.search(freeze, path)}
    if freeze and not frozen:
        raise ConfigError(
            f"optim.freeze {freeze!r} matches no parameter; paths are {', '.join(params)}."
        )
    if len(frozen) == len(params):
        raise ConfigError(f"optim.freeze {freeze!r} matches every parameter; nothing would train.")
    trainable = {path: value for path, value in params.items() if path not in frozen}
    return trainable, {path: params[path] for path in frozen}


def init_state(params: Params, optimizer: optax.GradientTransformation, freeze: str) -> TrainState:
    """Returns the state at step 0; jit it, donating `params`, to allocate moments in place."""
    trainable, frozen = partition(params, freeze)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def owner_of(
    path: tuple, leaf: jax.ShapeDtypeStruct, params: Mapping[str, jax.ShapeDtypeStruct]
) -> str:
    """Returns the parameter that a leaf of the state belongs to; empty if to none.

    Args:
      path: Of the leaf, as `jax.tree_util` gives it; it ends with the parameter's.
      leaf: It has the parameter's shape.
      params: `{path: shape}`.
    """
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    owner = names[-1] if names else ""
    return owner if owner in params and params[owner].shape == leaf.shape else ""


def abstract_state(
    params: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    freeze: str,
    *,
    placement: Placement,
    moments: Mapping[str, Any] | None = None,
) -> TrainState:
    """Returns the state as `ShapeDtypeStruct`s with shardings; allocates nothing.

    Args:
      params: `{path: shape and dtype}`.
      shardings: `{path: sharding}` of parameters.
      optimizer: Makes the optimizer's state.
      freeze: As in `partition`.
      placement: Gives the sharding of what belongs to no parameter, such as counters.
      moments: `{path: sharding}` of optimizer state that belongs to a parameter (same path, same
        shape); that of the parameter if absent.
    """
    moments = shardings if moments is None else moments
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, freeze), dict(params))

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = owner_of(path, leaf, params)
        is_moment = path[0] == jax.tree_util.GetAttrKey("opt_state")
        placed = moments if is_moment else shardings
        sharding = placed[owner] if owner else placement.replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)
