"""The form that files of jobs have: refused by name where they have another one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxft.formatting import format_bytes

_EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
# What files begin with that are something else.
_OTHERS = {
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"PK": "is a ZIP archive or a spreadsheet: export it as JSONL",
    b"PAR1": "is a Parquet file: export it as JSONL",
    b"[": "is a JSON array: write one object a line, without commas between them",
}
# Bytes: two million tokens of English. Tokenising takes 100 to 400 times as much memory.
_MOST_ROW = 8 << 20


class Refusal(Exception):
    """A job that cannot be run.

    Args:
      message: What is wrong, and what to do.
      code: Word that programs know it by.
      param: Field of the request.
    """

    def __init__(self, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        self.message, self.code, self.param = message, code, param


def require_json_lines(path: str, name: str, param: str) -> None:
    """Refuses what is no JSONL by its first line, and rows that are too large.

    What is no JSONL would be taken for plain text or a table.

    Args:
      path: The file.
      name: Name that its user gave it.
      param: Field of the request that names it.

    Raises:
      Refusal: With what it seems to be.
    """
    with Path(path).open("rb") as file:
        number, line = next(
            ((i, line) for i, line in enumerate(_lines(file), start=1) if line.strip()), (1, b"")
        )
    problem = next((text for start, text in _OTHERS.items() if line.startswith(start)), "")
    if not problem:
        _require_small_rows(path, name, param)
        try:
            if isinstance(json.loads(line.decode("utf-8-sig")), dict):
                return
            problem = f"has no JSON object in line {number}"
        except UnicodeDecodeError:
            problem = f"is no UTF-8 text in line {number}"
        except ValueError as error:
            shown = line[:60].decode(errors="replace").strip()
            problem = f"has {shown!r} in line {number}, which is no JSON object ({error})"
        except RecursionError:
            problem = f"is nested too deeply in line {number}"
    raise Refusal(
        f"{name}:{number}: the file {problem}. Expected JSONL, UTF-8 text with a JSON object on "
        f"each line, such as {_EXAMPLE}.",
        code="invalid_file_format",
        param=param,
    )


def _require_small_rows(path: str, name: str, param: str) -> None:
    with Path(path).open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if len(line) > _MOST_ROW:
                raise Refusal(
                    f"{name}:{number}: the row is larger than {format_bytes(_MOST_ROW)}. Split it, "
                    "or leave it out.",
                    code="invalid_file_format",
                    param=param,
                )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields lines; one that is too large ends after a byte more than rows may have."""
    return iter(lambda: file.readline(_MOST_ROW + 1), b"")
