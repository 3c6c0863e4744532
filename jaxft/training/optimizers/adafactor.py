"""Adafactor's direction (Shazeer and Stern, arXiv:1804.04235), factored by the axes of weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxft.sharding.axes import Dimensions, dimensions

# Of the paper: the second moment of step t decays by 1 - t^-0.8; added to squares; the largest
# root mean square of a direction.
_EXPONENT = 0.8
_ADDED = 1e-30
_LARGEST = 1.0


class Factors(NamedTuple):
    """Means of squared gradients of a matrix; what is averaged over has size 1.

    Attributes:
      outputs: `[lead…, *outputs, 1…]`.
      inputs: `[lead…, 1…, *inputs]`.
    """

    outputs: Any
    inputs: Any


class AdafactorState(NamedTuple):
    """Steps done, and by path `Factors` of a matrix or the second moment of a vector."""

    count: Any
    squares: Any


def scale_by_adafactor(axes: Mapping[str, tuple[str, ...]]) -> optax.GradientTransformation:
    """Divides gradients by the root of a factored second moment, and clips the result.

    Matrices are those of the model: stacked layers and experts are apart, the heads and their size
    are one dimension, so that a step is that of the unstacked matrices. Clipping holds the root
    mean square of each to 1 at most. Rates are absolute, not relative to the weights' size, so that
    they compare with those of other optimizers.

    Args:
      axes: Names of each parameter's dimensions by path.
    """
    known = {path: dimensions(names) for path, names in axes.items()}

    def init(params: Any) -> AdafactorState:
        squares = {path: _zeros(value, known[path]) for path, value in params.items()}
        return AdafactorState(jnp.zeros((), jnp.int32), squares)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        decay = 1.0 - jnp.asarray(count, jnp.float32) ** -_EXPONENT
        found = {
            path: _direction(gradient, state.squares[path], decay, known[path])
            for path, gradient in updates.items()
        }
        directions = {path: direction for path, (direction, _) in found.items()}
        return directions, AdafactorState(count, {path: new for path, (_, new) in found.items()})

    return optax.GradientTransformation(init, update)


def _zeros(value: Array, kind: Dimensions) -> Any:
    if not kind.inputs:
        return jnp.zeros_like(value)
    over_outputs, over_inputs = _places(kind)
    return jax.tree.map(
        jnp.zeros_like,
        Factors(
            jax.eval_shape(lambda x: jnp.sum(x, over_inputs, keepdims=True), value),
            jax.eval_shape(lambda x: jnp.sum(x, over_outputs, keepdims=True), value),
        ),
    )


def _places(kind: Dimensions) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns where outputs and inputs stand."""
    places = tuple(range(kind.lead, sum(kind)))
    return places[: kind.outputs], places[kind.outputs :]


def _direction(
    gradient: Float[Array, "..."], before: Any, decay: Array, kind: Dimensions
) -> tuple[Array, Any]:
    """Returns the direction of one parameter, and its squares after this step."""
    over_outputs, over_inputs = _places(kind)
    square = jnp.square(gradient) + _ADDED

    def mean(over: tuple[int, ...]) -> Array:
        return jnp.mean(square, over, keepdims=True)

    if kind.inputs:
        now = Factors(mean(over_inputs), mean(over_outputs))
        after = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, before, now)
        rows = after.outputs / jnp.mean(after.outputs, over_outputs, keepdims=True)
        direction = gradient * jax.lax.rsqrt(rows) * jax.lax.rsqrt(after.inputs)
    else:
        after = decay * before + (1.0 - decay) * square
        direction = gradient * jax.lax.rsqrt(after)
    size = jnp.sqrt(jnp.mean(jnp.square(direction), (*over_outputs, *over_inputs), keepdims=True))
    return direction / jnp.maximum(1.0, size / _LARGEST), after
