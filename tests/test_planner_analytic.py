"""Closed-form estimates, against compiled programs and where arrays are really placed."""

import math
from pathlib import Path

import pytest

from jaxft.chips import chip_named
from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.planner.analytic import Estimate, Estimator, Placed
from jaxft.planner.topology import Topology
from jaxft.program import make_placement
from jaxft.sharding.collectives import _WIRE
from jaxft.shardings import describe
from tests.oracle.cases import CASES
from tests.strategies import BUILT_IN, FOR_EXPERTS
from tests.write_golden import MODELS, config_of

GOLDEN = Path(__file__).parent / "golden"
EIGHT = Topology("h100:8", chip_named("h100"), (8,))  # pyright: ignore


def estimate(config: RunConfig, model: str | Architecture = "llama_8b") -> Estimate:
    architecture = architecture_from_hf(MODELS[model]) if isinstance(model, str) else model
    placement = make_placement(config)
    abstract = architecture.abstract(make_numerics(config.model.dtypes))
    placed = Placed(placement, abstract, config.data.max_length, config.optim.freeze)
    return Estimator(architecture=architecture, topology=EIGHT).estimate(config, placed)


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
    return sum(one.wire_bytes for one, _, _ in found.exchanges)


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
    held = describe(config, architecture, placement=make_placement(config)).bytes_per_device
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
    head = 4 * 2 * tokens * 4096 * 128256  # its logits are made again in the backward pass
    pairs = tokens * tokens / 2
    attention = 2 * 7 * pairs * 4096 * 32
    exact = 6 * tokens * 32 * layer + head + attention
    assert estimate(config).flops == pytest.approx(exact, rel=1e-9)
    config.model.remat = "full"
    down = 4096 * 14336
    again = 2 * tokens * 32 * (layer - down) + 2 * 2 * pairs * 4096 * 32
    assert estimate(config).flops == pytest.approx(exact + again, rel=1e-9)


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
    exact = 6 * tokens * 2 * layer + 4 * 2 * tokens * 512 * vocab + attention
    assert found.flops == pytest.approx(exact, rel=1e-9)


def test_twice_the_rows_take_twice_the_work_of_tokens():
    once, twice = single("fsdp"), single("fsdp")
    twice.train.batch_size *= 2
    a, b = estimate(once).terms, estimate(twice).terms
    assert b["compute"] == pytest.approx(2 * a["compute"])
    assert b["attention"] == pytest.approx(2 * a["attention"])
    assert b["ici"] == pytest.approx(a["ici"], rel=0.01)  # weights travel all the same


def test_stages_of_a_pipeline_wait_for_the_first_and_the_last_micro_batch():
    def idle(micro_batches: int) -> float:
        config = single("pp")
        config.train.accumulation = micro_batches
        config.train.batch_size = 8 * micro_batches
        found = estimate(config)
        busy = sum(found.terms[term] for term in ("compute", "attention", "memory"))
        exchange = found.terms["ici"] + found.terms["dcn"]
        return (found.seconds - exchange) / busy

    assert idle(2) == pytest.approx(3 / 2)
    assert idle(8) == pytest.approx(9 / 8)


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
