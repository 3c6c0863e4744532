"""Compares full fine-tuning with adapters on three tasks: what trains, memory, speed and quality.

    python -m benchmarks.adapters ../shared --output benchmarks/results/adapters.jsonl
    python -m benchmarks.adapters --table benchmarks/results/adapters.jsonl

The tasks are the demo's (the model that ships with jaxft; labels) and banking77 and rasbt-instruct
with models/stories260K of the folder (next tokens of held-out texts). All methods see the same rows
in the same order; each has the learning rate that was best of those tried on banking77, which
`--rates` prints. Prints one JSON line per run: parameters that train, bytes that the compiled step
holds, tokens a second, and what was measured on held-out data with its 95 % interval. The second
command prints the table of docs/tuning.md: means over seeds, and speed of the fastest run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxft
from benchmarks.lines import put
from benchmarks.quality import make_config, tasks
from jaxft.demo.data import write_task
from jaxft.demo.runs import load_run
from jaxft.files import read_jsonl
from jaxft.formatting import format_bytes
from jaxft.programs.description import read_description
from jaxft.training.program import build, build_evaluator, make_placement
from jaxft.workdir.environment import environment
from jaxft.workdir.source import find_source

STEPS, ROWS, LENGTH, RANK = 60, 8, 128, 8
METHODS: dict[str, dict[str, Any]] = {
    "full": {"optim.learning_rate": 1e-3},
    "LoRA": {"adapter.rank": RANK, "optim.learning_rate": 1e-2},
    "rsLoRA": {"adapter.rank": RANK, "adapter.scaling": "rslora", "optim.learning_rate": 5e-3},
    "DoRA": {"adapter.rank": RANK, "adapter.dora": True, "optim.learning_rate": 1e-2},
    "QLoRA": {"adapter.rank": RANK, "model.quantise": "nf4", "optim.learning_rate": 1e-2},
}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


def configs(shared: Path, folder: Path) -> Iterator[tuple[str, jaxft.RunConfig]]:
    """Yields the tasks with what all methods share."""
    write_task(folder / "demo")
    config = load_run("demo")
    data, names = config.data, ("train.jsonl", "held_out.jsonl")
    data.train, data.validation = (str(folder / "demo" / name) for name in names)
    config.eval.retention = str(folder / "demo" / "retention.txt")
    config.train.epochs = 1
    yield "embedded", config
    for task in tasks(shared):
        if task.name == "tinyshakespeare":
            continue
        held_out = task.held_out[:300]
        task = type(task)(task.name, task.train, held_out, task.before, task.after)
        config = make_config(task, shared, folder, packing="documents", steps=STEPS)
        config.train.batch_size, config.data.max_length = ROWS, LENGTH
        yield task.name, config


def measure(config: jaxft.RunConfig, name: str, method: str, seed: int) -> dict[str, Any]:
    """Trains by one method and evaluates; returns one record."""
    with tempfile.TemporaryDirectory() as folder:
        for key, value in METHODS[method].items():
            group, _, leaf = key.partition(".")
            setattr(getattr(config, group), leaf, value)
        config.train.seed = seed
        config.train.workdir = str(Path(folder) / "run")
        config.train.eval_every = 0
        config.train.log_every = 10
        config.eval.samples = 0
        started = time.monotonic()
        result = jaxft.train(config)
        seconds = time.monotonic() - started
        records = list(read_jsonl(Path(config.train.workdir) / "metrics.jsonl"))
        rates = [r["tokens_per_second"] for r in records[1:] if "tokens_per_second" in r]
        found = jaxft.evaluate(config, result.checkpoint)["validation"]
        size = sum(f.stat().st_size for f in Path(result.checkpoint).rglob("*") if f.is_file())
    record = {
        "task": name,
        "method": method,
        "keys": METHODS[method],
        "seed": seed,
        "steps": result.step,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(statistics.median(rates)),
        "checkpoint_bytes": size,
        **held_by_step(config, result.step),
        "loss": _estimate(found.sums.loss),
    }
    if found.answers is not None:
        record["accuracy"] = _estimate(found.answers.accuracy)
    return record


def held_by_step(config: jaxft.RunConfig, steps: int) -> dict[str, int]:
    """Returns how many parameters train, and what the compiled step holds, in bytes."""
    architecture = read_description(find_source(config.model.path), config).architecture
    evaluator = build_evaluator(
        config, architecture, placement=make_placement(config), max_segments=16
    )
    program = build(config, evaluator, steps=steps)
    memory = program.compile().memory_analysis()
    inputs = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "parameters": evaluator.parameters,
        "trained": sum(leaf.size for leaf in program.state.trainable.values()),
        "step_bytes": inputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
    }


def _estimate(estimate: Any) -> dict[str, float]:
    return {part: round(getattr(estimate, part), 4) for part in ("value", "low", "high")}


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table with a row for each task and method."""
    yield (
        "| task | tuning | trained parameters | checkpoint | memory of the step | tokens/s | "
        "held-out loss | of seeds |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["task"], line["method"]), []).append(line)
    for (task, method), runs in sorted(found.items(), key=lambda item: item[0][0]):
        first, losses = runs[0], [run["loss"] for run in runs]
        loss, low, high = (
            statistics.mean(loss[part] for loss in losses) for part in ("value", "low", "high")
        )
        values = [loss["value"] for loss in losses]
        yield (
            f"| {task} | {method} | {first['trained']:,} | "
            f"{format_bytes(first['checkpoint_bytes'])} | {format_bytes(first['step_bytes'])} | "
            f"{max(run['tokens_per_second'] for run in runs):,} | "
            f"{loss:.3f} [{low:.3f}, {high:.3f}] | {min(values):.3f} to {max(values):.3f} |"
        )


def main() -> None:
    """Runs every method on every task, with each seed."""
    parser = argparse.ArgumentParser(description="Compares full fine-tuning with adapters.")
    parser.add_argument(
        "shared", type=Path, nargs="?", help="folder with models/stories260K and data/"
    )
    parser.add_argument("--table", type=Path, help="print the table of a file of lines")
    parser.add_argument("--task", default="", help="this task only")
    parser.add_argument("--methods", default=",".join(METHODS), help="these methods only")
    parser.add_argument("--seeds", default="0,1,2", help="orders in which rows are drawn")
    parser.add_argument("--rates", action="store_true", help="try learning rates on banking77")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table(list(read_jsonl(options.table)))))
        return
    if options.shared is None:
        parser.error("name the folder with models/stories260K and data/, or --table")
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            for rate in RATES if options.rates else (METHODS[method]["optim.learning_rate"],):
                METHODS[method]["optim.learning_rate"] = rate
                with tempfile.TemporaryDirectory() as folder:
                    for name, config in configs(options.shared, Path(folder)):
                        wanted = "banking77" if options.rates else options.task
                        if wanted in ("", name):
                            record = measure(config, name, method, seed)
                            put(record | {"environment": environment()}, options.output)


if __name__ == "__main__":
    sys.exit(main())
