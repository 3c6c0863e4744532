"""What a training step carries from one step to the next, as pure arrays."""

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


def abstract_state(
    params: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    freeze: str,
    *,
    placement: Placement,
) -> TrainState:
    """Returns the state as `ShapeDtypeStruct`s with shardings; allocates nothing.

    Optimizer state that belongs to a parameter (same path, same shape) follows its sharding; what
    belongs to none, such as counters, is replicated.
    """
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, freeze), dict(params))

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        owner = names[-1] if names else ""
        follows = owner in params and params[owner].shape == leaf.shape
        sharding = shardings[owner] if follows else placement.replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)
