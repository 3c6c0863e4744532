"""Tokens added to a tokenizer: rows for them, in memory, in a run and in what it exports."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.config import RunConfig, from_dict
from jaxft.errors import ModelError
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.tokenizer import add_special_tokens, load_tokenizer
from jaxft.models.config import Numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.vocabulary import ROWS_MULTIPLE, tokens_beyond, with_rows_for
from jaxft.programs.description import load_model_tokenizer
from jaxft.programs.evaluation import evaluate
from jaxft.programs.trainer import train
from jaxft.programs.weights import load_weights
from jaxft.training.program import make_placement
from jaxft.workdir.source import Source, find_source
from tests.oracle.cases import CASES, llama_tensors
from tests.tiny_run import (
    assert_same_arrays,
    read_metrics,
    read_records,
    tiny_config,
    write_base,
)

ROWS = 64
KNOWN = 42
NEW = [f"<new{i}>" for i in range(30)]
GROWN = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of 64 rows with a tokenizer of 42 tokens."""
    return write_base(tmp_path_factory.mktemp("vocabulary") / "base")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model and data of this file's runs: answers are tokens that the model has no rows for."""
    home = tmp_path_factory.mktemp("home")
    tiny_config(home)
    for name in ("train", "held_out"):
        lines = []
        for number, token in enumerate(NEW[-16:]):
            chat = [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": f"a{token}"},
            ]
            lines.append(json.dumps({"messages": chat}) + "\n")
        (home / f"{name}.jsonl").write_text("".join(lines))
    return home


def run_config(home, workdir, **changes):
    config = tiny_config(home, workdir, **{"train__steps": 4} | changes)
    config.model.add_tokens = ", ".join(NEW)
    config.data.validation = str(home / "held_out.jsonl")
    return config


@pytest.fixture(scope="module")
def finished(home):
    return train(run_config(home, "finished"))


def with_tokens(folder, target, tokens):
    """Copies a model's folder, with a tokenizer that somebody added tokens to."""
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    tokenizer = load_tokenizer(folder)
    add_special_tokens(tokenizer, tokens)
    save_tokenizer(tokenizer, target, None)
    return target


def test_a_tokenizer_that_fits_changes_nothing(base):
    architecture = jaxft.load(base).architecture
    tokenizer = load_tokenizer(base)
    assert len(tokenizer) == KNOWN
    assert with_rows_for(architecture, tokenizer) is architecture
    add_special_tokens(tokenizer, NEW[: ROWS - KNOWN])
    assert with_rows_for(architecture, tokenizer) is architecture


def test_added_tokens_get_rows_and_a_base_vocabulary_beyond_the_rows_is_refused(base):
    tokenizer = load_tokenizer(base)
    architecture = architecture_from_hf(CASES["gqa"])
    add_special_tokens(tokenizer, NEW[: ROWS - KNOWN + 1])
    assert tokens_beyond(tokenizer, ROWS) == {NEW[ROWS - KNOWN]: ROWS}
    assert with_rows_for(architecture, tokenizer).config.vocab == ROWS + ROWS_MULTIPLE
    smaller = architecture_from_hf(CASES["gqa"] | {"vocab_size": KNOWN - 1})
    words = rf"up to {KNOWN - 1}, .* {KNOWN - 1} rows.*model\.tokenizer"
    with pytest.raises(ModelError, match=words):
        with_rows_for(smaller, tokenizer)


@pytest.mark.parametrize("case", ["gqa", "mqa_tied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
@pytest.mark.parametrize("rows", [64, 62])
def test_old_rows_keep_their_bits_and_new_ones_are_their_mean(case, strategy, rows, tmp_path):
    config = CASES[case] | {"vocab_size": rows}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors(config), tmp_path / "model.safetensors")
    stored = architecture_from_hf(config)
    sharded = {"strategy": strategy} | ({"mesh.tensor": 4} if strategy == "fsdp_tp" else {})
    placement = make_placement(from_dict(sharded))
    grown = architecture_from_hf(CASES[case] | {"vocab_size": 192})
    source = find_source(tmp_path)
    abstract = grown.abstract(Numerics())
    shardings = placement.shardings(abstract.params, abstract.axes)
    params = load_weights(source, grown, abstract, shardings)
    abstract = stored.abstract(Numerics())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = load_weights(source, stored, abstract, dict.fromkeys(abstract.params, one))
    assert params.keys() == expected.keys()
    tables = {"embed.w"} if case == "mqa_tied" else {"embed.w", "head.w"}
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(shardings[path], array.ndim), path
        old, new = np.asarray(expected[path]), np.asarray(array)
        assert len(new) == (192 if path in tables else len(old))
        assert new[: len(old)].tobytes() == old.tobytes()
        if path in tables:
            mean = np.broadcast_to(old.astype(np.float64).mean(0), new[rows:].shape)
            np.testing.assert_allclose(new[rows:], mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", ["gqa", "mqa_tied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp_tp"])
def test_new_tokens_take_rows_of_padding_as_the_mean_of_rows_with_tokens(case, strategy, tmp_path):
    config = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = llama_tensors(config)
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name][KNOWN:] = 0
        tensors[name][50:] = 7.0  # padding that something else has touched
    save_file(tensors, tmp_path / "model.safetensors")
    base = load_tokenizer(write_base(tmp_path / "base"))
    new = add_special_tokens(base, NEW[:3])
    assert new == [KNOWN, KNOWN + 1, KNOWN + 2]
    architecture = architecture_from_hf(config)
    sharded = {"strategy": strategy} | ({"mesh.tensor": 4} if strategy == "fsdp_tp" else {})
    placement = make_placement(from_dict(sharded))
    abstract = architecture.abstract(Numerics())
    shardings = placement.shardings(abstract.params, abstract.axes)
    source = find_source(tmp_path)
    given = {"tokenizer": base, "new_tokens": new}
    params = load_weights(source, architecture, abstract, shardings, **given)
    plain = load_weights(source, architecture, abstract, shardings)
    tables = {"embed.w"} if case == "mqa_tied" else {"embed.w", "head.w"}
    for path, array in params.items():
        old, found = np.asarray(plain[path]), np.asarray(array)
        assert array.sharding.is_equivalent_to(shardings[path], array.ndim), path
        if path not in tables:
            assert found.tobytes() == old.tobytes()
            continue
        mean = np.broadcast_to(old[:KNOWN].astype(np.float64).mean(0), (3, old.shape[1]))
        np.testing.assert_allclose(found[new], mean, rtol=0, atol=1e-7)
        kept = np.delete(np.arange(ROWS), new)
        assert found[kept].tobytes() == old[kept].tobytes()


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_begins_with_mean_rows_for_tokens_in_padding_and_exports_them(home, tied, capfd):
    name = f"padded_{tied}"
    model = home / name
    shutil.copytree(home / "base", model)
    tensors = load_file(model / "model.safetensors")
    described = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (model / "config.json").write_text(json.dumps(described))
    if tied:
        del tensors["lm_head.weight"]
    tables = tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}
    for table in tables:
        tensors[table][KNOWN:] = 0
    save_file(tensors, model / "model.safetensors")
    # A learning rate of nothing: what is exported is what the run began with.
    config = run_config(home, f"run_{name}", optim__learning_rate=1e-30)
    config.model.path, config.optim.weight_decay = str(model), 0.0
    config.train.steps, config.train.save_every = 4, 2
    finished = train(config)
    assert "row of padding in the embedding: 22" in capfd.readouterr().err
    exported = jaxft.export(finished.checkpoint, home / f"out_{name}")
    found = load_file(exported / "model.safetensors")
    for table in tables:
        old = tensors[table][:KNOWN].astype(np.float64)
        assert np.array_equal(found[table][:KNOWN], tensors[table][:KNOWN])
        rows = found[table][KNOWN:]
        assert len(rows) == GROWN - KNOWN
        mean = np.broadcast_to(old.mean(0), rows.shape)
        np.testing.assert_allclose(rows, mean, rtol=0, atol=1e-7)
    first = read_records(finished.workdir / "eval.jsonl")[0]
    assert evaluate(config)["validation"].sums.loss.value == pytest.approx(first["loss"], rel=1e-6)
    # Resumed, with the rows of a checkpoint and no new ones.
    shutil.copytree(finished.checkpoint, home / f"four_{name}")
    shutil.rmtree(finished.checkpoint)
    assert train(config, resume=True).step == 4
    assert_same_arrays(finished.checkpoint, home / f"four_{name}")


def test_rows_beyond_the_tokenizer_are_imported_and_exported(base, tmp_path):
    folder = jaxft.export(base, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == ROWS > KNOWN
    theirs, ours = (load_file(path / "model.safetensors") for path in (base, folder))
    assert {name: array.tobytes() for name, array in theirs.items()} == {
        name: array.tobytes() for name, array in ours.items()
    }


def test_a_folder_whose_tokenizer_was_given_tokens_is_loaded_and_exported(base, tmp_path, capfd):
    folder = with_tokens(base, tmp_path / "more", NEW)
    model, small = jaxft.load(folder), jaxft.load(base)
    assert "embedding: 8. It grows from 64 to 128 rows" in capfd.readouterr().err
    tokens = np.random.default_rng(0).integers(0, ROWS, (2, 24))
    logits = np.asarray(model(tokens))
    assert logits.shape[-1] == GROWN
    assert np.array_equal(logits[..., :ROWS], np.asarray(small(tokens)))
    exported = jaxft.export(folder, tmp_path / "out")
    assert json.loads((exported / "config.json").read_text())["vocab_size"] == GROWN
    again = jaxft.load(exported)
    # The export has grown already: only what it was made of says so.
    assert capfd.readouterr().err.count("grows") == 1
    assert np.array_equal(np.asarray(again(tokens)), logits)
    assert again.tokenizer(NEW[-1]).input_ids == [KNOWN + len(NEW) - 1]


def test_a_run_adds_tokens_says_so_and_keeps_the_grown_description(home, finished, capfd):
    train(run_config(home, "said", train__steps=2), overwrite=True)
    said = capfd.readouterr().err
    assert "added to the tokenizer: 30" in said
    assert "8. It grows from 64 to 128 rows, each new one the mean of the old ones." in said
    config, original = (
        json.loads((folder / "config.json").read_text())
        for folder in (finished.workdir / "model", home / "base")
    )
    assert config == original | {"vocab_size": GROWN}
    assert list(config) == list(original)
    model = jaxft.load(finished.checkpoint)
    assert model.params["embed.w"].shape[0] == GROWN
    assert model.tokenizer(NEW[-1]).input_ids == [KNOWN + len(NEW) - 1]
    before, after = (
        read_records(finished.workdir / "eval.jsonl")[number]["loss"] for number in (0, -1)
    )
    assert after < before


def test_evaluating_before_and_after_gives_what_the_run_recorded(home, finished):
    config = run_config(home, "evaluated")
    first, *_, last = read_records(finished.workdir / "eval.jsonl")
    loss = evaluate(config)["validation"].sums.loss.value
    assert loss == pytest.approx(first["loss"], rel=1e-6)
    # A checkpoint has its tokenizer and description beside it.
    config.model.add_tokens, config.model.tokenizer = "", str(home / "nowhere")
    loss = evaluate(config, finished.checkpoint)["validation"].sums.loss.value
    assert loss == pytest.approx(last["loss"], rel=1e-6)


def test_a_run_with_added_tokens_is_resumed_bit_for_bit(home, finished):
    config = run_config(home, "parts", train__save_every=2)
    train(config)
    folder = home / "parts/checkpoints"
    shutil.rmtree(folder / "4")
    assert train(config, resume=True).step == 4
    assert_same_arrays(folder / "4", finished.checkpoint)
    assert read_metrics(home / "parts") == read_metrics(finished.workdir)


def test_an_export_after_growth_is_a_model_of_its_own(finished, tmp_path):
    folder = jaxft.export(finished.checkpoint, tmp_path / "out", verify=True)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == GROWN
    model, again = jaxft.load(finished.checkpoint), jaxft.load(folder)
    tokens = np.arange(KNOWN + len(NEW))[None]
    assert np.array_equal(np.asarray(model(tokens)), np.asarray(again(tokens)))
    assert again.tokenizer(NEW).input_ids == [[KNOWN + i] for i in range(len(NEW))]
    assert again.template.control.ids[NEW[3]] == KNOWN + 3


def test_tokens_for_which_there_is_room_leave_the_weights_and_config_as_they_are(home):
    config = run_config(home, "room", train__steps=2)
    config.model.add_tokens = NEW[-1]
    result = train(config)
    kept = (result.workdir / "model/config.json").read_bytes()
    assert kept == (home / "base/config.json").read_bytes()
    model = jaxft.load(result.checkpoint)
    assert model.architecture.config.vocab == ROWS
    assert model.tokenizer(NEW[-1]).input_ids == [KNOWN]


def test_tokens_that_are_there_already_are_named(base, capfd):
    config = RunConfig()
    config.model.add_tokens = "<end>,<new>"
    tokenizer, new = load_model_tokenizer(Source(base), config.model)
    assert tokenizer.convert_ids_to_tokens(new) == ["<new>"]
    assert "that the tokenizer has already: <end>." in " ".join(capfd.readouterr().err.split())


def test_a_tokenizer_that_gives_other_ids_is_told(base, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = RunConfig()
    config.model.tokenizer = str(other)
    load_model_tokenizer(Source(base), config.model)
    assert not capfd.readouterr().err
    file = other / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    letters = [token for token in vocabulary if len(token) == 1]
    for letter, number in zip(letters, [vocabulary[x] for x in reversed(letters)], strict=True):
        vocabulary[letter] = number
    file.write_text(json.dumps(described))
    load_model_tokenizer(Source(base), config.model)
    same = KNOWN - len(letters) + len(letters) % 2
    said = " ".join(capfd.readouterr().err.split())
    assert f"has {same} of {KNOWN} tokens under the ids" in said
    config.model.random_init = True
    load_model_tokenizer(Source(base), config.model)
    assert not capfd.readouterr().err


def test_random_weights_have_the_rows_from_the_start(home, capfd):
    result = train(run_config(home, "random", train__steps=2, model__random_init=True))
    assert "It grows from 64 to 128 rows.\n" in capfd.readouterr().err
    assert jaxft.load(result.checkpoint).params["head.w"].shape[0] == GROWN
