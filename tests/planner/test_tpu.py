"""Plans compiled for TPU slices that are not there."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models.families import architecture_from_hf
from jaxft.planner import topology
from jaxft.planner.plan import Plan
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.remedies import try_remedies
from jaxft.planner.topology import parse
from tests.tpu import compiles_for_tpu
from tests.write_golden import MODELS

# A model of which a step compiles in seconds: two layers, with heads that the kernel takes.
SMALL = MODELS["llama_8b"] | {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 1024,
    "vocab_size": 2048,
}


def plan(name: str, model: dict = SMALL, *, evaluation: bool = False, **changes) -> Plan:
    where = parse(name)
    config = RunConfig()
    config.model.path = "model"
    config.data.max_length = 512
    config.train.batch_size = where.device_count
    for key, value in changes.items():
        group, _, leaf = key.rpartition("__")
        setattr(getattr(config, group) if group else config, leaf, value)
    planner = Planner(architecture=architecture_from_hf(model), prices=read_prices(), cache="off")
    return planner.plan(config, where, evaluation=evaluation)


@compiles_for_tpu
@pytest.mark.parametrize("name", ["v5p-8", "tpu7x-8", "2xv5e:2x2"])
def test_a_step_is_planned_for_each_kind_of_slice(name):
    found = plan(name, evaluation=True)
    assert found.fits
    assert 0 < found.memory.used < found.memory.limit
    assert sum(found.memory.kinds.values()) == found.memory.used
    assert found.time is not None
    assert found.time.seconds == pytest.approx(sum(found.time.spent.values()), rel=0.05)
    assert found.time.low < found.time.seconds < found.time.high
    # A step takes as long as what it computes at least, at the peak.
    assert found.time.seconds > found.work.model_flops / found.topology.chip.core.bfloat16
    assert found.work.flops > found.work.model_flops
    assert found.speed is not None
    assert 0 < found.speed.mfu < 1
    assert found.speed.price_per_million_tokens > 0
    assert found.evaluation is not None
    assert found.evaluation.seconds < found.time.seconds
    networks = {exchange.network for exchange in found.exchanges}
    assert networks == ({"ici", "dcn"} if found.topology.slices > 1 else {"ici"})
    assert json.loads(json.dumps(found.record()))["fits"]


@compiles_for_tpu
@pytest.mark.parametrize("name", ["v2-8", "v3-8", "v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_what_chips_can_give_away_is_what_the_compiler_says(name):
    where = parse(name)
    device = where.devices()[0]
    huge = jax.ShapeDtypeStruct((1 << 38,), jnp.float32, sharding=SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x * 2).lower(huge).compile()
    available = re.search(r"available HBM \(([\d.]+)G\)", str(caught.value))
    assert available is not None
    assert where.chip.core.usable / 2**30 == pytest.approx(float(available[1]), abs=0.006)


@pytest.mark.slow(seconds=110)
@compiles_for_tpu
def test_what_does_not_fit_says_by_how_much_and_what_would_help():
    model = SMALL | {"num_hidden_layers": 32, "hidden_size": 1024, "intermediate_size": 4096}
    changes = {"data__max_length": 4096, "train__batch_size": 32, "model__remat": "none"}
    found = plan("v5e-4", model, **changes)
    assert not found.fits
    assert found.time is None
    assert found.memory.headroom < 0
    assert sum(found.memory.kinds.values()) == found.memory.used
    config = RunConfig()
    config.model.path, config.model.remat = "model", "none"
    config.data.max_length, config.train.batch_size = 4096, 32
    planner = Planner(architecture=architecture_from_hf(model), prices=read_prices(), cache="off")
    tried = try_remedies(found, config, planner).remedies
    helped = [remedy for remedy in tried if remedy.fits]
    assert helped
    assert all(remedy.used < found.memory.limit for remedy in helped)
    assert any(remedy.flags.get("model.remat") == "full" for remedy in helped)


@compiles_for_tpu
def test_offloading_brings_activations_to_the_host():
    here = plan("v5e-4", model__remat="qkv")
    there = plan("v5e-4", model__remat="qkv", model__offload="inputs+qkv")
    tokens, layers, width = 512, 2, 512
    queries_keys_values = (8 + 2 * 4) * 128
    assert here.memory.host == 0
    kept = tokens * layers * (width + queries_keys_values) * 2
    assert kept <= there.memory.host <= 2 * kept  # the compiler may hold a second copy
    assert there.time is not None
    assert there.time.terms["host"] > 0


@compiles_for_tpu
def test_an_option_that_the_compiler_does_not_know_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"train.compiler_options: .*xla_tpu_no_such_thing"):
        plan("v5e-4", train__compiler_options="xla_tpu_no_such_thing=1")


def exchanged(found: Plan) -> dict[tuple[str, tuple[str, ...]], int]:
    """Payload bytes by kind and mesh axes."""
    return {(e.kind, e.axes): e.bytes for e in found.exchanges}


@pytest.mark.slow(seconds=100)
@compiles_for_tpu
def test_tensor_parallel_devices_sum_the_stream_five_times_a_layer():
    """After each half of a layer, before each in the backward pass, and once when it is made again.

    The last sum of a layer is not repeated: nothing but the next layer's input depends on it. One
    more is of the embedding's rows, one of the gradient of what the head reads.
    """
    found = plan(
        "v5p-8",
        MODELS["llama_8b"],
        strategy="tp",
        mesh__tensor=4,
        model__dtypes="bfloat16",
        data__max_length=2048,
        train__batch_size=1,
    )
    stream = 2048 * 4096 * 2
    [(key, payload)] = exchanged(found).items()
    assert key == ("all-reduce", ("tensor",))
    assert payload == pytest.approx((5 * 32 + 2) * stream, rel=1e-4)


@pytest.mark.slow(seconds=100)
@compiles_for_tpu
def test_experts_get_their_tokens_and_give_them_back():
    """Three times, with capacity of an even share: forward, made again, and backward."""
    found = plan(
        "v5p-128",
        MODELS["qwen3_30b_a3b"],
        strategy="ep",
        mesh__expert=64,
        model__dtypes="bfloat16",
        model__expert_capacity=1.0,
        data__max_length=2048,
    )
    stream, layers, chosen = 2048 * 2048 * 2, 48, 8
    sent = exchanged(found)
    assert sent["all-to-all", ("expert",)] == 6 * chosen * layers * stream
    # Gradients of all but the experts, in the type of the products; the router's is float32.
    attention, router = 2048 * 128 * (2 * 32 + 2 * 4), 2048 * 128
    tables = 2 * 151936 * 2048
    exact = 2 * (layers * attention + tables) + 4 * layers * router
    assert sent["all-reduce", ("expert",)] == pytest.approx(exact, rel=1e-3)


def test_a_slice_without_its_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    topology._tpu_devices.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'jax\[tpu\]'"):
        parse("v5e:4x8").devices()
