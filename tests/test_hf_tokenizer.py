"""Real tokenizers survive a round trip; broken ones are explained."""

import functools
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from jaxft.errors import ModelError
from jaxft.hf.tokenizer import load_tokenizer, save_tokenizer, stop_ids

NAMES = ["models/stories260K", "tokenizers/gpt2", "tokenizers/qwen3-hf", "tokenizers/deepseek-r1"]
CHATS = NAMES[2:]
TEXTS = ["Hello  world 12", "\n\n- wörld,\t日本語 🙂", "<|im_start|>user\nhi<|im_end|></s>", ""]
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


@pytest.mark.parametrize("tokenizer", NAMES, indirect=True)
def test_a_saved_tokenizer_gives_the_same_ids_and_template(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, None)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(tokenizer(TEXTS[1])["input_ids"]) == tokenizer.decode(
        tokenizer(TEXTS[1])["input_ids"]
    )
    assert again.chat_template == tokenizer.chat_template
    assert len(again) == len(tokenizer)
    assert again.eos_token_id == tokenizer.eos_token_id
    if tokenizer.chat_template:
        assert again.apply_chat_template(MESSAGES) == tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("tokenizer", [NAMES[0]], indirect=True)
def test_the_template_used_goes_into_the_folder_and_not_into_the_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, TEMPLATE)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    again = load_tokenizer(tmp_path)
    assert again.chat_template == TEMPLATE
    rendered = again.apply_chat_template(MESSAGES, tokenize=False)
    assert rendered == "system: Be brief.\nuser: 2 + 2?\nassistant: 4\n"
    assert tokenizer.chat_template is None


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


def test_sentencepiece_alone_is_read_or_its_package_is_named(shared):
    folder = shared / "tokenizers" / "mistral-v3"
    if find_spec("sentencepiece"):
        assert load_tokenizer(folder)("Hello")["input_ids"] == [1, 23325]
    else:
        with pytest.raises(ModelError, match="pip install sentencepiece"):
            load_tokenizer(folder)


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


def test_nobody_is_advised_to_install_pytorch():
    done = subprocess.run(
        [sys.executable, "-c", "import jaxft.hf.tokenizer"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PyTorch" not in done.stdout + done.stderr


def test_other_advice_of_transformers_still_arrives():
    record = logging.makeLogRecord({"name": "transformers", "msg": "something else"})
    assert logging.getLogger("transformers").filter(record)
