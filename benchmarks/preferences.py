"""Fine-tunes a real model, then learns preferences by each method, and says what both changed.

    .venv/bin/python benchmarks/preferences.py ../shared --output benchmarks/results/pref.jsonl

The folder holds models/stories260K and data/rasbt-instruct, whose 1,100 rows are shuffled and cut
in three: half of them, with the preferred answer, for supervised fine-tuning; 35 % as pairs that
preferences are learnt from; 15 % as pairs that are held out from both. Pairs of equal answers are
left out. What the model already knew is measured on held-out paragraphs of data/tinyshakespeare,
which are trained on nowhere.

Every method starts from the fine-tuned model, but ORPO, which needs none, is run from the
pre-trained one as well. Prints one JSON line per run, with differences paired over held-out pairs
and over rows of text, and their 95 % intervals.
"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxft
from benchmarks.lines import put
from jaxft.programs.comparison import compare
from jaxft.programs.evaluation import evaluate_pair
from jaxft.workdir.environment import environment

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo, smoothed": {"dpo.label_smoothing": 0.1},
    "dpo, normalised": {"dpo.normalised": True, "dpo.beta": 5.0},
    "ipo": {},
    "simpo": {},
    "orpo": {},
    "cpo": {},
    "kto": {},
}


def write_data(shared: Path, folder: Path, seed: int) -> dict[str, int]:
    """Writes the three parts and the text that is retained; returns their numbers of rows."""
    file = shared / "data/rasbt-instruct/instruction-data-with-preference.json"
    rows = [row for row in json.loads(file.read_text()) if _differ(row)]
    random.Random(seed).shuffle(rows)
    first, second = len(rows) // 2, len(rows) * 85 // 100
    answers = [row | {"output": row["chosen"]} for row in rows[:first]]
    for row in answers:
        del row["chosen"], row["rejected"]
    text = (shared / "data/tinyshakespeare/input.txt").read_text()
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    parts = {
        "answers": answers,
        "pairs": rows[first:second],
        "held_out": rows[second:],
        "retention": [{"text": part} for part in paragraphs[len(paragraphs) * 9 // 10 :][:300]],
    }
    for name, part in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: len(part) for name, part in parts.items()}


def _differ(row: dict[str, str]) -> bool:
    return row["chosen"].split() != row["rejected"].split()


def make_config(folder: Path, model: Path | str, name: str) -> jaxft.RunConfig:
    """Returns what all runs share."""
    config = jaxft.RunConfig()
    config.model.path = str(model)
    config.model.dtypes = "float32"
    config.data.max_length = 512
    config.data.overlength = "cut_prompt_start"  # pairs lose of their prompt, long text is split
    config.data.cache = str(folder / "cache")
    config.eval.retention = str(folder / "retention.jsonl")
    config.eval.samples = 0
    config.train.batch_size = 8
    config.train.workdir = str(folder / name)
    config.strategy = "ddp"
    return config


def fine_tune(shared: Path, folder: Path) -> Path:
    """Fine-tunes on the preferred answers; returns the folder of the exported model."""
    config = make_config(folder, shared / "models/stories260K", "sft")
    config.data.train = str(folder / "answers.jsonl")
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 20
    config.train.epochs = 10
    result = jaxft.train(config)
    return jaxft.export(result.checkpoint, str(folder / "sft-model"))


def learn_preferences(folder: Path, model: Path | str, name: str, start: str) -> dict[str, Any]:
    """Runs one method and compares the model before with that after; returns one record."""
    workdir = f"{name}-{start}".replace(", ", "-")
    config = make_config(folder, model, workdir)
    config.data.train = str(folder / "pairs.jsonl")
    config.data.validation = str(folder / "held_out.jsonl")
    config.objective.name = name.partition(",")[0]
    for key, value in METHODS[name].items():
        group, _, leaf = key.partition(".")
        setattr(getattr(config.objective, group), leaf, value)
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 5
    config.train.epochs = 2
    config.train.eval_every = 1000
    began = time.monotonic()
    result = jaxft.train(config)
    seconds = time.monotonic() - began
    before, after = evaluate_pair(config, model, result.checkpoint)
    found = compare(before, after)
    return {
        "method": name,
        "start": start,
        "keys": METHODS[name],
        "learning_rate": config.optim.learning_rate,
        "steps": result.step,
        "seconds": round(seconds, 1),
        "held_out": _figures(found["validation"]),
        "retention": _figures(found["retention"]),
    }


def _figures(comparison: Any) -> dict[str, Any]:
    return {
        name: {
            "before": _rounded(comparison.a.sums.estimates[name]),
            "after": _rounded(comparison.b.sums.estimates[name]),
            "difference": _rounded(difference),
        }
        for name, difference in comparison.differences.items()
    }


def _rounded(estimate: Any) -> dict[str, float]:
    values = dataclasses.asdict(estimate)
    return {name: round(value, 4) for name, value in values.items()}


def measure(shared: Path, folder: Path, methods: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Yields a record for each run."""
    counts = write_data(shared, folder, seed)
    tuned = fine_tune(shared, folder)
    for name in methods:
        yield learn_preferences(folder, tuned, name, "fine-tuned") | {"rows": counts}
    if "orpo" in methods:
        base = shared / "models/stories260K"
        yield learn_preferences(folder, base, "orpo", "pre-trained") | {"rows": counts}


def main() -> int:
    """Runs the methods that are asked for."""
    parser = argparse.ArgumentParser(description="Learns preferences on real data.")
    parser.add_argument("shared", type=Path, help="folder with models/stories260K and data/")
    parser.add_argument("--methods", default=";".join(METHODS), help="names, parted by ';'")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for record in measure(
            options.shared, Path(folder), options.methods.split(";"), options.seed
        ):
            found = {"seed": options.seed, "environment": environment()}
            put(record | found, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
