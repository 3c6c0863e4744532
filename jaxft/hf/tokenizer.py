"""Loads tokenizers as their files say, and finds the ids that end an answer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AddedToken,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from jaxft.errors import ModelError
from jaxft.hf.hub import lfs_hint

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

# Classes for which tokenizer_config.json says whether BOS comes first, whatever tokenizer.json
# says, and whether it does where no `add_bos_token` is there. transformers 4 obeys it, 5 does not.
_ADDS_BEGIN = {
    "CodeLlamaTokenizer": True,
    "CohereTokenizer": True,
    "GemmaTokenizer": True,
    "GPTNeoXTokenizer": False,
    "LlamaTokenizer": True,
}
# The class of models whose folder names none.
_CLASS_OF = {
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "olmo2": "GPTNeoXTokenizer",
    "phi3": "LlamaTokenizer",
}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder, which gives the ids that its files spell out.

    These are the ids of transformers 4 and of all that reads tokenizer.json or tokenizer.model
    itself. Code that the folder may hold is never run.

    Raises:
      ModelError: If its files are missing or broken.
    """
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}. Name a folder that "
            "has one with --config.model.tokenizer=FOLDER."
        )
    for name in VOCABULARIES:
        if hint := lfs_hint(folder / name):
            raise ModelError(f"{folder / name} holds no vocabulary.{hint}")
    try:
        tokenizer = _follow_files(read_tokenizer(folder), folder)
        _put_begin_and_end(tokenizer, folder)
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Returns what the installed transformers makes of a folder, as other programs see it."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _follow_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that does what tokenizer.json, or a lone tokenizer.model, says.

    Many classes of transformers 5 take the vocabulary from these files and put a normaliser,
    pre-tokeniser and decoder of their own around it.
    """
    spelled_out = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast or not spelled_out:
        return tokenizer
    followed = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = followed.get_vocab()
    # A class may know tokens that no file names, such as the EOS of GPT-2.
    named = {name: getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    followed.add_special_tokens(
        {
            name: token
            for name, token in named.items()
            if token in vocabulary and getattr(followed, name) is None
        }
    )
    return followed


def _put_begin_and_end(tokenizer: Any, folder: Path) -> None:
    """Makes the tokenizer put BOS and EOS around texts as tokenizer_config.json says."""
    settings = read_settings(folder / "tokenizer_config.json")
    name = settings.get("tokenizer_class")
    if not name:
        config = read_settings(folder / "config.json")
        kind = (config.get("text_config") or config).get("model_type", "")
        name = config.get("tokenizer_class") or _CLASS_OF.get(kind, "")
    name = str(name).removesuffix("Fast")
    if name not in _ADDS_BEGIN or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    begin = bool(settings.get("add_bos_token", _ADDS_BEGIN[name])) and bool(tokenizer.bos_token)
    end = bool(settings.get("add_eos_token", False)) and bool(tokenizer.eos_token)
    plain = tokenizer("a", add_special_tokens=False).input_ids
    wanted = [tokenizer.bos_token_id] * begin + plain + [tokenizer.eos_token_id] * end
    if tokenizer("a").input_ids != wanted:
        tokenizer.add_bos_token = begin
        tokenizer.add_eos_token = end


def read_settings(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file; an empty one if the file is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def without_appended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Returns the ids of a text without those that the tokenizer puts after it: it is to go on."""
    around, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    starts = (i for i in range(len(around)) if around[i : i + len(plain)] == plain)
    # A tokenizer that merges the text with what it adds around it has nothing to be taken off.
    before = next(starts, len(around) - len(plain))
    return ids[: len(ids) - (len(around) - before - len(plain))]


def decode_continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Returns the text of new ids as it follows the text of a prompt.

    Alone, ids of SentencePiece lose the space that their first word begins with.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(new, skip_special_tokens=True)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Makes each text one token wherever it stands, which decoding for people leaves out.

    Returns:
      Ids of those that are new; a text that is a token already keeps its id.
    """
    before = tokenizer.get_vocab()
    added = [AddedToken(text, special=True, normalized=False) for text in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return sorted(i for token, i in tokenizer.get_vocab().items() if token not in before)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[int, ...]:
    """Returns every id that ends generation, sorted.

    Chat models name the end of a turn in one of three places and the end of text in another, so
    that each of them alone may miss one.
    """
    ids: list[Any] = [] if tokenizer is None else [tokenizer.eos_token_id]
    for source in (generation_config, config, config.get("text_config") or {}):
        eos = source.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return tuple(sorted(set(ids) - {None}))
