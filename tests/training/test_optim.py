"""Schedules, decay and clipping in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import OptimConfig
from jaxft.models.module import AbstractModel
from jaxft.training.optim import make_optimizer, make_schedule

PEAK, STEPS = 2.0, 50


def course(kind: str, warmup: int, step: int, final: float = 0.1, share: float = 0.2) -> float:
    """Learning rate after `step` steps, written out."""
    if step < warmup:
        return PEAK * (step + 1) / warmup
    done = (step - warmup) / (STEPS - warmup)
    low = PEAK * final
    if kind == "linear":
        return PEAK + (low - PEAK) * done
    if kind == "cosine":
        return low + (PEAK - low) * (1 + math.cos(math.pi * done)) / 2
    if kind == "wsd":
        decay = round(STEPS * share)
        return PEAK + (low - PEAK) * max(step - (STEPS - decay), 0) / decay
    return PEAK


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules_follow_their_closed_forms(kind, warmup):
    config = OptimConfig(
        learning_rate=PEAK, schedule=kind, warmup_steps=warmup, final_ratio=0.1, decay_fraction=0.2
    )
    schedule = make_schedule(config, STEPS)
    found = [float(schedule(jnp.int32(step))) for step in range(STEPS)]
    expected = [course(kind, warmup, step) for step in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    for kind in ("constant", "linear", "cosine", "wsd"):
        config = OptimConfig(learning_rate=PEAK, schedule=kind, warmup_steps=STEPS)
        assert float(make_schedule(config, STEPS)(STEPS - 1)) == PEAK


def test_a_decay_of_less_than_a_step_leaves_all_steps_at_the_peak():
    config = OptimConfig(
        learning_rate=PEAK, schedule="wsd", warmup_steps=0, final_ratio=0.1, decay_fraction=0.001
    )
    schedule = make_schedule(config, STEPS)
    assert float(schedule(STEPS - 1)) == PEAK
    assert float(schedule(STEPS)) == pytest.approx(0.1 * PEAK)


AXES = {"norm.scale": ("norm",), "q.b": ("heads",), "q.w": ("heads", "embed")}
PARAMS = {"norm.scale": jnp.full(3, 2.0), "q.b": jnp.full(3, 2.0), "q.w": jnp.full((2, 3), 2.0)}
MODEL = AbstractModel(None, jax.eval_shape(lambda: PARAMS), AXES)


def updates(gradient: float, **changes):
    config = OptimConfig(**{"learning_rate": 0.1, "epsilon": 1.0, "weight_decay": 0.0} | changes)
    optimizer = make_optimizer(config, make_schedule(config, 10), MODEL)
    gradients = {path: jnp.full_like(value, gradient) for path, value in PARAMS.items()}
    return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]


def test_decay_leaves_norms_and_biases_alone():
    found = updates(0.0, weight_decay=0.5)
    np.testing.assert_allclose(found["q.w"], -0.1 * 0.5 * 2.0)
    np.testing.assert_array_equal(found["norm.scale"], 0)
    np.testing.assert_array_equal(found["q.b"], 0)


@pytest.mark.parametrize(
    ("clip_norm", "seen"), [(0.0, 5.0), (100.0, 5.0), (1.0, 1 / math.sqrt(12))]
)
def test_gradients_are_clipped_by_their_global_norm(clip_norm, seen):
    """Twelve elements of 5; Adam's first step is g / (|g| + epsilon)."""
    for value in updates(5.0, clip_norm=clip_norm).values():
        np.testing.assert_allclose(value, -0.1 * seen / (seen + 1.0), rtol=1e-6)
