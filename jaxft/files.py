"""Files that are never half written, and the one form of JSON that is written."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxft.errors import TrainingError

# What names of files that are being written begin with.
TEMPORARY = ".jaxft-"


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: readers and crashes see the old text or the new one.

    Raises:
      TrainingError: If the disk is full or the folder cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file at once; numbers that are not finite become null.

    Raises:
      TrainingError: If the disk is full or the folder cannot be written.
    """
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Returns the text of a JSON file, as people read it; numbers that are not finite are null."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file at once, as `write_text` does."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise write_error(path, error) from error


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Appends one object as one line in a single write; numbers that are not finite become null.

    Raises:
      TrainingError: If the disk is full or the file cannot be written.
    """
    append_bytes(path, _as_line(record).encode())


def append_bytes(path: Path, data: bytes) -> None:
    """Appends to a file in a single write; nothing is kept back.

    Raises:
      TrainingError: If the disk is full or the file cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            written = file.write(data)
            if written < len(data):
                file.write(data[written:])  # raises what stopped the first write
    except OSError as error:
        raise write_error(path, error) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file that may be absent, or torn by a crash at any line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and line.endswith(b"\n"):
                yield record


def rewrite_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replaces a file's lines at once."""
    write_text(path, "".join(map(_as_line, records)))


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def stamps(files: Iterable[Path]) -> list[list[Any]]:
    """Returns path, size and time of each file, which change if its content does."""
    stats = [(file, file.stat()) for file in files]
    return [[str(file.absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def finite(value: Any) -> Any:
    """Returns a value for JSON: None for what it cannot say (nan, inf), numbers for NumPy's."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and (number != number or abs(number) == float("inf")):
        return None
    return number


def write_error(path: Path, error: OSError) -> TrainingError:
    """Returns what to raise when the system refuses a write."""
    return TrainingError(
        f"{path} cannot be written: {error.strerror}. Free some disk space or fix the folder's "
        "permissions, then run it again; a training run goes on with --resume."
    )
