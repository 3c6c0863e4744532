"""Measures the way of data into training: how fast rows are made and read, and what waits for them.

    .venv/bin/python benchmarks/input_pipeline.py --shape 15m --steps 20 \
        --output benchmarks/results/input-pipeline.jsonl

Chats of the demo, with its tokenizer, go through the trainer itself: a model with random weights
trains on them for some steps. `data_share` is the time that devices waited for rows, as a share of
that of the steps, as goodput.jsonl of the run has it. Before that the same chats are prepared
without a cache (read, rendered, tokenised and packed: `prepared_rows_per_second`), and the steps'
batches are read with nothing between (`read_rows_per_second`); rows are packed ones.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import turns, workload
from benchmarks.shapes import shape_of


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures the input pipeline.")
    workload.add_options(parser)
    parser.add_argument("--documents", type=int, default=5000, help="chats of the data set")
    parser.add_argument("--steps", type=int, default=20, help="training steps, and batches read")
    turns.add_options(parser, torch=False)
    options = parser.parse_args()
    if options.packed or options.trained != 1:
        parser.error("rows are chats, packed as a run packs them: leave --packed, --trained out")
    keys = ("shape", "rows", "length", "set")
    turns.run(options, measure, keys=keys, figure="read_rows_per_second")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares and reads rows, then trains on them."""
    import jaxft
    from jaxft import data
    from jaxft.demo.cases import train_cases, write_cases
    from jaxft.files import read_jsonl
    from jaxft.hf.tokenizer import load_tokenizer
    from jaxft.workdir.environment import environment

    config = workload.config_of(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = write_cases(folder / "train.jsonl", train_cases(options.documents))
        config.model.path, config.model.random_init = str(_write_model(options, folder)), True
        config.data.train, config.data.cache = str(chats), str(folder / "cache")
        config.train.workdir, config.train.steps = str(folder / "run"), options.steps
        config.eval.samples = 0
        tokenizer = load_tokenizer(folder / "model")
        started = time.monotonic()
        rows = data.prepare(
            str(chats), config.data, tokenizer, seed=0, training=True, on_log=lambda text: None
        )
        prepared = time.monotonic() - started
        batches = data.batches(rows, batch_size=options.rows, steps=options.steps)
        started = time.monotonic()
        for _ in batches:
            pass
        read = time.monotonic() - started
        batches.close()
        result = jaxft.train(config)
        [goodput] = read_jsonl(result.workdir / "goodput.jsonl")
    seconds = goodput["seconds"]
    return {
        "measurement": "input_pipeline",
        "system": "jaxft",
        "shape": options.shape,
        "rows": options.rows,
        "length": options.length,
        "set": options.set,
        "documents": options.documents,
        "documents_per_second": round(options.documents / prepared, 1),
        "prepared_rows_per_second": round(len(rows) / prepared, 1),
        "read_rows_per_second": round(options.rows * options.steps / read, 1),
        "data_share": round(seconds["data"] / (seconds["data"] + seconds["steps"]), 5),
        "seconds": {kind: round(value, 4) for kind, value in seconds.items()},
        "environment": environment(),
    }


def _write_model(options: argparse.Namespace, folder: Path) -> Path:
    """Writes a folder with the shape and the demo's tokenizer; returns it."""
    from jaxft.demo import BASE

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shape_of(options.shape)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, model / name)
    return model


if __name__ == "__main__":
    main()
