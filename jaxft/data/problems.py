"""Collects what is wrong with rows: to be refused together, or left out, counted and listed."""

import collections
import json
import re
from pathlib import Path
from typing import Any

from jaxft.errors import DataError

MAXIMUM_PROBLEMS = 20
_SHOWN_KINDS = 10
_VALUE_AND_EXPECTED = re.compile(
    r"(?P<key>[^\"]*?) is (?:[\"\[{(]|-?\d|null|true|false|-?Infinity|NaN).*"
    r"; expected (?P<expected>.*)",
    re.DOTALL,
)
"""A key, the JSON that it holds, which may be cut and hold anything, and what was expected."""
_VALUE = re.compile(r'"[^"]*"|(?<!\w)\[.*\]|\{.*\}|(?<=\bof )\'[^\']*\'')


class RowError(ValueError):
    """An error in one row, without its origin."""


class Problems:
    """The bad rows met so far; raises by itself when there are enough to stop reading.

    Args:
      name: What is being read, for the headline: a file, or the training data as a whole.
      skipped: File that bad rows are listed in, one JSON object a line, in place of being refused.

    Attributes:
      count: Bad rows so far.
      kinds: Number of bad rows of each kind.
    """

    def __init__(self, name: str, *, skipped: Path | None = None):
        self.name = name
        self.count = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self._skipped = skipped
        self._texts: list[str] = []
        self._examples: dict[str, None] = {}

    @property
    def are_skipped(self) -> bool:
        """Whether bad rows are left out and not refused."""
        return self._skipped is not None

    def add(self, origin: str, text: str, *, raw: Any = None, example: str = "") -> None:
        """Notes one problem.

        Args:
          origin: `file:line`.
          text: The key, what it holds and what was expected.
          raw: The row as far as it could be read, for the list of what is left out.
          example: A right row of that format; shown once, below all problems.

        Raises:
          DataError: When `MAXIMUM_PROBLEMS` are reached, unless bad rows are left out.
        """
        self.count += 1
        self.kinds[kind(text)] += 1
        if self._skipped is not None:
            _append(self._skipped, {"origin": origin, "problem": text, "row": raw})
            return
        self._texts.append(f"{origin}: {text}")
        if example:
            self._examples[example] = None
        if self.count >= MAXIMUM_PROBLEMS:
            self._raise(
                f"The first {self.count} bad rows of {self.name}; what follows them was not read:"
            )

    def stop(self, origin: str, text: str) -> None:
        """Raises for what leaves the rest of a source unread, after what was collected before.

        Raises:
          DataError: Always.
        """
        self._texts.append(f"{origin}: {text}")
        self._raise(f"{self.name} cannot be read to its end:", can_skip=False)

    def check(self) -> None:
        """Raises what was collected.

        Raises:
          DataError: If there was any problem and bad rows are not left out.
        """
        if self._texts:
            noun = "bad row" if self.count == 1 else "bad rows"
            self._raise(f"{self.count} {noun} in {self.name}:")

    def _raise(self, headline: str, *, can_skip: bool = True) -> None:
        lines = [headline, *self._texts, *(f"A right row: {text}" for text in self._examples)]
        if can_skip:
            lines.append("To leave such rows out and list them: --config.data.bad_rows=skip")
        raise DataError([*lines, "Nothing was trained."])


def kind(text: str) -> str:
    """Returns what problems of one kind have in common: the text without numbers and values."""
    if match := _VALUE_AND_EXPECTED.fullmatch(text):
        expected = re.split(r"[;.] |\.$|(?<=JSON): ", match["expected"], maxsplit=1)[0]
        return f"{_without_numbers(match['key'])} is not {expected}"
    return _without_numbers(re.split(r"[;.] |\.$", _VALUE.sub("…", text), maxsplit=1)[0])


def _without_numbers(text: str) -> str:
    return re.sub(r"\d[\d,]*", "N", text)


def describe_kinds(kinds: dict[str, int]) -> list[str]:
    """Returns one line for each of the most frequent kinds, and one for the others together."""
    ranked = sorted(kinds.items(), key=lambda item: -item[1])
    lines = [f"{count:,} x {text}" for text, count in ranked[:_SHOWN_KINDS]]
    if others := sum(count for _, count in ranked[_SHOWN_KINDS:]):
        lines.append(f"{others:,} of other kinds")
    return lines


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        text = json.dumps(record, default=repr)
    except (RecursionError, ValueError):
        text = json.dumps({**record, "row": "(nested too deeply to be written)"})
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


class IgnoredProblems(Problems):
    """Bad rows of a source that was judged before, or is judged later."""

    def add(self, origin: str, text: str, *, raw: Any = None, example: str = "") -> None:
        """Does nothing."""
