"""Reads the rows of a source and turns them into what an objective takes."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from jaxft.data.formats.cells import describe_numbers
from jaxft.data.formats.detection import EXAMPLES, check_meaning, choose_format
from jaxft.data.formats.items import Document, Format, Item, conversations_of
from jaxft.data.formats.units import UNIT_EXAMPLES, choose_unit_format
from jaxft.data.problems import Problems, RowError
from jaxft.data.sources import Row, Source
from jaxft.errors import DataError

_FIRST_EXAMPLES = {"documents": "messages", "pairs": "preference", "labelled": "labelled"}


def read_items(
    source: Source,
    problems: Problems,
    *,
    on_format: Callable[[Format], None],
    chosen: Collection[int] | None = None,
    units: str = "documents",
) -> Iterator[tuple[Row, Item]]:
    """Yields rows and what they are of a source; bad rows go to `problems`.

    Args:
      source: What is read; it names the format, or leaves it to be found out from the first row.
      problems: Raises by itself when it is full; the caller checks it at the end.
      on_format: Called once, before the first item.
      chosen: Numbers of the rows that are read; by default all.
      units: What the objective takes: 'documents', which are conversations or texts; 'pairs' of
        answers; or 'labelled' ones, for which pairs are taken too.

    Raises:
      DataError: If no row is in a known format, or the columns that are named do not exist.
    """
    # An error would otherwise hold the file open for as long as it is kept itself.
    with contextlib.closing(source.rows(problems)) as every:
        rows: Iterator[Row] = every
        if chosen is not None:
            rows = itertools.islice((row for row in every if row.number in chosen), len(chosen))
        yield from _items(source, rows, problems, on_format=on_format, units=units)


def _items(
    source: Source,
    rows: Iterator[Row],
    problems: Problems,
    *,
    on_format: Callable[[Format], None],
    units: str,
) -> Iterator[tuple[Row, Item]]:
    row_format, unknown = None, None
    examples = EXAMPLES | UNIT_EXAMPLES
    first_example = examples[_FIRST_EXAMPLES[units]]
    for row in rows:
        origin = source.origin(row.line, row.number)
        if row_format is None:
            try:
                if units == "documents":
                    row_format = choose_format(row, source.spec, origin)
                else:
                    row_format = choose_unit_format(row, source.spec, origin, units)
            except DataError as error:
                if not problems.are_skipped:
                    raise
                unknown = unknown or error
                problems.add(origin, error.problems[0].removeprefix(f"{origin}: "), raw=row.value)
                continue
            except RowError as error:
                problems.add(origin, str(error), raw=row.value, example=first_example)
                continue
            description = row_format.description + source.remark()
            description += describe_numbers(row.value, row_format.columns)
            row_format = dataclasses.replace(row_format, description=description)
            on_format(row_format)
        try:
            item = _convert(row.value, row_format, origin, named=source.spec.format != "auto")
        except RowError as error:
            problems.add(origin, str(error), raw=row.value, example=examples[row_format.name])
        else:
            yield row, item
    if row_format is None and unknown is not None:
        raise unknown


def _convert(value: Any, row_format: Format, origin: str, *, named: bool) -> Item:
    check_meaning(value, row_format, named=named)
    try:
        item = row_format.convert(value, origin)
        _check_characters(item)
    except RecursionError:
        raise RowError("the row is nested too deeply.") from None
    return item


def _check_characters(item: Item) -> None:
    """Raises RowError for text that no encoding can write, whichever way it came into a row."""
    if isinstance(item, Document):
        text = item.text
    else:
        talks = [[talk.messages, talk.tools] for talk in conversations_of(item)]
        text = json.dumps(talks, ensure_ascii=False, default=repr)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise RowError(
            f"the row has half of a character, \\u{ord(found):04x} without its pair; an emoji was "
            "probably cut in two. Remove it."
        ) from None
