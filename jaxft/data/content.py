"""The content of a file, told from its first bytes rather than from its name."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow

from jaxft.data.specs import SourceSpec
from jaxft.errors import DataError

_HEAD = 1 << 16
_LONGEST_FIRST_LINE = 1 << 20
_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
}
COMPRESSED = tuple(suffix for _, suffix in _COMPRESSIONS.values())
"""Endings of the names of compressed files."""

_BINARY = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"%PDF": "a PDF",
    b"SQLite format 3": "a SQLite database",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}
_JSON_LINES, _TABLES, _TEXTS = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".txt", ".text", ".md")
TABLE_SUFFIXES = (*_JSON_LINES, ".json", *_TABLES, ".parquet")
SUFFIXES = (*TABLE_SUFFIXES, *_TEXTS)
"""Endings of the names of data files, without those of compression."""

_JSON = re.compile(r'[\[\s]*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\})')
DELIMITERS = ",;\t"
"""What may separate the fields of a table."""

_TABLE_LINES = 20
_FEWEST_TABLE_LINES = 3


@dataclass(frozen=True, slots=True)
class Content:
    """The way a file is read.

    Attributes:
      kind: 'JSON lines', 'JSON', 'a table', 'Parquet' or 'text'.
      remark: Words for a log where the name of the file says otherwise.
    """

    kind: str
    remark: str = ""


def suffix_of(path: Path) -> str:
    """Returns the ending of a file's name in lower case, without that of compression."""
    name = path.name.lower()
    ending = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    return Path(name.removesuffix(ending)).suffix


def open_file(path: Path) -> IO[bytes]:
    """Opens a file whose bytes may be compressed, whatever its name.

    Raises:
      DataError: If it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(8)
        match _compression(begin):
            case "gzip":
                return cast(IO[bytes], gzip.open(path))
            case "bzip2":
                return bz2.open(path)
            case "xz":
                return lzma.open(path)
            case "zstd":
                return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _compression(begin: bytes) -> str:
    return next((name for magic, (name, _) in _COMPRESSIONS.items() if begin.startswith(magic)), "")


def detect(path: Path, spec: SourceSpec, head: bytes, *, is_whole: bool) -> Content:
    """Says how a file is read.

    Args:
      path: Its name decides between a table and plain text, which look alike.
      spec: With format 'text' a text file is text whatever it looks like.
      head: Its first bytes, decompressed.
      is_whole: Whether these are all.

    Raises:
      DataError: If it is binary, or may be a table or plain text.
    """
    suffix = suffix_of(path)
    if head.startswith(b"PAR1"):
        return Content("Parquet", _remark("Parquet", suffix, (".parquet",)))
    if suffix == ".parquet":
        raise DataError(f"{path}:1: not a readable Parquet file: it does not begin as one.")
    _refuse_binary(path, head)
    text = codecs.decode(head, "utf-8-sig", errors="replace").lstrip()
    json_kind = _json_kind(text)
    if suffix in _JSON_LINES and not (json_kind == "JSON" and text.startswith("[")):
        return Content("JSON lines")
    if suffix == ".json":
        return Content("JSON" if is_whole and _is_one_object(text) else json_kind or "JSON")
    if json_kind and not (suffix in _TEXTS and spec.format == "text"):
        return Content(json_kind, _remark(json_kind, suffix, ()))
    if suffix in _TABLES or (suffix not in _TEXTS and spec.format == "columns"):
        return Content("a table")
    if suffix not in _TEXTS and spec.format != "text" and _looks_like_table(text, is_whole):
        raise DataError(
            f"{path} may be a table or plain text. Name it {path.name}.csv, or write what it is "
            f"after its name: '{path}:format=text', or "
            f"'{path}:format=columns:prompt=…:completion=…'."
        )
    return Content("text")


def read_head(file: IO[bytes]) -> tuple[bytes, bool]:
    """Returns the bytes of a file that `detect` looks at, and whether these are all."""
    head = file.read(_HEAD)
    if b"\n" not in head:
        head += file.readline(_LONGEST_FIRST_LINE)
    return head, not file.read(1)


def _remark(kind: str, suffix: str, usual: tuple[str, ...]) -> str:
    return "" if suffix in usual else f"; the file holds {kind}, which its name does not say"


def _refuse_binary(path: Path, head: bytes) -> None:
    what = next((what for magic, what in _BINARY.items() if head.startswith(magic)), "")
    if name := _compression(head):
        what = f"{name} within compressed data; decompress it once"
    if not what and b"\0" in head:
        what = "a binary file"
    if what:
        what, _, remedy = what.partition("; ")
        advice = f" {remedy[0].upper()}{remedy[1:]}." if remedy else ""
        raise DataError(
            f"{path} is {what} and cannot be read as data; expected JSON, CSV, Parquet or text in "
            f"UTF-8.{advice}"
        )


def _json_kind(text: str) -> str:
    """Returns 'JSON lines', 'JSON' or '' for text that does not begin as JSON does."""
    if not _JSON.match(text):
        return ""
    line, _, rest = text.partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "JSON"
    return "JSON lines" if isinstance(value, dict) or rest.strip() else "JSON"


def _is_one_object(text: str) -> bool:
    return text.startswith("{") and not text.partition("\n")[2].strip()


def _looks_like_table(text: str, is_whole: bool) -> bool:
    lines = text.splitlines()[:_TABLE_LINES] if is_whole else text.splitlines()[:-1][:_TABLE_LINES]
    lines = [line for line in lines if line.strip()]
    if len(lines) < _FEWEST_TABLE_LINES:
        return False
    for delimiter in DELIMITERS:
        try:
            counts = {len(fields) for fields in csv.reader(lines, delimiter=delimiter)}
        except csv.Error:
            continue
        if len(counts) == 1 and counts.pop() > 1:
            return True
    return False
