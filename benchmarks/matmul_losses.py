"""Trains all of a real model by products of 8-bit numbers, and holds the losses together.

    python -m benchmarks.matmul_losses ../shared --output benchmarks/results/matmul-losses.jsonl

The recipe of `benchmarks/quality.py`: stories260K for 300 steps of 16 rows of 256 tokens on one of
its data sets, documents apart, in float32 but for what `model.matmul` rounds. Prints one JSON line
for each kind; exits with 1 if a held-out loss is more than 1 % above that without.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jaxft
from benchmarks import quality
from benchmarks.lines import put
from jaxft.sharding.scaled import FORMATS
from jaxft.workdir.environment import environment

TOLERANCE = 0.01


def measure(task: quality.Task, shared: Path, kind: str, *, steps: int, seed: int) -> dict:
    """Trains and evaluates by one kind of products; returns one record."""
    with tempfile.TemporaryDirectory() as folder:
        config = quality.make_config(
            task, shared, Path(folder), packing="documents", steps=steps, seed=seed
        )
        config.model.matmul, config.train.eval_every = kind, 0
        result = jaxft.train(config)
        sums = jaxft.evaluate(config, result.checkpoint)["validation"].sums
    loss = round(quality.first_blocks(sums).loss.value, 4)
    return {"data": task.name, "steps": steps, "seed": seed, "matmul": kind, "loss": loss}


def main() -> int:
    """Runs every kind on one data set."""
    parser = argparse.ArgumentParser(description="Holds losses by rounded products together.")
    parser.add_argument("shared", type=Path, help="folder with models/stories260K and data/")
    parser.add_argument("--kinds", default=",".join(FORMATS), help="these kinds only")
    parser.add_argument("--data", default="rasbt-instruct", help="name of the data set")
    parser.add_argument("--steps", type=int, default=quality.STEPS, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    [task] = [task for task in quality.tasks(options.shared) if task.name == options.data]
    found = {}
    for kind in ("", *options.kinds.split(",")):
        record = measure(task, options.shared, kind, steps=options.steps, seed=options.seed)
        found[kind] = record["loss"]
        put(record | {"environment": environment()}, options.output)
    worse = [kind for kind, loss in found.items() if loss > (1 + TOLERANCE) * found[""]]
    for kind in worse:
        print(f"{kind}: {found[kind]}, without rounding {found['']}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
