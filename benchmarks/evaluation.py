"""Measures the evaluation step, and PyTorch's beside it where a Python with torch is at hand.

    .venv/bin/python benchmarks/evaluation.py --shape 15m --torch-python python3.11 \
        --output benchmarks/results/evaluation.jsonl

The step of `jaxft eval`, on random weights and random tokens: sums of every row, read one step late
as the command reads them. PyTorch's side is the loss of Hugging Face's model, without gradients.
Takes the options of `train_step.py`, and turns as it does.
"""

import argparse
import time
from typing import Any

from benchmarks import turns, workload
from benchmarks.train_step import held_by, refuse_what_torch_does_not_do, torch_step


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures the evaluation step.")
    workload.add_options(parser)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two others")
    turns.add_options(parser)
    options = parser.parse_args()
    if options.torch_python:
        refuse_what_torch_does_not_do(options, parser.error)
    keys = ("shape", "rows", "length", "set")
    turns.run(options, measure, keys=keys, torch=measure_torch, equal=("parameters",))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times the evaluation step."""
    import jax
    import numpy as np

    from jaxft.training.feeding import put
    from jaxft.workdir.environment import environment

    work = workload.make_workload(options)
    evaluator, params = work.evaluator, work.params()
    batch = put(work.rows, evaluator.placement.rows)
    started = time.monotonic()
    step = evaluator.eval_step.lower(params, batch).compile()
    compile_seconds = time.monotonic() - started
    terms = jax.device_get(step(params, batch))
    waiting = step(params, batch)
    started = time.monotonic()
    for _ in range(options.steps):
        found = step(params, batch)
        jax.device_get(waiting)
        waiting = found
    jax.block_until_ready(waiting)
    seconds = (time.monotonic() - started) / options.steps
    analysis = step.memory_analysis()
    return {
        "measurement": "evaluation",
        "system": "jaxft",
        "shape": options.shape,
        **work.described(),
        "packed": options.packed,
        "trained": options.trained,
        "set": options.set,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(batch.tokens.size / seconds, 1),
        "compile_seconds": round(compile_seconds, 2),
        "step_bytes": held_by(analysis) if analysis else None,
        "loss": round(float(np.sum(terms.total) / np.sum(terms.weight)), 4),
        "environment": environment(),
    }


def measure_torch(options: argparse.Namespace) -> dict[str, Any]:
    """Times the loss of `torch_step.py`."""
    return torch_step(options, trains=False)


if __name__ == "__main__":
    main()
