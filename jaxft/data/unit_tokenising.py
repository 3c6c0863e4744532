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
from jaxft.data.units import CHOSEN, MISMATCHED, REJECTED
from jaxft.errors import DataError

_TOKENISED_TOGETHER = 128
_HELD_BACK = 4096
"""Most rows to one prompt that wait for a row to another one."""


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
    """A labelled answer that waits for an answer to another prompt beside it."""

    source: int
    row: Row
    text: str
    prompt: str
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
        """Yields for each answer its document and one with an answer to another prompt.

        That is the answer of the next row whose prompt differs; the row after the last one is the
        first one.

        Raises:
          DataError: If all rows have one prompt or one answer, or too many at the beginning have
            one prompt.
        """
        for chunk in itertools.batched(self._with_others(items), _TOKENISED_TOGETHER):
            talks = [_answered_by(answer, other) for answer, other in chunk]
            for (answer, other), side in zip(chunk, self._examples(talks), strict=True):
                try:
                    mismatched = _sound(side)
                    _check_prompts(answer.example, mismatched, "with either answer")
                except RowError as error:
                    where = other.conversation.origin
                    text = f"with the answer of {where} in place of its own: {error}"
                    self._problems.add(answer.conversation.origin, text, raw=answer.row.value)
                    continue
                examples = _counted_once(answer.example, mismatched)
                labels = (answer.label, MISMATCHED)
                yield Unit(answer.source, answer.row, answer.text, examples, labels)

    def _with_others(
        self, items: Iterable[tuple[int, Row, Item]]
    ) -> Iterator[tuple[_Answer, _Answer]]:
        """Yields each answer with one of the next row that has another prompt.

        Rows to one prompt wait for that row. What would be too many for memory takes the last row
        before them instead.
        """
        first = second = before = None
        waiting: list[list[_Answer]] = []
        for row in self._answers(items):
            first = first or row
            if waiting and row[0].prompt != waiting[0][0].prompt:
                second = second or row
                yield from _beside(waiting, row)
                before, waiting = waiting[-1], []
            elif len(waiting) == _HELD_BACK:
                if not before:
                    raise self._refusal(f"the first {_HELD_BACK:,} rows have one prompt")
                yield from _beside(waiting, before)
                waiting = []
            waiting.append(row)
        if not waiting:
            return
        prompt = waiting[0][0].prompt
        other = next((row for row in (first, second) if row and row[0].prompt != prompt), None)
        if not other:
            raise self._refusal(f"all {len(waiting):,} rows have one prompt")
        yield from _beside(waiting, other)

    def _refusal(self, what: str) -> DataError:
        """Returns the error for rows that are too much alike; raises that of bad rows before it."""
        self._problems.check()
        return DataError(
            f"{self._name}: {what}, but the KL of KTO is estimated from answers to other prompts. "
            "Name data with several prompts and unlike answers, in mixed order."
        )

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
                prompt = talks[0].prompt_text.casefold()
                yield [
                    _Answer(source, row, item.text, prompt, talk, example, label)
                    for talk, example, label in zip(talks, examples, _labels(item), strict=True)
                ]
        if rows == 1:
            raise self._refusal("there is one row")
        if rows and len(seen) < 2:
            raise self._refusal(f"all {rows:,} rows have one answer")

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


def _beside(
    rows: Iterable[list[_Answer]], other: list[_Answer]
) -> Iterator[tuple[_Answer, _Answer]]:
    """Yields each answer with one of another row: of pairs, the one with the same place."""
    for row in rows:
        yield from ((answer, other[min(i, len(other) - 1)]) for i, answer in enumerate(row))


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
    _check_prompts(chosen, rejected, "of 'chosen' and 'rejected'")
    if np.array_equal(chosen.ids[chosen.trained], rejected.ids[rejected.trained]):
        raise RowError("'chosen' and 'rejected' are the same tokens once rendered.")


def _check_prompts(first: Example, second: Example, whose: str) -> None:
    """Raises RowError for prompts that differ as tokens: both are cut at one place."""
    length = _prompt_length(first.trained)
    is_alike = np.array_equal(first.ids[:length], second.ids[:length])
    if length != _prompt_length(second.trained) or not is_alike:
        raise RowError(
            f"the prompts {whose} are other tokens once rendered. Set --config.data.template to a "
            "template whose prompt does not depend on the answer."
        )
