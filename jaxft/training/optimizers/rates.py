"""Factors of the learning rate, by pattern, by layer and by the part of an adapter."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from jaxft.config import OptimConfig
from jaxft.errors import ConfigError
from jaxft.models.families import precedes_layers
from jaxft.models.module import AbstractModel


def factors(config: OptimConfig, model: AbstractModel) -> dict[str, float | np.ndarray]:
    """Returns `{path: factor}` of parameters whose rate is not the run's.

    Of stacked layers a factor is float32 `[L, 1…]`.

    Args:
      config: Its `rates`, `layer_decay` and `lora_plus` multiply.
      model: Gives the parameters.

    Raises:
      ConfigError: If a pattern matches no parameter, or `lora_plus` is set without adapters.
    """
    patterns = config.factors()
    unmatched = [p for p in patterns if not any(re.search(p, path) for path in model.params)]
    problems = [f"optim.rates {pattern!r} matches no parameter." for pattern in unmatched]
    if config.lora_plus != 1 and not any(path.endswith(".lora_b") for path in model.params):
        problems.append("optim.lora_plus is set, but the model has no adapters; leave it out.")
    if problems:
        paths = f"Paths are {', '.join(model.params)}."
        raise ConfigError([f"{problem} {paths}" for problem in problems])
    found = {}
    for path in model.params:
        factor = next((f for p, f in patterns.items() if re.search(p, path)), 1.0)
        if path.endswith(".lora_b"):
            factor *= config.lora_plus
        by_layer = factor * _of_layer(path, config.layer_decay, model)
        if np.any(by_layer != 1):
            found[path] = by_layer
    return found


def scale_by_factors(
    inner: optax.GradientTransformation,
    config: OptimConfig,
    found: Mapping[str, float | np.ndarray],
) -> optax.GradientTransformation:
    """Multiplies updates of some parameters by factors; `init` raises ConfigError if all are 0.

    The state is that of `inner` alone, so that a run can be resumed with other factors.
    """

    def init(params: Any) -> Any:
        if all(not np.any(found.get(path, 1.0)) for path in params):
            raise ConfigError(
                f"optim.rates {config.rates!r} leaves every parameter that trains at a rate of 0. "
                f"Leave the key out, or some of them: {', '.join(params)}."
            )
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, state, params)
        scaled = {
            path: value * found[path] if path in found else value for path, value in updates.items()
        }
        return scaled, state

    return optax.GradientTransformation(init, update)


def _of_layer(path: str, decay: float, model: AbstractModel) -> float | np.ndarray:
    """Returns the power of the decay that a parameter's distance from the top makes."""
    axes, shape = model.axes[path], model.params[path].shape
    layers = sum(map(len, model.stacks.values()))
    if axes[0] == "layers":
        distances = np.asarray([layers - number for number in model.layers_of(path)], np.float32)
        return (np.float32(decay) ** distances).reshape(-1, *(1,) * (len(shape) - 1))
    return decay ** (1 + layers) if precedes_layers(path) else 1.0
