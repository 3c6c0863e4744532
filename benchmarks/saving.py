"""Measures for how long a checkpoint holds up training.

    .venv/bin/python benchmarks/saving.py --shape 110m --output benchmarks/results/saving.jsonl

Saves the state of a run as its loop does. `held_up_seconds` pass until training can go on, with
parameters and moments checked to be finite and copied off the device, and `background_seconds` from
then until all is on disk, in which steps take `step_seconds_meanwhile` in place of `step_seconds`.
Takes the options of `train_step.py`, so that `--set adapter.rank=16` measures the checkpoints of an
adapter. Seconds are medians over the saves after the first.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import turns, workload


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures saving.")
    workload.add_options(parser)
    parser.add_argument("--steps", type=int, default=3, help="timed steps before and after a save")
    parser.add_argument(
        "--saves", type=int, default=4, help="checkpoints; the first does not count"
    )
    parser.add_argument("--scratch", type=Path, help="folder to save in; else a temporary one")
    turns.add_options(parser, torch=False)
    options = parser.parse_args()
    if options.saves < 2:
        parser.error("--saves is at least 2, as the first does not count")
    turns.run(options, measure, keys=("shape", "rows", "length", "set"), figure="held_up_seconds")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times saves between steps."""
    import jax

    from jaxft.programs.session import all_finite
    from jaxft.training.feeding import put
    from jaxft.workdir.checkpoint import Checkpoints, Progress
    from jaxft.workdir.environment import environment

    work = workload.make_workload(options)
    program = work.program()
    step, state = program.compile(), work.state(program)
    batch = put(work.batch(), work.evaluator.placement.micro_batches)

    def run_steps() -> float:
        nonlocal state
        started = time.monotonic()
        for _ in range(options.steps):
            state, _ = step(state, {}, batch)
        jax.block_until_ready(state)
        return (time.monotonic() - started) / options.steps

    run_steps()
    alone, held_up, meanwhile, background = [], [], [], []
    with (
        tempfile.TemporaryDirectory(dir=options.scratch) as folder,
        Checkpoints(Path(folder)) as checkpoints,
    ):
        for _ in range(options.saves):
            alone.append(run_steps())
            started = time.monotonic()
            assert all_finite((state.trainable, state.opt_state))
            checkpoints.save(state, progress=Progress({}), config={})
            held_up.append(time.monotonic() - started)
            meanwhile.append(run_steps())
            checkpoints.wait()
            background.append(time.monotonic() - started - held_up[-1])
        written = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())

    def median(seconds: list[float]) -> float:
        return round(statistics.median(seconds[1:]), 4)

    return {
        "measurement": "saving",
        "system": "jaxft",
        "shape": options.shape,
        **work.described(),
        "set": options.set,
        "saves": options.saves,
        "checkpoint_bytes": written,
        "held_up_seconds": median(held_up),
        "first_held_up_seconds": round(held_up[0], 4),
        "background_seconds": median(background),
        "step_seconds": median(alone),
        "step_seconds_meanwhile": median(meanwhile),
        "environment": environment(),
    }


if __name__ == "__main__":
    main()
