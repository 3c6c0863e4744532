"""Measures a layer's attention with its gradients, by back end.

    .venv/bin/python benchmarks/attention.py --shape llama-3.1-8b --length 4096 --rows 4 --packed \
        --set model.dtypes=bfloat16 --set model.attention=cudnn

Random queries, keys and values with the heads of the shape; the back end is `model.attention`,
which is first held against XLA's on the device, as a run does. Takes the options of
`train_step.py`; `compare.py` lets two back ends take turns.
"""

import argparse
import time
from typing import Any

from benchmarks import turns, workload


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures attention.")
    workload.add_options(parser)
    parser.add_argument("--steps", type=int, default=20, help="timed passes, after two others")
    turns.add_options(parser, torch=False)
    turns.run(parser.parse_args(), measure, keys=("shape", "rows", "length", "set"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times attention forward and backward."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft.models.attention import attend, check_backend
    from jaxft.workdir.environment import environment

    work = workload.make_workload(options)
    evaluator, config = work.evaluator, work.evaluator.architecture.config
    backend = evaluator.attention.backend
    check_backend(backend, config)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (config.heads, config.kv_heads, config.kv_heads, config.heads)
    q, k, v, pulled = (
        jax.random.normal(
            key,
            (options.rows, options.length, n, config.head_dim),
            evaluator.numerics.compute_dtype,
        )
        for key, n in zip(keys, heads, strict=True)
    )
    segments, scores = jnp.asarray(work.rows.segments), config.scores(config.kinds[0])

    @jax.jit
    def passes(q: Any, k: Any, v: Any) -> Any:
        def out(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, segments, backend=backend, scores=scores)

        value, back = jax.vjp(out, q, k, v)
        return value, back(pulled)

    step = passes.lower(q, k, v).compile()
    for _ in range(2):
        found = jax.block_until_ready(step(q, k, v))
    started = time.monotonic()
    for _ in range(options.steps):
        found = step(q, k, v)
    jax.block_until_ready(found)
    seconds = (time.monotonic() - started) / options.steps
    squared = float(np.sum(2.0 * work.rows.positions + 1))
    flops, peak = 6 * config.heads * config.head_dim * squared, work.peak()
    return {
        "measurement": "attention",
        "system": "jaxft",
        "shape": options.shape,
        "rows": options.rows,
        "length": options.length,
        "packed": options.packed,
        "dtypes": work.config.model.dtypes,
        "attention": backend,
        "set": options.set,
        "step_seconds": round(seconds, 6),
        "tokens_per_second": round(options.rows * options.length / seconds, 1),
        "teraflops_causal": round(flops / seconds / 1e12, 4),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
        "environment": environment(),
    }


if __name__ == "__main__":
    main()
