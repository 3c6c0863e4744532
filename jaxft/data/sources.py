"""Reads raw rows of local files and hub data sets, each with the file and line it came from."""

import csv
import functools
import glob
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from jaxft.data.problems import Problems
from jaxft.errors import DataError, nearest

_TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (*_TABLE_SUFFIXES, ".txt", ".text", ".md")
_READ_CHARACTERS = 1 << 20
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""From words in file names to the splits that the hub's own library makes of them."""
_HUB_ID = re.compile(
    r"(?P<name>[^\s:\[\]]+)(?::(?P<config>[\w.\-+]+))?(?:\[(?P<split>[^\[\]]+)\])?"
)

csv.field_size_limit(1 << 30)


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row.

    Attributes:
      value: A dict of columns, or a string for plain text.
      line: Line of the file, or number of the row in a set without lines, from 1.
    """

    value: Any
    line: int


@dataclass(frozen=True)
class Source(ABC):
    """One file or hub data set that can be read again and again.

    Attributes:
      name: How it is called in messages.
      split: Part of a hub data set; empty for files.
    """

    name: str
    split: str = field(default="", kw_only=True)

    @abstractmethod
    def rows(self, problems: Problems) -> Iterator[Row]:
        """Yields rows; what cannot be read goes to `problems` instead."""

    def remark(self) -> str:
        """Returns what a log should add on which part of the source the rows are; mostly ''."""
        return ""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the content does."""

    def origin(self, line: int) -> str:
        """Returns `file:line`."""
        return f"{self.name}:{line}"


@dataclass(frozen=True)
class File(Source):
    """A local file.

    Attributes:
      path: Where it is.
      text_split: What one document of plain text is: 'paragraph', 'line' or 'file'.
    """

    path: Path = field(kw_only=True)
    text_split: str = field(default="paragraph", kw_only=True)

    def fingerprint(self) -> str:
        """Hash of the bytes: a file that changes without its date changing is seen too."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(self, problems: Problems) -> Iterator[Row]:
        """Yields rows; what cannot be read goes to `problems` instead."""
        match self.path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from self._json_line_rows(problems)
            case ".json":
                read = self._json_line_rows if self._holds_json_lines() else self._json_rows
                yield from read(problems)
            case ".csv" | ".tsv":
                yield from self._csv_rows(problems)
            case ".parquet":
                yield from self._parquet_rows(problems)
            case _:
                yield from self._text_rows(problems)

    def _lines(self, problems: Problems) -> Iterator[tuple[int, str]]:
        """Yields (line number, text with its line end); lines that are not UTF-8 are problems."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    problems.add(
                        self.origin(number),
                        f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}. "
                        "Save the file as UTF-8.",
                    )
                else:
                    yield number, text

    def _json_line_rows(self, problems: Problems) -> Iterator[Row]:
        for number, line in self._lines(problems):
            if not line.strip():
                continue
            try:
                yield Row(json.loads(line), number)
            except json.JSONDecodeError as error:
                problems.add(
                    self.origin(number), f"broken JSON at column {error.colno}: {error.msg}."
                )

    def _holds_json_lines(self) -> bool:
        """Whether a `.json` file holds one object a line, as many published ones do."""
        with self.path.open("rb") as file:
            try:
                first = json.loads(file.readline())
            except ValueError:
                return False
            return isinstance(first, dict) and any(line.strip() for line in file)

    def _json_rows(self, problems: Problems) -> Iterator[Row]:
        text = _JsonText(line for _, line in self._lines(problems))
        try:
            match text.peek():
                case "[":
                    yield from text.items()
                case "{":
                    yield from self._json_object_rows(text, problems)
                case _:
                    problems.add(
                        self.origin(1), "expected a JSON array of objects, or an object of them."
                    )
        except _BrokenJson as error:
            problems.add(self.origin(error.line), f"broken JSON: {error}.")

    def _json_object_rows(self, text: "_JsonText", problems: Problems) -> Iterator[Row]:
        """Yields the objects of the only list of objects, or else all members, if all are rows."""
        lists, others = self._json_members
        if len(lists) > 1:
            problems.add(
                self.origin(1),
                f"one JSON object with several lists of objects: {_quoted(lists)}. Write each of "
                "them to a file of its own.",
            )
        elif lists:
            for name in text.names():
                if name == lists[0]:
                    yield from text.items()
                else:
                    text.value()
        elif others:
            problems.add(
                self.origin(1),
                f"one JSON object in which {_quoted(others)} {'is' if len(others) == 1 else 'are'} "
                "neither a row nor a list of rows; expected a JSON array of objects, an object of "
                "them, or an object with one list of them.",
            )
        else:
            for _ in text.names():
                yield text.value()

    @functools.cached_property
    def _json_members(self) -> tuple[list[str], list[str]]:
        """Names of the members that are lists of objects, and of those that are no objects."""
        lists: list[str] = []
        others: list[str] = []
        text = _JsonText(line for _, line in self._lines(Problems(self.name)))
        for name in text.names() if text.peek() == "{" else ():
            if text.peek() == "[":
                kinds = [isinstance(row.value, dict) for row in text.items()]
                (lists if kinds and all(kinds) else others).append(name)
            elif not isinstance(text.value().value, dict):
                others.append(name)
        return lists, others

    def remark(self) -> str:
        """Returns which list of a JSON object is read."""
        if self.path.suffix.lower() != ".json" or self._holds_json_lines():
            return ""
        lists, _ = self._json_members
        return f"; rows are those of the list {lists[0]!r} in the file" if lists else ""

    def _csv_rows(self, problems: Problems) -> Iterator[Row]:
        lines = (line for _, line in self._lines(problems))
        header_line = next(lines, "")
        delimiter = max(",;\t", key=header_line.count)
        header = next(csv.reader([header_line], delimiter=delimiter), [])
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        line = 2
        try:
            for values in reader:
                if len(values) == len(header):
                    yield Row(dict(zip(header, values, strict=True)), line)
                elif values:
                    problems.add(
                        self.origin(line),
                        f"{len(values)} fields; expected {len(header)}: {', '.join(header)}.",
                    )
                line = reader.line_num + 2
        except csv.Error as error:
            problems.add(self.origin(line), f"broken CSV: {error}. Check the quotes.")

    def _parquet_rows(self, problems: Problems) -> Iterator[Row]:
        try:
            line = 0
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        line += 1
                        yield Row(drop_filler(value), line)
        except pyarrow.ArrowException as error:
            problems.add(self.origin(line + 1), f"not a readable Parquet file: {error}.")

    def _text_rows(self, problems: Problems) -> Iterator[Row]:
        document: list[str] = []
        start = 1
        for number, line in self._lines(problems):
            ends = self.text_split == "line" or (
                self.text_split == "paragraph" and not line.strip()
            )
            if not document:
                start = number
            document.append(line)
            if ends:
                yield from _text_row(document, start)
                document = []
        yield from _text_row(document, start)


class _BrokenJson(ValueError):
    """What is wrong with a line of JSON text."""

    def __init__(self, problem: str, line: int):
        super().__init__(problem)
        self.line = line


class _JsonText:
    """Parses one value after another out of JSON text that arrives in pieces."""

    def __init__(self, lines: Iterable[str]):
        self._lines = iter(lines)
        self._buffer = ""
        self._position = 0
        self._decoder = json.JSONDecoder()
        self.line = 1

    def _read(self) -> bool:
        """Adds to what is buffered at least as much again, so that long values cost no square."""
        pieces = [self._buffer[self._position :]]
        wanted = max(_READ_CHARACTERS, len(pieces[0]))
        read = 0
        for line in self._lines:
            pieces.append(line)
            read += len(line)
            if read >= wanted:
                break
        if read:
            self._buffer, self._position = "".join(pieces), 0
        return read > 0

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def peek(self) -> str:
        """Returns the next character that is neither white space nor a comma; '' at the end."""
        while True:
            position = self._position
            while position < len(self._buffer) and self._buffer[position] in " \t\r\n,":
                position += 1
            self._advance(position)
            if position < len(self._buffer):
                return self._buffer[position]
            if not self._read():
                return ""

    def skip(self, character: str) -> None:
        """Steps over a character that `peek` returned, or raises."""
        if self.peek() != character:
            raise _BrokenJson(f"expected {character!r}", self.line)
        self._advance(self._position + 1)

    def items(self) -> Iterator[Row]:
        """Yields the items of the list that comes next."""
        self.skip("[")
        while self._before("]"):
            yield self.value()

    def names(self) -> Iterator[str]:
        """Yields the names of the object that comes next; the caller takes each value."""
        self.skip("{")
        while self._before("}"):
            name = self._decode()
            self.skip(":")
            yield name

    def _before(self, closing: str) -> bool:
        character = self.peek()
        if not character:
            raise _BrokenJson("the file ends too early", self.line)
        if character == closing:
            self.skip(closing)
        return character != closing

    def value(self) -> Row:
        """Returns the value that comes next, with the line where it begins."""
        self.peek()
        line = self.line
        return Row(self._decode(), line)

    def _decode(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                self._advance(error.pos)
                raise _BrokenJson(error.msg, self.line) from error
            if end == len(self._buffer) and self._read():
                continue
            self._advance(end)
            return value


def _text_row(lines: list[str], start: int) -> Iterator[Row]:
    text = "".join(lines).replace("\r\n", "\n").strip("\n")
    if text.strip():
        yield Row(text, start)


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


def find_sources(
    text: str, *, text_split: str = "paragraph", streaming: bool = False, training: bool = True
) -> list[Source]:
    """Resolves comma-separated files, folders, globs and hub ids, in the order given.

    Args:
      text: Such as `a.jsonl,more/*.csv` or `org/name:config[split]`.
      text_split: What one document of a plain text file is.
      streaming: Read hub data sets without downloading them first.
      training: A hub id without a split means 'train', otherwise 'validation'.

    Raises:
      DataError: For files that are not there, with the nearest name, all at once.
    """
    sources: list[Source] = []
    problems: list[str] = []
    for part in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", text))):
        try:
            found = _find_files(part, text_split)
        except DataError as error:
            problems += error.problems
            continue
        if found:
            sources += found
        elif (hub := _hub_source(part, streaming, training)) is not None:
            sources.append(hub)
        else:
            problems.append(_missing(part))
    if problems:
        raise DataError(problems)
    if not sources:
        raise DataError("No data is named; set data.train to files, globs or hub ids.")
    return sources


def _find_files(part: str, text_split: str) -> list[Source]:
    path = Path(part).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = _find_in_folder(path)
    else:
        paths = sorted(Path(item) for item in glob.glob(str(path), recursive=True))
    paths = [item for item in paths if item.is_file()]
    return [File(str(item), path=item, text_split=text_split) for item in paths]


def _find_in_folder(folder: Path) -> list[Path]:
    """Returns the data files of a folder, without those that only describe the data.

    A folder whose data lie in folders below gives none: it is read in the layout of the hub.

    Raises:
      DataError: If the files are of several parts, such as training and test.
    """
    paths = [path for path in _visible_files(folder, "*") if path.suffix.lower() != ".md"]
    tables = [path for path in paths if path.suffix.lower() in _TABLE_SUFFIXES]
    below = [path for path in _visible_files(folder, "*/*") if path.suffix in _TABLE_SUFFIXES]
    if below and not tables:
        return []
    paths = tables or paths
    named = [path for path in below if _split_of(path.name) or _split_of(path.parent.name)]
    splits = {path: split for path in paths if (split := _split_of(path.name))}
    if named or len(set(splits.values())) > 1:
        parts = [*paths, *named]
        shown = ", ".join(str(path.relative_to(folder)) for path in parts[:8])
        raise DataError(
            f"Folder {str(folder)!r} has data of several parts: {shown}"
            f"{', …' if len(parts) > 8 else ''}. Name the files that are meant, such as "
            f"{str(parts[0])!r}, or the part, such as '{folder}[train]'."
        )
    return paths


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in SUFFIXES
        and path.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _split_of(name: str) -> str:
    """Returns the part of a data set that the name of a file or folder tells of, or ''."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _quoted(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5:,} more" if len(names) > 5 else shown


def _hub_source(part: str, streaming: bool, training: bool) -> Source | None:
    match = _HUB_ID.fullmatch(part)
    if match is None:
        return None
    name = match["name"]
    if not Path(name).is_dir() and (
        name.startswith((".", "/", "~")) or name.endswith(SUFFIXES) or name.count("/") != 1
    ):
        return None
    from jaxft.data.hub import HubSource  # takes seconds to import, and few runs need it

    split = match["split"] or ("train" if training else "validation")
    return HubSource(name, split=split, configuration=match["config"] or "", streaming=streaming)


def _missing(part: str) -> str:
    path = Path(part).expanduser()
    if any(character in part for character in "*?["):
        return f"No file matches {part!r}."
    if path.parent.is_dir():
        names = [item.name for item in path.parent.iterdir()]
        return f"There is no file {part!r}.{nearest(path.name, names)}"
    return f"There is no file {part!r}, and no folder {str(path.parent)!r}."
