"""A run beside a base in codes: evaluated, resumed, loaded, exported and merged."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.errors import ConfigError
from jaxft.programs.evaluation import evaluate
from tests.programs.test_served_adapters import adapter_config, logits_of
from tests.tiny_run import read_records

STEPS = 6


def logits(folder, **options):
    return logits_of(jaxft.load(folder, **options))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def run(home):
    """A whole run, and one that was stopped halfway and resumed."""
    keys = {"model__quantise": "nf4", "optim__schedule": "constant"}
    config = adapter_config(home, "whole", train__steps=STEPS, **keys)
    whole = jaxft.train(config)
    parts = adapter_config(home, "parts", train__steps=STEPS // 2, **keys)
    jaxft.train(parts)
    parts.train.steps = STEPS
    return config, whole, jaxft.train(parts, resume=True)


@pytest.mark.slow(seconds=15)
def test_a_run_beside_codes_is_resumed_to_the_same_bits(run):
    _, whole, parts = run
    one, other = (jaxft.load(result.workdir, quantise="nf4").params for result in (whole, parts))
    assert {path.rpartition(".")[2] for path in one} >= {"codes", "scales", "lora_a", "lora_b"}
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])


@pytest.mark.slow(seconds=5)
def test_what_a_run_said_of_held_out_data_is_found_again(run):
    config, whole, _ = run
    first, *_, last = read_records(whole.workdir / "eval.jsonl")
    assert last["loss"] < first["loss"]
    found = evaluate(config, whole.workdir, step="latest")["validation"].record()
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)


@pytest.mark.slow(seconds=8)
def test_the_adapter_is_exported_alone_and_merged_into_the_weights_of_the_files(run, home):
    """Not into what codes stand for: an export loses nothing by them."""
    _, whole, _ = run
    folder = jaxft.export(whole.workdir, home / "adapter", verify=True, on_log=lambda text: None)
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(home / "base")
    merged = jaxft.export(whole.workdir, home / "merged", merge=True, on_log=lambda text: None)
    before, after = (load_file(f / "model.safetensors") for f in (home / "base", merged))
    pairs = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (pairs[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    scale = described["lora_alpha"] / described["r"]
    assert np.abs(b).max() > 0
    expected = before[f"{name}.weight"] + scale * b @ a
    np.testing.assert_allclose(after[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    # Of files: in full precision, unless codes are asked for.
    np.testing.assert_allclose(logits(folder), logits(merged), atol=1e-4)
    np.testing.assert_array_equal(logits(whole.workdir), logits(folder))
    coded = logits(whole.workdir, quantise="nf4")
    np.testing.assert_array_equal(coded, logits(folder, quantise="nf4"))
    assert np.abs(coded - logits(folder)).max() > 1e-3


@pytest.mark.slow(seconds=6)
def test_a_model_in_codes_is_asked(run, home):
    """The answer is the one that its logits give, token by token."""
    model = jaxft.load(run[1].workdir, quantise="int8")
    assert model.parameters == jaxft.load(run[1].workdir).parameters
    ids = model.prompt_ids([{"role": "user", "content": "say abc"}])
    expected = list(ids)
    for _ in range(4):
        expected.append(int(model(np.array([expected]))[0, -1].argmax()))
    [new] = model.complete([ids], max_new_tokens=4)
    assert new == expected[len(ids) :][: len(new)]
    assert model.generate("say abc", max_new_tokens=4) is not None
    with pytest.raises(ConfigError, match=r"quantise is 'nf5'; expected one of nf4"):
        jaxft.load(home / "base", quantise="nf5")
