"""The text of an answer as it arrives: whole characters, nothing of a stop string, its scores."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.programs.streaming import TextWriter
from jaxft.programs.texts import Piece

type Score = list[Any]
"""A token as it is written, its log-probability, its bytes or None, and the most likely ones."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(slots=True)
class Written:
    """The text that a piece adds to an answer.

    Attributes:
      text: New text.
      scores: Scores of the tokens whose text is complete.
      prompt: Scores of the prompt's tokens, with the first piece of a text that asks for them.
      ended: `stop` or `length`, if this is the last of it.
    """

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    prompt: list[Score] = field(default_factory=list)
    ended: str = ""


class Answer:
    """One continuation.

    Args:
      tokenizer: Decodes tokens.
      after: The tokens of a text that it continues; none after a conversation.
      stops: Texts that end it.
      speller: Writes tokens beside their scores.
      likely: Most likely tokens that are given with each; -1 for no scores.

    Attributes:
      tokens: Tokens of it so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        after: Sequence[int] = (),
        stops: Sequence[str] = (),
        speller: "Speller",
        likely: int = -1,
    ):
        self._writer, self._after = TextWriter(tokenizer, after=after), after
        self._stops, self._speller, self._likely = tuple(stops), speller, likely
        self._held = ""  # decoded, but perhaps the start of a stop string
        self._given = 0  # characters that were given
        self._scores: list[tuple[int, Score]] = []  # where each token's text begins
        self.tokens = 0

    def add(self, piece: Piece) -> Written:
        """Returns what new tokens add; behind a stop string nothing is added."""
        written = self._added(piece)
        if piece.prompt_scores is not None:
            text, raw = self._speller.spell(self._after[0])
            others = zip(self._after[1:], *piece.prompt_scores, strict=True)
            written.prompt = [[text, None, raw, []], *(self._score(*other) for other in others)]
        return written

    def _added(self, piece: Piece) -> Written:
        # Where text ends in the middle of a piece, its tokens are told apart.
        apart = bool(self._stops) or self._likely >= 0
        groups = [[token] for token in piece.tokens] if apart else [piece.tokens]
        for number, group in enumerate(groups):
            if self._likely >= 0:
                begin = self._given + len(self._held)
                assert piece.scores is not None
                score = self._score(piece.tokens[number], *(x[number] for x in piece.scores))
                self._scores.append((begin, score))
            self._held += self._writer.push(group)
            self.tokens += len(group)
            if (cut := self._cut()) >= 0:
                return self._end(cut, "stop")
        if piece.ended:
            self._held += self._writer.end()
            cut = self._cut()
            return self._end(cut, "stop") if cut >= 0 else self._end(len(self._held), piece.ended)
        ready = len(self._held) - _begun(self._held, self._stops)
        return self._give(ready)

    def _cut(self) -> int:
        """Returns where the first stop string begins in what is held; -1 if there is none."""
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        return min(found, default=-1)

    def _end(self, cut: int, ended: str) -> Written:
        # A token of which no character is left belongs to the stop string.
        last = self._given + cut
        whole = cut == len(self._held)
        self._scores = [(at, score) for at, score in self._scores if at < last or whole]
        written = self._give(cut)
        written.scores += [score for _, score in self._scores]
        self._scores, self._held, written.ended = [], "", ended
        return written

    def _give(self, count: int) -> Written:
        text, self._held = self._held[:count], self._held[count:]
        self._given += count
        ready = [score for at, score in self._scores if at < self._given]
        self._scores = self._scores[len(ready) :]
        return Written(text, ready)

    def _score(self, token: int, chosen: Any, ids: Any, likely: Any) -> Score:
        text, raw = self._speller.spell(token)
        others = [
            [*self._spelt(token, value)]
            for token, value in zip(
                ids[: self._likely].tolist(), likely[: self._likely].tolist(), strict=True
            )
        ]
        return [text, float(chosen), raw, others]

    def _spelt(self, token: int, value: float) -> tuple[str, float, list[int] | None]:
        text, raw = self._speller.spell(token)
        return text, float(value), raw


def _begun(text: str, stops: Sequence[str]) -> int:
    """Returns how many of the last characters may be the start of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest


class Speller:
    """Writes single tokens, as scores have them.

    Args:
      tokenizer: Its tokens.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._of_bytes = "ByteLevel" in repr(getattr(backend, "decoder", None))
        # Behind another token, as alone the first word of a text may lose its space.
        self._before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
        self._text_before = tokenizer.decode(self._before)
        self.spell = functools.lru_cache(maxsize=1 << 16)(self._spell)

    def _spell(self, token: int) -> tuple[str, list[int] | None]:
        r"""Returns a token's text and bytes; those that are no text are spelt `bytes:\xe2\x82`."""
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return f"<{token}>", None
        if token in self._special:
            return raw, list(raw.encode())
        found = self._bytes_of(raw)
        text = self._tokenizer.decode([*self._before, token])
        if found is None and text.startswith(self._text_before):
            text = text[len(self._text_before) :]
        elif found is None:
            text = self._tokenizer.decode([token])
        else:
            text = bytes(found).decode(errors="replace")
        if "\ufffd" not in text:
            return text, list(text.encode())
        if found is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found

    def _bytes_of(self, raw: str) -> list[int] | None:
        """Returns the bytes of a token of a vocabulary of bytes; None for those of texts."""
        if match := _BYTE.fullmatch(raw):
            return [int(match[1], 16)]
        table = _byte_letters()
        if not self._of_bytes or any(letter not in table for letter in raw):
            return None
        return [table[letter] for letter in raw]


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Returns the byte that each letter of byte-level vocabularies stands for (GPT-2, 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
