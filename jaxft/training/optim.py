"""A run's optimizer: clipping, direction, decay, learning rates and averages, one after another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.config import OptimConfig
from jaxft.models.module import AbstractModel
from jaxft.sharding.axes import dimensions
from jaxft.training.optimizers.adafactor import scale_by_adafactor
from jaxft.training.optimizers.averages import schedule_free, with_average
from jaxft.training.optimizers.moments import store_moments, stored_types
from jaxft.training.optimizers.muon import is_muons, orthogonalise
from jaxft.training.optimizers.rates import factors, scale_by_factors


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps already done.

    The first step of a warm-up of w steps uses 1/w of the peak and step w the peak; the decay
    reaches `final_ratio` of the peak one step after the last.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final, rest = peak * config.final_ratio, max(steps - config.warmup_steps, 1)
    decay = min(max(round(steps * config.decay_fraction), 1), rest)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, final, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_ratio),
        "wsd": optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)],
            [rest - decay],
        ),
    }[config.schedule]
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, model: AbstractModel
) -> optax.GradientTransformation:
    """Returns what turns gradients into updates; it computes in float32.

    Decay is decoupled (Loshchilov and Hutter, arXiv:1711.05101) and scaled by the learning rate; it
    leaves vectors alone, such as norms and biases: it would pull them to zero without a
    regularising effect.

    Args:
      config: The run's.
      schedule: From `make_schedule`.
      model: Gives shape, dtype and axes of each parameter.

    Raises:
      ConfigError: If a pattern of rates matches no parameter.
    """

    def decayed(params: Any) -> dict[str, bool]:
        return {path: dimensions(model.axes[path]).inputs > 0 for path in params}

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    types = stored_types(model.params, model.axes, config.moments)
    found = factors(config, model)
    step = optax.chain(
        store_moments(_direction(config, model), types),
        optax.add_decayed_weights(config.weight_decay, decayed),
        scale_by_factors(optax.scale_by_learning_rate(schedule), config, found),
    )
    if config.name == "schedule_free":
        step = schedule_free(step, schedule, config.beta1)
    chain = optax.chain(clip, step)
    return _in_float32(with_average(chain, config.ema) if config.ema else chain)


def _direction(config: OptimConfig, model: AbstractModel) -> optax.GradientTransformation:
    """Returns the optimizer's own part: from gradients to directions of steps."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            return scale_by_adafactor(model.axes)
        case "lion":
            return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)
        case "sgd":
            return optax.trace(config.momentum)
        case "schedule_free":
            return optax.scale_by_rms(
                config.beta2, eps=config.epsilon, eps_in_sqrt=False, bias_correction=True
            )
    labels = {path: "muon" if is_muons(axes) else "adamw" for path, axes in model.axes.items()}
    muon = optax.chain(optax.trace(config.momentum, nesterov=True), orthogonalise(model.axes))
    return optax.partition(
        {"muon": muon, "adamw": adam}, lambda params: {path: labels[path] for path in params}
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gives a transformation gradients and parameters in float32, whatever they are kept in."""

    def widened(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(lambda params: inner.init(widened(params)), update)
