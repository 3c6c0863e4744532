"""Loads and saves tokenizers with their chat template, and finds the ids that end an answer."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxft.errors import ModelError

# transformers advises to install PyTorch, which jaxft does without.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder; code that the folder may hold is never run.

    Raises:
      ModelError: If its files are missing or broken.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)}. Name a folder that "
            "has one with model.tokenizer."
        )
    if not _has_fast_files(folder) and find_spec("sentencepiece") is None:
        raise ModelError(
            f"{folder} has its tokenizer in SentencePiece's format alone (tokenizer.model). Run "
            "`pip install sentencepiece` to read it."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def _has_fast_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES if name != "tokenizer.model")


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None
) -> None:
    """Writes a tokenizer so that loading it gives the same ids and this chat template.

    Args:
      tokenizer: It is not changed.
      folder: Where the files go; it exists.
      chat_template: The template the model was trained with, or None to leave the tokenizer's own.
    """
    own = tokenizer.chat_template
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[int, ...]:
    """Returns every id that ends generation, sorted.

    Chat models name the end of a turn in one of three places and the end of text in another, so
    that each of them alone may miss one.
    """
    ids: list[Any] = [tokenizer.eos_token_id]
    for source in (generation_config, config):
        eos = source.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return tuple(sorted(set(ids) - {None}))
