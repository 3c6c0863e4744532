"""Measures the training step, and PyTorch's beside it where a Python with torch is at hand.

    .venv/bin/python benchmarks/train_step.py --shape 15m --torch-python python3.11 \
        --output benchmarks/results/train_step.jsonl

Fine-tuning with AdamW on random weights and random tokens: all of the model, or what `--set` says
(`--set adapter.rank=16`, with `--set model.quantise=nf4` QLoRA). Prints one JSON line per
measurement. With --torch-python, jaxft and a plain PyTorch loop over Hugging Face's model take
turns on the same rows with the same parameters training, each run in a process of its own, and a
last line gives the ratio of the medians with its interval. On an accelerator, --packed lays several
documents into a row:

    .venv/bin/python benchmarks/train_step.py --shape llama-3.2-1b --length 4096 --rows 4 --packed \
        --set model.dtypes=mixed --set model.remat=full
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import turns, workload
from benchmarks.shapes import shape_of

# What PyTorch's side follows, and what only says how jaxft computes the same.
COMPARABLE = {
    *("model.dtypes", "adapter.rank", "adapter.alpha"),
    *("model.remat", "model.attention", "objective.chunk", "strategy", "train.compiler_options"),
}
_WARMING, _TRACED = 2, 2


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures the training step.")
    workload.add_options(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two others")
    parser.add_argument(
        "--operations", type=int, default=0, help="trace two steps; the longest that are listed"
    )
    turns.add_options(parser)
    options = parser.parse_args()
    if options.torch_python:
        refuse_what_torch_does_not_do(options, parser.error)
    keys = ("shape", "rows", "length", "set")
    turns.run(options, measure, keys=keys, torch=measure_torch, equal=("trained_parameters",))


def refuse_what_torch_does_not_do(
    options: argparse.Namespace, refuse: Callable[[str], Any]
) -> None:
    """Calls `refuse` with a text where PyTorch's side would do something else."""
    others = sorted({text.partition("=")[0] for text in options.set} - COMPARABLE)
    if others:
        refuse(f"PyTorch's side knows nothing of {', '.join(others)}")
    if options.packed or options.trained != 1:
        refuse("PyTorch is compared on rows that are not packed, and trained whole")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times the trainer's own step."""
    import jax

    from jaxft.hardware.devices import device_memory, host_memory
    from jaxft.training.feeding import put
    from jaxft.workdir.environment import environment

    work = workload.make_workload(options)
    program = work.program()
    started = time.monotonic()
    step = program.compile()
    compile_seconds = time.monotonic() - started
    state = work.state(program)
    placement = work.evaluator.placement
    batch = put(work.batch(), placement.micro_batches)
    for _ in range(_WARMING):
        state, metrics = step(state, {}, batch)
    jax.block_until_ready(state)
    started = time.monotonic()
    for _ in range(options.steps):
        state, metrics = step(state, {}, batch)
    jax.block_until_ready(state)
    seconds = (time.monotonic() - started) / options.steps

    counts = jax.device_get(metrics.counts)
    flops, peak = work.flops(program, counts), work.peak()
    memory, analysis = device_memory(placement.mesh.devices.flat[0]), step.memory_analysis()
    record = {
        "measurement": "train_step",
        "system": "jaxft",
        "shape": options.shape,
        **work.described(),
        "packed": options.packed,
        "trained": options.trained,
        "set": options.set,
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(int(counts["tokens"]) / seconds, 1),
        "trained_tokens_per_second": round(int(counts["trained_tokens"]) / seconds, 1),
        "compile_seconds": round(compile_seconds, 2),
        "teraflops_causal": round(flops.causal / seconds / 1e12, 4),
        "teraflops_full": round(flops.full / seconds / 1e12, 4),
        "mfu": round(flops.causal / seconds / peak, 4) if peak else None,
        "mfu_full": round(flops.full / seconds / peak, 4) if peak else None,
        "host_peak_bytes": host_memory().peak,
        "device_peak_bytes": memory.peak if memory else None,
        "step_bytes": held_by(analysis) if analysis else None,
        "compiled_temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
        "loss": round(float(metrics.ratios["loss"][0] / metrics.ratios["loss"][1]), 4),
    }
    if options.operations:
        record["operations"] = longest(step, state, batch, options.operations)
    return record | {"environment": environment()}


def held_by(analysis: Any) -> int:
    """Returns the bytes that a compiled program needs on a device: what it takes, gives and uses.

    The peak of a process has in it what made the weights as well.
    """
    arguments = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return arguments - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes


def longest(step: Any, state: Any, batch: Any, count: int) -> list[dict[str, Any]]:
    """Traces two steps; returns their longest operations, with seconds and calls of a step."""
    import jax

    from jaxft.compiled.trace import operations

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions slow the host down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(_TRACED):
                state, _ = step(state, {}, batch)
            jax.block_until_ready(state)
        [file] = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
        found = operations(trace, step.as_text())[:count]
    return [
        dataclasses.asdict(one)
        | {"calls": one.calls / _TRACED, "seconds": round(one.seconds / _TRACED, 6)}
        for one in found
    ]


def measure_torch(options: argparse.Namespace) -> dict[str, Any]:
    """Times the loop of `torch_step.py`."""
    return torch_step(options, trains=True)


def torch_step(options: argparse.Namespace, *, trains: bool) -> dict[str, Any]:
    """Returns PyTorch's record of a training step, or of an evaluation."""
    config = workload.config_of(options)
    described = {
        "shape": options.shape,
        "rows": options.rows,
        "length": options.length,
        "dtypes": config.model.dtypes,
        "set": options.set,
    }
    rank = config.adapter.rank
    work = {
        "config": shape_of(options.shape),
        "described": described,
        "steps": options.steps,
        "trains": trains,
        "rank": rank,
        "alpha": config.adapter.alpha or 2 * rank,
    }
    script = Path(__file__).with_name("torch_step.py")
    return turns.once([options.torch_python, str(script), json.dumps(work)])


if __name__ == "__main__":
    main()
