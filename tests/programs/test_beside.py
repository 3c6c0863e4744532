"""Runs on multimodal folders, and exports in which only the text has changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.errors import ConfigError, ModelError
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.modules import CONFIG, WEIGHTS
from jaxft.hf.peft.read import read_adapter
from jaxft.hf.peft.write import write_adapter
from jaxft.hf.read import Entry
from jaxft.hf.save import save_params
from jaxft.hf.stored import INDEX, other_tensors
from jaxft.models.config import make_numerics
from jaxft.models.families import architecture_from_hf
from jaxft.programs.beside import FILES, find_others, note_others
from jaxft.programs.conversion import check, describe
from jaxft.programs.description import hf_config
from jaxft.programs.exporter import _check_apart
from jaxft.programs.folder import keep_model_files
from jaxft.workdir.source import Source
from jaxft.workdir.workdir import Workdir
from tests.oracle.cases import write_folder
from tests.oracle.towers import tokens, write_tower
from tests.tiny_run import crash, tiny_config, write_base

PROCESSOR = '{"image_mean": [0.5]}\n'


def write_whole(folder: Path, case: str) -> Path:
    """Writes a multimodal folder with a tokenizer and what a processor reads; returns it."""
    if not folder.exists():
        write_base(folder)
    write_tower(case, folder)
    (folder / FILES[0]).write_text(PROCESSOR)
    return folder


def stored(folder: Path) -> dict[str, tuple]:
    found = load_file(folder / "model.safetensors")
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def is_text(name: str) -> bool:
    return "language_model" in name or "lm_head" in name


def test_a_run_exports_the_whole_with_only_its_text_changed(tmp_path, monkeypatch):
    """Also one that is killed and goes on, byte for byte as one that was not."""
    keys = {"train__steps": 2, "train__save_every": 1, "optim__learning_rate": 1e-2}
    config = tiny_config(tmp_path, **keys)
    base = write_whole(tmp_path / "base", "llava")
    crash(monkeypatch, config, step=2)
    jaxft.train(config, resume=True)
    run, lines = tmp_path / "run", []
    out = jaxft.export(run, tmp_path / "out", verify=True, on_log=lines.append)
    jaxft.train(tiny_config(tmp_path, "undisturbed", **keys))
    undisturbed = jaxft.export(tmp_path / "undisturbed", tmp_path / "expected", on_log=lines.append)
    assert contents(out) == contents(undisturbed)
    before, after = stored(base), stored(out)
    rest = [name for name in before if not is_text(name)]
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == set(filter(is_text, before))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    assert (out / FILES[0]).read_text() == PROCESSOR
    assert any(
        line.startswith("Tensors beside the model") and line.endswith(f": {len(rest)}.")
        for line in lines
    )
    np.testing.assert_array_equal(jaxft.load(out)(tokens()), jaxft.load(run)(tokens()))
    # The rest has moved, and then is not the same.
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"other tensors are those of .*base.* with --base"):
        jaxft.export(run, tmp_path / "again")
    again = jaxft.export(run, tmp_path / "again", base=tmp_path / "moved", on_log=lines.append)
    assert stored(again) == after
    with pytest.raises(ConfigError, match="takes no other base"):
        jaxft.load(run, base=tmp_path / "moved")
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    tensors[rest[0]] = tensors[rest[0]] + 1
    save_file(tensors, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(ModelError, match=f"not the {len(rest)} beside which"):
        jaxft.export(run, tmp_path / "third", base=tmp_path / "moved")
    (run / "model" / "other_tensors.json").unlink()
    with pytest.raises(ModelError, match="does not say where the rest"):
        jaxft.export(run, tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.slow(seconds=15)
def test_an_adapter_is_merged_into_the_whole(tmp_path):
    config = tiny_config(tmp_path, train__steps=2, adapter__rank=2)
    base = write_whole(tmp_path / "base", "llava")
    jaxft.train(config)
    out = jaxft.export(tmp_path / "run", tmp_path / "out", merge=True, on_log=lambda text: None)
    before, after = stored(base), stored(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all("layers" in name and is_text(name) for name in changed)
    shutil.rmtree(out)
    adapter = jaxft.export(tmp_path / "run", out, on_log=lambda text: None)
    logits = jaxft.load(adapter)(tokens())
    np.testing.assert_allclose(logits, jaxft.load(tmp_path / "run")(tokens()), atol=1e-5)


def test_another_type_is_that_of_the_text_alone(tmp_path):
    base = write_whole(tmp_path / "base", "gemma3")
    out = jaxft.export(base, tmp_path / "out", dtype="bfloat16", on_log=lambda text: None)
    before = load_file(base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype.name == ("bfloat16" if is_text(name) else "float32")
        assert is_text(name) or value.tobytes() == before[name].tobytes()


def test_tensors_of_any_type_are_passed_through_into_shards(tmp_path):
    folder = write_tower("qwen3_vl", tmp_path)
    file = folder / "model.safetensors"
    odd = {"model.visual.steps": np.arange(5), "model.visual.mask": np.array([True, False, True])}
    save_file(load_file(file) | odd, file)
    architecture = architecture_from_hf(json.loads((folder / "config.json").read_text()))
    shapes = architecture.abstract(make_numerics("float32")).params
    params = {path: np.ones(spec.shape, np.float32) for path, spec in shapes.items()}
    others = other_tensors(folder, architecture.naming)
    target = tmp_path / "target"
    target.mkdir()
    arguments = {"dtypes": "float32", "others": others, "max_shard_bytes": 20_000}
    save_params(target, architecture.naming, params, **arguments)
    index = json.loads((target / INDEX).read_text())
    found = {n: x for shard in target.glob("*.safetensors") for n, x in load_file(shard).items()}
    assert found.keys() == index["weight_map"].keys() == load_file(file).keys()
    assert len(set(index["weight_map"].values())) > 2
    for name in others:
        assert found[name].tobytes() == load_file(file)[name].tobytes()
        assert found[name].dtype == load_file(file)[name].dtype
    assert save_params(target, architecture.naming, params, **arguments) == len(
        list(target.glob("*.safetensors"))
    )


def test_an_export_over_the_folder_that_holds_the_rest_is_refused(tmp_path):
    base = write_whole(tmp_path / "base", "llava")
    with pytest.raises(ModelError, match="holds what is exported"):
        jaxft.export(base, base, overwrite=True, on_log=lambda text: None)


def test_a_run_is_not_exported_over_the_folder_that_its_rest_lies_in(tmp_path):
    others = {"visual.w": Entry(tmp_path / "model.safetensors", "F32", (1,), 8, 12)}
    with pytest.raises(ModelError, match="holds what is exported"):
        _check_apart(tmp_path, others=others)


def test_bytes_of_a_file_that_became_shorter_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    with pytest.raises(ModelError, match="became shorter"):
        list(Entry(tmp_path / "file", "U8", (12,), 0, 12).parts())


def test_rows_of_new_tokens_are_said_in_the_config_of_the_text(tmp_path):
    source = Source(write_tower("gemma3", tmp_path))
    config = dataclasses.replace(source.architecture.config, vocab=128)
    grown = hf_config(source, dataclasses.replace(source.architecture, config=config))
    assert grown["text_config"]["vocab_size"] == 128 and "vocab_size" not in grown


def test_a_check_counts_the_text_and_the_whole(tmp_path):
    found = check(write_tower("gemma3", tmp_path))
    sizes = {name: x.size for name, x in load_file(tmp_path / "model.safetensors").items()}
    assert found.parameters + found.beside == sum(sizes.values())
    assert f"{found.parameters:,} parameters of text, {sum(sizes.values()):,} in" in describe(found)
    assert {line.state for line in found.lines if not line.ours} == {"passed through"}


def test_layers_that_guess_further_tokens_lie_beside_a_model_of_text_too(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    for folder in (base, run / "checkpoints"):
        folder.mkdir(parents=True)
    file = write_folder("qwen3_5_gqa", base) / "model.safetensors"
    source = Source(base)
    architecture = source.architecture
    assert not find_others(source, architecture)
    held = Source(run, checkpoints=run / "checkpoints")
    assert find_others(held, architecture) == {}  # started without weights
    note_others(source, architecture, run)
    file.rename(tmp_path / "moved")
    assert find_others(held, architecture) == {}  # nothing is missing of a base that is gone
    (tmp_path / "moved").rename(file)
    guess = {"mtp.fc.weight": np.ones((2, 4), np.float32)}
    save_file(load_file(file) | guess, file)
    note_others(source, architecture, run)
    assert find_others(held, architecture).keys() == guess.keys()
    assert hf_config(source, architecture).keys() == source.described.config.keys()
    assert {line.state for line in check(base).lines if not line.ours} == {"passed through"}
    save_file(load_file(file) | {"mtp.fc.weight": np.zeros((2, 4), np.float32)}, file)
    with pytest.raises(ModelError, match="1 tensors beside its model that are not the 1 beside"):
        find_others(held, architecture)


@pytest.mark.parametrize("random_init", [False, True])
def test_a_random_start_leaves_layers_that_guess_behind(tmp_path, random_init):
    base = write_base(tmp_path / "base")
    file = write_folder("qwen3_5_gqa", base) / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": np.ones((2, 4), np.float32)}, file)
    config = tiny_config(tmp_path, model__random_init=random_init)
    workdir, source = Workdir(path=tmp_path / "run"), Source(base)
    workdir.path.mkdir()
    tokenizer = source.described.load_tokenizer()
    keep_model_files(workdir, config, source, source.architecture, tokenizer, is_chat=False)
    held = Source(workdir.model, checkpoints=workdir.checkpoints)
    assert list(find_others(held, source.architecture)) == ["mtp.fc.weight"] * (not random_init)


def test_adapters_have_the_names_of_the_whole_and_are_read_in_all_spellings(tmp_path):
    folder = write_tower("llava", tmp_path)
    architecture = architecture_from_hf(json.loads((folder / "config.json").read_text()))
    params = architecture.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in params.items()}
    random = np.random.default_rng(0)
    arrays = {
        "layers.mlp.up.lora_a": random.normal(size=(2, 3, 32)).astype(np.float32),
        "layers.mlp.up.lora_b": random.normal(size=(2, 48, 3)).astype(np.float32),
    }
    adapter = Adapter(arrays, {"layers.mlp.up": 6.0})
    write_adapter(tmp_path, adapter, architecture.naming, shapes)
    tensors = load_file(tmp_path / WEIGHTS)
    start = "base_model.model.model.language_model.layers.{}.mlp.up_proj.lora_{}.weight"
    assert tensors.keys() == {start.format(layer, ab) for layer in (0, 1) for ab in "AB"}
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert targets == r"model\.language_model\.layers\.\d+\.mlp\.up_proj"
    old = {n.replace("model.language_model", "language_model.model"): x for n, x in tensors.items()}
    # Of the text model alone, whose modules the config names likewise.
    alone = {n.replace("model.language_model", "model"): x for n, x in tensors.items()}
    for names in (tensors, old, alone):
        save_file(names, tmp_path / WEIGHTS)
        if names is alone:
            config = json.loads((tmp_path / CONFIG).read_text())
            config["target_modules"] = targets.replace(r"language_model\.", "")
            (tmp_path / CONFIG).write_text(json.dumps(config))
        found = read_adapter(tmp_path, architecture.naming, shapes)
        assert found.arrays.keys() == arrays.keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(found.arrays[path], value)
