"""What is written of a tokenizer: its own files, or others that every reader understands."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.hf.tokenizer import (
    add_special_tokens,
    decode_continuation,
    load_tokenizer,
    without_appended,
)
from tests.tiny_run import write_base

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def change_settings(folder: Path, **settings: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the files of a tokenizer by name."""
    model = ("config.json", "generation_config.json", "model.safetensors", "NOTE.md", "golden")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.relative_to(folder).parts[0] not in model
    }


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", ["gpt2", "qwen3-hf", "bert-base-uncased"])
def test_files_of_an_unchanged_tokenizer_are_copied(name, shared, out):
    source = shared / "tokenizers" / name
    save_tokenizer(load_tokenizer(source), out)
    assert files_of(out) == files_of(source)


def test_every_file_of_an_unchanged_tokenizer_is_copied(shared, out, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shared / "models/stories260K", source)
    change_settings(source, legacy=True, own="kept")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (templates / "tool_use.jinja").write_text("{{ tools }}" + TEMPLATE)
    save_tokenizer(load_tokenizer(source), out)
    assert files_of(out) == files_of(source)
    assert {"tokenizer.model", "special_tokens_map.json"} < files_of(out).keys()
    # The template used is the default one: a run on chats leaves all as it is.
    save_tokenizer(load_tokenizer(source), out, TEMPLATE)
    assert files_of(out) == files_of(source)


def test_added_tokens_leave_class_and_words_of_the_source(base, out):
    words = {"additional_special_tokens": ["<user>"], "own": "kept", "add_bos_token": False}
    change_settings(base, **words)
    tokenizer = load_tokenizer(base)
    add_special_tokens(tokenizer, ["<new>"])
    save_tokenizer(tokenizer, out)
    settings = read_settings(out)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words.items() <= settings.items()
    assert "extra_special_tokens" not in settings
    assert settings["added_tokens_decoder"]["42"]["content"] == "<new>"
    assert settings["added_tokens_decoder"]["42"]["special"]
    assert json.loads((out / "special_tokens_map.json").read_text())["eos_token"] == "<end>"
    assert (out / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert AutoTokenizer.from_pretrained(out)("<new>").input_ids == [42]


def test_a_vocabulary_of_pieces_stays_and_names_the_added_tokens_beside_it(shared, out):
    source = shared / "models/stories260K"
    tokenizer = load_tokenizer(source)
    add_special_tokens(tokenizer, ["<new>"])
    save_tokenizer(tokenizer, out)
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert json.loads((out / "added_tokens.json").read_text()) == {"<new>": 512}
    assert read_settings(out)["add_bos_token"]


def test_words_that_transformers_5_alone_knows_are_not_passed_on(base, out):
    change_settings(base, tokenizer_class="TokenizersBackend", extra_special_tokens=["<user>"])
    save_tokenizer(load_tokenizer(base), out)
    settings = read_settings(out)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<user>"]
    assert "extra_special_tokens" not in settings


@pytest.mark.parametrize("in_files", [False, True])
def test_all_named_templates_are_kept(base, out, in_files):
    named = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE, "rag": "rag " + TEMPLATE}
    (base / "chat_template.jinja").unlink()
    if in_files:
        (base / "additional_chat_templates").mkdir()
        (base / "chat_template.jinja").write_text(named["default"])
        for name in ("tool_use", "rag"):
            (base / f"additional_chat_templates/{name}.jinja").write_text(named[name])
    else:
        listed = [{"name": name, "template": text} for name, text in named.items()]
        change_settings(base, chat_template=listed)
    tokenizer = load_tokenizer(base)
    save_tokenizer(tokenizer, out, named["default"])
    assert files_of(out) == files_of(base)
    add_special_tokens(tokenizer, ["<new>"])
    save_tokenizer(tokenizer, out)
    assert load_tokenizer(out).chat_template == named
    # With tools a program takes tool_use: it must not find a template that was not trained.
    save_tokenizer(tokenizer, out, "own " + TEMPLATE)
    own = dict.fromkeys(("default", "tool_use"), "own " + TEMPLATE)
    assert load_tokenizer(out).chat_template == named | own


def test_a_template_is_written_where_old_and_new_programs_look(base, out):
    (base / "chat_template.jinja").unlink()
    change_settings(base, chat_template="{{ messages }}")
    save_tokenizer(load_tokenizer(base), out, TEMPLATE)
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert read_settings(out)["chat_template"] == TEMPLATE
    assert files_of(out)["tokenizer.json"] == files_of(base)["tokenizer.json"]


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True, False),
        ({"tokenizer_class": "LlamaTokenizer"}, True, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False, False),
        ({"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}, True, True),
        # Of other classes tokenizer.json decides, which has no processor here.
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False, False),
        ({"tokenizer_class": None}, True, False),  # config.json says that it is a Llama
    ],
)
def test_begin_and_end_are_put_as_the_files_say(base, out, settings, begins, ends):
    change_settings(base, **settings, bos_token="<pad>")
    tokenizer = load_tokenizer(base)
    begin, end = [0] * begins, [1] * ends
    assert tokenizer("ab").input_ids == [*begin, 5, 6, *end]
    assert without_appended(tokenizer, tokenizer("ab").input_ids) == [*begin, 5, 6]
    assert without_appended(tokenizer, tokenizer("").input_ids) == begin
    save_tokenizer(tokenizer, out)
    (out / "config.json").write_text((base / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == [*begin, 5, 6, *end]
    assert load_tokenizer(out)("ab").input_ids == [*begin, 5, 6, *end]


def test_begin_that_tokenizer_json_puts_is_taken_away_where_the_settings_say_no(base):
    tokenizer = load_tokenizer(base)
    backend = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(
        single="<pad> $A", pair="<pad> $A $B", special_tokens=[("<pad>", 0)]
    )
    backend.save(str(base / "tokenizer.json"))
    assert load_tokenizer(base)("ab").input_ids == [0, 5, 6]
    change_settings(base, tokenizer_class="LlamaTokenizer", bos_token="<pad>", add_bos_token=False)
    assert load_tokenizer(base)("ab").input_ids == [5, 6]


@pytest.mark.slow(seconds=6)
def test_deepseek_begins_texts_with_its_first_token(shared, out):
    source = shared / "tokenizers/deepseek-r1"
    save_tokenizer(load_tokenizer(source), out)
    for tokenizer in (load_tokenizer(source), AutoTokenizer.from_pretrained(out)):
        assert tokenizer("Hello").input_ids[0] == tokenizer.bos_token_id == 0
    settings = "tokenizer_config.json"
    assert (out / settings).read_bytes() == (source / settings).read_bytes()


def test_a_class_does_not_build_another_tokenizer_around_the_vocabulary(shared, out):
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copyfile(shared / "models/stories260K" / name, out / name)
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    own = load_tokenizer(shared / "models/stories260K")
    read = load_tokenizer(out)
    for text in (" two spaces  here", "<s> after a token</s>so", "was"):
        assert read(text).input_ids == own(text).input_ids
    (out / "again").mkdir()
    save_tokenizer(read, out / "again")
    again = AutoTokenizer.from_pretrained(out / "again")
    assert again("</s>so").input_ids == own("</s>so").input_ids


def test_a_continuation_keeps_its_first_space(shared):
    tokenizer = load_tokenizer(shared / "models/stories260K")
    prompt, whole = (
        without_appended(tokenizer, tokenizer(text).input_ids)
        for text in ("there", "there was a dog")
    )
    assert whole[: len(prompt)] == prompt
    assert decode_continuation(tokenizer, prompt, whole[len(prompt) :]) == " was a dog"
    assert decode_continuation(tokenizer, prompt, [tokenizer.eos_token_id]) == ""
