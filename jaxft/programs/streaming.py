"""Text as it is generated; a session keeps what it has read, so that a chat reads what is new."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.hf.tokenizer import decode_continuation
from jaxft.models.config import DecoderConfig
from jaxft.models.module import Params
from jaxft.programs.engine import Engine
from jaxft.programs.sampling import Sampling
from jaxft.programs.texts import Request

_DECODE = 4  # tokens in one step, and as many arrive together
_SLOTS = 1024  # of the smallest cache: a conversation grows
_WINDOW = 64  # tokens that are decoded again with each further one, at most about as many
_CONTEXT = 16  # tokens before those, which tell how their text begins


class Session:
    """An engine for one text that grows, such as a conversation.

    Args:
      config: Shape of the decoder.
      graphdef: Its structure.
      params: Its parameters, in any placement.
      has_token: As `Engine` takes it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        graphdef: Any,
        params: Params,
        *,
        has_token: np.ndarray | None = None,
    ):
        self.engine = Engine(config, graphdef, params, rows=1, slots=_SLOTS, has_token=has_token)
        self.ended = False
        """Whether the last answer came to a stop token."""

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling | None = None,
    ) -> Iterator[list[int]]:
        """Yields the ids that `generate_tokens` returns for this prompt, a few at a time.

        What the prompt has in common with the text so far is not read again. The iterator may be
        left at any time.

        Raises:
          ConfigError: If the prompt is empty, or it and `max_new_tokens` exceed the context.
        """
        request = Request(prompt, max_new_tokens, stop_ids, sampling or Sampling())
        self.engine.check(request)
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[list[int]]:
        self.ended, ticket = False, self.engine.submit(request)
        try:
            while not self.engine.idle:
                for piece in self.engine.step(_DECODE):
                    if piece.ticket != ticket:
                        continue
                    if piece.tokens:
                        yield piece.tokens
                    if piece.ended:
                        self.ended = piece.ended == "stop"
                        return
        finally:
            self.engine.cancel(ticket)


class TextWriter:
    """The text of tokens that arrive little by little; joined, it is that of all of them at once.

    Held back is what more tokens may change: bytes of a character that is not complete, and, where
    the tokenizer tidies spaces before punctuation, the last word.

    Args:
      tokenizer: Decodes tokens.
      after: The tokens of a text that they continue.
    """

    def __init__(self, tokenizer: Any, *, after: Sequence[int] = ()):
        self._tokenizer, self._after = tokenizer, list(after)
        self._tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._known: list[int] = []
        self._shown = self._text = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Returns the text that further tokens complete."""
        self._known += tokens
        if self._after:
            text = decode_continuation(self._tokenizer, self._after, self._known)
        else:
            text = self._tokenizer.decode(self._known, skip_special_tokens=True)
        self._text, ready = text, text.rstrip("\ufffd")
        if self._tidies:
            ready = ready.rpartition(" ")[0]
        found = ""
        if len(ready) > len(self._shown) and ready.startswith(self._shown):
            found, self._shown = ready[len(self._shown) :], ready
        if self._shown == self._text and len(self._known) >= _WINDOW and not self._tidies:
            # A few tokens tell how the next ones are written; decoding all again takes ever longer.
            self._after, self._known = self._known[-_CONTEXT:], []
            self._shown = self._text = ""
        return found

    def end(self) -> str:
        """Returns the text that was held back."""
        found, self._shown = self._text[len(self._shown) :], self._text
        return found


def text_pieces(
    tokenizer: Any, ids: Iterable[Sequence[int]], *, after: Sequence[int] = ()
) -> Iterator[str]:
    """Yields text as tokens arrive, as `TextWriter` gives it.

    Args:
      tokenizer: Decodes them.
      ids: New tokens, a few at a time.
      after: The tokens of a text that they continue.
    """
    writer = TextWriter(tokenizer, after=after)
    for new in ids:
        if text := writer.push(new):
            yield text
    if text := writer.end():
        yield text
