"""Sources of raw rows: a name, a way to read it, and rows with their places."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxft.data.problems import Problems
from jaxft.data.specs import SourceSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row.

    Attributes:
      value: A dict of columns, or a string for plain text.
      line: Line of the file, or number of the row in a set without lines, from 1.
      number: Place among the rows of its source, from 0; several rows may begin on one line.
    """

    value: Any
    line: int
    number: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Source(ABC):
    """One file or hub data set that can be read again and again.

    Attributes:
      name: Name in messages.
      spec: Spelling of the source, with the way its rows are read; files of a glob share one.
      split: Part of a hub data set; empty for files.
    """

    name: str
    spec: SourceSpec = field(kw_only=True)
    split: str = field(default="", kw_only=True)

    def rows(self, problems: Problems) -> Generator[Row, None, None]:
        """Yields rows; what cannot be read goes to `problems` instead.

        Raises:
          DataError: If the rest of the source cannot be read either.
        """
        for number, (value, line) in enumerate(self._values(problems)):
            yield Row(value, line, number)

    @abstractmethod
    def _values(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        """Yields the value and line of each row."""

    @property
    def is_streamed(self) -> bool:
        """Whether rows come over the network one by one, so that reading all may take days."""
        return False

    def remark(self) -> str:
        """Returns what a log should add on which part of the source the rows are; mostly ''."""
        return ""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the content does."""

    def origin(self, line: int, number: int = 0) -> str:
        """Returns `file:line`, with the row where it can be told that lines hold several."""
        return place_of(self.name, line, number)


def place_of(name: str, line: int, number: int) -> str:
    """Returns where a row is: `file:line`, or `file:line (row 8)`.

    The row is said where there are more rows than lines before it, as in an array on one line.

    Args:
      name: The source.
      line: As in `Row`.
      number: As in `Row`.
    """
    return f"{name}:{line} (row {number + 1:,})" if number >= line > 0 else f"{name}:{line}"


def drop_filler(value: Any) -> Any:
    """Removes the `None` members that Arrow puts into nested structs to give them one schema.

    Tool-call arguments would otherwise grow keys that the model then learns to write. Top-level
    columns keep their `None`, which means an empty cell.
    """
    if not isinstance(value, dict):
        return value
    return {name: _without_none(item) for name, item in value.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
