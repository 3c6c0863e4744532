r"""Predicted step times beside those that others published, each at its own settings.

    python -m benchmarks.published ../shared/configs --output benchmarks/results/published.jsonl

Compiles jaxft's step for each run's model, slice, rows, sharding and rematerialisation, and prints
a line for each, then the mean and the worst difference. Needs libtpu and no TPU; the first time it
takes some 40 minutes of two cores, as compiling with host offload does. No constant of the planner
was fitted to these runs: its rates are measurements of single parts, named where they stand. The
last column leaves each run out of one factor that is fitted to all others.

The published runs are MaxText's. Their programs are not ours: what is compared is their time with
that of jaxft's step at the same settings, attention's backward pass counted as theirs runs it.
Compiler options are theirs as far as the compiler still takes them: libtpu 0.0.50 refuses
`xla_tpu_enable_async_collective_fusion` but on v5e.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig
from jaxft.hf.load import read_config
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.planner.plan import Plan, Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.topology import parse, use_compiler_alone
from jaxft.workdir import environment

_VMEM = "xla_tpu_scoped_vmem_limit_kib=98304"
_LAYOUT = (
    "xla_tpu_use_minor_sharding_for_major_trivial_input=true,"
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1,"
    "xla_tpu_assign_all_reduce_scatter_layout=true"
)
_OVERLAP = (
    "xla_tpu_enable_data_parallel_all_reduce_opt=true,"
    "xla_tpu_data_parallel_opt_different_sized_ops=true"
)
_ASYNC = "xla_tpu_overlap_compute_collective_tc=true,xla_enable_async_all_gather=true"
_FUSED = (
    "xla_tpu_enable_async_collective_fusion=true,"
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true,"
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true"
)
_OFFLOAD = (
    "xla_tpu_enable_all_experimental_scheduler_features=true,"
    "xla_tpu_enable_scheduler_memory_pressure_tracking=true,"
    "xla_tpu_host_transfer_overlap_limit=24,"
    "xla_tpu_aggressive_opt_barrier_removal=ENABLED,"
    "xla_lhs_prioritize_async_depth_over_stall=ENABLED,"
    "xla_tpu_enable_ag_backward_pipelining=true,"
    "xla_should_allow_loop_variant_parameter_in_chain=ENABLED,"
    "xla_should_add_loop_invariant_op_in_chain=ENABLED,"
    "xla_max_concurrent_host_send_recv=100,"
    "xla_tpu_scheduler_percent_shared_memory_limit=100,"
    "xla_latency_hiding_scheduler_rerun=2"
)
_WHOLE = "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"

_8B, _70B = "meta-llama--Meta-Llama-3.1-8B", "meta-llama--Meta-Llama-3.1-70B"
_405B = "meta-llama--Meta-Llama-3.1-405B"


def _llama(embed: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Returns the config.json of a model with a hidden width of 28,672 and 32,000 tokens."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": embed,
        "intermediate_size": 28672,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published measurement.

    Attributes:
      name: Of model and slice.
      model: Folder under the given one, or a config.json.
      topology: The slice.
      length: Tokens of a row.
      rows: Of one device.
      step: Seconds of a step.
      remat: As `model.remat`.
      offload: As `model.offload`.
      options: For the compiler.
      source: Where it was published, and what is uncertain about it.
    """

    name: str
    model: str | dict[str, Any]
    topology: str
    length: int
    rows: int
    step: float
    remat: str
    offload: str = ""
    options: tuple[str, ...] = field(default=())
    source: str


_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/"
_OF_V5E = (
    "github.com/AI-Hypercomputer/maxtext, MaxText/configs/v5e: TFLOP/s a chip, from which the step "
    "is derived"
)
RUNS = (
    Run(
        name="Llama-3.1-8B, v6e-8",
        model=_8B,
        topology="v6e-8",
        length=8192,
        rows=3,
        step=3.443,
        remat="qkv+attention_out",
        offload="inputs+qkv+attention_out",
        options=(_VMEM, _LAYOUT, _OVERLAP, _ASYNC, _OFFLOAD, _WHOLE),
        source=f"{_RECIPES}trillium",
    ),
    Run(
        name="Llama-3.1-8B, v6e-256",
        model=_8B,
        topology="v6e-256",
        length=8192,
        rows=4,
        step=4.546,
        remat="qkv+attention_out",
        offload="inputs+qkv+attention_out",
        options=(_VMEM, _LAYOUT, _OVERLAP, _ASYNC, _OFFLOAD),
        source=f"{_RECIPES}trillium",
    ),
    Run(
        name="Llama-3.1-70B, v6e-256",
        model=_70B,
        topology="v6e-256",
        length=8192,
        rows=5,
        step=42.656,
        remat="qkv",
        offload="inputs+qkv",
        options=(_VMEM, _LAYOUT, _OVERLAP, _ASYNC, _OFFLOAD),
        source=f"{_RECIPES}trillium",
    ),
    Run(
        name="Llama-2-70B, v6e-256",
        model=_llama(8192, 80, 64, 8),
        topology="v6e-256",
        length=4096,
        rows=2,
        step=9.052,
        remat="qkv",
        offload="qkv",
        options=(_VMEM, _ASYNC),
        source=f"{_RECIPES}trillium; the log's 905 tokens/s a chip are 2 rows a chip, not 3",
    ),
    Run(
        name="Llama-2-70B, 512 v5p chips",
        model=_llama(8192, 80, 64, 8),
        topology="v5p-1024",
        length=4096,
        rows=4,
        step=23.68,
        remat="qkv+attention_out+mlp_out",
        options=(_OVERLAP, _ASYNC),
        source="MaxText's documents: 692 tokens/s a chip; the number of chips is uncertain",
    ),
    Run(
        name="Llama-3.1-405B, 512 v5p chips",
        model=_405B,
        topology="v5p-1024",
        length=8192,
        rows=2,
        step=131.474,
        remat="attention+mlp_out",
        offload="attention+mlp_out",
        options=(_VMEM, _ASYNC, _OFFLOAD),
        source=f"{_RECIPES}v5p",
    ),
    Run(
        name="16B, v5e-256",
        model=_llama(4096, 32, 64, 64),
        topology="v5e-256",
        length=2048,
        rows=6,
        step=10.3,
        remat="full",
        options=(_OVERLAP, _FUSED, _ASYNC),
        source=_OF_V5E,
    ),
    Run(
        name="32B, v5e-256",
        model=_llama(8192, 32, 64, 64),
        topology="v5e-256",
        length=2048,
        rows=4,
        step=12.1,
        remat="full",
        options=(_OVERLAP, _FUSED, _ASYNC),
        source=_OF_V5E,
    ),
    Run(
        name="64B, v5e-256",
        model=_llama(8192, 64, 64, 64),
        topology="v5e-256",
        length=2048,
        rows=2,
        step=13.5,
        remat="full",
        options=(_OVERLAP, _FUSED, _ASYNC),
        source=_OF_V5E,
    ),
    Run(
        name="Llama-3.1-70B, 64 tpu7x chips",
        model=_70B,
        topology="tpu7x-128",
        length=8192,
        rows=2,
        step=12.20,
        remat="qkv+attention",
        options=("xla_tpu_scoped_vmem_limit_kib=61440",),
        source=f"{_RECIPES}ironwood; its first moment is bfloat16, ours float32",
    ),
)


def plan(run: Run, models: Path) -> Plan:
    """Plans jaxft's step at a published run's settings."""
    topology = parse(run.topology)
    architecture = _architecture(run, models)
    config = RunConfig()
    config.model.path = run.model if isinstance(run.model, str) else run.name
    config.model.remat, config.model.offload = run.remat, run.offload
    config.data.max_length = run.length
    config.train.batch_size = run.rows * topology.device_count
    config.train.compiler_options = ",".join(run.options)
    config.validate()
    planner = Planner(
        architecture=architecture,
        prices=read_prices(),
        fused_backward=_is_fused(topology.chip.name),
    )
    return planner.plan(config, topology)


def _is_fused(chip: str) -> bool:
    """Whether the published runs on a chip make attention's gradients in one kernel."""
    return chip in ("v6e", "tpu7x")


def _architecture(run: Run, models: Path) -> Architecture:
    config = read_config(models / run.model) if isinstance(run.model, str) else run.model
    return architecture_from_hf(config)


def record(run: Run, found: Plan) -> dict[str, Any]:
    """Returns one line of the result file."""
    assert found.time is not None
    return {
        "run": run.name,
        "topology": run.topology,
        "published_seconds": run.step,
        "predicted_seconds": found.time.seconds,
        "ratio": found.time.seconds / run.step,
        "by_cycles_seconds": found.time.by_cycles,
        "spent": found.time.spent,
        "memory_gib": found.memory.used / 2**30,
        "limit_gib": found.memory.limit / 2**30,
        "source": run.source,
    }


def left_out(ratios: list[float]) -> list[float]:
    """Returns each ratio after division by the geometric mean of all others."""
    logs = [math.log(ratio) for ratio in ratios]
    return [math.exp(x - (sum(logs) - x) / (len(logs) - 1)) for x in logs]


def summary(ratios: list[float]) -> dict[str, float]:
    """Returns root mean square and worst relative difference of predictions."""
    differences = [ratio - 1 for ratio in ratios]
    return {
        "mean": sum(differences) / len(differences),
        "rms": math.sqrt(sum(d * d for d in differences) / len(differences)),
        "worst": max(differences, key=abs),
    }


def main() -> None:
    """Plans every published run."""
    parser = argparse.ArgumentParser(description="Compares predictions with published steps.")
    parser.add_argument("models", type=Path, help="folder of folders with config.json")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    use_compiler_alone()
    lines = []
    for run in RUNS:
        if options.only in run.name:
            lines.append(record(run, plan(run, options.models)))
            print(f"{run.name}: {lines[-1]['ratio']:.3f}", flush=True)
    ratios = [line["ratio"] for line in lines]
    others = left_out(ratios) if len(ratios) > 1 else ratios
    print("| run | published, s | predicted, s | ratio | by cycles | one factor, left out |")
    print("|---|---|---|---|---|---|")
    for line, other in zip(lines, others, strict=True):
        line["ratio_left_out"] = other
        print(
            f"| {line['run']} | {line['published_seconds']:.2f} | "
            f"{line['predicted_seconds']:.2f} | {line['ratio']:.3f} | "
            f"{line['by_cycles_seconds'] / line['published_seconds']:.3f} | {other:.3f} |"
        )
    totals = {"raw": summary(ratios), "left_out": summary(others)}
    for name, total in totals.items():
        print(name, ", ".join(f"{key} {value:+.1%}" for key, value in total.items()))
    if options.output:
        with options.output.open("a") as file:
            for line in [*lines, {"summary": totals}]:
                file.write(json.dumps(line | {"environment": environment()}) + "\n")


if __name__ == "__main__":
    main()
