"""Control tokens, which only chat templates may write: in the texts of rows they are plain text.

A tokenizer makes a control token of its spelling wherever that stands. A row that spells one would
forge a turn or end one, so what rows say is told from what the template says before anything is
tokenised.
"""

import collections
import functools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from jaxft.data.problems import RowError

_BARS = re.compile("<[|\uff5c].*[|\uff5c]>")


class ControlTokens:
    """The control tokens of a tokenizer.

    They are its special tokens, and of its other added tokens those that the chat template writes
    and that are spelt with bars, as DeepSeek's role tokens are. Others, such as `<tool_call>`, are
    text that a model may write and a row may hold.

    Args:
      tokenizer: A Hugging Face tokenizer.
      template: Source of the chat template.
      kept: Whether rows may spell control tokens: `escape` then leaves them as they are.

    Attributes:
      ids: Spelling -> id.
    """

    def __init__(self, tokenizer: Any, template: str = "", *, kept: bool = False):
        self._tokenizer = tokenizer
        self._kept = kept
        self.ids = dict(_control_tokens(tokenizer, template))
        # Of words that are in no vocabulary some tokenizers make this one by themselves.
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.counted_ids = sorted(set(self.ids.values()) - unknown)
        self._counted = {token for token, number in self.ids.items() if number not in unknown}
        self._pattern = _any_of(self.ids)
        # No row can spell these: they are others in each process.
        nonce = secrets.token_hex(6)
        self._stand_ins = {token: f"qz{nonce}n{i}zq" for i, token in enumerate(self.ids)}
        self._spelt = {stand_in: token for token, stand_in in self._stand_ins.items()}
        self._private = {token: f"{nonce}{token}{nonce}" for token in self.ids}
        self._stand_in_pattern = re.compile(f"qz{nonce}n[0-9]+zq")

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yields the control tokens of a text, but for the one of unknown words."""
        return (match for match in self._pattern.finditer(text) if match[0] in self._counted)

    def count(self, texts: Iterable[str]) -> collections.Counter[str]:
        """Returns how often each control token is spelt in texts."""
        return collections.Counter(
            match[0] for text in texts for match in self._pattern.finditer(text)
        )

    def remove(self, text: str) -> str:
        """Returns a text without control tokens."""
        return self._pattern.sub("", text)

    def escape(self, value: Any, *, keep: Sequence[str] = ()) -> Any:
        """Returns a text, or lists and dicts of texts, with stand-ins for its control tokens.

        Args:
          value: What a row says.
          keep: Control tokens that stay as they are.
        """
        if self._kept:
            return value
        match value:
            case str():
                return self._pattern.sub(
                    lambda match: match[0] if match[0] in keep else self._stand_ins[match[0]], value
                )
            case list() | tuple():
                return [self.escape(item, keep=keep) for item in value]
            case dict():
                return {
                    self.escape(name): self.escape(item, keep=keep) for name, item in value.items()
                }
        return value

    def unescape(self, text: str) -> str:
        """Returns a text in which stand-ins are what they stand for."""
        return self._stand_in_pattern.sub(lambda match: self._spelt[match[0]], text)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Returns token ids of texts: control tokens become one id, stand-ins those of plain text.

        Args:
          texts: As `escape` or a template left them.
          add_special_tokens: Add those that the tokenizer itself puts around a text.

        Raises:
          RowError: If the tokenizer cannot encode a control token as plain text.
        """
        escaped = [i for i, text in enumerate(texts) if self._stand_in_pattern.search(text)]
        ids: list[list[int]] = [[]] * len(texts)
        usual = sorted(set(range(len(texts))) - set(escaped))
        if usual:
            found = self._tokenizer(
                [texts[i] for i in usual],
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            ).input_ids
            for i, item in zip(usual, found, strict=True):
                ids[i] = item
        for i in escaped:
            spelt = self._pattern.sub(lambda match: self._private[match[0]], texts[i])
            encoding = self._respelt.encode(
                self.unescape(spelt), add_special_tokens=add_special_tokens
            )
            ids[i] = encoding.ids
        return ids

    def require_plain_text(self) -> None:
        """Raises RowError if the tokenizer cannot encode control tokens as plain text."""
        if not self._kept:
            self._respelt.get_vocab_size()

    @functools.cached_property
    def _respelt(self) -> Tokenizer:
        """A tokenizer whose control tokens are spelt as no row can spell them."""
        refusal = RowError(
            "a text of the row spells a control token of the tokenizer, which cannot encode it as "
            "plain text. Remove it from the row."
        )
        if not self._tokenizer.is_fast:
            raise refusal
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        for token in state["added_tokens"]:
            token["content"] = self._private.get(token["content"], token["content"])
        _respell(state["model"], self._private)
        respelt = Tokenizer.from_str(json.dumps(state))
        if any(respelt.token_to_id(self._private[t]) != number for t, number in self.ids.items()):
            raise refusal
        return respelt


def _control_tokens(tokenizer: Any, template: str) -> Iterator[tuple[str, int]]:
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = str(token)
        if token.special or (_BARS.fullmatch(text) and text in template):
            yield text, number
    for text, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        yield text, number


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern of any of the texts; the longest wins, as it does in a tokenizer."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _respell(model: dict[str, Any], spellings: dict[str, str]) -> None:
    """Renames the control tokens of a vocabulary, and forgets merges that lead to one."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {spellings.get(text, text): number for text, number in vocabulary.items()}
    else:
        model["vocab"] = [[spellings.get(text, text), score] for text, score in vocabulary]
    if "merges" in model:
        pairs = (p if isinstance(p, list) else p.split(" ") for p in model["merges"])
        model["merges"] = [pair for pair in pairs if "".join(pair) not in spellings]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
