"""What is said of folders that hold no model in safetensors."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.errors import ModelError
from jaxft.hf.folder import read_config
from jaxft.hf.hub import resolve
from jaxft.models.families import architecture_from_hf
from tests.tiny_run import write_base

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def said_of(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        jaxft.load(folder)
    return str(caught.value)


def fill(folder: Path, *names: str, **contents: object) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_an_adapter_is_called_one_with_its_base_and_how_to_merge_it(tmp_path):
    fill(tmp_path, "adapter_model.safetensors", adapter_config=ADAPTER)
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} holds an adapter")
    assert "belongs to 'org/base'. Merge it into that first" in text
    assert "jaxft export --merge --checkpoint=" in text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["m-Q4.gguf"], "holds GGUF (m-Q4.gguf)"),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin"], "PyTorch's pickled weights"),
        (["model.pth"], "PyTorch's pickled weights"),
        (["consolidated.00.pth", "params.json"], "its makers' own layout"),
        (["consolidated.safetensors", "params.json"], "its makers' own layout"),
        (["tf_model.h5"], "TensorFlow's weights (tf_model.h5)"),
        (["flax_model.msgpack"], "Flax' weights (flax_model.msgpack)"),
        (["model.onnx", "model.onnx_data"], "holds ONNX (model.onnx)"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer but no model"),
        (["notes.txt"], "no model: neither config.json nor weights"),
        (["sub/config.json"], "did you mean"),
        ([], "is empty"),
    ],
)
def test_what_a_folder_holds_instead_of_a_model_is_said(tmp_path, names, words):
    text = said_of(fill(tmp_path, *names))
    assert text.startswith(str(tmp_path))
    assert words in text


def test_a_file_of_gguf_is_explained(tmp_path):
    fill(tmp_path, "m.gguf")
    with pytest.raises(ModelError, match=r"holds GGUF \(m\.gguf\)(.|\n)*gguf_file='m\.gguf'"):
        resolve(str(tmp_path / "m.gguf"))


def test_parts_of_a_run_name_the_run(tmp_path):
    run = tmp_path / "run"
    fill(run, "metrics.jsonl", environment={}, config={"model.path": "x"})
    assert "run that has saved no checkpoint yet" in said_of(run)
    for part in ("checkpoints", "model"):
        (run / part).mkdir()
    write_base(tmp_path / "base")
    shutil.copyfile(tmp_path / "base/config.json", run / "model/config.json")
    for part in ("checkpoints", "model"):
        assert f"name the run's folder, {run}" in said_of(run / part)


def test_shards_that_are_not_there_are_told_in_one_line(tmp_path):
    base = write_base(tmp_path / "base")
    names = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = {t: f"model-{i:05}-of-00021.safetensors" for i, t in enumerate(names, start=1)}
    fill(base, **{"model.safetensors.index": {"weight_map": shards}})
    text = said_of(base)
    assert "21 files named by model.safetensors.index.json are not there" in text
    assert "model-00001-of-00021.safetensors, model-00002-of-00021.safetensors" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    base = write_base(tmp_path / "base")
    (base / name).write_text(POINTER)
    text = said_of(base)
    assert name in text
    assert "git lfs pull" in text


def test_a_multimodal_model_is_called_one():
    idefics = {"text_config": {"model_type": "llama"}, "vision_config": {"hidden_size": 8}}
    with pytest.raises(ModelError) as caught:
        architecture_from_hf({"model_type": "idefics3", **idefics})
    text = str(caught.value)
    assert "'idefics3' is a multimodal model: a language model (llama) inside one" in text
    assert "vision_config" in text
    assert "Did you mean" not in text
    with pytest.raises(ModelError, match="'blip' is a multimodal model"):
        architecture_from_hf({"model_type": "blip", "vision_config": {}, "text_config": {}})
    with pytest.raises(ModelError, match="'t5' is an encoder and a decoder"):
        architecture_from_hf({"model_type": "t5", "is_encoder_decoder": True})


def test_folders_beside_a_missing_one_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demo", "runs/other", "runs/.hidden"):
        Path(name).mkdir(parents=True)
    for path, words in {
        "runs/dmeo": r"^There is no folder runs/dmeo\. Did you mean runs/demo\?",
        "runs/zzz": r"^There is no folder runs/zzz\. runs holds demo, other\.",
        "rums/demo": r"^There is no folder rums/demo\.",
        "./runs/dmeo/model": r"^There is no folder runs/dmeo/model, nor runs/dmeo\.",
        "rusn": r"^There is no folder rusn\. Did you mean runs\?",
    }.items():
        with pytest.raises(ModelError, match=words):
            jaxft.load(path)


def test_a_config_without_type_is_not_taken_for_a_model(tmp_path):
    fill(tmp_path, "pytorch_model.bin", config={"hidden_size": 8})
    with pytest.raises(ModelError, match="pickled"):
        read_config(tmp_path)
