"""Predicted step times beside those that others published, each at its own settings.

    python -m benchmarks.published ../shared/configs --output benchmarks/results/published.jsonl
    python -m benchmarks.published ../shared/configs --gpus

Predicts jaxft's step for each run's model, slice, rows, sharding and rematerialisation, and prints
a line for each, then the mean and the worst difference. For TPUs the step is compiled, which needs
libtpu and no TPU; the first time it takes some 40 minutes of two cores, as compiling with host
offload does. For GPUs it is estimated in closed form, in seconds. No constant of the planner was
fitted to these runs: its rates are measurements of single parts, named where they stand. The last
column leaves each run out of one factor that is fitted to all others.

The published programs are not ours: what is compared is their time with that of jaxft's step at the
same settings. Compiler options are theirs as far as the compiler still takes them: libtpu 0.0.50
refuses `xla_tpu_enable_async_collective_fusion` but on v5e.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import append
from benchmarks.published_runs import GPU_RUNS, HELD_OUT, HELD_OUT_RUNS, TPU_RUNS, Run
from jaxft.compiled.layout import cpu_devices
from jaxft.config import RunConfig
from jaxft.hf.folder import read_config
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.planner.analytic import Estimator
from jaxft.planner.placed import Placed, estimated_devices
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.topology import Topology, parse, use_compiler_alone
from jaxft.training.compiler_options import BY_CHIP
from jaxft.training.program import make_placement
from jaxft.workdir.environment import environment


def predict(run: Run, models: Path) -> dict[str, Any]:
    """Returns one line of the result file: what is predicted at a published run's settings."""
    topology = _topology(run)
    architecture = _architecture(run, models)
    predicted = _compiled if topology.can_compile else _estimated
    found = predicted(_config(run, topology), topology, architecture)
    return {
        "run": run.name,
        "topology": run.topology,
        "published_seconds": run.step,
        "predicted_seconds": found["seconds"],
        "ratio": found.pop("seconds") / run.step,
        **found,
        "group": run.group,
        "source": run.source,
    }


def _topology(run: Run) -> Topology:
    topology = parse(run.topology)
    if not run.dcn:
        return topology
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, dcn=run.dcn))


def _config(run: Run, topology: Topology) -> RunConfig:
    config = RunConfig()
    config.model.path = run.model if isinstance(run.model, str) else run.name
    config.model.remat, config.model.offload = run.remat, run.offload
    config.data.max_length = run.length
    config.train.accumulation = run.accumulation
    config.train.batch_size = run.rows * run.accumulation * topology.device_count
    config.train.compiler_options = ",".join(run.options)
    config.strategy = run.strategy
    for axis, size in run.mesh.items():
        setattr(config.mesh, axis, size)
    config.validate()
    return config


def _architecture(run: Run, models: Path) -> Architecture:
    config = read_config(models / run.model) if isinstance(run.model, str) else run.model
    return architecture_from_hf(config)


def _compiled(config: RunConfig, topology: Topology, architecture: Architecture) -> dict[str, Any]:
    planner = Planner(architecture=architecture, prices=read_prices())
    found = planner.plan(config, topology)
    assert found.time is not None
    return {
        "seconds": found.time.seconds,
        "by_cycles_seconds": found.time.by_cycles,
        "spent": found.time.spent,
        "memory_gib": found.memory.used / 2**30,
        "limit_gib": found.memory.limit / 2**30,
    }


def _estimated(config: RunConfig, topology: Topology, architecture: Architecture) -> dict[str, Any]:
    placement = make_placement(config, estimated_devices(topology))
    abstract = architecture.abstract(make_numerics(config.model.dtypes))
    placed = Placed(placement, abstract, config.data.max_length)
    found = Estimator(architecture=architecture, topology=topology).estimate(config, placed)
    return {
        "seconds": found.seconds,
        "spent": found.spent,
        "memory_gib": found.bytes / 2**30,
        "limit_gib": topology.chip.limit / 2**30,
    }


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Returns mean, root mean square, worst, least and most relative difference of predictions."""
    differences = [ratio - 1 for ratio in ratios]
    return {
        "mean": sum(differences) / len(differences),
        "rms": math.sqrt(sum(d * d for d in differences) / len(differences)),
        "worst": max(differences, key=abs),
        "least": min(differences),
        "most": max(differences),
    }


def summaries(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the summary of all lines but those held out, with one factor left out, and by group.

    Each line gets `ratio_left_out`: its ratio after division by what the others have in common. Of
    runs that are held out that is what all the rest have.
    """
    known = [line for line in lines if line["group"] != HELD_OUT] or lines
    ratios = [line["ratio"] for line in known]
    for line in lines:
        others = [other["ratio"] for other in known if other is not line]
        line["ratio_left_out"] = line["ratio"] / statistics.geometric_mean(others or [1.0])
    totals = {
        "raw": summary(ratios),
        "left_out": summary([line["ratio_left_out"] for line in known]),
    }
    for group, members in itertools.groupby(lines, key=lambda line: line["group"]):
        if group:
            totals[group] = summary([line["ratio"] for line in members])
    return totals


def _row(line: dict[str, Any]) -> str:
    cells = [
        line["run"],
        f"{line['published_seconds']:.2f}",
        f"{line['predicted_seconds']:.2f}",
        f"{line['ratio']:.3f}",
        f"{line['ratio_left_out']:.3f}",
    ]
    if "by_cycles_seconds" in line:
        cells.insert(4, f"{line['by_cycles_seconds'] / line['published_seconds']:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Predicts every published run."""
    parser = argparse.ArgumentParser(description="Compares predictions with published steps.")
    parser.add_argument("models", type=Path, help="folder of folders with config.json")
    parser.add_argument("--gpus", action="store_true", help="estimates for GPUs, not TPUs")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    known = GPU_RUNS if options.gpus else (*TPU_RUNS, *HELD_OUT_RUNS)
    runs = [run for run in known if options.only in run.name]
    if options.gpus:
        cpu_devices(max(parse(run.topology).device_count for run in runs))
    else:
        use_compiler_alone()
        BY_CHIP.clear()  # the published programs had their own options alone
    lines = []
    for run in runs:
        lines.append(predict(run, options.models))
        print(f"{run.name}: {lines[-1]['ratio']:.3f}", flush=True)
    totals = summaries(lines)
    cycles = "" if options.gpus else " by cycles |"
    print(f"| run | published, s | predicted, s | ratio |{cycles} one factor, left out |")
    print("|---|---|---|---|---|" + ("" if options.gpus else "---|"))
    for line in lines:
        print(_row(line))
    for name, total in totals.items():
        print(name, ", ".join(f"{key} {value:+.1%}" for key, value in total.items()))
    for line in [*lines, {"summary": totals}]:
        append(line | {"environment": environment()}, options.output)


if __name__ == "__main__":
    main()
