"""Refusals before anything is traced."""

import pytest

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.hardware.chips import chip_named
from jaxft.training.checks import check_matmul
from jaxft.training.program import build_evaluator, make_placement
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


@compiles_for_tpu
def test_a_run_on_a_chip_without_such_products_is_refused_before_it_is_traced():
    config = RunConfig()
    config.model.matmul = "fp8"
    placement = make_placement(config, tpu_devices("v5e:2x2"))
    with pytest.raises(ConfigError, match=r"or set --config\.model\.matmul=int8"):
        build_evaluator(config, load_tiny("llama3_rope").architecture, placement=placement)
