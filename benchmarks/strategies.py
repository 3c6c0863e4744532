r"""What each built-in strategy holds and exchanges, from programs compiled for eight CPU devices.

    python -m benchmarks.strategies ../shared/configs/meta-llama--Llama-3.2-1B-Instruct \
        ../shared/configs/Qwen--Qwen3-30B-A3B --output benchmarks/results/strategies.jsonl

The folders need a config.json alone: of a dense model, and of a mixture of experts for the
strategies that split experts. The training step of a row of 1,024 tokens for each device, in two
micro-batches, is compiled and not run, so these are facts of the program and not timings. All is
float32, as which XLA for CPU exchanges bfloat16 anyway. Prints the table of docs/sharding.md; each
line goes to `--output` as JSON.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks.lines import append
from jaxft.compiled.layout import Description, cpu_devices, describe_run
from jaxft.config import RunConfig
from jaxft.workdir.environment import environment
from tests.strategies import BUILT_IN, FOR_EXPERTS, MESHES

_DEVICES, _LENGTH, _MICRO_BATCHES = 8, 1024, 2
_MIB = 2**20


def describe(folder: Path, strategy: str) -> Description:
    """Compiles the training step of a model under a strategy."""
    config = RunConfig(strategy=strategy)
    config.model.path = str(folder)
    config.model.random_init = True
    config.model.dtypes = "float32"
    config.data.max_length = _LENGTH
    config.train.accumulation = _MICRO_BATCHES
    config.train.batch_size = _DEVICES * _MICRO_BATCHES
    for axis, size in MESHES[strategy].items():
        setattr(config.mesh, axis, size)
    return describe_run(config, devices=cpu_devices(_DEVICES), compiled=True)


def record(found: Description) -> dict:
    """Returns one line of the result file; sizes are of one device and one step, in bytes."""
    assert found.communication is not None
    return {
        "strategy": found.strategy,
        "model": Path(found.model).name,
        "mesh": found.mesh,
        "held": found.bytes_per_device,
        "temporary": found.communication.temporary_bytes,
        "collectives": [
            {
                "kind": total.kind,
                "axes": list(total.axes),
                "count": total.count,
                "bytes": total.bytes,
                "wire_bytes": total.wire_bytes,
            }
            for total in found.communication.totals
        ],
    }


def row(line: dict) -> str:
    """Returns one row of the table, in MiB."""
    held = line["held"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in line["mesh"].items())
    sent = {}
    for total in line["collectives"]:
        sent[total["kind"]] = sent.get(total["kind"], 0) + total["wire_bytes"]
    shown = [f"{kind} {size / _MIB:,.0f}" for kind, size in sent.items() if size >= _MIB]
    numbers = [
        *(held[part] for part in ("parameters", "gradients", "optimizer")),
        line["temporary"],
    ]
    cells = [f"`{line['strategy']}`", mesh, *(f"{n / _MIB:,.0f}" for n in numbers)]
    return f"| {' | '.join([*cells, ', '.join(shown)])} |"


def main() -> None:
    """Compiles every built-in strategy."""
    parser = argparse.ArgumentParser(description="Compares strategies by their programs.")
    parser.add_argument("dense", type=Path, help="folder with config.json of a dense model")
    parser.add_argument("experts", type=Path, help="and of a mixture of experts")
    parser.add_argument("--only", default="", help="this strategy alone")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    print("| strategy | mesh | parameters | gradients | optimizer | temporaries | sent, by kind |")
    print("|---|---|---|---|---|---|---|")
    for strategy in BUILT_IN:
        if options.only not in ("", strategy):
            continue
        folder = options.experts if strategy in FOR_EXPERTS else options.dense
        line = record(describe(folder, strategy))
        print(row(line), flush=True)
        append(line | {"environment": environment()}, options.output)


if __name__ == "__main__":
    main()
