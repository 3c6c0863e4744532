"""Reads raw rows of local files, each with the line it came from."""

import codecs
import csv
import functools
import hashlib
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from jaxft.data import content
from jaxft.data.formats import told_columns
from jaxft.data.json_text import READ_CHARACTERS, JsonError, JsonText, loads
from jaxft.data.problems import Problems
from jaxft.data.sources import Source, drop_filler
from jaxft.errors import DataError

_LONGEST_LINE = 1 << 30
_PARQUET_ROWS = 1024
_LARGEST_EXACT = 2.0**53
# What reading compressed bytes raises, beside what every file may.
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

csv.field_size_limit(_LONGEST_LINE)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of text.

    Attributes:
      number: Number of the line, from 1.
      text: Text with its line end; bytes that are no UTF-8 are lone surrogates.
      problem: Bytes that are no UTF-8, in words; mostly empty.
    """

    number: int
    text: str
    problem: str


@dataclass(frozen=True, slots=True)
class _Members:
    """Names of the members of a JSON object.

    Attributes:
      names: All of them.
      lists: Members that are lists of objects.
      others: Members that are neither lists of objects nor objects.
      cells: Members that can be cells of a row: texts, numbers and the like, and lists of messages.
    """

    names: list[str]
    lists: list[str]
    others: list[str]
    cells: list[str]


@dataclass(frozen=True)
class File(Source):
    """A local file.

    Attributes:
      path: Path of the file.
    """

    path: Path = field(kw_only=True)

    def fingerprint(self) -> str:
        """Hash of the bytes: a file that changes without its date changing is seen too."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    def remark(self) -> str:
        """Returns what the file holds where its name does not say, and which list of it is read."""
        remark = self._content.remark
        lists = self._json_members.lists if self._content.kind == "JSON" else []
        if lists and not self._is_one_row:
            remark += f"; rows are those of the list {lists[0]!r} in the file"
        return remark

    @property
    def kind(self) -> str:
        """Kind of content, as `content.Content` calls it."""
        return self._content.kind

    @functools.cached_property
    def _content(self) -> content.Content:
        with content.open_file(self.path) as file:
            head, is_whole = self._reading(lambda: content.read_head(file))
        return content.detect(self.path, self.spec, head, is_whole=is_whole)

    def _values(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        match self._content.kind:
            case "JSON lines":
                yield from self._json_lines(problems)
            case "JSON":
                yield from self._json(problems)
            case "a table":
                yield from self._table(problems)
            case "Parquet":
                yield from self._parquet(problems)
            case _:
                yield from self._texts(problems)

    def _reading[T](self, read: Callable[[], T]) -> T:
        try:
            return read()
        except _READ_ERRORS as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.name} cannot be read: {getattr(error, 'strerror', '') or error}.")

    def _lines(self) -> Iterator[_Line]:
        with content.open_file(self.path) as file:
            number = 0
            while line := self._reading(lambda: file.readline(_LONGEST_LINE)):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"{self.origin(number)}: the line is longer than {_LONGEST_LINE >> 20:,} "
                        "MiB. Split the file."
                    )
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                try:
                    yield _Line(number, line.decode(encoding), "")
                except UnicodeDecodeError as error:
                    problem = (
                        f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}. "
                        "Save the file as UTF-8."
                    )
                    yield _Line(number, line.decode(encoding, "surrogateescape"), problem)

    def _json_lines(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        for line in self._lines():
            text = line.text.rstrip("\r\n")
            if line.problem:
                problems.add(self.origin(line.number), line.problem, raw=text)
            elif text.strip():
                try:
                    value = loads(text)
                except JsonError as error:
                    problems.add(self.origin(line.number), f"{error}.", raw=text)
                else:
                    yield value, line.number

    def _pieces(self) -> Iterator[str]:
        """Yields the text of the file, bytes that are no UTF-8 as lone surrogates."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        with content.open_file(self.path) as file:
            first = True
            while data := self._reading(lambda: file.read(READ_CHARACTERS)):
                text = decoder.decode(data)
                yield text.removeprefix("\ufeff") if first else text
                first = False
        yield decoder.decode(b"", final=True)

    def _json(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        text = JsonText(self._pieces())
        try:
            match text.peek():
                case "[":
                    yield from self._json_rows(text.items(), problems)
                case "{":
                    yield from self._json_object(text, problems)
                case _:
                    problems.stop(
                        self.origin(1), "expected a JSON array of objects, or an object of them."
                    )
            text.end()
        except JsonError as error:
            problems.stop(self.origin(error.line), f"broken JSON: {error}.")

    def _json_rows(
        self, rows: Iterator[tuple[Any, int, str]], problems: Problems
    ) -> Iterator[tuple[Any, int]]:
        for number, (value, line, problem) in enumerate(rows):
            problem = problem or _escaped_bytes(value)
            if problem:
                problems.add(self.origin(line, number), f"{problem}.", raw=value)
            else:
                yield value, line

    def _json_object(self, text: JsonText, problems: Problems) -> Iterator[tuple[Any, int]]:
        """Yields the object if it is a row, or the rows in its only list, or else all members."""
        lists, others = self._json_members.lists, self._json_members.others
        if self._is_one_row:
            yield from self._json_rows((text.value() for _ in range(1)), problems)
        elif len(lists) > 1:
            problems.stop(
                self.origin(1),
                f"one JSON object with several lists of objects: {_quoted(lists)}. Write each of "
                "them to a file of its own.",
            )
        elif lists:
            for name in text.names():
                if name == lists[0]:
                    yield from self._json_rows(text.items(), problems)
                else:
                    text.value()
        elif others:
            problems.stop(
                self.origin(1),
                f"one JSON object in which {_quoted(others)} {'is' if len(others) == 1 else 'are'} "
                "neither a row nor a list of rows; expected a JSON array of objects, an object of "
                "them, or an object with one list of them.",
            )
        else:
            yield from self._json_rows((text.value() for _ in text.names()), problems)

    @functools.cached_property
    def _is_one_row(self) -> bool:
        """Whether the JSON object of the file is a row, and not one or several that hold rows."""
        members = self._json_members
        columns = told_columns(members.names, self.spec)
        return bool(columns) and columns[0] in members.cells and {*members.lists} <= {*columns}

    @functools.cached_property
    def _json_members(self) -> _Members:
        found = _Members([], [], [], [])
        text = JsonText(self._pieces())
        for name in text.names() if text.peek() == "{" else ():
            found.names.append(name)
            if text.peek() == "[":
                items = [(isinstance(item, dict), _is_message(item)) for item, _, _ in text.items()]
                has_objects = bool(items) and all(is_object for is_object, _ in items)
                (found.lists if has_objects else found.others).append(name)
                if has_objects and all(is_message for _, is_message in items):
                    found.cells.append(name)
            elif not isinstance(text.value()[0], dict):
                found.others.append(name)
                found.cells.append(name)
        return found

    def _table(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        broken: list[_Line] = []
        given: list[str] = []

        def texts() -> Iterator[str]:
            for line in self._lines():
                if line.problem:
                    broken.append(line)
                given.append(line.text)
                yield line.text

        lines = texts()
        first = next(lines, "")
        delimiter = max(content.DELIMITERS, key=first.count)
        header = next(csv.reader([first], delimiter=delimiter), [])
        self._check_names(header, problems)
        if broken:
            problems.stop(self.origin(1), broken[0].problem)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 2
            given.clear()
            broken.clear()
            try:
                values = next(reader, None)
            except csv.Error as error:
                problem = f"broken CSV: {error}. Check the quotes."
                if "unexpected end" in str(error):
                    problems.stop(self.origin(line), problem)
                problems.add(self.origin(line), problem, raw="".join(given))
                continue
            if values is None:
                return
            if broken:
                problems.add(self.origin(broken[0].number), broken[0].problem, raw="".join(given))
            elif len(values) == len(header):
                yield dict(zip(header, values, strict=True)), line
            elif values:
                problems.add(
                    self.origin(line),
                    f"{len(values)} fields; expected {len(header)}: {', '.join(header)}.",
                    raw="".join(given),
                )

    def _check_names(self, names: list[str], problems: Problems) -> None:
        repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if repeated:
            problems.stop(
                self.origin(1), f"several columns have the same name: {_quoted(repeated)}."
            )

    def _parquet(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        line = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                self._check_names(file.schema_arrow.names, problems)
                integers = _integers_with_gaps(file)
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    for value in batch.to_pylist():
                        line += 1
                        for name in integers:
                            value[name] = _whole(value[name])
                        yield drop_filler(value), line
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            problems.stop(
                self.origin(line + 1), f"not a readable Parquet file from this row on: {error}."
            )

    def _texts(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        document: list[_Line] = []
        for line in self._lines():
            document.append(line)
            split = self.spec.text_split
            if split == "line" or (split == "paragraph" and not line.text.strip()):
                yield from self._text(document, problems)
                document = []
        yield from self._text(document, problems)

    def _text(self, lines: list[_Line], problems: Problems) -> Iterator[tuple[str, int]]:
        text = "".join(line.text for line in lines).replace("\r\n", "\n")
        if self.spec.text_split != "file":
            text = text.strip("\n")
        broken = next((line for line in lines if line.problem), None)
        if broken is not None:
            problems.add(self.origin(broken.number), broken.problem, raw=text)
        elif text.strip():
            yield text, lines[0].number


def _integers_with_gaps(file: parquet.ParquetFile) -> list[str]:
    """Returns the names of float columns that have gaps and hold whole numbers otherwise.

    Integers become floats in many tools as soon as one of them is missing; as text, 3 would be 3.0.
    """
    kinds = (pyarrow.float32(), pyarrow.float64())
    has_gaps = {field.name: False for field in file.schema_arrow if field.type in kinds}
    for batch in file.iter_batches(columns=list(has_gaps)):
        for name in list(has_gaps):
            cells = batch.column(name).to_numpy(zero_copy_only=False)  # gaps become NaN
            numbers = cells[np.isfinite(cells)]
            has_gaps[name] |= len(numbers) < len(cells)
            if not _are_whole(numbers):
                del has_gaps[name]
        if not has_gaps:
            break
    return [name for name, gaps in has_gaps.items() if gaps]


def _are_whole(numbers: np.ndarray) -> bool:
    """Whether floats are integers, and small enough to tell each from the next."""
    return bool(np.all((np.floor(numbers) == numbers) & (np.abs(numbers) <= _LARGEST_EXACT)))


def _whole(value: float | None) -> float | int | None:
    return value if value is None or not math.isfinite(value) else int(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _escaped_bytes(value: Any) -> str:
    """Returns a problem if a value holds bytes that were no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":
            return f"not UTF-8: byte {ord(character) - 0xDC00:#04x}; save the file as UTF-8"
    except (RecursionError, ValueError):
        return "it is nested too deeply"
    return ""


def _quoted(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown
