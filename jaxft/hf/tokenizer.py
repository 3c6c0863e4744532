"""Loads and saves tokenizers with their chat template, and finds the ids that end an answer."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import ModelError

# transformers advises to install PyTorch, which jaxft does without.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)

from sentencepiece import SentencePieceProcessor  # noqa: E402
from tokenizers import models  # noqa: E402
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.is_fast and not _has_fast_files(folder):
            _sort_merges(tokenizer, folder / "tokenizer.model")
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def _has_fast_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES if name != "tokenizer.model")


def _sort_merges(tokenizer: Any, file: Path) -> None:
    """Merges pieces in the order of their scores, as SentencePiece does.

    transformers 5 takes the order of ids instead, which is another one where runs of spaces have
    early ids and the lowest scores, as in Llama 2 and Mistral.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if state["type"] != "BPE":
        return
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:  # a file of tiktoken, which has the same name
        return
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
    merges = sorted(state["merges"], key=lambda pair: -scores.get("".join(pair), -math.inf))
    tokenizer.backend_tokenizer.model = models.BPE(
        state["vocab"],
        [(left, right) for left, right in merges],
        unk_token=state["unk_token"],
        fuse_unk=state["fuse_unk"],
        byte_fallback=state["byte_fallback"],
    )


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> int:
    """Makes each text one token wherever it stands, which decoding for people leaves out.

    Returns:
      How many are new; a text that is a token already keeps its id.
    """
    before = len(tokenizer)
    added = [AddedToken(text, special=True, normalized=False) for text in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return len(tokenizer) - before


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None
) -> None:
    """Writes a tokenizer so that loading it gives the same ids and this chat template.

    Args:
      tokenizer: It is not changed.
      folder: Where the files go; it exists.
      chat_template: The template the model was trained with, or None to leave the tokenizer's own.
    """
    own, settings = tokenizer.chat_template, dict(tokenizer.init_kwargs)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if hasattr(tokenizer, "legacy"):
        # Whether a space is put after special tokens too: transformers 5 obeys it, but drops it.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own
        tokenizer.init_kwargs = settings


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
