"""AdamW, its schedule, its decay mask and its clipping, all from optax."""

import re
from typing import Any

import optax

from jaxft.config import OptimConfig

# Scales of norms, biases, sinks: decay would pull them to zero without a regularising effect.
_NOT_DECAYED = re.compile(r"\.(scale|b|sinks)$")


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


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns global-norm clipping followed by AdamW (Loshchilov and Hutter, arXiv:1711.05101).

    Decay is decoupled and scaled by the learning rate; it leaves norms and biases alone.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(clip, adamw)


def _decayed(params: Any) -> dict[str, bool]:
    return {path: not _NOT_DECAYED.search(path) for path in params}
