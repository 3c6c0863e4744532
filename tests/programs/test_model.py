"""A loaded model as a notebook uses it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxft
from jaxft.errors import CheckpointError, ConfigError, ModelError
from jaxft.hf import folder
from jaxft.programs import description
from jaxft.programs.generate import Sampling
from jaxft.workdir.source import find_source
from tests.tiny_run import tiny_config, write_base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return jaxft.load(write_base(tmp_path_factory.mktemp("model") / "base"))


def test_logits_are_float32_for_every_position(model):
    logits = model(np.zeros((2, 5), np.int64))
    assert logits.shape == (2, 5, model.architecture.config.vocab)
    assert logits.dtype == np.float32


def test_tokens_out_of_range_or_shape_are_refused(model):
    vocab = model.architecture.config.vocab
    with pytest.raises(ValueError, match=f"the vocabulary has {vocab}"):
        model(np.full((1, 3), vocab))
    with pytest.raises(ValueError, match="expected integers"):
        model(np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="expected integers"):
        model(np.zeros((1, 3)))


@pytest.mark.slow(seconds=2)
def test_a_prompt_gives_a_text_and_a_batch_gives_a_list(model):
    chat = [{"role": "user", "content": "say abc"}]
    one = model.generate("say abc", max_new_tokens=4)
    assert isinstance(one, str)
    assert model.generate(["say abc", "a"], max_new_tokens=4)[0] == one
    answers = model.generate([chat, chat], max_new_tokens=4)
    assert answers == [model.generate(chat, max_new_tokens=4)] * 2
    assert model.generate([], max_new_tokens=4) == []


def test_chats_go_through_the_template_and_texts_do_not(model):
    ids = model.prompt_ids([{"role": "user", "content": "ab"}])
    assert model.tokenizer.decode(ids) == "<user>ab<end><assistant>"
    assert model.tokenizer.decode(model.prompt_ids("ab")) == "ab"


def test_a_prompt_that_cannot_be_answered_is_refused(model):
    limit = model.architecture.config.max_length
    with pytest.raises(ConfigError, match=f"context has {limit}"):
        model.generate("a", max_new_tokens=limit)
    with pytest.raises(ConfigError, match="no tokens"):
        model.generate("", max_new_tokens=1)


@pytest.mark.slow(seconds=2)
def test_dtypes_are_what_is_asked_for(model):
    half = jaxft.load(model.source.folder, dtypes="bfloat16")
    assert {array.dtype.name for array in half.params.values()} == {"bfloat16"}
    mixed = jaxft.load(model.source.folder, dtypes="mixed")
    assert {array.dtype.name for array in mixed.params.values()} == {"float32"}
    tokens = np.arange(8)[None]
    exact = np.asarray(model(tokens))
    for other in (half, mixed):
        # bfloat16 keeps 8 bits; a few layers add up to some hundredths.
        assert np.max(np.abs(other(tokens) - exact)) < 0.05 * np.max(np.abs(exact))


def test_a_source_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(ModelError, match="no folder"):
        jaxft.load(tmp_path / "nothing")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/model").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_source(tmp_path / "run")


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)])
def test_ids_without_a_token_are_never_generated(model, sampling):
    known = len(model.tokenizer)
    rows = model.architecture.config.vocab
    assert model.has_token.tolist() == [i < known for i in range(rows)]
    # Of two opposite rows one has the largest logit by far, whatever the hidden state.
    head = np.array(model.params["head.w"])
    head[rows - 2] = 1e3 * head[rows - 1]
    head[rows - 1] = -head[rows - 2]
    params = model.params | {"head.w": jax.numpy.array(head)}
    padded = dataclasses.replace(model, params=params)
    assert np.all(np.argmax(padded(np.arange(known)[None]), axis=-1) >= rows - 2)
    prompts = [[7, 8, 9], [10]]
    texts = padded.generate_from_ids(prompts, max_new_tokens=5, sampling=sampling)
    assert texts == model.generate_from_ids(prompts, max_new_tokens=5, sampling=sampling)


@pytest.mark.slow(seconds=4)
def test_a_text_is_continued_with_the_space_that_its_next_word_begins_with(shared):
    model = jaxft.load(shared / "models/stories260K")
    [prompt] = [model.prompt_ids("Once upon a time, there")]
    texts = [model.generate("Once upon a time, there", max_new_tokens=count) for count in (1, 8)]
    assert texts[0] == " was"
    whole = "Once upon a time, there" + texts[1]
    assert model.prompt_ids(whole)[: len(prompt)] == prompt
    assert model.prompt_ids(whole)[len(prompt)] == model.tokenizer.convert_tokens_to_ids("▁was")


def test_a_text_that_goes_on_does_not_end_with_the_token_that_the_tokenizer_puts_there(tmp_path):
    base = write_base(tmp_path / "base")
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<end>", "add_eos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<pad>"}))
    model = jaxft.load(base)
    assert model.tokenizer("ab").input_ids == [0, 5, 6, 1]
    assert model.prompt_ids("ab") == [0, 5, 6]
    # One that the writer of a prompt puts there is plain text.
    spelt = model.prompt_ids("ab<end>")
    assert 1 not in spelt
    assert model.tokenizer.decode(spelt[1:]).startswith("ab")


def test_a_folder_without_tokenizer_gives_logits_and_no_text(model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model.source.folder / name).read_bytes())
    bare = jaxft.load(tmp_path)
    tokens = np.arange(8)[None]
    assert np.array_equal(bare(tokens), model(tokens))
    for prompt in ("abc", [{"role": "user", "content": "abc"}]):
        with pytest.raises(ModelError, match=f"{tmp_path} has no tokenizer"):
            bare.generate(prompt, max_new_tokens=2)
    with pytest.raises(ModelError, match="has no tokenizer"):
        bare.generate_from_ids([[5, 6]], max_new_tokens=2)


@pytest.mark.parametrize("content", ["{", '{"model_type": "bert"}'])
def test_a_bad_config_is_what_is_reported_and_not_the_tokenizer(model, tmp_path, content):
    for file in model.source.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(content)
    for read in (jaxft.load, lambda path: jaxft.export(path, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"config\.json") as caught:
            read(tmp_path)
        assert "tokenizer" not in str(caught.value)


@pytest.mark.slow(seconds=6)
def test_a_command_reads_what_describes_its_model_once(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, train__steps=2)
    config.data.validation = str(tmp_path / "held_out.jsonl")
    base = tmp_path / "base"
    read, files = folder.read_json, []
    for module in (folder, description):
        monkeypatch.setattr(module, "read_json", lambda file: files.append(file) or read(file))
    jaxft.load(base).generate("say abc", max_new_tokens=2)
    assert files == [base / "config.json"]
    files.clear()
    jaxft.export(base, tmp_path / "out", on_log=lambda text: None)
    assert files == [base / "config.json"]
    files.clear()
    jaxft.evaluate(config)
    assert files == [base / "config.json"]
    files.clear()
    run = jaxft.train(config)
    # What the run keeps of the model is another folder, for its exports.
    assert [file for file in files if file.parent == base] == [base / "config.json"]
    files.clear()
    jaxft.export(run.workdir, tmp_path / "out", overwrite=True, on_log=lambda text: None)
    assert files == [run.workdir / "model/config.json", run.workdir / "model/tensor_dtypes.json"]
