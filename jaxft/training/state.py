"""The state that a training step hands to the next, as pure arrays."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import ConfigError
from jaxft.models.adapters import NOTHING, Adaptation
from jaxft.models.module import Params, is_unlearnt
from jaxft.sharding.rules import Placement
from jaxft.training.optimizers.averages import evaluated, is_averaged
from jaxft.training.optimizers.placing import sharding_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TrainState:
    """A registered dataclass of pure dicts; no module, function, mesh or key inside.

    Attributes:
      step: int32 scalar, optimizer steps done.
      trainable: `{path: array}` that the optimizer changes.
      frozen: `{path: array}` that it does not; disjoint from `trainable`.
      opt_state: optax's state over `trainable`.
      base: `{path: array}` of the model that adapters are made for; it does not change, and is
        read from where it came from: no checkpoint holds it.
    """

    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    base: Any = field(default_factory=dict)

    @property
    def params(self) -> Params:
        """All parameters of the model."""
        return {**self.trainable, **self.frozen, **self.base}

    @property
    def saved(self) -> Params:
        """All parameters that a checkpoint holds."""
        return {**self.trainable, **self.frozen}

    @property
    def evaluated(self) -> Params:
        """All parameters as they are evaluated and exported: an average in place of what trains."""
        return {**self.params, **evaluated(self.trainable, self.opt_state)}

    @property
    def is_averaged(self) -> bool:
        """Whether what is evaluated differs from what trains."""
        return is_averaged(self.opt_state)


class Parts(NamedTuple):
    """The parameters of a model by what becomes of them, as the attributes of `TrainState`."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    base: dict[str, Any]


def partition(params: Mapping[str, Any], freeze: str, adaptation: Adaptation = NOTHING) -> Parts:
    """Separates what trains from what does not.

    What is never learnt does not train, whatever the other arguments say.

    Args:
      params: `{path: anything}`.
      freeze: Regular expression searched in paths; empty freezes nothing.
      adaptation: What is learnt beside the model; without it all of the model is.

    Raises:
      ConfigError: If it matches no path, or all.
    """
    learnt, kept = (
        {path for path in params if not adaptation or belongs(path)}
        for belongs in (adaptation.is_learnt, adaptation.is_kept)
    )
    learnt = {path for path in learnt if not is_unlearnt(path)}
    frozen = {path for path in learnt if freeze and re.search(freeze, path)}
    if freeze and not frozen:
        told = ", ".join(sorted(learnt))
        raise ConfigError(f"optim.freeze {freeze!r} matches no parameter; paths are {told}.")
    trained = learnt - frozen
    if not trained:
        raise ConfigError(f"optim.freeze {freeze!r} matches every parameter; nothing would train.")
    return Parts(
        {path: value for path, value in params.items() if path in trained},
        {path: value for path, value in params.items() if path in kept - trained},
        {path: value for path, value in params.items() if path not in kept},
    )


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    freeze: str,
    adaptation: Adaptation = NOTHING,
) -> TrainState:
    """Returns the state at step 0; jit it, donating `params`, to allocate moments in place."""
    trainable, frozen, base = partition(params, freeze, adaptation)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, trainable, frozen, optimizer.init(trainable), base)


def abstract_state(
    params: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    freeze: str,
    adaptation: Adaptation = NOTHING,
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
      adaptation: As in `partition`.
      placement: Gives the sharding of what belongs to no parameter, such as counters.
      moments: `{path: sharding}` of optimizer state that belongs to a parameter and has its shape;
        that of the parameter if absent.

    Raises:
      ConfigError: If a part of the optimizer's state cannot be placed.
    """
    moments = shardings if moments is None else moments
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, freeze, adaptation), dict(params))

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_moment = path[0] == jax.tree_util.GetAttrKey("opt_state")
        placed = moments if is_moment else shardings
        sharding = sharding_of(path, leaf, params, placed, placement)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)
