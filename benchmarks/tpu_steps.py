r"""Steps of models on TPU slices that are not there, and what of each is waited for.

    python -m benchmarks.tpu_steps ../shared/configs --output benchmarks/results/tpu-steps.jsonl
    python -m benchmarks.tpu_steps ../shared/configs --only v5e --options xla_name=value,...
    python -m benchmarks.tpu_steps ../shared/configs --only v6e --matmul int8

Compiles jaxft's step for each, which needs libtpu and no TPU and takes some minutes of a core,
plays it through (docs/planning.md) and prints a line. `--options` go on top of those of the chip,
as `train.compiler_options` does; `--plain` leaves those of the chip out.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lines import put
from jaxft.config import RunConfig, compiler_options
from jaxft.hf.folder import read_config
from jaxft.models.families import architecture_from_hf
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.topology import parse, use_compiler_alone
from jaxft.training.compiler_options import BY_CHIP
from jaxft.workdir.environment import environment

_LLAMA = "meta-llama--Meta-Llama-3.1-8B"
_QWEN, _MIXTRAL = "Qwen--Qwen3-30B-A3B", "mistralai--Mixtral-8x7B-v0.1"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step, with full rematerialisation, float32 masters and AdamW.

    Attributes:
      folder: That holds the model's config.json.
      slice: Where it runs.
      length: Tokens of a row.
      rows: Rows of one device.
      strategy: As `strategy`.
      mesh: As `mesh`, other sizes than the strategy's own.
      capacity: As `model.expert_capacity`.
    """

    folder: str
    slice: str
    length: int
    rows: int
    strategy: str = "fsdp"
    mesh: tuple[tuple[str, int], ...] = ()
    capacity: float = 0.0

    @property
    def name(self) -> str:
        """What `--only` looks in."""
        return f"{self.folder} {self.slice} {self.strategy}"


CASES = (
    Case(folder=_LLAMA, slice="v5e:4x4", length=4096, rows=1),
    Case(folder=_LLAMA, slice="v5p-64", length=8192, rows=2),
    Case(folder=_LLAMA, slice="v6e-16", length=4096, rows=2),
    Case(folder=_LLAMA, slice="2xv5e:4x4", length=4096, rows=1, strategy="hsdp"),
    Case(folder=_QWEN, slice="v5p-64", length=4096, rows=4, capacity=1.25),
    Case(folder=_QWEN, slice="v5p-64", length=4096, rows=4),
    Case(folder=_MIXTRAL, slice="v5p-256", length=4096, rows=4, capacity=1.25),
    Case(folder=_MIXTRAL, slice="v5p-256", length=4096, rows=4),
)


def measure(case: Case, models: Path, options: str, matmul: str) -> dict[str, Any]:
    """Returns a line of the result file."""
    topology = parse(case.slice)
    config = RunConfig(strategy=case.strategy)
    config.model.path, config.model.remat = case.folder, "full"
    config.model.expert_capacity, config.model.matmul = case.capacity, matmul
    config.data.max_length = case.length
    config.train.batch_size = case.rows * topology.device_count
    for axis, size in case.mesh:
        setattr(config.mesh, axis, size)
    config.train.compiler_options = options
    config.validate()
    architecture = architecture_from_hf(read_config(models / case.folder))
    planner = Planner(architecture=architecture, prices=read_prices(), cache="off")
    found = planner.plan(config, topology)
    time, speed = found.time, found.speed
    return {
        "model": case.folder,
        "slice": case.slice,
        "length": case.length,
        "rows_per_device": case.rows,
        "strategy": case.strategy,
        "capacity": case.capacity,
        "mesh": found.mesh,
        "matmul": matmul,
        "options": BY_CHIP.get(topology.chip.name, {}) | compiler_options(options),
        "seconds": time.seconds if time else None,
        "seconds_by_cycles": time.by_cycles if time else None,
        "spent": time.spent if time else None,
        "mfu": speed.mfu if speed else None,
        "memory_gib": found.memory.used / 2**30,
        "exchanges": list(_exchanges(found)),
        "compile_seconds": found.compile_seconds,
    }


def _exchanges(found: Any) -> Iterator[dict[str, Any]]:
    for one in found.exchanges:
        yield {
            "kind": one.kind,
            "axes": one.axes,
            "count": one.count,
            "gib": one.bytes / 2**30,
            "seconds": one.seconds,
            "overlapped": one.overlapped,
        }


def main() -> None:
    """Plans every case."""
    parser = argparse.ArgumentParser(description="Plans steps on TPU slices.")
    parser.add_argument("models", type=Path, help="folder of folders with config.json")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--options", default="", help="options of the compiler on top")
    parser.add_argument("--matmul", default="", help="as model.matmul")
    parser.add_argument("--plain", action="store_true", help="without the options of the chip")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    use_compiler_alone()
    if options.plain:
        BY_CHIP.clear()
    for case in CASES:
        if options.only not in case.name:
            continue
        line = measure(case, options.models, options.options, options.matmul)
        put(line | {"environment": environment()}, options.output)


if __name__ == "__main__":
    main()
