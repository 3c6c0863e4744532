"""Real tokenizers survive a round trip; broken ones are explained."""

import base64
import functools
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from jaxft.config import DataConfig
from jaxft.data import chat
from jaxft.data.template import resolve_template
from jaxft.errors import ModelError
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.tokenizer import add_special_tokens, load_tokenizer, stop_ids
from tests.tiny_run import write_base

CHATS = ["tokenizers/qwen3-hf", "tokenizers/deepseek-r1"]
NAMES = [
    "models/stories260K",
    *CHATS,
    "tokenizers/gpt2",
    "tokenizers/bert-base-uncased",
    "tokenizers/mistral-v3",
]
TEXTS = [
    "Hello  world 12",
    "\n\n- wörld,\t日本語 🙂",
    "<|im_start|>user\nhi<|im_end|></s>",
    "<s>User: hi</s>\n\nAssistant: [INST] x [/INST] y",
    " x\r\n\u200d\u0301ﬁ  ",
    "[CLS] a [MASK]<new>b",
    "",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

_cached = functools.cache(load_tokenizer)


@pytest.fixture
def tokenizer(request, shared) -> PreTrainedTokenizerBase:
    return _cached(shared / request.param)


def assert_same(again: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.chat_template == tokenizer.chat_template
    assert len(again) == len(tokenizer)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(again, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    template = resolve_template(tokenizer, DataConfig())
    assert resolve_template(again, DataConfig()) == template
    ids = chat.prompt_ids(tokenizer, MESSAGES, template=template)
    assert chat.prompt_ids(again, MESSAGES, template=template) == ids


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("tokenizer", NAMES, indirect=True)
def test_a_saved_tokenizer_gives_the_same_ids_and_template(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, None)
    assert_same(load_tokenizer(tmp_path), tokenizer)


@pytest.mark.slow(seconds=3, but=r"^gpt2$")
@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "mistral-v3"])
def test_added_tokens_survive_a_run_and_its_export(name, shared, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    size = len(tokenizer)
    known = tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids[0])
    assert add_special_tokens(tokenizer, ["<new>", known, "<other>"]) == [size, size + 1]
    assert add_special_tokens(tokenizer, ["<new>"]) == []
    assert tokenizer.convert_tokens_to_ids(["<new>", "<other>"]) == [size, size + 1]
    ids = tokenizer("a<new>b").input_ids
    assert size in ids
    assert "new" not in tokenizer.decode(ids, skip_special_tokens=True)
    for folder in (tmp_path / "run", tmp_path / "export"):
        folder.mkdir()
        save_tokenizer(tokenizer, folder, None)
        again = load_tokenizer(folder)
        assert_same(again, tokenizer)
        tokenizer = again


@pytest.mark.parametrize("tokenizer", [NAMES[0]], indirect=True)
def test_the_template_used_goes_into_the_folder_and_not_into_the_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, TEMPLATE)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    again = load_tokenizer(tmp_path)
    assert again.chat_template == TEMPLATE
    rendered = again.apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == "system: Be brief.\nuser: 2 + 2?\nassistant: 4\n"
    assert tokenizer.chat_template is None


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize("tokenizer", CHATS, indirect=True)
def test_another_template_replaces_the_own_one(tokenizer, tmp_path):
    own = tokenizer.chat_template
    save_tokenizer(tokenizer, tmp_path, TEMPLATE)
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE
    assert tokenizer.chat_template == own


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no tokenizer: none of .*model\.tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0", "added_tokens": []}'])
def test_a_broken_tokenizer_is_explained(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"The tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path)


def test_sentencepiece_alone_gives_the_ids_of_sentencepiece(shared):
    folder = shared / "tokenizers" / "mistral-v3"
    tokenizer = _cached(folder)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    generator = random.Random(0)
    parts = ["Hello", "world", " ", "  ", "    ", "\n", "\n\n\n", "\t", "é", "日本語", "🙂", "12"]
    parts += ["def f(x):", "the ", "'s", "http://", "ﬁ", "\u0301"]
    for _ in range(500):
        text = "x" + "".join(generator.choices(parts, k=generator.randint(1, 12)))
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)], text


def test_tiktoken_alone_is_read(tmp_path):
    words = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    lines = [f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = load_tokenizer(tmp_path)
    ids = [259, 32, *"é".encode()]
    assert tokenizer("hello é")["input_ids"] == ids
    assert tokenizer.decode(ids) == "hello é"


def test_code_in_the_folder_is_not_run(tmp_path, shared):
    source = shared / "models" / "stories260K" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(source.read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    try:
        load_tokenizer(tmp_path)
    except ModelError as error:
        assert "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


def test_stop_ids_are_those_of_all_three_places(shared):
    tokenizer = _cached(shared / NAMES[0])
    assert stop_ids(tokenizer, {}, {}) == (2,)
    assert stop_ids(tokenizer, {"eos_token_id": [7, 5]}, {"eos_token_id": 9}) == (2, 5, 7, 9)
    assert stop_ids(tokenizer, {"eos_token_id": None}, {"eos_token_id": 0}) == (0, 2)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("module", ["save_tokenizer", "tokenizer"])
def test_nobody_is_advised_to_install_pytorch(module):
    done = subprocess.run(
        [sys.executable, "-c", f"import jaxft.hf.{module}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PyTorch" not in done.stdout + done.stderr


def test_a_model_that_transformers_does_not_know_is_not_doubted(tmp_path, monkeypatch, caplog):
    folder = write_base(tmp_path / "base")
    (folder / "config.json").write_text('{"model_type": "kimi_k2"}')
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert load_tokenizer(folder).eos_token == "<end>"
    assert not caplog.records


def test_other_advice_of_transformers_still_arrives():
    record = logging.makeLogRecord({"name": "transformers", "msg": "something else"})
    assert logging.getLogger("transformers").filter(record)
