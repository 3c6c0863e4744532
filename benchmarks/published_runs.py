"""Training steps that others published, with the settings they ran at: facts, and where they stand.

TPU runs are MaxText's. GPU runs are those in bfloat16 of which model, GPUs, rows, sharding and
rematerialisation are known and can be said with the keys of a run: not torchtitan's with selective
rematerialisation, which repeats every second product, and none in float8. All of llm-foundry's rows
of a kind are taken.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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


_70B_OF_2 = _llama(8192, 80, 64, 8)
_13B_OF_2 = _llama(5120, 40, 40, 40) | {"intermediate_size": 13824}
_7B_OF_2 = _llama(4096, 32, 32, 32) | {"intermediate_size": 11008}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published measurement.

    Attributes:
      name: Of model and slice.
      model: Folder under the given one, or a config.json.
      topology: The slice.
      length: Tokens of a row.
      rows: Of one device in one micro-batch.
      step: Seconds of a step.
      remat: As `model.remat`.
      offload: As `model.offload`.
      accumulation: As `train.accumulation`.
      strategy: As `strategy`.
      mesh: Sizes of mesh axes that the strategy does not choose.
      options: For the compiler.
      dcn: Bytes a second of a GPU between machines, where they were joined by less than usual.
      group: Of runs by one program on one kind of chip, or of those held out; else empty.
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
    accumulation: int = 1
    strategy: str = "fsdp"
    mesh: Mapping[str, int] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    dcn: float = 0.0
    group: str = ""
    source: str


_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/"
_OF_V5E = (
    "github.com/AI-Hypercomputer/maxtext, MaxText/configs/v5e: TFLOP/s a chip, from which the step "
    "is derived"
)
TPU_RUNS = (
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
        model=_70B_OF_2,
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
        model=_70B_OF_2,
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

# Group of runs that were looked up when the planner's rates stood, and used for none of them.
HELD_OUT = "held out"
HELD_OUT_RUNS = tuple(
    dataclasses.replace(run, group=HELD_OUT)
    for run in (
        Run(
            name="Mistral-7B, v6e-8",
            model="mistralai--Mistral-7B-v0.1",
            topology="v6e-8",
            length=8192,
            rows=6,
            step=6.320,
            remat="qkv+attention_out",
            offload="inputs+qkv+attention_out",
            options=(_VMEM, _LAYOUT, _OVERLAP, _ASYNC, _OFFLOAD, _WHOLE),
            source=f"{_RECIPES}trillium",
        ),
        Run(
            name="Llama-3.1-8B, v6e-16",
            model=_8B,
            topology="v6e-16",
            length=8192,
            rows=3,
            step=3.393,
            remat="qkv+attention_out",
            offload="inputs+qkv+attention_out",
            options=(_VMEM, _LAYOUT, _OVERLAP, _ASYNC, _OFFLOAD, _WHOLE),
            source=f"{_RECIPES}trillium",
        ),
    )
)

_DOTS = "qkv+attention+attention_out+mlp+mlp_out"

# Width, heads and layers of MosaicML's MPT models.
_MPT = {
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
# Model, tokens of a row, GPUs, rows of a micro-batch, micro-batches, rematerialisation, tokens/s of
# a GPU: all rows of the tables for bfloat16 and 80 GB with 1B parameters and more, and with rows of
# 2,048 to 16,384 tokens.
_MPT_ON_H100 = """
70b  2048 64  8  4 full  1039
70b  2048 32  2 16 full   882
30b  8192  8  1 21 full  1384
30b  4096  8  1 21 full  1802
30b  2048 32 14  3 full  2308
30b  2048 16 10  3 full  2263
30b  2048  8  3 21 full  2002
13b 16384  8  3  3 full  2985
13b  4096  8 10  3 full  4717
13b  2048 64  2  1 none  4800
13b  2048 32  2  1 none  4811
13b  2048 16  2  1 none  4767
13b  2048  8  2  1 none  4792
7b   8192  8  8  2 full  6935
7b   4096  8 16  2 full  8611
7b   2048  8  6  1 none 10643
3b  16384  8  1  6 none 11152
3b   8192  8  3  6 none 16578
3b   4096  8  5  6 none 20964
3b   2048 64  6  3 none 22525
3b   2048 32  6  3 none 23021
3b   2048 16 10  3 none 24142
1b  16384  8  2  4 none 19649
1b   8192  8  3  4 none 29157
1b   4096  8  7  4 none 38535
1b   2048 64 20  1 none 44402
1b   2048 32 20  1 none 45130
1b   2048 16 20  1 none 46037
1b   2048  8 14  1 none 45455
"""
_MPT_ON_A100 = """
70b  2048 64  8  4 full   410
70b  2048 32  2 16 full   373
30b  8192  8  1 21 full   574
30b  4096  8  1 21 full   814
30b  2048  8  3 21 full   916
13b 16384  8  3  3 full  1431
13b  8192  8  5  3 full  1795
13b  4096  8 10  3 full  2060
13b  2048  8  2  3 none  2262
7b  16384  8  4  2 full  2453
7b   8192  8  8  2 full  3206
7b   4096  8 16  2 full  3684
7b   2048  8  6  2 none  4641
3b  16384  8  1  6 none  5529
3b   8192  8  3  6 none  7695
3b   4096  8  5  6 none  9457
3b   2048  8 10  2 none 10811
1b  16384  8  2  4 none  9956
1b   8192  8  3  4 none 13814
1b   4096  8  7  4 none 17807
1b   2048  8 14  4 none 20513
"""


def _mpt_runs(chip: str, table: str) -> Iterator[Run]:
    """Yields the runs of a table of MosaicML's."""
    for line in table.split("\n"):
        if not line:
            continue
        size, length, devices, rows, accumulation, remat, rate = line.split()
        width, heads, layers = _MPT[size]
        tokens = int(rows) * int(accumulation) * int(length)
        yield Run(
            name=f"MPT-{size}, {length} tokens, {devices} x {chip}",
            model={
                "model_type": "gpt2",  # the same products; positions differ
                "activation_function": "gelu_new",
                "n_embd": width,
                "n_head": heads,
                "n_layer": layers,
                "n_positions": int(length),
                "vocab_size": 50368,
                "layer_norm_epsilon": 1e-5,
            },
            topology=f"{chip}:{devices}",
            length=int(length),
            rows=int(rows),
            accumulation=int(accumulation),
            step=tokens / float(rate),
            remat=remat,
            group=f"llm-foundry (PyTorch, 2023), {chip}",
            source="github.com/mosaicml/llm-foundry, scripts/train/benchmarking",
        )


_TITAN = "github.com/pytorch/torchtitan, docs/performance.md of 2024"
# Google's machines of eight H100: their networks, which GPUs share evenly
# (docs.cloud.google.com/compute/docs/accelerator-optimized-machines).
_A3_HIGH, _A3_MEGA = 12.5e9, 25e9


def _a3_runs() -> Iterator[Run]:
    """Yields Llama-2-7B by MaxText on machines of eight H100, from TFLOP/s of a GPU."""
    for machines, rate in ((1, 492), (2, 422), (4, 407), (8, 409), (16, 375)):
        yield Run(
            name=f"Llama-2-7B, {8 * machines} x h100",
            model=_7B_OF_2,
            topology=f"h100:{8 * machines}",
            length=4096,
            rows=4,
            # 46.08 GFLOP a token, as the log of the run on A3 Mega has it.
            step=4 * 4096 * 46.08e9 / (rate * 1e12),
            remat=_DOTS,
            strategy="hsdp",
            mesh={"data": machines, "fsdp": 8},
            dcn=_A3_HIGH,
            group="MaxText, h100 and h200",
            source="github.com/AI-Hypercomputer/maxtext, MaxText/configs/a3/llama_2_7b",
        )


GPU_RUNS = (
    *_a3_runs(),
    Run(
        name="Llama-2-7B, 256 x h100",
        model=_7B_OF_2,
        topology="h100:256",
        length=4096,
        rows=4,
        step=1.500,
        remat=_DOTS,
        strategy="hsdp",
        mesh={"data": 32, "fsdp": 8},
        dcn=_A3_MEGA,
        group="MaxText, h100 and h200",
        source="github.com/AI-Hypercomputer/gpu-recipes, training/a3mega/llama-2-7b",
    ),
    Run(
        name="Llama-3.1-70B, 256 x h200",
        model=_70B,
        topology="h200:256",
        length=8192,
        rows=2,
        step=15.516,
        remat="qkv+attention+attention_out",
        strategy="hsdp",
        mesh={"data": 2, "fsdp": 128},
        group="MaxText, h100 and h200",
        source="github.com/AI-Hypercomputer/gpu-recipes, training/a3ultra/llama3-1-70b",
    ),
    Run(
        name="Llama-3-70B, 64 x a100",
        model=_70B,
        topology="a100:64",
        length=8192,
        rows=1,
        step=8192 / 331,
        remat="full",
        group="torchtitan (PyTorch, 2024), a100",
        source=_TITAN,
    ),
    Run(
        name="Llama-2-70B, 64 x a100",
        model=_70B_OF_2,
        topology="a100:64",
        length=4096,
        rows=2,
        step=2 * 4096 / 353,
        remat="full",
        group="torchtitan (PyTorch, 2024), a100",
        source=_TITAN,
    ),
    Run(
        name="Llama-2-13B, 64 x a100",
        model=_13B_OF_2,
        topology="a100:64",
        length=4096,
        rows=2,
        step=2 * 4096 / 2162,
        remat="none",
        group="torchtitan (PyTorch, 2024), a100",
        source=_TITAN,
    ),
    *_mpt_runs("a100", _MPT_ON_A100),
    *_mpt_runs("h100", _MPT_ON_H100),
)
