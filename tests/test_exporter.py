"""Writing folders that other tools load."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import jaxft
from jaxft.errors import JaxftError, ModelError
from tests.tiny_run import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("exporter") / "base")


def quiet(text: str) -> None:
    pass


def test_an_untouched_model_leaves_as_it_came_byte_for_byte(base, tmp_path):
    # Mixed types, as some published models have: norms in float32 beside bfloat16 matrices.
    tensors = {
        name: tensor if "norm" in name else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in base.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, mixed / "model.safetensors")
    output = jaxft.export(mixed, tmp_path / "out", on_log=quiet)
    exported = load_file(output / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype, name
        assert exported[name].tobytes() == tensor.tobytes(), name
    assert json.loads((output / "config.json").read_text()) == json.loads(
        (mixed / "config.json").read_text()
    )


def test_real_models_leave_as_they_came(shared, tmp_path):
    source = shared / "models/stories260K"
    output = jaxft.export(source, tmp_path / "out", verify=True, on_log=quiet)
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, output))
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)
    with safe_open(output / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_and_the_template_go_with_the_weights(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, output))
    messages = [{"role": "user", "content": "say abc"}]
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages)
    assert after.chat_template == before.chat_template


def test_every_stop_token_is_in_the_generation_config(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    stops = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    # The end of a turn, which the config.json of this base does not name.
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<end>") in stops
    assert set(jaxft.load(output).stop_ids) == set(stops)


def test_another_dtype_is_written_and_named(base, tmp_path):
    lines: list[str] = []
    output = jaxft.export(
        base, tmp_path / "out", dtype="bfloat16", verify=True, on_log=lines.append
    )
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    config = json.loads((output / "config.json").read_text())
    assert {config.get(name, "bfloat16") for name in ("dtype", "torch_dtype")} == {"bfloat16"}
    assert "Largest difference of logits" in lines[-1]


def test_a_folder_is_not_overwritten_unless_asked(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    with pytest.raises(JaxftError, match="out"):
        jaxft.export(base, output, on_log=quiet)
    jaxft.export(base, output, overwrite=True, on_log=quiet)


def test_verification_notices_other_weights(base, tmp_path, monkeypatch):
    from jaxft import exporter

    def damaged(folder, rules, params, *, dtypes):
        params = params | {"layers.attn.q.w": params["layers.attn.q.w"][::-1]}
        return real(folder, rules, params, dtypes=dtypes)

    real = exporter.save_params
    monkeypatch.setattr(exporter, "save_params", damaged)
    with pytest.raises(ModelError, match="other logits"):
        jaxft.export(base, tmp_path / "out", verify=True, on_log=quiet)


def test_nothing_is_left_of_an_export_that_failed(base, tmp_path, monkeypatch):
    from jaxft import exporter

    def failing(*args, **kwargs):
        raise ModelError("the disk is full")

    monkeypatch.setattr(exporter, "save_tokenizer", failing)
    with pytest.raises(ModelError):
        jaxft.export(base, tmp_path / "out", on_log=quiet)
    assert not (tmp_path / "out").exists()


def test_logits_of_the_export_are_those_of_the_model(base, tmp_path):
    tokens = np.arange(12).reshape(2, 6)
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    assert np.array_equal(jaxft.load(base)(tokens), jaxft.load(output)(tokens))
