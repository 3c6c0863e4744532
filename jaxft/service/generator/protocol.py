"""Requests to the generator, as JSON; it answers in lines of JSON objects.

Lines, each an object with some of these:

- `{"prompt_tokens": [n, …], "echo": [text, …]}` comes first, `echo` if it was asked for.
- `{"index": i, "text": …, "tokens": n}`: text that continues, and how many tokens so far. Choice j
  of prompt p has the index p n + j. If asked for, `"scores"` is a list of `[token,
  log-probability, bytes, [[token, log-probability, bytes], …]]`. In the last line of a choice
  `"ended"` is `stop` or `length`.
  `"prompt"` is the like of the prompt's tokens, the first of which has no log-probability.
- `{"error": {…}}`, as the API has errors, comes last, if there is one.
"""

from typing import Annotated, Any

from pydantic import Field

from jaxft.service.bodies import Body

MOST_CHOICES = 128
"""Texts of one request."""
MOST_LIKELY = 20
"""Most likely tokens whose log-probabilities are given."""


class Prompt(Body):
    """The beginning of a text: messages, a text or its tokens.

    Attributes:
      messages: A conversation, which the model's template renders.
      tools: Function descriptions offered in it.
      text: A text that goes on.
      ids: Token ids that go on.
    """

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: list[int] | None = None


class Generate(Body):
    """Texts to be continued.

    Attributes:
      path: The first argument of `jaxft.load`.
      step: The checkpoint of a run.
      prompts: Beginnings of texts.
      n: Continuations of each.
      max_tokens: Most new tokens; None for as many as fit, up to a limit of the generator.
      temperature: The one of `programs.sampling.Sampling`.
      top_k: Likewise.
      top_p: Likewise.
      seed: Likewise.
      stop: Texts that end a continuation; not part of it.
      scored: Whether tokens come with log-probabilities.
      likely: Most likely tokens in each place that come with them.
      echo: Whether the prompts' texts are wanted, and with `scored` their log-probabilities.
    """

    path: str
    step: str = "best"
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MOST_CHOICES)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Annotated[list[str], Field(default_factory=list)]
    scored: bool = False
    likely: Annotated[int, Field(ge=0, le=MOST_LIKELY)] = 0
    echo: bool = False
