"""Turns pairs of answers and labelled answers into units of two documents each."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.chat import Example, chat_examples
from jaxft.data.formats import (
    Conversation,
    Item,
    Labelled,
    Preference,
    answer_text,
    conversations_of,
)
from jaxft.data.problems import Problems, RowError
from jaxft.data.sources import Row
from jaxft.data.template import Template
from jaxft.errors import DataError

_TOKENISED_TOGETHER = 128
CHOSEN, REJECTED, MISMATCHED = 1, -1, 0
"""Labels of documents: of preferred answers, of the others, and of answers of other rows."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents of one row that are written one behind the other.

    Attributes:
      source: Number of the row's source.
      row: The row itself.
      text: Content by which two equal rows are told.
      examples: The documents.
      labels: The label of each document; empty for documents without.
      is_chat: Whether it comes from a conversation.
    """

    source: int
    row: Row
    text: str
    examples: list[Example]
    labels: tuple[int, ...] = ()
    is_chat: bool = True


@dataclass(frozen=True, slots=True)
class _Answer:
    """A labelled answer that waits for the answer of another row beside it."""

    source: int
    row: Row
    text: str
    conversation: Conversation
    example: Example
    label: int


class UnitTokeniser:
    """Turns items into units, many at a time.

    Args:
      tokenizer: A Hugging Face tokenizer.
      config: How to render, and what becomes of control tokens.
      template: From `resolve_template`.
      problems: Takes the rows that cannot be compared.
      name: Which data, for errors.
    """

    def __init__(
        self, tokenizer: Any, config: DataConfig, template: Template, problems: Problems, name: str
    ):
        self._tokenizer = tokenizer
        self._config = config
        self._template = template
        self._problems = problems
        self._name = name

    def pairs(self, items: Iterable[tuple[int, Row, Item]]) -> Iterator[Unit]:
        """Yields the chosen and the rejected document of each pair."""
        for chunk in itertools.batched(items, _TOKENISED_TOGETHER):
            found = self._examples([c for _, _, item in chunk for c in conversations_of(item)])
            for source, row, item in chunk:
                sides = [next(found), next(found)]
                try:
                    chosen, rejected = (_sound(side) for side in sides)
                    _check_pair(chosen, rejected)
                except RowError as error:
                    self._problems.add(item.origin, str(error), raw=row.value)
                    continue
                yield Unit(source, row, item.text, _counted_once(chosen, rejected), _labels(item))

    def labelled(self, items: Iterable[tuple[int, Row, Item]]) -> Iterator[Unit]:
        """Yields for each answer its document and that of the next row's answer in its place.

        The row after the last one is the first one.

        Raises:
          DataError: If there are no two rows with unlike answers.
        """
        for chunk in itertools.batched(_with_next(self._answers(items)), _TOKENISED_TOGETHER):
            talks = [_answered_by(answer, other) for answer, other in chunk]
            for (answer, other), side in zip(chunk, self._examples(talks), strict=True):
                try:
                    mismatched = _sound(side)
                except RowError as error:
                    where = other.conversation.origin
                    text = f"with the answer of {where} in place of its own: {error}"
                    self._problems.add(answer.conversation.origin, text, raw=answer.row.value)
                    continue
                examples = _counted_once(answer.example, mismatched)
                labels = (answer.label, MISMATCHED)
                yield Unit(answer.source, answer.row, answer.text, examples, labels)

    def _answers(self, items: Iterable[tuple[int, Row, Item]]) -> Iterator[list[_Answer]]:
        """Yields the labelled answers of each row, of which a pair has two."""
        seen: set[str] = set()
        rows = 0
        for chunk in itertools.batched(items, _TOKENISED_TOGETHER):
            found = self._examples([c for _, _, item in chunk for c in conversations_of(item)])
            for source, row, item in chunk:
                talks = conversations_of(item)
                sides = [next(found) for _ in talks]
                try:
                    examples = [_sound(side) for side in sides]
                    if len(examples) == 2:
                        _check_pair(*examples)
                except RowError as error:
                    self._problems.add(item.origin, str(error), raw=row.value)
                    continue
                rows += 1
                if len(seen) < 2:
                    seen.update(answer_text(talk.answer) for talk in talks)
                yield [
                    _Answer(source, row, item.text, talk, example, label)
                    for talk, example, label in zip(talks, examples, _labels(item), strict=True)
                ]
        if rows and (rows < 2 or len(seen) < 2):
            what = "one row" if rows < 2 else f"{rows:,} rows whose answers are all equal"
            raise DataError(
                f"{self._name}: there is {what}, but labelled answers are compared with those of "
                "other rows. Name data with at least two unlike answers."
            )

    def _examples(self, talks: Sequence[Conversation]) -> Iterator[list[Example] | RowError]:
        return chat_examples(
            self._tokenizer,
            talks,
            template=self._template,
            train_on="completion",
            thinking=self._config.thinking,
            refuse_control=self._config.control_tokens == "refuse",
        )


def _counted_once(first: Example, second: Example) -> list[Example]:
    """Returns documents whose shared prompt counts once among the control tokens they spell."""
    spelt = collections.Counter(first.control_tokens) | collections.Counter(second.control_tokens)
    return [
        dataclasses.replace(first, control_tokens=dict(spelt)),
        dataclasses.replace(second, control_tokens={}),
    ]


def _labels(item: Item) -> tuple[int, ...]:
    if isinstance(item, Preference):
        return CHOSEN, REJECTED
    assert isinstance(item, Labelled)
    return (CHOSEN if item.desirable else REJECTED,)


def _with_next(rows: Iterator[list[_Answer]]) -> Iterator[tuple[_Answer, _Answer]]:
    """Yields each answer with one of the next row: of pairs, the one with the same place."""
    first = before = next(rows, None)
    for row in itertools.chain(rows, [first]):
        if before is None or row is None:
            return
        yield from ((answer, row[min(i, len(row) - 1)]) for i, answer in enumerate(before))
        before = row


def _answered_by(answer: _Answer, other: _Answer) -> Conversation:
    talk = answer.conversation
    return dataclasses.replace(talk, messages=[*talk.prompt, other.conversation.answer])


def _sound(side: list[Example] | RowError) -> Example:
    """Returns the document of an answer, of which something must be trained."""
    if isinstance(side, RowError):
        raise side
    [example] = side
    if not example.trained[1:].any():
        raise RowError("no token of the last answer would be trained.")
    return example


def _prompt_length(trained: np.ndarray) -> int:
    """Returns the number of tokens before the first trained one."""
    return int(np.argmax(trained))


def _check_pair(chosen: Example, rejected: Example) -> None:
    """Raises RowError for prompts that differ as tokens, or answers that do not."""
    length = _prompt_length(chosen.trained)
    is_alike = np.array_equal(chosen.ids[:length], rejected.ids[:length])
    if length != _prompt_length(rejected.trained) or not is_alike:
        raise RowError(
            "the prompts of 'chosen' and 'rejected' are other tokens once rendered. Set "
            "--config.data.template to a template whose prompt does not depend on the answer."
        )
    if np.array_equal(chosen.ids[chosen.trained], rejected.ids[rejected.trained]):
        raise RowError("'chosen' and 'rejected' are the same tokens once rendered.")
