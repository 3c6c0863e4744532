"""Fine-tunes a real pre-trained model on real data, and holds the losses against PyTorch's.

    .venv/bin/python benchmarks/quality.py ../shared --output benchmarks/results/quality.jsonl

The folder holds models/stories260K and the data sets (its README gives the recipe and the figures,
measured with PyTorch and transformers in float32). Each data set is run twice: as one stream cut
into blocks, which is the recipe and must give its figures, and with documents kept apart, which is
jaxft's default. Prints one JSON line per run; exits with 1 if a figure is off.
"""

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxft
from benchmarks.lines import put
from jaxft.programs.held_out import UnitSums
from jaxft.workdir.environment import environment

STEPS, BLOCK, BATCH, EVALUATED_BLOCKS = 300, 256, 16, 64
BEFORE_TOLERANCE, AFTER_TOLERANCE = 0.005, 0.03


@dataclass(frozen=True)
class Task:
    """A data set as texts, with the reference's held-out nats per token."""

    name: str
    train: list[str]
    held_out: list[str]
    before: float
    after: float


def tasks(shared: Path) -> Iterator[Task]:
    """Yields the three data sets, split and written out as the recipe says."""
    text = (shared / "data/tinyshakespeare/input.txt").read_text()
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    cut = int(0.9 * len(paragraphs))
    yield Task("tinyshakespeare", paragraphs[:cut], paragraphs[cut:], 5.089, 2.460)

    rows = json.loads((shared / "data/rasbt-instruct/instruction-data.json").read_text())
    texts = [
        f"Instruction: {row['instruction']}\nInput: {row['input']}\nResponse: {row['output']}"
        for row in rows
    ]
    yield Task("rasbt-instruct", texts[:935], texts[935:], 4.357, 1.442)

    train, test = (_banking(shared / f"data/banking77/{split}.csv") for split in ("train", "test"))
    random.Random(0).shuffle(test)
    yield Task("banking77", train, test, 4.688, 1.167)


def _banking(file: Path) -> list[str]:
    with file.open(newline="") as lines:
        return [
            f"{row['text']} -> {row['category'].replace('_', ' ')}" for row in csv.DictReader(lines)
        ]


def make_config(
    task: Task, shared: Path, folder: Path, *, packing: str, steps: int = STEPS, seed: int = 0
) -> jaxft.RunConfig:
    """Returns the recipe as a config; writes the texts to JSONL files in `folder`."""
    config = jaxft.RunConfig()
    config.model.path = str(shared / "models/stories260K")
    config.model.tokenizer = _write_tokenizer_without_end(
        shared / "models/stories260K", folder / "tokenizer"
    )
    config.model.dtypes = "float32"
    config.model.remat = "none"
    config.data.train = _write(folder / f"{task.name}.train.jsonl", task.train)
    config.data.validation = _write(folder / f"{task.name}.held_out.jsonl", task.held_out)
    config.data.max_length = BLOCK
    config.data.packing = packing
    config.data.text_split = "file"  # nothing stands between texts but BOS
    config.data.overlength = "split"
    config.data.cache = str(folder / "cache")
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.0
    config.optim.beta2 = 0.999
    config.optim.clip_norm = 1.0
    config.train.steps = steps
    config.train.seed = seed
    config.train.batch_size = BATCH
    config.train.eval_every = steps
    config.train.save_every = 0
    config.train.workdir = str(folder / f"{task.name}-{packing}")
    config.eval.samples = 0
    config.strategy = "ddp"
    return config


def _write_tokenizer_without_end(source: Path, target: Path) -> str:
    """Copies a tokenizer without its EOS, which the reference puts behind no text."""
    target.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    return str(target)


def _write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def first_blocks(rows: UnitSums) -> UnitSums:
    """Returns the blocks that the reference evaluates."""
    assert rows.bytes is not None
    columns = (rows.total, rows.weight)
    total, weight = (column[:EVALUATED_BLOCKS] for column in columns)
    figures = {
        name: (a[:EVALUATED_BLOCKS], b[:EVALUATED_BLOCKS]) for name, (a, b) in rows.figures.items()
    }
    return UnitSums(total, weight, figures, rows.bytes[:EVALUATED_BLOCKS])


def loss_of_full_blocks(rows: UnitSums) -> float:
    """Averages as the reference does: batches of 16 full blocks, then the mean of their means.

    It differs from the mean over tokens where the blocks do not fill the last batch, which is so
    for rasbt-instruct: 57 blocks.
    """
    rows = first_blocks(rows)
    full = rows.weight == BLOCK - 1
    losses = rows.total[full] / rows.weight[full]
    means = [losses[i : i + BATCH].mean() for i in range(0, len(losses), BATCH)]
    return float(np.mean(means))


def measure(
    task: Task, shared: Path, *, packing: str, steps: int = STEPS, seed: int = 0
) -> dict[str, Any]:
    """Evaluates, trains and evaluates again; returns one record."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(task, shared, Path(folder), packing=packing, steps=steps, seed=seed)
        before = jaxft.evaluate(config)["validation"].sums
        result = jaxft.train(config)
        after = jaxft.evaluate(config, result.checkpoint)["validation"].sums
    average = (
        loss_of_full_blocks if packing == "stream" else lambda rows: first_blocks(rows).loss.value
    )
    return {
        "data": task.name,
        "packing": packing,
        "steps": steps,
        "seed": seed,
        "before": round(average(before), 4),
        "after": round(average(after), 4),
        "evaluated_tokens": int(first_blocks(after).weight.sum()),
    }


def check(record: dict, task: Task) -> list[str]:
    """Adds the reference's figures and returns what is off."""
    record |= {"reference_before": task.before, "reference_after": task.after}
    problems = []
    if abs(record["before"] - task.before) > BEFORE_TOLERANCE:
        problems.append(f"{task.name}: before {record['before']}, reference {task.before}")
    if record["after"] > task.after + AFTER_TOLERANCE:
        problems.append(f"{task.name}: after {record['after']}, reference {task.after}")
    return problems


def main() -> int:
    """Runs every data set in both packings."""
    parser = argparse.ArgumentParser(description="Holds fine-tuning of real data against PyTorch.")
    parser.add_argument("shared", type=Path, help="folder with models/stories260K and data/")
    parser.add_argument("--data", default="", help="this data set only")
    parser.add_argument("--packing", default="", help="stream or documents only")
    parser.add_argument("--seed", type=int, default=0, help="order in which blocks are drawn")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    problems = []
    for task in tasks(options.shared):
        for packing in ("stream", "documents"):
            if options.data not in ("", task.name) or options.packing not in ("", packing):
                continue
            record = measure(task, options.shared, packing=packing, seed=options.seed)
            if packing == "stream":
                problems += check(record, task)
            put(record | {"environment": environment()}, options.output)
    for problem in problems:
        print(f"off: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
