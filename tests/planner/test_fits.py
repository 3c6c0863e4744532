"""Ways to tune a model, of which each is planned with its own keys alone."""

import pytest

from jaxft import cli
from jaxft.config import AdapterConfig, RunConfig
from jaxft.errors import ConfigError
from jaxft.planner.candidates import with_flags
from jaxft.planner.fits import METHODS, Fit, _chosen, find_fits
from jaxft.planner.prices import read_prices
from jaxft.planner.show import print_fits


def test_all_of_a_model_is_tuned_without_the_keys_of_an_adapter():
    config = RunConfig()
    config.adapter = AdapterConfig(rank=4, ranks="mlp=2", train="norm", added_rows=True)
    config.optim.lora_plus, config.model.quantise = 16.0, "int8"
    full, lora, qlora = (with_flags(config, _chosen(config, keys)) for keys in METHODS.values())
    assert full.adapter == AdapterConfig()
    assert (full.optim.lora_plus, full.model.quantise) == (1.0, "")
    assert lora.adapter == qlora.adapter == config.adapter
    assert (lora.model.quantise, qlora.model.quantise) == ("", "int8")


def test_what_a_fit_has_no_use_for_is_refused_or_said():
    config = RunConfig(strategy="ddp")
    config.adapter.path = "runs/a"
    with pytest.raises(ConfigError, match=r"adapter\.path runs/a has one already"):
        find_fits(config, pytest.fail, read_prices(""))
    config.adapter.path = ""

    def stop(text):  # before more devices are made than other tests have
        raise ConfigError(text)

    with pytest.raises(ConfigError, match="strategy ddp is not looked at: all fits are of fsdp"):
        find_fits(config, pytest.fail, read_prices(""), on_log=stop)


def test_a_chip_without_its_compiler_is_not_said_to_be_too_small(monkeypatch, capsys):
    unknown = [Fit(m, "v5e", reason="install libtpu", is_known=False) for m in ("full", "LoRA")]
    print_fits("m", [*unknown, Fit("full", "l4", reason="does not fit 256 devices")])
    said = capsys.readouterr().out
    assert said.count("not known") == 2
    assert "full on v5e, LoRA on v5e: install libtpu" in said
    monkeypatch.setattr("jaxft.planner.command.fits", lambda *args, **kwargs: unknown)
    monkeypatch.setattr("jaxft.planner.topology.use_compiler_alone", lambda: None)
    assert cli.main(["plan", "--fit=m"]) == 2
