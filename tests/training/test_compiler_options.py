import jax
import pytest

from jaxft.hardware.chips import chip_of
from jaxft.training import compiler_options
from jaxft.training.compiler_options import step_options
from tests.planner.test_tpu import plan
from tests.tpu import compiles_for_tpu, tpu_devices

KNOWN, UNKNOWN = "xla_embed_ir_in_executable", "xla_no_such_thing"


def test_a_chip_without_a_table_gets_what_the_user_chose():
    assert step_options(jax.devices()[0], {KNOWN: True}) == {KNOWN: True}


@pytest.mark.parametrize("names", [(KNOWN, UNKNOWN), (UNKNOWN, KNOWN)])
def test_an_option_that_the_compiler_refuses_is_dropped_with_a_word(monkeypatch, capsys, names):
    monkeypatch.setattr(compiler_options, "BY_CHIP", {"chip": dict.fromkeys(names, True)})
    found = compiler_options._accepted.__wrapped__(jax.devices()[0], "chip")
    assert found == {KNOWN: True}
    said = " ".join(capsys.readouterr().err.split())
    assert f"Compiled without {UNKNOWN}, which this compiler refuses: " in said
    assert "No such compile option" in said


@compiles_for_tpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_this_compiler_takes_every_option_of_the_table(name, capsys):
    device = tpu_devices(name)[0]
    chip = chip_of(device.device_kind)
    assert chip is not None
    found = compiler_options._accepted.__wrapped__(device, chip.name)
    assert found == compiler_options.BY_CHIP.get(chip.name, {})
    assert capsys.readouterr().err == ""


@compiles_for_tpu
def test_what_the_user_chose_goes_on_top_of_the_table():
    device = tpu_devices("v6e:2x2")[0]
    name = "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter"
    assert step_options(device, {})[name] is True
    assert step_options(device, {name: False})[name] is False


@pytest.mark.slow(seconds=40)
@compiles_for_tpu
def test_sparse_cores_make_reduce_scatters_beside_the_core():
    def overlapped(**changes) -> float:
        [found] = [e for e in plan("v6e-4", **changes).exchanges if e.kind == "reduce-scatter"]
        return found.overlapped

    name = "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter"
    assert overlapped(train__compiler_options=f"{name}=false") == pytest.approx(0)
    assert overlapped() > 0.2
