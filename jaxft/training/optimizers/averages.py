"""Averages of weights, which are evaluated and exported in place of those that train."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AverageState(NamedTuple):
    """The state of `with_average`.

    Attributes:
      inner: State of what is averaged.
      count: Steps done.
      average: `{path: float32}`.
    """

    inner: Any
    count: Any
    average: Any

    def evaluated(self, trainable: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the average, in the parameters' types."""
        return {path: self.average[path].astype(p.dtype) for path, p in trainable.items()}


def with_average(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters after each step.

    It begins at the starting weights; in step t, from 0, it keeps min(decay, (1 + t) / (10 + t)) of
    itself, so that a short run is not all start.
    """

    def init(params: Any) -> AverageState:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AverageState(inner.init(params), jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state.inner, params)
        kept = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        average = jax.tree.map(
            lambda a, p, u: a + (1.0 - kept) * (p + u - a), state.average, params, updates
        )
        return updates, AverageState(after, optax.safe_increment(state.count), average)

    return optax.GradientTransformation(init, update)


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free`.

    Attributes:
      inner: State of the optimizer whose steps are averaged.
      count: Steps done.
      largest: Largest learning rate so far.
      total: Sum of the weights of all steps.
      z: `{path: float32}`, the sequence that takes the steps.
      beta: Share of the average in the parameters.
    """

    inner: Any
    count: Any
    largest: Any
    total: Any
    z: Any
    beta: Any

    def evaluated(self, trainable: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the average x, of which and z the parameters are made."""
        return _averages(trainable, self.z, self.beta)


@jax.jit
def _averages(trainable: Mapping[str, Any], z: Mapping[str, Any], beta: Any) -> dict[str, Any]:
    return {
        path: (z[path] + (y.astype(jnp.float32) - z[path]) / beta).astype(y.dtype)
        for path, y in trainable.items()
    }


def schedule_free(
    inner: optax.GradientTransformation, schedule: optax.Schedule, beta: float
) -> optax.GradientTransformation:
    """Averages the steps of an optimizer in place of a decay (Defazio et al., arXiv:2405.15682).

    Parameters are y = (1 - beta) z + beta x. z takes the steps u of `inner`, which are computed
    from gradients at y, and x is the mean of z, weighted by the square of the largest rate so far.
    With c the share of the newest z, y moves by (1 - beta + beta c) u - c (y - z).

    Args:
      inner: Without momentum; it returns steps, learning rate and sign included.
      schedule: The learning rate in these steps.
      beta: More than 0.
    """

    def init(params: Any) -> ScheduleFreeState:
        zero = jnp.zeros((), jnp.float32)
        z = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        count = jnp.zeros((), jnp.int32)
        return ScheduleFreeState(inner.init(params), count, zero, zero, z, jnp.float32(beta))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, after = inner.update(updates, state.inner, params)
        largest = jnp.maximum(state.largest, schedule(state.count))
        total = state.total + largest**2
        share = jnp.where(total > 0, largest**2 / jnp.where(total > 0, total, 1.0), 0.0)
        own = 1.0 - beta + beta * share
        moves = jax.tree.map(lambda u, y, z: own * u - share * (y - z), steps, params, state.z)
        z = jax.tree.map(jnp.add, state.z, steps)
        count = optax.safe_increment(state.count)
        return moves, ScheduleFreeState(after, count, largest, total, z, state.beta)

    return optax.GradientTransformation(init, update)


def is_averaged(opt_state: Any) -> bool:
    """Returns whether averages stand for parameters that train."""
    return any(_is_average(node) for node in _nodes(opt_state))


def evaluated(trainable: Mapping[str, Any], opt_state: Any) -> dict[str, Any]:
    """Returns `{path: array}` of the averages that stand for parameters; empty without any."""
    averages = [node for node in _nodes(opt_state) if _is_average(node)]
    return averages[0].evaluated(trainable) if averages else {}


def _is_average(node: Any) -> bool:
    return isinstance(node, AverageState | ScheduleFreeState)


def _nodes(opt_state: Any) -> list[Any]:
    return jax.tree.leaves(opt_state, is_leaf=_is_average)
