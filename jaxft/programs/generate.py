"""Continuations of many prompts, all at once to whoever asks."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from jaxft.errors import ConfigError
from jaxft.models.config import DecoderConfig
from jaxft.models.module import Params
from jaxft.programs.engine import Engine
from jaxft.programs.sampling import Sampling
from jaxft.programs.texts import Request

MOST_ROWS = 64
"""Prompts that are continued at the same time; others wait for a row that ends."""


def generate_tokens(
    config: DecoderConfig,
    graphdef: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    has_token: np.ndarray | None = None,
) -> list[list[int]]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Where processes share the parameters, all of them call this with the same arguments.

    Args:
      config: Shape of the decoder.
      graphdef: Its structure.
      params: Its parameters, in any placement.
      prompts: Token ids, at least one in each.
      max_new_tokens: Longest continuation.
      stop_ids: Tokens that end a row; not part of the result.
      sampling: Greedy if absent; prompt i is the text of that number.
      has_token: As `Engine` takes it.

    Returns:
      The new ids of each prompt.

    Raises:
      ConfigError: If `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    rows = min(MOST_ROWS, 1 << (len(prompts) - 1).bit_length())
    longest = max(map(len, prompts)) + max_new_tokens
    engine = Engine(config, graphdef, params, rows=rows, slots=longest, has_token=has_token)
    found: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        request = Request(prompt, max_new_tokens, stop_ids, sampling or Sampling(), number)
        found[engine.submit(request)] = []
    while not engine.idle:
        for piece in engine.step():
            found[piece.ticket] += piece.tokens
    return list(found.values())
