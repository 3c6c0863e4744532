"""Closed-form estimates, against compiled programs and where arrays are really placed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxft.compiled.collectives import _WIRE
from jaxft.compiled.hlo import Module
from jaxft.compiled.layout import describe, make_program
from jaxft.config import AdapterConfig, RunConfig
from jaxft.errors import ConfigError
from jaxft.hardware.chips import chip_named
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.layers import LayerInputs
from jaxft.models.module import abstract_model, merge
from jaxft.planner.analytic import Estimate, Estimator, Evaluation, Exchanged
from jaxft.planner.cost import totals
from jaxft.planner.placed import Placed
from jaxft.planner.topology import Topology
from jaxft.training.adaptation import adapted
from jaxft.training.program import make_placement
from tests.oracle.cases import CASES, FAMILY_CASES
from tests.strategies import BUILT_IN, COMPOSED, FOR_EXPERTS, UNLIKE
from tests.write_golden import MODELS, config_of

GOLDEN = Path(__file__).parents[1] / "golden"
EIGHT = Topology("h100:8", chip_named("h100"), (8,))  # pyright: ignore


def estimate(
    config: RunConfig,
    model: str | Architecture = "llama_8b",
    *,
    flash: bool = True,
    topology: Topology = EIGHT,
) -> Estimate:
    architecture = architecture_from_hf(MODELS[model]) if isinstance(model, str) else model
    placement = make_placement(config)
    abstract = architecture.abstract(make_numerics(config.model.dtypes))
    length, freeze = config.data.max_length, config.optim.freeze
    placed = Placed(placement, abstract, length, freeze, architecture.adaptation, flash=flash)
    return Estimator(architecture=architecture, topology=topology).estimate(config, placed)


def single(strategy: str) -> RunConfig:
    """The run of the golden files in float32, which XLA for CPU exchanges whatever it is told."""
    config = config_of(strategy)
    config.model.dtypes = "float32"
    return config


def model_of(strategy: str) -> str:
    return "qwen3_30b_a3b" if strategy in FOR_EXPERTS else "llama_8b"


def measured_wire_bytes(strategy: str) -> float:
    """What a device sends in the step that was compiled for eight CPU devices."""
    file = GOLDEN / f"collectives_{model_of(strategy)}_{strategy}.txt"
    _, mesh, *lines = file.read_text().splitlines()
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split())}
    total = 0.0
    for line in lines:
        kind, axes, _, payload = line.split()
        devices = math.prod(sizes[axis] for axis in axes.split("+"))
        total += _WIRE[kind](devices) * int(payload.replace(",", ""))
    return total


def estimated_wire_bytes(strategy: str) -> float:
    found = estimate(single(strategy), model_of(strategy))
    return sum(one.collective.wire_bytes for one in found.exchanges)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp", "hsdp", "cp", "fsdp_cp"])
def test_what_devices_send_is_that_of_the_compiled_step(strategy):
    assert estimated_wire_bytes(strategy) == pytest.approx(measured_wire_bytes(strategy), rel=2e-3)


def test_strategies_are_ordered_by_communication_as_their_programs_are():
    """XLA for CPU sums what tensor parallel devices have several times over, a tenth of all."""
    dense = [name for name in BUILT_IN if name not in FOR_EXPERTS and name != "pp_fsdp_tp"]
    estimated = {name: estimated_wire_bytes(name) for name in dense}
    measured = {name: measured_wire_bytes(name) for name in dense}
    apart = [
        (a, b)
        for a in dense
        for b in dense
        if measured[a] > 1.25 * measured[b] and estimated[a] <= estimated[b]
    ]
    assert apart == []


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_state_takes_what_its_arrays_take_where_they_are_placed(strategy):
    config = single(strategy)
    architecture = architecture_from_hf(MODELS[model_of(strategy)])
    program = make_program(config, architecture, placement=make_placement(config))
    held = describe(program, model="").bytes_per_device
    kinds = estimate(config, model_of(strategy)).kinds
    assert kinds["parameters"] == held["parameters"]
    assert kinds["optimizer"] == pytest.approx(held["optimizer"], abs=64)  # but for counters


def test_less_is_kept_with_each_step_of_rematerialisation():
    kept = []
    for remat in ("none", "dots", "qkv+attention", "attention", "full"):
        config = single("fsdp")
        config.model.remat = remat
        kept.append(estimate(config).kinds["activations"])
    assert sorted(kept, reverse=True) == kept
    assert len(set(kept)) == len(kept)


def kept_by_jax(architecture: Architecture, capacity: float) -> float:
    """Bytes of a token that a layer's operations keep by themselves, weights left out."""
    length, config = 64, architecture.config
    numerics = Numerics(jnp.float32, jnp.bfloat16, expert_capacity=capacity)
    abstract = abstract_model(lambda rngs: architecture.blocks[""](config, numerics, rngs))

    @jax.custom_vjp
    def attention(q: Any, k: Any, v: Any) -> Any:
        return q

    # As a kernel does: what it reads and makes, and a sum of each row's scores.
    attention.defvjp(
        lambda q, k, v: (2 * q, (q, k, v, 2 * q, jnp.sum(q, -1, dtype=jnp.float32))),
        lambda kept, d: (d + kept[3] + kept[4][..., None].astype(d.dtype), kept[1], kept[2]),
    )
    rope = jnp.ones((1, length, 1, config.head_dim // 2))
    inputs = LayerInputs(
        (rope, rope),
        None,
        lambda q, k, v, *_: (attention(q, k, v), None),
        jnp.ones((1, length), bool),
        jnp.ones((1, length), jnp.int32),
    )

    def backward(params: Any, x: Any) -> Any:
        def layer(params: Any, x: Any) -> Any:
            block: Any = merge(abstract.graphdef, params)
            return block(x, inputs, None)[::2]

        return jax.vjp(layer, params, x)[1]

    x = jax.ShapeDtypeStruct((1, length, config.embed), jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(backward, abstract.params, x))
    weights = {leaf.size for leaf in abstract.params.values()}
    return sum(
        leaf.size * leaf.dtype.itemsize / length
        for leaf in kept
        if leaf.size not in weights and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


@pytest.mark.parametrize(("case", "capacity"), [("qwen3_mha", 0), ("mixtral_tied", 1.25)])
def test_what_each_operation_keeps_is_what_jax_keeps_of_a_layer(case, capacity):
    """Of norms of heads, and of experts; but for a number of a token here and there."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128}
    architecture = architecture_from_hf(CASES[case] | sizes)
    config = config_of("fsdp")
    config.model.remat, config.model.expert_capacity = "none", capacity
    found = estimate(config, architecture).kinds["activations"]
    tokens = config.train.batch_size * config.data.max_length / 8
    of_token = found / tokens / architecture.config.layers
    assert of_token == pytest.approx(kept_by_jax(architecture, capacity), rel=0.03)


@pytest.mark.parametrize("keys", [{}, {"strategy": "fsdp_tp", "mesh__tensor": 2}])
def test_norms_of_latents_pass_latents_and_not_heads(keys):
    """Devices that share out heads have all of a token's latents each."""
    architecture, config = small("deepseek_v3"), small_run("none", **keys)
    placement = make_placement(config)
    abstract = architecture.abstract(make_numerics("float32"))
    placed = Placed(placement, abstract, config.data.max_length, "")
    estimator = Estimator(architecture=architecture, topology=EIGHT)
    assert estimator._run(config, placed)._normed() == 2 * 256 + 128 + 96


def test_the_delta_rule_takes_what_its_compiled_program_takes(shared):
    """Qwen3.5-27B by `fsdp`, two rows a device: 428 ms on v5p, docs/planning.md; mostly memory."""
    config = RunConfig(strategy="fsdp")
    config.model.remat, config.data.max_length, config.train.batch_size = "full", 4096, 16
    file = shared / "configs" / "Qwen--Qwen3.5-27B" / "config.json"
    architecture = architecture_from_hf(json.loads(file.read_text()))
    abstract = architecture.abstract(make_numerics("mixed"))
    placed = Placed(make_placement(config), abstract, 4096, "")
    v5p = Topology("v5p-16", chip_named("v5p"), (2, 2, 2))  # pyright: ignore
    run = Estimator(architecture=architecture, topology=v5p)._run(config, placed)
    work = run._work()
    assert run.passes * run._rule_seconds(work) == pytest.approx(0.428, rel=0.05)
    assert work.recurrence / run._rates_of_products().products < 0.05


def test_layer_inputs_alone_are_tokens_times_width_times_layers():
    config = single("fsdp")
    tokens = 128  # one row of each device
    assert estimate(config).kinds["activations"] == tokens * 4096 * 32 * 4


def test_what_is_offloaded_moves_to_the_host():
    config = single("fsdp")
    here = estimate(config)
    config.model.offload = "inputs"
    there = estimate(config)
    assert there.kinds["activations"] == 0
    assert there.host == here.kinds["activations"]
    assert there.terms["host"] > here.terms["host"] == 0


def test_flops_are_those_of_the_mathematics_and_of_what_is_repeated():
    config = single("fsdp")
    config.model.remat = "none"
    tokens, layer = 128, 4096 * 128 * (32 + 2 * 8) + 4096 * 4096 + 3 * 4096 * 14336
    head = 3 * 2 * tokens * 4096 * 128256
    pairs = tokens * tokens / 2
    attention = 2 * 7 * pairs * 4096 * 32
    exact = 6 * tokens * 32 * layer + head + attention
    assert estimate(config).flops == pytest.approx(exact, rel=1e-9)
    config.model.remat = "full"
    down = 4096 * 14336
    again = 2 * tokens * 32 * (layer - down) + 2 * 2 * pairs * 4096 * 32
    assert estimate(config).flops == pytest.approx(exact + again, rel=1e-9)


def test_rounded_products_take_half_the_time_and_send_codes():
    """Forward and for the gradients of what is read, not for those of weights; nor the head's."""
    config = single("fsdp")
    config.model.dtypes, config.model.remat = "mixed", "none"
    whole = estimate(config)
    config.model.matmul = "fp8"
    found = estimate(config)
    assert found.flops == whole.flops
    tokens, layer = 128, 4096 * 128 * (32 + 2 * 8) + 4096 * 4096 + 3 * 4096 * 14336
    chip = chip_named("h100")
    assert chip is not None
    half = 2 * 2 * tokens * 32 * layer / chip.bfloat16 / 2
    assert whole.terms["compute"] - found.terms["compute"] == pytest.approx(half, rel=2e-3)
    saved = whole.spent["matmul"] - found.spent["matmul"]
    assert saved == pytest.approx(half / chip.product_share, rel=2e-3)

    def sent(one: Estimate, kind: str) -> float:
        return sum(e.collective.bytes for e in one.exchanges if e.collective.kind == kind)

    assert sent(whole, "all-gather") - sent(found, "all-gather") == 2 * 32 * layer
    assert sent(whole, "reduce-scatter") == sent(found, "reduce-scatter")


def test_what_is_compared_with_is_rounded_too_and_an_evaluation_is_not():
    seconds = {}
    for matmul in ("", "fp8"):
        config = single("fsdp")
        config.model.dtypes, config.objective.name = "mixed", "dpo"
        config.model.matmul = matmul
        policy = estimate(config).spent["matmul"]
        config.objective.reference = "cached"
        seconds[matmul] = policy - estimate(config).spent["matmul"]
    assert seconds["fp8"] < 0.6 * seconds[""]


# Of each family, small enough to be compiled in a second, large enough that products are all.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 96,
    "kv_lora_rank": 96,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 24,
    "v_head_dim": 48,
}
GPT2_SIZES = {"n_embd": 256, "n_head": 4, "n_layer": 2, "vocab_size": 512}


def small(family: str) -> Architecture:
    config = dict(CASES[FAMILY_CASES[family][0]])
    sizes = GPT2_SIZES if family == "gpt2" else {k: v for k, v in SIZES.items() if k in config}
    config |= sizes
    if "kv_lora_rank" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    return architecture_from_hf(config)


def small_run(remat: str, *, freeze: str = "", capacity: float = 0.0, **keys: Any) -> RunConfig:
    config = RunConfig(strategy="fsdp")
    config.model.path, config.model.dtypes, config.model.attention = "small", "float32", "xla"
    config.model.remat, config.optim.freeze = remat, freeze
    config.model.expert_capacity = capacity
    config.data.max_length, config.train.batch_size = 32, 8
    for key, value in keys.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return config


TP = "llama", {"strategy": "fsdp_tp", "mesh__tensor": 2}
EP = "mixtral", {"strategy": "ep", "mesh__expert": 4, "capacity": 1.0}


def compiled_flops(config: RunConfig, architecture: Architecture) -> float:
    """Of matrix products in the program for eight CPU devices, on one of them."""
    program = make_program(config, architecture, placement=make_placement(config))
    return sum(totals(Module(program.compile().as_text()), lambda *_: None)[0].values())


# Of composed families those whose layers do not multiply, or not make again, as Llama's do; those
# of Gemma 4 have a test of their own.
OF_OTHER_PRODUCTS = {"cohere", "nanochat"}
IN_SHORT = {"llama", "gemma2", "mixtral", "gpt2"}


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        pytest.param(f, "full", marks=[pytest.mark.slow(seconds=5)] * (f not in IN_SHORT))
        for f in FAMILY_CASES
        if f not in (*COMPOSED, "gemma4_text") or f in OF_OTHER_PRODUCTS
    ]
    # What is made again depends on how a layer is built, of which there are few ways.
    + [pytest.param(f, "none", marks=pytest.mark.slow(seconds=5)) for f in UNLIKE],
)
def test_flops_of_every_family_are_those_of_its_compiled_step(family, remat):
    architecture = small(family)
    # Two spans of a recurrent layer's chunks: of one alone the compiler makes nothing twice.
    config = small_run(remat, data__max_length=2048 if architecture.config.is_recurrent else 32)
    config.model.expert_capacity = 1.0 if architecture.config.experts else 0.0
    found = estimate(config, architecture, flash=False)
    assert found.flops == pytest.approx(compiled_flops(config, architecture), rel=3e-3)


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize(
    ("remat", "freeze"),
    [("full", ""), ("none", ""), ("full", "per_layer"), ("full", "table|embed")],
)
def test_flops_of_what_layers_read_beside_the_stream_are_those_compiled(remat, freeze):
    """Tables are looked up in; layers that make no keys multiply none."""
    sizes = {k: v for k, v in SIZES.items() if k in CASES["gemma4_text_e2b"]}
    own = {"hidden_size_per_layer_input": 128, "vocab_size_per_layer_input": 512}
    layers = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    }
    architecture = architecture_from_hf(CASES["gemma4_text_e2b"] | sizes | own | layers)
    config = small_run(remat, freeze=freeze)
    found = estimate(config, architecture, flash=False)
    assert found.flops == pytest.approx(compiled_flops(config, architecture), rel=3e-3)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize(
    ("remat", "freeze"), [("full", ""), ("full", "embed|per_layer"), ("none", "")]
)
def test_memory_of_what_layers_read_beside_the_stream_is_that_compiled(remat, freeze):
    """By how much a step takes more of it for wider inputs."""
    config = small_run(remat, freeze=freeze, data__max_length=1024)

    def taken(width: int) -> tuple[float, int]:
        own = {"hidden_size_per_layer_input": width}
        architecture = architecture_from_hf(CASES["gemma4_text_e2b"] | own)
        program = make_program(config, architecture, placement=make_placement(config))
        memory = program.compile().memory_analysis()
        kept = estimate(config, architecture, flash=False).kinds["activations"]
        return kept, memory.temp_size_in_bytes

    narrow, wide = taken(1024), taken(2048)
    assert wide[0] - narrow[0] == pytest.approx(wide[1] - narrow[1], rel=0.15)


@pytest.mark.parametrize(
    ("family", "freeze"),
    [
        pytest.param("llama", "mlp", marks=pytest.mark.slow(seconds=5)),
        ("llama", "layers"),
        ("llama", "embed|layers"),
        ("mixtral", "mlp"),
        pytest.param("mixtral", "attn", marks=pytest.mark.slow(seconds=5)),
    ],
)
def test_of_what_is_frozen_no_gradients_are_computed(family, freeze):
    config, architecture = small_run("full", freeze=freeze), small(family)
    config.model.expert_capacity = 1.0 if architecture.config.experts else 0.0
    found = estimate(config, architecture, flash=False)
    expected = compiled_flops(config, architecture)
    assert found.flops == pytest.approx(expected, rel=3e-3)


def test_of_what_is_frozen_nothing_is_exchanged_or_kept():
    def sent(freeze: str, kind: str) -> float:
        found = estimate(small_run("none", freeze=freeze), small("llama"))
        return sum(e.collective.bytes for e in found.exchanges if e.collective.kind == kind)

    head = 4 * 512 * 256
    assert sent("embed|layers", "reduce-scatter") == head
    assert sent("embed|layers", "all-gather") - head == (sent("", "all-gather") - head) / 2
    found = estimate(small_run("none", freeze="embed|layers"), small("llama"))
    assert found.kinds["activations"] == 0


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize(("family", "keys"), [TP, EP])
def test_an_adapter_takes_what_it_takes_compiled(family, keys):
    config = small_run("full", **keys)
    architecture = adapted(small(family), AdapterConfig(rank=16))
    program = make_program(config, architecture, placement=make_placement(config))
    compiled, found = program.compile(), estimate(config, architecture, flash=False)
    kinds = found.kinds
    held = kinds["parameters"] + kinds["optimizer"] + kinds["batch"]
    memory = compiled.memory_analysis()
    assert held == pytest.approx(memory.argument_size_in_bytes, abs=64)  # but for counters
    assert kinds["optimizer"] == pytest.approx(2 * kinds["gradients"], abs=64)
    flops = sum(totals(Module(compiled.as_text()), lambda *_: None)[0].values())
    assert found.flops == pytest.approx(flops, rel=5e-3)


def test_a_stage_runs_forward_again_and_keeps_inputs_alone():
    def of(strategy: str, **keys: Any) -> Estimate:
        config = small_run("none", strategy=strategy, train__accumulation=4, **keys)
        config.train.batch_size = 32
        sizes = {k: v for k, v in SIZES.items() if k in CASES["gqa"]} | {"num_hidden_layers": 4}
        return estimate(config, architecture_from_hf(CASES["gqa"] | sizes))

    # Two rows and two layers of each of two stages beside one row and four layers of a device.
    whole, staged = of("fsdp"), of("pp", mesh__stage=2)
    layer = 256 * 64 * (4 + 2 * 2) + 256 * 256 + 3 * 256 * 512
    attention = 2 * (32 * 32 / 2) * 256
    again = 4 * 2 * 2 * (2 * 32 * layer + 2 * attention)
    assert staged.flops == pytest.approx(whole.flops + again)
    kept = staged.kinds["activations"] - whole.kinds["activations"]
    assert kept == 3 * 2 * 32 * 256 * 4  # of three micro-batches


def test_whole_float32_products_take_six_of_bfloat16_on_tpus_and_no_matrix_units_on_gpus():
    seconds = {}
    for dtypes in ("bfloat16", "float32"):
        config = small_run("full")
        config.model.dtypes = dtypes
        seconds[dtypes] = estimate(config, small("llama")).spent["matmul"]
    assert seconds["float32"] / seconds["bfloat16"] == pytest.approx(989.4 / 67)
    assert chip_named("v5e").exact == pytest.approx(197e12 / 6)  # pyright: ignore


def test_scores_of_whole_rows_take_time_and_memory():
    config = small_run("none", data__max_length=1024, train__batch_size=8)
    flash, whole = (estimate(config, small("llama"), flash=f) for f in (True, False))
    scores = 2 * 1024 * 4 * 1024  # of two layers and four heads
    kept = whole.kinds["activations"] - flash.kinds["activations"]
    assert kept == scores * (4 + 4 + 1)  # in float32, with their weights, and which are hidden
    assert whole.spent["memory"] > 2 * flash.spent["memory"]
    # Six products of all pairs, in place of seven of those that see each other.
    pairs = 1024 * 1024 * 4 * 64 * 2
    assert whole.flops - flash.flops == pytest.approx(2 * pairs * (6 - 7 / 2))


@pytest.mark.parametrize("windows", [(8, 8), (8, 0)])
def test_kernels_multiply_the_pairs_that_windows_leave(windows):
    def of(windows: tuple[int, int]) -> Estimate:
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        case = CASES["qwen2_layer_types"]
        sizes = {key: size for key, size in SIZES.items() if key in case}
        config = case | sizes | {"layer_types": kinds, "sliding_window": 8, "head_dim": 64}
        run = small_run("none", data__max_length=1024, train__batch_size=8)
        return estimate(run, architecture_from_hf(config))

    some, whole = of(windows), of((0, 0))
    seen = [sum(min(query + 1, window or 1024) for query in range(1024)) for window in windows]
    pairs = sum(1024 * 1025 / 2 - number for number in seen)
    # A row of a device: seven products, four heads of 64. To within half a token of each query.
    assert whole.flops - some.flops == pytest.approx(7 * 2 * 4 * 64 * pairs, rel=1e-2)
    assert some.seconds < whole.seconds


def test_tokens_travel_as_often_as_experts_take_them():
    def sent(capacity: float, remat: str) -> float:
        config = small_run(remat, strategy="ep", mesh__expert=4, capacity=capacity)
        [one] = [e for e in estimate(config, small("mixtral")).exchanges if _is_routing(e)]
        return one.collective.bytes

    stream = 32 * 256 * 4
    assert sent(1.0, "none") == 4 * 2 * 2 * stream  # two layers, two experts of a token
    assert sent(2.0, "none") == 2 * sent(1.0, "none")
    assert sent(1.0, "full") == 6 / 4 * sent(1.0, "none")


def _is_routing(one: Exchanged) -> bool:
    return one.collective.kind == "all-to-all"


def test_a_split_stream_is_gathered_and_scattered():
    def kinds(strategy: str) -> set[str]:
        found = estimate(small_run("full", strategy=strategy, mesh__tensor=2), small("llama"))
        return {e.collective.kind for e in found.exchanges if e.collective.axes == ("tensor",)}

    assert {"all-gather", "reduce-scatter"} <= kinds("fsdp_tp_sp")
    assert "all-reduce" in kinds("fsdp_tp")
    assert "reduce-scatter" not in kinds("fsdp_tp")


def test_logits_of_a_split_row_are_those_of_its_part():
    def logits(**keys: Any) -> int:
        sizes = {k: v for k, v in SIZES.items() if k in CASES["gqa"]} | {"vocab_size": 65536}
        config = small_run("full", **keys)
        found = estimate(config, architecture_from_hf(CASES["gqa"] | sizes)).kinds["logits"]
        return found - 4 * 65536 * 256  # the head's gradient

    whole = logits(data__max_length=128)
    assert whole == 2 * 4 * 128 * 65536  # with their gradient
    assert logits(strategy="cp", mesh__context=8, data__max_length=1024) == 8 * whole


def test_what_the_head_and_what_layers_have_in_hand_are_not_there_at_once():
    sizes = {k: v for k, v in SIZES.items() if k in CASES["gqa"]}
    for vocab, at_head in ((512, False), (65536, True)):
        config = small_run("full", data__max_length=128)
        architecture = architecture_from_hf(CASES["gqa"] | sizes | {"vocab_size": vocab})
        kinds = estimate(config, architecture).kinds
        assert (kinds["logits"] > 0, kinds["temporaries"] > 0) == (at_head, not at_head)


def test_what_goes_to_the_host_costs_what_it_takes_longer_than_all_else():
    config = single("fsdp")
    config.model.offload = "inputs"
    both_ways = 2 * 128 * 4096 * 32 * 4 / 64e9  # PCIe 5; a row of each device
    found = estimate(config)
    assert found.terms["host"] == pytest.approx(both_ways)
    assert found.spent["wait host"] == 0
    assert found.seconds > both_ways
    slow = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, host=64e6))
    assert estimate(config, topology=slow).seconds == pytest.approx(1000 * both_ways)


def test_evaluation_passes_through_stages_and_does_no_more():
    def of(strategy: str, **keys: Any) -> Evaluation:
        config = small_run("none", strategy=strategy, **keys)
        architecture = small("llama")
        placement = make_placement(config)
        abstract = architecture.abstract(make_numerics("float32"))
        estimator = Estimator(architecture=architecture, topology=EIGHT)
        return estimator.evaluation(
            config, Placed(placement, abstract, 32, config.optim.freeze), 16
        )

    assert of("fsdp") == of("fsdp", freeze="embed|layers") == of("fsdp", capacity=2.0)
    # Two rows of four devices with one of two layers: three turns of one row, the head twice for
    # half of the vocabulary.
    layer = 256 * 64 * (4 + 2 * 2) + 256 * 256 + 3 * 256 * 512
    products = 2 * 2 * 32 * (3 * layer / 2 + 256 * 512)
    staged, alone = of("pp", mesh__stage=2).seconds, of("fsdp").seconds
    assert products / (67e12 * 0.73) < staged
    assert staged > alone


def test_a_feed_forward_part_without_a_gate_has_one_product_less():
    config = single("fsdp")
    config.model.remat = "none"
    architecture = architecture_from_hf(
        CASES["gpt2_tied"] | {"n_embd": 512, "n_head": 8, "n_layer": 2, "vocab_size": 4096}
    )
    found = estimate(config, architecture)
    tokens, vocab = 128, architecture.config.vocab
    layer = 4 * 512 * 512 + 2 * 512 * 2048
    attention = 2 * 7 * (tokens * tokens / 2) * 512 * 2
    exact = 6 * tokens * 2 * layer + 3 * 2 * tokens * 512 * vocab + attention
    assert found.flops == pytest.approx(exact, rel=1e-9)


def test_twice_the_rows_take_twice_the_work_of_tokens():
    once, twice = single("fsdp"), single("fsdp")
    twice.train.batch_size *= 2
    a, b = estimate(once).terms, estimate(twice).terms
    assert b["compute"] == pytest.approx(2 * a["compute"])
    assert b["ici"] == pytest.approx(a["ici"], rel=0.01)  # weights travel all the same


def test_stages_of_a_pipeline_wait_for_the_first_and_the_last_micro_batch():
    def idle(micro_batches: int) -> float:
        config = single("pp")
        config.train.accumulation = micro_batches
        config.train.batch_size = 8 * micro_batches
        found = estimate(config)
        # The head and the optimizer do not run in turns.
        busy = sum(found.spent[kind] for kind in ("matmul", "attention", "memory"))
        return found.spent["wait stages"] / busy

    assert 0.7 * 1 / 2 < idle(2) < 1 / 2
    assert 0.7 * 1 / 8 < idle(8) < 1 / 8


def test_what_is_frozen_has_no_gradients_and_no_moments():
    config = single("fsdp")
    config.optim.freeze = "layers|embed"
    frozen = estimate(config).kinds
    config.optim.freeze = ""
    free = estimate(config).kinds
    assert frozen["parameters"] == free["parameters"]
    head_and_norm = 4 * (128256 * 4096 + 4096) // 4
    assert frozen["gradients"] == pytest.approx(head_and_norm, rel=1e-4)
    assert frozen["optimizer"] == pytest.approx(2 * head_and_norm, rel=1e-4)


def test_a_strategy_that_cannot_place_the_model_is_refused():
    config = single("fsdp_tp")
    config.mesh.fsdp, config.mesh.tensor = 1, 8
    config.mesh.data = 1
    model = MODELS["llama_8b"] | {"num_attention_heads": 36, "num_key_value_heads": 36}
    architecture = architecture_from_hf(model)
    placed = Placed(make_placement(config), architecture.abstract(make_numerics("float32")), 128)
    with pytest.raises(ConfigError, match="heads"):
        Estimator(architecture=architecture, topology=EIGHT).estimate(config, placed)


def test_a_reference_that_is_kept_takes_memory_and_time_and_a_cached_one_a_column():
    config = config_of("fsdp")
    config.objective.name = "dpo"
    config.data.max_length, config.train.batch_size = 2048, 16
    found = {}
    for kind in ("fixed", "cached"):
        config.objective.reference = kind
        found[kind] = estimate(config)
    fixed, cached = found["fixed"], found["cached"]
    assert fixed.kinds["reference"] == fixed.kinds["parameters"] > 0 == cached.kinds["reference"]
    assert cached.kinds["batch"] > fixed.kinds["batch"]
    # A forward pass more, beside one forward, one again and two backward.
    assert 1.2 < fixed.seconds / cached.seconds < 1.5


OPTIMIZERS = {
    "adamw": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "ema": {"ema": 0.9},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "muon": {"name": "muon"},
    "sgd": {"name": "sgd"},
    "schedule_free": {"name": "schedule_free", "schedule": "constant"},
}


@pytest.mark.parametrize("strategy", ["fsdp_tp", "zero1"])
def test_memory_of_each_optimizer_is_that_of_the_programs_state(strategy):
    for name, keys in OPTIMIZERS.items():
        if (strategy, name) == ("zero1", "int8"):
            continue  # its four blocks of the stream do not go over eight devices
        config = config_of(strategy)
        config.train.batch_size, config.data.max_length = 16, 32
        for key, value in keys.items():
            setattr(config.optim, key, value)
        architecture = small("llama")
        placement = make_placement(config)
        program = make_program(config, architecture, placement=placement)
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(program.state.opt_state)
        )
        abstract = architecture.abstract(make_numerics(config.model.dtypes))
        assert Placed(placement, abstract, 32).optimizer(config.optim) == held, name
        assert estimate(config, architecture).kinds["optimizer"] == held, name


def test_muon_works_on_layers_that_devices_share_out():
    config = single("fsdp")
    plain = estimate(config).flops
    config.optim.name = "muon"
    d, f, kv = 4096, 14336, 1024
    sizes = [(d, d)] * 2 + [(kv, d)] * 2 + [(d, f)] * 3
    expected = 32 / 8 * sum(5 * (4 * a * a * b + 2 * a**3) for a, b in sizes)
    assert estimate(config).flops - plain == pytest.approx(expected)
