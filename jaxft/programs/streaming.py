"""Text as it is generated; a session keeps what it has read, so that a chat reads what is new."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.hf.tokenizer import decode_continuation
from jaxft.models.config import DecoderConfig
from jaxft.models.module import Params
from jaxft.programs.engine import Engine, Request
from jaxft.programs.sampling import Sampling

_DECODE = 4  # tokens in one step, and as many arrive together
_SLOTS = 1024  # of the smallest cache: a conversation grows


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


def text_pieces(
    tokenizer: Any, ids: Iterable[Sequence[int]], *, after: Sequence[int] = ()
) -> Iterator[str]:
    """Yields text as tokens arrive; joined, it is what decoding all of them at once gives.

    Held back is what more tokens may change: bytes of a character that is not complete, and, where
    the tokenizer tidies spaces before punctuation, the last word.

    Args:
      tokenizer: Decodes them.
      ids: New tokens, a few at a time.
      after: The tokens of a text that they continue.
    """
    tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    known: list[int] = []
    shown = text = ""
    for new in ids:
        known += new
        if after:
            text = decode_continuation(tokenizer, after, known)
        else:
            text = tokenizer.decode(known, skip_special_tokens=True)
        ready = text.rstrip("\ufffd")
        if tidies:
            ready = ready.rpartition(" ")[0]
        if len(ready) > len(shown) and ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
    if len(text) > len(shown):
        yield text[len(shown) :]
