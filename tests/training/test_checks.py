"""Refusals before anything is traced."""

import contextlib

import pytest

from jaxft.config import RunConfig, from_dict
from jaxft.errors import ConfigError
from jaxft.hardware.chips import chip_named
from jaxft.models.families import architecture_from_hf
from jaxft.training.checks import check_matmul, check_stages
from jaxft.training.program import build_evaluator, make_placement
from tests.oracle.cases import CASES
from tests.tiny import load_tiny
from tests.tpu import compiles_for_tpu, tpu_devices

# By the types that chips multiply faster than bfloat16.
FASTER = {
    ("int8", "fp8"): ("b200", "h100", "h100-pcie", "h200", "gh200", "l4", "l40s"),
    ("int8",): ("v5e", "v5p", "v6e", "a100"),
    ("fp8",): ("tpu7x",),
    (): ("v2", "v4", "v100", "t4"),
}


@pytest.mark.parametrize(
    ("name", "kinds"), [(name, kinds) for kinds, names in FASTER.items() for name in names]
)
def test_products_that_a_chip_makes_no_faster_are_refused(name, kinds):
    for kind in ("int8", "fp8"):
        config = RunConfig()
        config.model.matmul = kind
        if kind in kinds:
            check_matmul(config, chip_named(name))
            continue
        with pytest.raises(ConfigError, match=f"{name} is not known to multiply faster") as error:
            check_matmul(config, chip_named(name))
        assert ("or set --config.model.matmul=" in str(error.value)) == bool(kinds)
    check_matmul(RunConfig(), chip_named(name))


def test_a_device_without_published_rates_computes_what_it_is_asked_to():
    config = RunConfig()
    config.model.matmul = "fp8"
    check_matmul(config, None)


@pytest.mark.parametrize(
    ("case", "layers", "stages", "message"),
    [
        # A dense layer, then one with experts: one group, which does not recur.
        (
            "deepseek_v3_published",
            2,
            2,
            "the blocks of this model's 2 layers do not recur in equal groups "
            "(layer 0 dense, layer 1 sparse)",
        ),
        (
            "deepseek_v3_published",
            4,
            2,
            "the blocks of this model's 4 layers do not recur in equal groups "
            "(layer 0 dense, layers 1 to 3 sparse)",
        ),
        ("gqa", 1, 2, "this model has 1 layer. Use a mesh whose stage divides 1"),
        ("gqa", 4, 8, "this model has 4 layers. Use a mesh whose stage divides 4"),
        ("gqa", 4, 2, ""),
        ("qwen3_5_published", 8, 8, "this model has 2 groups of 4 layers. Use a mesh whose stage"),
        ("qwen3_5_published", 8, 2, ""),
    ],
)
def test_layers_that_stages_cannot_share_are_refused(case, layers, stages, message):
    placement = make_placement(from_dict({"strategy": "pp", "mesh.stage": stages, "mesh.data": -1}))
    model = architecture_from_hf(CASES[case] | {"num_hidden_layers": layers}).config
    with pytest.raises(ConfigError) if message else contextlib.nullcontext() as error:
        check_stages(model, placement)
    if message:
        text = str(error.value)
        assert f"over {stages} stages, which must have equal layers, and {message}" in text
        assert "a strategy without stages, such as fsdp_tp" in text


@compiles_for_tpu
def test_a_run_on_a_chip_without_such_products_is_refused_before_it_is_traced():
    config = RunConfig()
    config.model.matmul = "fp8"
    placement = make_placement(config, tpu_devices("v5e:2x2"))
    with pytest.raises(ConfigError, match=r"or set --config\.model\.matmul=int8"):
        build_evaluator(config, load_tiny("llama3_rope").architecture, placement=placement)
