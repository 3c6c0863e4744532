"""Learns an adapter beside each kind of quantised weights, and holds the losses together.

    python -m benchmarks.quantised_losses ../shared --output benchmarks/results/losses.jsonl

LoRA of rank 8 on stories260K for 100 steps of 4 rows on a data set of `benchmarks/quality.py`,
documents apart, with the weights of the layers in float32 and in each kind of codes. Prints one
JSON line for each; exits with 1 if a held-out loss is more than 2 % above that of float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jaxft
from benchmarks import quality
from benchmarks.lines import put
from jaxft.models.quantised import DTYPES
from jaxft.workdir.environment import environment

STEPS, ROWS, RANK, TOLERANCE = 100, 4, 8, 0.02


def measure(task: quality.Task, shared: Path, kind: str) -> dict:
    """Trains and evaluates with one kind of weights; returns one record."""
    with tempfile.TemporaryDirectory() as folder:
        config = quality.make_config(task, shared, Path(folder), packing="documents", steps=STEPS)
        config.optim.learning_rate, config.train.batch_size = 5e-3, ROWS
        config.adapter.rank, config.model.quantise = RANK, kind
        config.train.eval_every = 0
        result = jaxft.train(config)
        sums = jaxft.evaluate(config, result.checkpoint)["validation"].sums
    loss = round(quality.first_blocks(sums).loss.value, 4)
    return {"data": task.name, "steps": STEPS, "rank": RANK, "quantise": kind, "loss": loss}


def main() -> int:
    """Runs every kind on one data set."""
    parser = argparse.ArgumentParser(description="Holds losses beside quantised weights together.")
    parser.add_argument("shared", type=Path, help="folder with models/stories260K and data/")
    parser.add_argument("--kinds", default=",".join(DTYPES), help="these kinds of codes only")
    parser.add_argument("--data", default="banking77", help="name of the data set")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    [task] = [task for task in quality.tasks(options.shared) if task.name == options.data]
    found = {}
    for kind in ("", *options.kinds.split(",")):
        record = measure(task, options.shared, kind)
        found[kind] = record["loss"]
        put(record | {"environment": environment()}, options.output)
    worse = [kind for kind, loss in found.items() if loss > (1 + TOLERANCE) * found[""]]
    for kind in worse:
        print(f"{kind}: {found[kind]}, without quantising {found['']}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
