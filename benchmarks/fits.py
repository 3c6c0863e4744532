r"""Which model tunes on which slice: a step with adapters, compiled for TPUs that are not there.

    python -m benchmarks.fits ../shared/configs --output benchmarks/results/fits.jsonl
    python -m benchmarks.fits --table benchmarks/results/fits.jsonl

The first needs libtpu and no TPU, and some minutes of one core for each line; `--only v6e` makes
those lines whose name has the words. The second prints the table of docs/tuning.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lines import append
from jaxft.config import RunConfig
from jaxft.formatting import format_bytes, format_seconds
from jaxft.hf.folder import read_config
from jaxft.models.families import architecture_from_hf
from jaxft.planner.candidates import with_flags
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.topology import parse, use_compiler_alone
from jaxft.training.adaptation import adapted, quantised
from jaxft.workdir.environment import environment

_LENGTH, _RANK = 4096, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that should fit.

    Attributes:
      title: Of the model.
      folder: That holds its config.json.
      slice: Where it runs.
      quantise: As `model.quantise`; empty: the base is bfloat16.
      rows: Rows of one device in a step.
      flags: Further keys.
    """

    title: str
    folder: str
    slice: str
    quantise: str = ""
    rows: int = 1
    flags: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """What tells it from the others."""
        method = f"QLoRA ({self.quantise})" if self.quantise else "LoRA"
        return f"{self.title}, {method}, {self.slice}"


_EIGHT = "meta-llama--Meta-Llama-3.1-8B"
_SEVENTY = "meta-llama--Meta-Llama-3.1-70B"
CASES = (
    Case(title="Llama-3.1-8B", folder=_EIGHT, slice="v5e-4"),
    Case(title="Llama-3.1-8B", folder=_EIGHT, slice="v6e-1"),
    Case(title="Llama-3.1-8B", folder=_EIGHT, slice="v5e-1", quantise="nf4"),
    Case(title="Llama-3.1-70B", folder=_SEVENTY, slice="v5e-8", quantise="nf4"),
    Case(title="Llama-3.1-70B", folder=_SEVENTY, slice="v6e-4", quantise="nf4"),
    Case(
        title="Qwen3-30B-A3B",
        folder="Qwen--Qwen3-30B-A3B",
        slice="v5e-4",
        quantise="nf4",
        flags=(("model.expert_capacity", 1.25),),
    ),
    Case(
        title="gpt-oss-120b",
        folder="openai--gpt-oss-120b",
        slice="v6e-8",
        quantise="nf4",
        flags=(("model.expert_capacity", 1.25),),
    ),
    Case(title="Llama-3.1-8B", folder=_EIGHT, slice="l4:1", quantise="nf4"),
    Case(title="Llama-3.1-70B", folder=_SEVENTY, slice="h200:1", quantise="nf4"),
)


def plan(case: Case, models: Path) -> dict[str, Any]:
    """Plans a case and returns what it says, for JSON."""
    topology = parse(case.slice)
    keys = {
        "model.path": case.title,
        "adapter.rank": _RANK,
        "data.max_length": _LENGTH,
        "model.quantise": case.quantise,
        "train.batch_size": case.rows * topology.device_count,
        **dict(case.flags),
    }
    config = with_flags(RunConfig(), {"strategy": "fsdp", **keys})
    architecture = architecture_from_hf(read_config(models / case.folder))
    architecture = quantised(adapted(architecture, config.adapter), config.model.quantise)
    planner = Planner(architecture=architecture, prices=read_prices())
    found = planner.make(config, topology)
    record = found.record()
    kept = "source", "parameters", "trained", "strategy", "mesh", "memory", "time", "speed"
    return {
        "name": case.name,
        "model": case.title,
        "quantise": case.quantise,
        "slice": case.slice,
        "keys": keys,
        **{name: record[name] for name in kept},
        "fits": found.fits,
        "compile_seconds": found.compile_seconds,
        "environment": environment(),
    }


def row(line: dict[str, Any]) -> str:
    """Returns a row of the table."""
    memory, time, speed = line["memory"], line["time"], line["speed"]
    cells = [
        line["model"],
        f"QLoRA, {line['quantise']}" if line["quantise"] else "LoRA, bfloat16",
        f"`{line['slice']}`",
        f"{line['keys']['train.batch_size']}",
        f"{format_bytes(memory['used'])} of {format_bytes(memory['limit'])}",
        "yes" if line["fits"] else f"no, by {format_bytes(memory['used'] - memory['limit'])}",
        format_seconds(time["seconds"]) if time else "",
        f"{speed['tokens_per_second_per_chip']:,.0f}" if speed else "",
        f"{speed['price_per_million_tokens']:.3g}" if speed and speed["price_per_hour"] else "",
        line["source"],
    ]
    return f"| {' | '.join(cells)} |"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Returns the table of docs/tuning.md."""
    head = "model, tuning, slice, rows of a step, memory of a device, fits, step, "
    head += "tokens/s/chip, USD/M tokens, by"
    columns = head.split(", ")
    return "\n".join(
        [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(row(line) for line in lines)]
    )


def main() -> None:
    """Plans every case, or prints the table of what was planned."""
    parser = argparse.ArgumentParser(description="Plans which model tunes on which slice.")
    parser.add_argument("models", type=Path, nargs="?", help="folder of folders with config.json")
    parser.add_argument("--only", default="", help="words of the cases that are planned")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    parser.add_argument("--table", type=Path, help="print the table of these lines")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    if options.models is None:
        parser.error("name the folder of models, or a file with --table")
    use_compiler_alone()
    for case in CASES:
        if options.only not in case.name:
            continue
        line = plan(case, options.models)
        print(row(line), flush=True)
        print(line["memory"]["kinds"], flush=True)
        append(line, options.output)


if __name__ == "__main__":
    main()
