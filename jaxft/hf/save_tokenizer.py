"""Writes tokenizers so that transformers 4 and 5, and what reads their files, give the same ids."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from jaxft.files import as_json
from jaxft.hf.tokenizer import read_settings, read_tokenizer

_TEMPLATES = "additional_chat_templates"
# Vocabularies of readers that do not know tokenizer.json; added tokens are in a file beside them.
_OTHER_VOCABULARIES = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "tokenizer.tiktoken",
)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    *_OTHER_VOCABULARIES,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The class that follows tokenizer.json in every version.
_GENERAL = "PreTrainedTokenizerFast"
# Names of it and others that transformers 4 does not know.
_UNKNOWN_TO_4 = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None = None
) -> None:
    """Writes a tokenizer so that every reader gets the same ids and this chat template.

    Files of the folder it was loaded from are copied byte for byte as long as they are true.

    Args:
      tokenizer: From `load_tokenizer`, perhaps with tokens added since. It is not changed.
      folder: Where the files go; it exists.
      chat_template: The template the model was trained with, or None for the tokenizer's own.
    """
    source = Path(tokenizer.name_or_path)
    _copy(source, folder)
    if not tokenizer.is_fast:
        _save_slow(tokenizer, folder, chat_template)
        return
    stored = read_tokenizer(source)
    templates = _templates(stored.chat_template, chat_template or tokenizer.chat_template)
    settings = read_settings(source / "tokenizer_config.json")
    # The words of the file stay as they are for a tokenizer and a template that are.
    stays = (
        templates == _named(stored.chat_template)
        and stored.get_vocab() == tokenizer.get_vocab()
        and _is_read_by_4(settings)
    )
    unchanged = _reads_as(stored, tokenizer)
    if stays and unchanged:
        return
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    file = folder / "tokenizer.json"
    if not unchanged and not (file.is_file() and _same(Tokenizer.from_file(str(file)), backend)):
        _write_json(file, _state(backend))
    if stays and _reads_as(read_tokenizer(folder), tokenizer):
        return
    if templates != _named(stored.chat_template):
        _write_templates(templates, folder)
    settings = _update(settings, tokenizer, templates)
    _write_json(folder / "tokenizer_config.json", settings)
    if not _reads_as(read_tokenizer(folder), tokenizer):
        # The class builds something else around the vocabulary in the installed version.
        settings = {"padding_side": stored.padding_side, **settings, "tokenizer_class": _GENERAL}
        _write_json(folder / "tokenizer_config.json", settings)
    if not (folder / "special_tokens_map.json").is_file():
        _write_json(folder / "special_tokens_map.json", _special_tokens(tokenizer))
    _write_added_tokens(tokenizer, folder)


def _copy(source: Path, folder: Path) -> None:
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    for file in sorted((source / _TEMPLATES).glob("*.jinja")):
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / _TEMPLATES / file.name)


def _save_slow(tokenizer: Any, folder: Path, chat_template: str | None) -> None:
    """Lets transformers write a tokenizer that has no form as tokenizer.json."""
    own = tokenizer.chat_template
    tokenizer.chat_template = _unnamed(_templates(own, chat_template or own))
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def _reads_as(read: Any, tokenizer: Any) -> bool:
    """Whether what was read from files gives the ids of another tokenizer."""
    return read.is_fast and _same(read.backend_tokenizer, tokenizer.backend_tokenizer)


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids for every text, and the same text for ids."""
    a, b = _state(one), _state(other)
    if a["model"].get("ignore_merges", False) != b["model"].get("ignore_merges", False):
        merging = other if a["model"].get("ignore_merges") else one
        if not all(len(merging.model.tokenize(token)) == 1 for token in a["model"]["vocab"]):
            return False
        a["model"]["ignore_merges"] = b["model"]["ignore_merges"]
    return a == b


def _state(backend: Tokenizer) -> dict[str, Any]:
    """Returns all that decides on ids and text, each in one spelling.

    Truncation and padding belong to a call, and some processors only count offsets.
    """
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    processor = state["post_processor"] or {}
    if processor.get("type") == "ByteLevel" or processor.get("special_tokens") == {}:
        state["post_processor"] = None
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if name in state["model"]:
            state["model"][name] = state["model"][name] or None
    return state


def _is_read_by_4(settings: Mapping[str, Any]) -> bool:
    return settings.get("tokenizer_class") not in _UNKNOWN_TO_4 and not isinstance(
        settings.get("extra_special_tokens"), list
    )


def _named(own: str | Mapping[str, str] | None) -> dict[str, str]:
    """Returns chat templates by name."""
    if not own:
        return {}
    return {"default": own} if isinstance(own, str) else dict(own)


def _unnamed(templates: Mapping[str, str]) -> str | dict[str, str] | None:
    if list(templates) == ["default"]:
        return templates["default"]
    return dict(templates) or None


def _templates(
    stored: str | Mapping[str, str] | None, used: str | Mapping[str, str] | None
) -> dict[str, str]:
    """Returns the templates to write: those stored, with the one that the model was trained with.

    With tools, programs take the template that is called `tool_use`: a template that has replaced
    the default was trained with tools as well and takes its place, too.
    """
    kept = _named(stored)
    if not isinstance(used, str):
        return _named(used) or kept
    if used == (kept.get("default") or next(iter(kept.values()), None)):
        return kept
    return kept | dict.fromkeys({"default", *(kept.keys() & {"tool_use"})}, used)


def _write_templates(templates: Mapping[str, str], folder: Path) -> None:
    for name, text in templates.items():
        file = folder / (
            f"{_TEMPLATES}/{name}.jinja" if name != "default" else "chat_template.jinja"
        )
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _update(
    settings: Mapping[str, Any], tokenizer: Any, templates: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, in words that transformers 4 and 5 know."""
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # the word of 5 for what 4 calls additional, and 5 reads as well
        known = settings.get("additional_special_tokens") or []
        settings = {k: v for k, v in settings.items() if k != "extra_special_tokens"}
        settings |= {"additional_special_tokens": known + [t for t in extra if t not in known]}
    if settings.get("tokenizer_class") in _UNKNOWN_TO_4:
        settings = {**settings, "tokenizer_class": _GENERAL}
    if templates:
        shown = [{"name": name, "template": text} for name, text in templates.items()]
        one = templates["default"] if list(templates) == ["default"] else shown
        settings = {**settings, "chat_template": one}
    begins, ends = _begin_and_end(tokenizer)
    added = {
        str(number): token.__getstate__()
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    return {
        **_special_tokens(tokenizer),
        **settings,
        "add_bos_token": begins,
        "add_eos_token": ends,
        "added_tokens_decoder": added,
    }


def _begin_and_end(tokenizer: Any) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text."""
    ids = tokenizer("a").input_ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return begin is not None and ids[:1] == [begin], end is not None and ids[-1:] == [end]


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    names = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    return {name: str(token) for name in names if (token := getattr(tokenizer, name))}


def _write_added_tokens(tokenizer: Any, folder: Path) -> None:
    """Names tokens beyond the vocabulary for readers of the files that do not hold them."""
    if not any((folder / name).is_file() for name in _OTHER_VOCABULARIES):
        return
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    added = {token: i for token, i in tokenizer.get_added_vocab().items() if i >= size}
    if added:
        _write_json(folder / "added_tokens.json", added)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(as_json(content), encoding="utf-8")
