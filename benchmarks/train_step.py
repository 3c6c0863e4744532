"""Measures the training step, and PyTorch's beside it where a Python with torch is at hand.

    .venv/bin/python benchmarks/train_step.py --shape 15m --torch-python python3.11 \
        --output benchmarks/results/train_step.jsonl

Full fine-tuning with AdamW on random weights and random tokens: what is timed does not depend on
either. Prints one JSON line per measurement. With --torch-python, jaxft and a plain PyTorch loop
over Hugging Face's model take turns on the same rows, each run in a process of its own, and a last
line gives the ratio of the medians. On an accelerator, --packed lays several documents into a row:

    .venv/bin/python benchmarks/train_step.py --shape llama-3.2-1b --length 4096 --rows 4 --packed
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import put
from jaxft.hardware import huge_pages

SHAPES: dict[str, dict[str, Any]] = {
    "15m": {
        "vocab_size": 32000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "110m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
COMMON = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --worker."""
    options = _options()
    if options.worker:
        # As the command `jaxft train` does.
        huge_pages.start_again_with_them()
        print(json.dumps(measure(options)))
        return
    take_turns(_run, options, ("shape", "rows", "length", "dtypes"))


def take_turns(
    run: Callable[[str, argparse.Namespace], dict[str, Any]],
    options: argparse.Namespace,
    keys: Sequence[str],
) -> None:
    """Measures jaxft, and PyTorch in turns with it, and prints lines and the ratio of medians.

    Args:
      run: Of a system's name and the options, one measurement with `tokens_per_second`.
      options: `rounds`, `torch_python` and `output` are read.
      keys: Names of the options that the line of the ratio repeats.
    """
    runs: dict[str, list[float]] = {"jaxft": [], "torch": []}
    for _ in range(options.rounds):
        for system in ("jaxft", "torch") if options.torch_python else ("jaxft",):
            record = run(system, options)
            runs[system].append(record["tokens_per_second"])
            put(record | {"processor": processor()}, options.output)
    if options.torch_python:
        medians = {system: statistics.median(values) for system, values in runs.items()}
        ratio = {
            "measurement": "ratio",
            **{key: getattr(options, key) for key in keys},
            "rounds": options.rounds,
            "jaxft_tokens_per_second": medians["jaxft"],
            "torch_tokens_per_second": medians["torch"],
            "jaxft_over_torch": round(medians["jaxft"] / medians["torch"], 3),
        }
        put(ratio, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the training step.")
    parser.add_argument("--shape", default="15m", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=16, help="rows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--dtypes", default="float32", choices=("float32", "mixed", "bfloat16"))
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--packed", action="store_true", help="documents of random lengths")
    parser.add_argument(
        "--trained", type=float, default=1.0, help="share of a row, at its end, that is trained"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", default="", help="a Python with torch and transformers")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.trained <= 1:
        parser.error("--trained is a share above 0, at most 1")
    plain = not options.packed and options.trained == 1 and options.dtypes != "mixed"
    if options.torch_python and not plain:
        parser.error("PyTorch is compared on unpacked rows, all trained, in float32 or bfloat16")
    return options


def _run(system: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures in a process of its own, so that memory and threads are not shared."""
    if system == "torch":
        workload = {
            "config": COMMON | SHAPES[options.shape],
            "shape": options.shape,
            "rows": options.rows,
            "length": options.length,
            "dtypes": options.dtypes,
            "steps": options.steps,
        }
        script = Path(__file__).with_name("torch_step.py")
        command = [options.torch_python, str(script), json.dumps(workload)]
    else:
        command = [sys.executable, *sys.argv, "--worker"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def processor() -> str:
    """Returns the name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = " with AMX" if "amx_tile" in flags else ""
    return f"{len(names)} x {names[0]}{extra}" if names else platform.processor()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times the trainer's own step."""
    import jax
    import numpy as np

    from jaxft.config import RunConfig
    from jaxft.hardware.devices import device_memory, host_memory, peak_flops
    from jaxft.models.families import architecture_from_hf
    from jaxft.models.module import init_params
    from jaxft.training.feeding import put
    from jaxft.training.flops import training_flops
    from jaxft.training.program import build, build_evaluator, make_placement
    from jaxft.training.state import init_state
    from jaxft.workdir.environment import environment

    config = RunConfig()
    config.model.dtypes, config.model.remat = options.dtypes, options.remat
    config.model.attention, config.strategy = options.attention, options.strategy
    config.data.max_length, config.train.batch_size = options.length, options.rows
    architecture = architecture_from_hf(COMMON | SHAPES[options.shape])
    lengths = _document_lengths(options)
    most = max(map(len, lengths))
    evaluator = build_evaluator(
        config, architecture, max_segments=most, placement=make_placement(config)
    )
    program = build(config, evaluator, steps=1000)
    started = time.monotonic()
    step = program.compile()
    compile_seconds = time.monotonic() - started

    build_model = architecture.build(evaluator.numerics)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    state = jax.jit(
        lambda: init_state(init_params(build_model, 0), program.optimizer, ""),
        out_shardings=shardings,
    )()
    rows = _rows(lengths, options.length, architecture.config.vocab, options.trained)
    batch = put(rows.map(lambda column: column[None]), evaluator.placement.micro_batches)
    for _ in range(2):
        state, metrics = step(state, {}, batch)
    jax.block_until_ready(state)
    started = time.monotonic()
    for _ in range(options.steps):
        state, metrics = step(state, {}, batch)
    jax.block_until_ready(state)
    seconds = (time.monotonic() - started) / options.steps

    c = architecture.config
    tokens = int(metrics.counts["tokens"])
    flops = training_flops(
        evaluator.multiplied_parameters,
        learning=evaluator.learning(program.state.trainable),
        layers=c.layers,
        heads=c.heads,
        head_dim=c.head_dim,
        tokens=tokens,
        squared_lengths=int(metrics.counts["squared_lengths"]),
        untrained_tokens=tokens - int(metrics.counts["trained_tokens"]),
    )
    devices = evaluator.placement.mesh.devices
    peak = peak_flops(devices.flat[0].device_kind, evaluator.numerics.compute_dtype)
    memory = device_memory(devices.flat[0])
    analysis = step.memory_analysis()
    return {
        "measurement": "train_step",
        "system": "jaxft",
        "shape": options.shape,
        "parameters": evaluator.parameters,
        "rows": options.rows,
        "length": options.length,
        "packed": options.packed,
        "trained": options.trained,
        "dtypes": options.dtypes,
        "remat": options.remat,
        "attention": evaluator.attention.backend,
        "strategy": options.strategy,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_tokens_per_second": round(int(metrics.counts["trained_tokens"]) / seconds, 1),
        "compile_seconds": round(compile_seconds, 2),
        "teraflops_causal": round(flops.causal / seconds / 1e12, 4),
        "teraflops_full": round(flops.full / seconds / 1e12, 4),
        "mfu": round(flops.causal / seconds / peak / devices.size, 4) if peak else None,
        "mfu_full": round(flops.full / seconds / peak / devices.size, 4) if peak else None,
        "host_peak_bytes": host_memory().peak,
        "device_peak_bytes": memory.peak if memory else None,
        "compiled_temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
        "loss": round(float(metrics.ratios["loss"][0] / metrics.ratios["loss"][1]), 4),
        "numpy": np.__version__,
        "environment": environment(),
    }


def _document_lengths(options: argparse.Namespace) -> list[list[int]]:
    """Returns the lengths of the documents in each row; they fill it."""
    import numpy as np

    if not options.packed:
        return [[options.length]] * options.rows
    generator, rows = np.random.default_rng(0), []
    for _ in range(options.rows):
        left, lengths = options.length, []
        while left:
            length = min(left, int(generator.lognormal(6.0, 0.8)) + 2)
            lengths.append(length)
            left -= length
        rows.append(lengths)
    return rows


def _rows(lengths: list[list[int]], length: int, vocab: int, trained: float) -> Any:
    """Returns a `Batch` of `[rows, length]` arrays of random tokens."""
    import numpy as np

    from jaxft.data.batch import Batch

    tokens = np.random.default_rng(1).integers(0, vocab, (len(lengths), length + 1), np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
    weights = np.ones(positions.shape, np.float32)
    # The last token of a document has nothing to predict.
    weights[:, :-1] = segments[:, 1:] == segments[:, :-1]
    weights[:, -1] = 0
    weights[:, : length - round(trained * length)] = 0
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights,
        positions=positions.astype(np.int32),
        segments=segments.astype(np.int32),
    )


if __name__ == "__main__":
    main()
