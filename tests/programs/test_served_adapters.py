"""Adapters after training: evaluated, asked, exported and merged, and trained on."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft import cli
from jaxft.cli.common import export_command
from jaxft.errors import CheckpointError, ConfigError, ModelError
from jaxft.programs.comparison import compare
from jaxft.programs.evaluation import evaluate, evaluate_pair
from jaxft.programs.exporter import _identity
from jaxft.training.state import TrainState
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.source import find_source
from tests.tiny_run import read_records, tiny_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def adapter_config(home, workdir, **changes):
    """Returns the config of a short run that learns an adapter."""
    keys = {
        "adapter__rank": 2,
        "optim__learning_rate": 2e-2,
        "data__validation": str(home / "held_out.jsonl"),
    }
    return tiny_config(home, workdir, **{**keys, **changes})


@pytest.fixture(scope="module")
def run(home):
    """A run of every kind of leaf but a start: its config and its result."""
    config = adapter_config(
        home,
        "run",
        adapter__dora=True,
        adapter__scaling="rslora",
        adapter__ranks="mlp.down=3",
        adapter__train="norm",
        adapter__added_rows=True,
        model__add_tokens="<new>",
    )
    return config, jaxft.train(config)


def logits_of(model):
    return np.asarray(model(np.arange(42).reshape(2, 21)))


@pytest.mark.slow(seconds=8)
def test_the_adapter_of_a_run_is_evaluated_as_it_was_in_training(run):
    config, result = run
    last = read_records(result.workdir / "eval.jsonl")[-1]
    found = evaluate(config, result.workdir, step="latest")["validation"].record()
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert evaluate(config)["validation"].record()["loss"] > found["loss"] + 0.1


def test_a_run_with_an_adapter_is_loaded_and_asked(run, home):
    _, result = run
    tuned, base = jaxft.load(result.checkpoint), jaxft.load(home / "base")
    assert np.max(np.abs(logits_of(tuned)[..., :64] - logits_of(base))) > 0.1
    assert len(tuned.generate("say abc", max_new_tokens=3)) <= 3


def test_a_base_that_has_moved_is_named(run, home, tmp_path):
    _, result = run
    shutil.copytree(result.workdir, tmp_path / "run")
    moved = shutil.copytree(home / "base", tmp_path / "moved")
    note = tmp_path / "run/model/adapter.json"
    note.write_text(note.read_text().replace(str(home / "base"), str(tmp_path / "gone")))
    with pytest.raises(ModelError, match=r"an adapter of .*gone, which cannot be read.*--base"):
        jaxft.load(tmp_path / "run")
    there = jaxft.load(tmp_path / "run", base=moved)
    np.testing.assert_array_equal(logits_of(there), logits_of(jaxft.load(result.workdir)))


def test_other_weights_in_the_place_of_the_base_are_noticed(run, home, tmp_path):
    _, result = run
    jaxft.export(home / "base", tmp_path / "other", dtype="bfloat16", on_log=lambda text: None)
    other = {"base": tmp_path / "other"}
    for read in (
        lambda: jaxft.load(result.workdir, **other),
        lambda: jaxft.load(result.workdir, dtypes="bfloat16", **other),
        lambda: jaxft.export(result.workdir, tmp_path / "out", merge=True, **other),
        lambda: jaxft.export(result.workdir, tmp_path / "out", **other),
    ):
        with pytest.raises(CheckpointError, match=r"not those that the adapter of .* trained on"):
            read()


def test_a_base_of_another_shape_is_no_base_of_the_adapter(run, home, tmp_path):
    other = shutil.copytree(home / "base", tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"another model than .*other: layers 2, not 3\."):
        jaxft.load(run[1].workdir, base=other)


def test_an_adapter_that_a_config_names_is_evaluated(run, home):
    config, result = run
    named = adapter_config(home, "new", adapter__rank=0, adapter__path=str(result.workdir))
    found, expected = evaluate(named), evaluate(config, result.workdir)
    assert found["validation"].record()["loss"] == expected["validation"].record()["loss"]
    with pytest.raises(ConfigError, match="--base names another model"):
        evaluate(named, base=str(home / "base"))


def test_weights_in_other_codes_than_in_training_are_said(run, capfd):
    config, result = run
    model = dataclasses.replace(config.model, quantise="int8")
    quantised = dataclasses.replace(config, model=model, adapter=jaxft.RunConfig().adapter)
    assert evaluate(quantised, result.workdir)
    said = "model.quantise is 'int8' here; the run was trained with ''"
    assert said in " ".join(capfd.readouterr().err.split())


def test_a_folder_of_a_model_and_an_adapter_is_neither(exported, home, tmp_path):
    both = shutil.copytree(home / "base", tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(exported[0] / name, both)
    with pytest.raises(ModelError, match=r"holds a model and an adapter.*which of the two"):
        jaxft.load(both)


def test_what_a_command_line_says_of_adapters(run, exported, tmp_path, capfd):
    workdir = shutil.copytree(run[1].workdir, tmp_path / "run")
    assert export_command(workdir).endswith(f"--output={workdir}-adapter --verify")
    note = workdir / "model/adapter.json"
    described = json.loads(note.read_text())
    described["adaptation"]["sites"] = {}
    note.write_text(json.dumps(described))
    assert export_command(workdir).endswith(f"--output={workdir}-model --verify --merge")
    arguments = ["convert", str(exported[0]), f"--output={tmp_path / 'out'}"]
    assert cli.main(arguments) == 2
    assert "jaxft export --merge" in capfd.readouterr().err


def test_an_export_goes_on_only_beside_the_same_adapter(exported):
    source = find_source(exported[0])
    assert any("adapter_config.json" in str(found[0]) for found in _identity(source))


def test_an_adapter_is_no_model_to_start_from(run, home):
    _, result = run
    config = tiny_config(home, "next", model__path=str(result.workdir))
    with pytest.raises(ConfigError, match=r"an adapter, not a whole model.*adapter.path=") as error:
        jaxft.train(config)
    assert f"jaxft export --merge --checkpoint={result.workdir}" in str(error.value)


def test_a_whole_model_takes_no_base(home):
    with pytest.raises(ConfigError, match="is a whole model and no adapter"):
        jaxft.load(home / "base", base=home / "base")


@pytest.fixture(scope="module")
def exported(run, home):
    """The adapter of the run in PEFT's format, and what was said."""
    lines: list[str] = []
    folder = jaxft.export(run[1].workdir, home / "adapter", verify=True, on_log=lines.append)
    return folder, lines


@pytest.mark.slow(seconds=2)
def test_a_run_leaves_its_adapter_as_a_folder_that_is_loaded_again(run, exported, home):
    _, result = run
    folder, lines = exported
    assert lines[-1].startswith("Verified: loaded the adapter again. Largest difference of logits")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "base")
    files = {file.name for file in folder.iterdir()}
    assert files >= {"adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"}
    assert not files & {"config.json", "model.safetensors"}
    tuned, again = jaxft.load(result.workdir), jaxft.load(folder)
    np.testing.assert_allclose(logits_of(again), logits_of(tuned), atol=1e-4)
    assert again.tokenizer.convert_tokens_to_ids("<new>") == 42


def test_rows_of_added_tokens_that_did_not_train_go_with_the_adapter(run, tmp_path):
    shutil.copytree(run[1].workdir, tmp_path / "run")
    note = tmp_path / "run/model/adapter.json"
    described = json.loads(note.read_text())
    described["adaptation"]["rows"] = []
    note.write_text(json.dumps(described))
    folder = jaxft.export(tmp_path / "run", tmp_path / "out", on_log=lambda text: None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config["trainable_token_indices"].values()) == [[42], [42]]
    written = load_file(folder / "adapter_model.safetensors")
    [row] = written["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    known = load_file(run[1].workdir.parent / "base/model.safetensors")["lm_head.weight"][:42]
    np.testing.assert_allclose(row, known.mean(0), atol=1e-6)


@pytest.mark.slow(seconds=3)
def test_an_adapter_of_others_is_evaluated_on_a_named_base(run, exported, home, tmp_path, capfd):
    config, result = run
    folder = shutil.copytree(exported[0], tmp_path / "adapter")
    described = json.loads((folder / "adapter_config.json").read_text())
    renamed = json.dumps(described | {"base_model_name_or_path": "org/another"})
    (folder / "adapter_config.json").write_text(renamed)
    find_source(folder, base=str(home / "base"))
    assert "names org/another as its base, and is put beside" in capfd.readouterr().err
    described["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"does not say of which model.*--base"):
        evaluate(config, folder)
    base = str(home / "base")
    a, b = (evaluate(config, path, base=base)["validation"] for path in (folder, result.workdir))
    assert "as its base, and is put" not in capfd.readouterr().err
    assert a.sums.loss.value == pytest.approx(b.sums.loss.value, rel=1e-5)


def test_a_base_with_too_few_rows_is_said_to_be_of_another_adapter(exported, home, tmp_path):
    other = shutil.copytree(home / "base", tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(described | {"vocab_size": 16}))
    with pytest.raises(ModelError, match=r"is an adapter of another model than .*other: .*16 rows"):
        jaxft.load(exported[0], base=other)


@pytest.mark.slow(seconds=4)
def test_two_adapters_of_one_base_are_compared(run, exported):
    config, result = run
    pair = evaluate_pair(config, exported[0], result.workdir, step="5")
    difference = compare(*pair)["validation"].differences["loss"]
    assert difference.high > difference.value > 0  # step 8 learnt more than step 5


@pytest.mark.slow(seconds=4)
def test_a_base_is_held_as_it_is_beside_the_adapter_it_is_compared_with(home, tmp_path, capfd):
    config = adapter_config(home, "beside", adapter__rank=0, model__dtypes="mixed")
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(home / "base"),
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    pairs = {"A": np.ones((2, 32), np.float32), "B": np.zeros((32, 2), np.float32)}
    tensors = {name.format(layer, part): pairs[part] for layer in (0, 1) for part in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for pair in ((home / "base", tmp_path), (tmp_path, home / "base")):
        difference = compare(*evaluate_pair(config, *pair))["validation"].differences["loss"]
        assert difference.low == difference.high == 0  # an adapter that has learnt nothing
        assert "base is held as the base of" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow(seconds=5)
def test_an_adapter_is_merged_into_the_weights_of_its_base(run, exported, home, tmp_path):
    _, result = run
    lines: list[str] = []
    out = jaxft.export(
        result.workdir, tmp_path / "out", merge=True, verify=True, on_log=lines.append
    )
    assert "Each is equal once rounded to float32" in lines[-2]
    assert lines[-1].startswith("Largest difference of logits, of 128 random tokens:")
    tuned, whole = jaxft.load(result.workdir), jaxft.load(out)
    np.testing.assert_allclose(logits_of(whole), logits_of(tuned), atol=1e-4)
    before, after = (load_file(f / "model.safetensors") for f in (home / "base", out))
    assert before.keys() == after.keys()
    # What has no adapter is the base's own, the rows of other tokens too.
    name = "model.embed_tokens.weight"
    assert before[name][:42].tobytes() == after[name][:42].tobytes()
    again = jaxft.export(exported[0], tmp_path / "again", merge=True, on_log=lambda text: None)
    for name, tensor in load_file(again / "model.safetensors").items():
        np.testing.assert_allclose(tensor, after[name], atol=1e-5)


@pytest.mark.slow(seconds=2)
def test_the_name_of_a_run_as_base_is_said_to_be_for_jaxft_alone(run, home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "whole/model")
    state = TrainState(1, jaxft.load(home / "base").params, {}, {"count": np.int32(1)})
    with Checkpoints(tmp_path / "whole/checkpoints") as checkpoints:
        checkpoints.save(state, progress=Progress(data={}), config={})
    lines: list[str] = []
    whole = tmp_path / "whole"
    jaxft.export(run[1].workdir, tmp_path / "out", base=whole, on_log=lines.append)
    assert lines[-1].startswith(f"The adapter names {whole} as its base, the folder of a run")


def test_a_merge_says_what_rounding_leaves_of_the_adapter(run, tmp_path):
    lines: list[str] = []
    jaxft.export(
        run[1].workdir, tmp_path / "out", merge=True, dtype="bfloat16", on_log=lines.append
    )
    assert re.search(r"adapter adds to weights, (99|100)\.\d% is left once rounded", lines[-2])
    assert "between the model with its adapter and the merged one" in lines[-1]


def test_exports_that_cannot_be_are_refused(run, home, tmp_path):
    with pytest.raises(ConfigError, match="a whole model: there is no adapter to merge"):
        jaxft.export(home / "base", tmp_path / "out", merge=True)
    with pytest.raises(ConfigError, match="--dtype is for --merge"):
        jaxft.export(run[1].workdir, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ModelError, match="holds what is exported"):
        jaxft.export(run[1].workdir, home, merge=True, overwrite=True)


@pytest.mark.slow(seconds=15)
def test_training_goes_on_from_an_adapter_and_is_resumed(run, exported, home):
    _, first = run
    before = read_records(first.workdir / "eval.jsonl")[-1]
    config = adapter_config(
        home, "further", adapter__rank=0, adapter__path=str(exported[0]), train__steps=2
    )
    jaxft.train(config)
    config.train.steps = 3
    exported[0].rename(home / "gone")  # checkpoints hold all of it
    result = jaxft.train(config, resume=True)
    (home / "gone").rename(exported[0])
    start, *_, end = read_records(result.workdir / "eval.jsonl")
    assert start["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert end["loss"] < start["loss"]
    found = evaluate(config, result.workdir, step="latest")["validation"].record()
    assert found["loss"] == pytest.approx(end["loss"], rel=1e-6)


@pytest.mark.slow(seconds=12)
def test_preferences_are_compared_with_the_adapter_that_training_went_on_from(run, home):
    rows = [{"prompt": f"say {n}", "chosen": "abc", "rejected": "cba"} for n in range(12)]
    pairs = home / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = adapter_config(
        home,
        "preferred",
        adapter__rank=0,
        adapter__path=str(run[1].workdir),
        objective__name="dpo",
        data__train=str(pairs),
        data__validation=str(pairs),
        train__steps=2,
    )
    result = jaxft.train(config)
    start, *_, end = read_records(result.workdir / "eval.jsonl")
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-6) and end["loss"] < start["loss"]
    # Named by the config, or by the note of the run.
    assert evaluate(config, result.workdir)["validation"].sums.loss.value == pytest.approx(
        end["loss"]
    )
    config.model.path, config.adapter.path = str(result.workdir), ""
    assert evaluate(config)["validation"].sums.loss.value == pytest.approx(end["loss"])


def test_a_run_does_not_overwrite_the_adapter_that_it_goes_on_from(run, home):
    _, result = run
    for path in (result.workdir, result.checkpoint):
        config = adapter_config(home, "run", adapter__rank=0, adapter__path=str(path))
        with pytest.raises(ConfigError, match=r"train\.workdir and adapter\.path are the same"):
            jaxft.train(config, overwrite=True)
    assert result.checkpoint.is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter__rank": 4}, "adapter.rank is set, but adapter.path names an adapter"),
        ({"adapter__train": "norm"}, "adapter.train is set, but adapter.path"),
        ({"model__random_init": True}, "leave model.random_init out"),
        ({"adapter__path": "base"}, "is a whole model, not an adapter"),
    ],
)
def test_an_adapter_to_go_on_from_has_its_own_keys(home, run, changes, said):
    path = changes.get("adapter__path") or run[1].workdir
    keys = {"adapter__rank": 0, **changes, "adapter__path": str(home / path)}
    with pytest.raises(ConfigError, match=said):
        jaxft.train(adapter_config(home, "refused", **keys))
