"""Contents of files: written once, whole or absent, found by id."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxft.files import TEMPORARY
from jaxft.service.ids import is_id

_PIECE = 1 << 20


class Blobs:
    """A folder of files that are named by ids alone: names that users give never become paths."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: str) -> Path:
        """Returns where a content is; raises ValueError for what is no id."""
        if not is_id(number):
            raise ValueError(f"{number!r} is no id")
        return self._folder / number

    def writer(self) -> "Writer":
        """Returns what takes a content piece by piece."""
        return Writer(self._folder)

    def write(self, number: str, data: bytes) -> int:
        """Stores a content; returns its size in bytes."""
        with self.writer() as writer:
            writer.write(data)
            return writer.keep(self.path(number))

    def join(self, number: str, parts: Iterable[str], others: "Blobs") -> int:
        """Stores the contents of parts one after another; returns the size in bytes."""
        with self.writer() as writer:
            for part in parts:
                with others.path(part).open("rb") as file:
                    shutil.copyfileobj(file, writer, _PIECE)
            return writer.keep(self.path(number))

    def remove(self, number: str) -> None:
        """Deletes a content; one that is not there is no error."""
        self.path(number).unlink(missing_ok=True)

    def names(self) -> Iterator[tuple[str, float]]:
        """Yields what the folder holds, unfinished contents too, and when it was written."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                yield entry.name, entry.stat().st_mtime

    def sweep(self, names: Iterable[str]) -> None:
        """Deletes files by name, unfinished ones too."""
        for name in names:
            if is_id(name) or name.startswith(TEMPORARY):
                (self._folder / name).unlink(missing_ok=True)


class Writer:
    """A content that is being written; leaving the block without `keep` leaves nothing."""

    def __init__(self, folder: Path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
        self._file: BinaryIO = os.fdopen(handle, "wb")
        self._path: Path | None = Path(name)
        self.size = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> int:
        """Appends; returns how many bytes."""
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def keep(self, path: Path) -> int:
        """Puts the content in its place, on disk; returns its size in bytes."""
        assert self._path is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, path)
        self._path = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name as well
        finally:
            os.close(folder)
        return self.size
