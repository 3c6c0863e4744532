"""Texts that engines continue: what is asked for, and what is given."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxft.programs.sampling import Sampling, Scores


class Columns(NamedTuple):
    """The part of a wide adapter that is the adapter of a text.

    Attributes:
      number: Number of the adapter, never given twice; 0 for none.
      start: The first column.
      end: The column behind the last.
    """

    number: int = 0
    start: int = 0
    end: int = 0


NO_COLUMNS = Columns()


@dataclass(frozen=True, slots=True)
class Request:
    """A text that is to be continued.

    Attributes:
      prompt: Token ids, at least one.
      max_new_tokens: Longest continuation, at least 1.
      stop_ids: Tokens that end it; not part of it.
      sampling: The way to choose tokens.
      number: Number of the text among those of one seed; see `Sampling.seed`.
      columns: The adapter that continues it; the bare model by default.
      scored: Whether its pieces have log-probabilities.
      prompt_scored: Whether the prompt has, too; it is read anew for them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0
    columns: Columns = NO_COLUMNS
    scored: bool = False
    prompt_scored: bool = False

    @property
    def limit(self) -> int:
        """The length that the text may reach."""
        return len(self.prompt) + self.max_new_tokens


class Piece(NamedTuple):
    """New tokens of one text.

    Attributes:
      ticket: The number that `submit` gave.
      tokens: They; without the one that ends the text.
      ended: `stop` or `length` with the last piece of a text, else empty.
      scores: Log-probabilities `[tokens, …]`, of a text that is scored.
      prompt_scores: Scores of the prompt's tokens but the first, with the first piece of a text
        that asks for them.
    """

    ticket: int
    tokens: list[int]
    ended: str
    scores: Scores | None = None
    prompt_scores: Scores | None = None
