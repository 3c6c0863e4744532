"""Folders as tar archives, sent piece by piece: nothing of them is held in memory or written twice.

Weights do not compress, so that the size is known before the first piece.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PIECE = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK  # of zeros


class Entry(NamedTuple):
    """A file of an archive.

    Attributes:
      path: Path on this machine.
      header: The blocks before its content.
      size: Bytes of its content.
    """

    path: Path
    header: bytes
    size: int


def entries_of(folder: Path, name: str) -> list[Entry]:
    """Returns the files of a folder; `name` is what the folder is called in the archive."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            info = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            info.size, info.mtime = path.stat().st_size, int(path.stat().st_mtime)
            found.append(Entry(path, info.tobuf(tarfile.PAX_FORMAT), info.size))
    return found


def size_of(entries: list[Entry]) -> int:
    """Returns the bytes of the archive."""
    return sum(len(e.header) + e.size + _padding(e.size) for e in entries) + _END


def pieces_of(entries: list[Entry]) -> Iterator[bytes]:
    """Yields the archive."""
    for entry in entries:
        yield entry.header
        with entry.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
        yield bytes(_padding(entry.size))
    yield bytes(_END)


def _padding(size: int) -> int:
    return -size % _BLOCK
