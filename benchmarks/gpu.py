"""Measures jaxft on one GPU, all in one call: `benchmarks/gpu.sh` makes ready for it and calls it.

    OUT=results TORCH_PYTHON=python3 benchmarks/gpu.sh
    TINY=1 benchmarks/gpu.sh

Each case is a measurement by another benchmark here, in a process with a time limit of its own:
what hangs or fails leaves the others, and is a line that says so. Cases that no time is left for
are named, too. The first asks whether cuDNN's attention is right on this device; if it is not,
training steps run with XLA's. The case of tokamax's attention fails where tokamax is not installed.
Models have random weights and published shapes. Prints the lines, a table, and the longest
operations of the training step with the lowest MFU; exits with 1 if a case failed, of which the
file .log beside the lines has all that it said.
"""

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.lines import put
from jaxft.formatting import format_bytes

_LEAST = 15  # seconds, with less of which left no case begins
_OPERATIONS = 10
_OF_GPUS = ("cudnn", "tokamax")  # attention that is for GPUs alone
_TINY_LIMIT = 600.0  # seconds; a busy machine takes minutes to compile


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      name: What is measured.
      command: Name of the benchmark and its options.
      limit: Seconds that it may take.
      system: `jaxft` or `torch`.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    system: str = "jaxft"


def _steps(name: str, limit: float, shape: str, rows: int, *flags: str, **keys: str) -> Case:
    """Returns a training step of packed rows of 4,096 tokens, with its longest operations."""
    work = ("train_step", f"--shape={shape}", f"--rows={rows}", "--length=4096", "--packed")
    traced = f"--operations={_OPERATIONS}"
    return Case(name, (*work, traced, *flags, *_set(keys)), limit)


def _set(keys: dict[str, str]) -> tuple[str, ...]:
    """Returns keys of a run, with `__` for the dot, as options."""
    return tuple(f"--set={key.replace('__', '.')}={value}" for key, value in keys.items())


def _attention(backend: str) -> Case:
    command = ("attention", "--shape=llama-3.1-8b", "--rows=4", "--length=4096", "--packed")
    keys = _set({"model__dtypes": "bfloat16", "model__attention": backend})
    return Case(f"attention, {backend}", (*command, *keys), 60)


def _decoding(shape: str, rows: int, system: str = "jaxft") -> Case:
    name = f"{shape}, {rows} text{'s' if rows > 1 else ''}"
    command = ("generation", f"--shape={shape}", f"--rows={rows}", "--dtypes=bfloat16")
    return Case(f"decoding, {name}", (*command, "--length=512"), 75, system)


def cases(*, torch_python: str) -> Iterator[Case]:
    """Yields the measurements, what matters most first.

    Args:
      torch_python: Python with torch and transformers; empty to leave PyTorch out.
    """
    for attention in (*_OF_GPUS, "xla"):
        yield _attention(attention)
    lora = {"model__dtypes": "mixed", "model__remat": "dots", "adapter__rank": "16"}
    mixed = {"model__dtypes": "mixed", "model__remat": "full"}
    eight = "llama-3.1-8b"
    yield _steps("full, llama-3.2-1b", 90, "llama-3.2-1b", 8, model__dtypes="mixed")
    fp8 = {"model__dtypes": "mixed", "model__matmul": "fp8"}
    yield _steps("full, llama-3.2-1b, fp8", 90, "llama-3.2-1b", 8, **fp8)
    yield _steps("LoRA, llama-3.1-8b", 100, eight, 4, **lora)
    yield _steps("QLoRA, llama-3.1-8b", 100, eight, 4, **lora, model__quantise="nf4")
    yield _steps("full, qwen3-4b", 100, "qwen3-4b", 4, **mixed)
    yield _decoding("llama-3.2-1b", 1)
    experts = "qwen3-30b-a3b-4-layers"
    yield _steps("experts, none dropped", 80, experts, 4, **mixed)
    yield _steps("experts, capacity 1.25", 80, experts, 4, **mixed, model__expert_capacity="1.25")
    yield _decoding(eight, 32)
    if torch_python:
        beside = ("train_step", "--shape=llama-3.2-1b", "--rows=4", "--length=4096")
        beside += ("--set=model.dtypes=bfloat16", f"--torch-python={torch_python}")
        for system in ("jaxft", "torch"):
            yield Case("beside PyTorch, full, llama-3.2-1b, bfloat16", beside, 75, system)
        decoding = _decoding("llama-3.2-1b", 1, "torch")
        command = (*decoding.command, f"--torch-python={torch_python}")
        yield Case(decoding.name, command, decoding.limit, "torch")


def tiny(case: Case) -> Case:
    """Returns a case of the same kind that any machine can measure."""
    small = {
        "--shape": "tiny-experts" if "a3b" in " ".join(case.command) else "tiny",
        "--length": "32",
        "--rows": "2",
        "--steps": "1",
        "--repeats": "1",
        "--new": "4",
    }
    kinds = {
        "train_step": ("--shape", "--length", "--rows", "--steps"),
        "attention": ("--shape", "--length", "--rows", "--steps"),
        "generation": ("--shape", "--length", "--rows", "--repeats", "--new"),
    }
    chosen = tuple(f"{name}={small[name]}" for name in kinds[case.command[0]])
    # What is said last of an option counts.
    return Case(case.name, (*case.command, *chosen), _TINY_LIMIT, case.system)


def measure(cases: Sequence[Case], *, seconds: float, output: Path) -> list[dict[str, Any]]:
    """Measures case after case; returns and prints a line for each.

    Args:
      cases: What is measured.
      seconds: Wall time for all of them.
      output: File that lines are appended to; beside it what failing cases said is kept.
    """
    lines, end = [], time.monotonic() + seconds
    fallen_back: list[str] = []
    for case in cases:
        limit, started = min(case.limit, end - time.monotonic()), time.monotonic()
        script = Path(__file__).with_name(f"{case.command[0]}.py")
        further = fallen_back if case.command[0] == "train_step" else ()
        command = [sys.executable, str(script), *case.command[1:], *further, "--once", case.system]
        try:
            if limit < _LEAST:
                raise turns.Failed("not run, as no time was left")
            record = turns.once(command, limit=limit)
        except turns.Failed as error:
            record = {"system": case.system, "failed": str(error)}
            with output.with_suffix(".log").open("a") as log:
                log.write(f"=== {case.name}\n{error.said}\n")
            if case.name == "attention, cudnn":
                fallen_back.append("--set=model.attention=xla")
        line = {"case": case.name, "case_seconds": round(time.monotonic() - started, 1)}
        lines.append(put(line | record, output))
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Returns a table of what was measured."""
    rows = [f"{'case':48}  {'system':6}  {'tokens/s':>12}  {'MFU':>6}  {'memory':>9}"]
    for line in lines:
        start = f"{line['case']:48}  {line['system']:6}  "
        if "failed" in line:
            rows.append(f"{start}FAILED: {line['failed'][:200]}")
            continue
        mfu, held = line.get("mfu"), line.get("step_bytes") or line.get("device_peak_bytes")
        shares = f"{100 * mfu:.1f} %" if mfu else ""
        memory = format_bytes(held) if held else ""
        rows.append(f"{start}{line['tokens_per_second']:>12,.0f}  {shares:>6}  {memory:>9}")
    return "\n".join(rows)


def slowest(lines: Sequence[dict[str, Any]]) -> str:
    """Returns the longest operations of the traced step that uses the device the least."""
    traced = [line for line in lines if line.get("operations")]
    if not traced:
        return "No step was traced."
    line = min(traced, key=lambda line: (line["mfu"] or 0, line["tokens_per_second"]))
    rows = [
        f"{1e3 * one['seconds']:>10.2f} ms {one['seconds'] / line['step_seconds']:>7.1%}  "
        f"{one['name']}: {one['what']}"
        for one in line["operations"]
    ]
    return "\n".join([f"Longest operations of a step of {line['case']!r}:", *rows])


def backend() -> str:
    """Returns the kind of device that jax finds, by a process that ends and frees it."""
    code = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return (found.stdout.splitlines() or [""])[-1]


def main() -> int:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description="Measures jaxft on one GPU.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--seconds", type=float, default=500, help="wall time for all cases")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--torch-python", default="", help="Python with torch, transformers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    options = parser.parse_args()
    chosen = [c for c in cases(torch_python=options.torch_python) if options.only in c.name]
    if options.tiny:
        names = {_attention(kind).name for kind in _OF_GPUS}
        chosen = [tiny(case) for case in chosen if case.name not in names]
    elif (found := backend()) != "gpu":
        raise SystemExit(f"jax finds no GPU here, but {found!r}; --tiny (TINY=1) needs none.")
    date = datetime.date.today().isoformat()
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output / f"{date}-gpu{'-tiny' if options.tiny else ''}.jsonl"
    seconds = len(chosen) * _TINY_LIMIT if options.tiny else options.seconds
    lines = measure(chosen, seconds=seconds, output=output)
    print(f"\n{table(lines)}\n\n{slowest(lines)}\n\nLines are in {output}.", flush=True)
    return 1 if any("failed" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
