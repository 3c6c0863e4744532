"""Holds AdamW's steps with moments in fewer bits beside those with moments in float32.

    python -m benchmarks.moments --output benchmarks/results/moments.jsonl

5,000 steps of normal gradients of 64 x 128 parameters whose sizes are spread log-normally; they
stay as large, or fall to a tenth after 500 steps. Prints one JSON line for each form of moments,
beta2 and course: the relative difference of directions (root mean square) and the size of steps
over that of float32, means of the last 20 steps. `nearest` is what bfloat16 would be without
chance.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lines import put
from jaxft.training.optimizers.moments import store_moments, stored_types
from jaxft.workdir.environment import environment

STEPS, FALL, SHAPE = 5000, 500, (64, 128)


def _to_nearest(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        updates, after = inner.update(updates, state, params)
        kept = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim else x, after
        )
        return updates, kept

    return optax.GradientTransformation(inner.init, update)


def measure(moments: str, beta2: float, *, falls: bool) -> dict:
    """Returns one record."""
    exact = optax.scale_by_adam(b1=0.9, b2=beta2)
    if moments == "nearest":
        narrow = _to_nearest(exact)
    else:
        spec = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
        narrow = store_moments(exact, stored_types(spec, {"w": ("mlp", "embed")}, moments))
    sizes = jnp.exp(jax.random.normal(jax.random.key(9), SHAPE))

    def advance(states, step):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), SHAPE)
        course = jnp.where(falls & (step >= FALL), 0.1, 1.0)
        gradients = {"w": course * sizes * noise}
        found = [t.update(gradients, s) for t, s in zip((exact, narrow), states, strict=True)]
        (wide, rounded), states = zip(*found, strict=True)
        whole, off = (
            jnp.sqrt(jnp.mean(jnp.square(x))) for x in (wide["w"], rounded["w"] - wide["w"])
        )
        size = jnp.sqrt(jnp.mean(jnp.square(rounded["w"]))) / whole
        return states, (off / whole, size)

    params = {"w": jnp.zeros(SHAPE)}
    states = (exact.init(params), narrow.init(params))
    _, figures = jax.jit(lambda s: jax.lax.scan(advance, s, jnp.arange(STEPS)))(states)
    difference, size = (float(np.mean(np.asarray(x)[-20:])) for x in figures)
    return {
        "moments": moments,
        "beta2": beta2,
        "falls": falls,
        "steps": STEPS,
        "difference": round(difference, 4),
        "size": round(size, 3),
    }


def main() -> None:
    """Measures every form."""
    parser = argparse.ArgumentParser(description="Holds moments in fewer bits beside float32.")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    output = parser.parse_args().output
    for moments in ("nearest", "bfloat16", "int8"):
        for beta2 in (0.95, 0.999):
            for falls in (False, True):
                record = measure(moments, beta2, falls=falls)
                put(record | {"environment": environment()}, output)


if __name__ == "__main__":
    main()
