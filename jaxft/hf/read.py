"""Reads parts of stored tensors: the bytes they lie in and gaps of less than a page."""

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.rules import Part

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FP8 = "F8_E4M3"
BYTES = {**DTYPES, "U8": np.dtype(np.uint8), FP8: np.dtype(ml_dtypes.float8_e4m3fn)}
# Reading waits for the disk and copies without the interpreter's lock; casting holds it.
_THREADS = 4
# What one thread reads at a time, and the most that it holds beside the result.
_BLOCK = 8 * 2**20
# What it reads at a time where nothing is held: bytes go where they stay.
_STRAIGHT = 32 * 2**20
# Bytes less than a page apart are read as one run: the kernel fetches whole pages anyway.
_PAGE = 4096

# A task reads some bytes and writes what they hold into an array it was given.
type Task = Callable[[Reader], None]


class Reader:
    """Open files, and the threads that read them.

    Use it as a context; what it returns does not depend on it any more.
    """

    def __init__(self):
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(_THREADS, "jaxft-read")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def run(self, tasks: Iterable[Task]) -> None:
        """Runs the tasks and returns when all are done; the first error is raised."""
        for _ in self._pool.map(lambda task: task(self), tasks):
            pass

    def read(self, file: Path, start: int, target: memoryview) -> None:
        """Fills `target` with the bytes of a file from `start` on.

        Raises:
          ModelError: If the file ends before, because it was changed after its header was read.
        """
        descriptor = self._files.get(file)
        if descriptor is None:
            descriptor = self._open(file)
        done = os.preadv(descriptor, [target], start)
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], start + done)
            if not count:
                raise ModelError(f"{file} became shorter while it was read; try again.")
            done += count

    def scratch(self, size: int) -> np.ndarray:
        """Returns bytes that belong to this thread until its next call."""
        if len(getattr(self._scratch, "bytes", "")) < size:
            self._scratch.bytes = np.empty(size, np.uint8)
        return self._scratch.bytes[:size]

    def _open(self, file: Path) -> int:
        with self._opening:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that lies in bytes `start` to `end` of a file; `dtype` is safetensors' word."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes in the file."""
        return self.end - self.start

    @property
    def written(self) -> int:
        """Number of bytes that `parts` yields."""
        return self.size

    def problem(self) -> str:
        """Returns why it cannot be read, or an empty text."""
        if self.dtype not in DTYPES:
            return f"is stored as {self.dtype}; expected one of {', '.join(DTYPES)}."
        if self.size != math.prod(self.shape) * DTYPES[self.dtype].itemsize:
            return f"takes {self.size} bytes, which is not its shape's size."
        return ""

    def parts(self) -> Iterator[np.ndarray]:
        """Yields its bytes in order, whatever their type is, some at a time.

        Raises:
          ModelError: If the file ends before, because it was changed after its header was read.
        """
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for start in range(self.start, self.end, _STRAIGHT):
                wanted = min(_STRAIGHT, self.end - start)
                some = stream.read(wanted)
                if len(some) < wanted:
                    raise ModelError(f"{self.file} became shorter while it was read; try again.")
                yield np.frombuffer(some, np.uint8)

    def map(self) -> np.ndarray:
        """Returns it backed by its file: bytes are read where it is indexed."""
        return np.memmap(self.file, BYTES[self.dtype], "r", self.start, self.shape)

    def tasks(self, part: Part, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Task]:
        """Yields what reads a part of it in our layout, at `index`, into `out`, cast."""
        return self.select(lambda whole: part.to_ours(whole)[(*index, ...)], out)

    def select(
        self, view_of: Callable[[np.ndarray], np.ndarray], out: np.ndarray
    ) -> Iterator[Task]:
        """Does what `tasks` does, for any view of the tensor."""
        # Nobody looks into this array: where its view lies in it is where to read in the file.
        dtype = BYTES[self.dtype]
        sizes = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        strides = tuple(dtype.itemsize * size for size in sizes)
        whole = np.lib.stride_tricks.as_strided(np.empty(1, dtype), self.shape, strides)
        view = view_of(whole)
        start = self.start + view.ctypes.data - whole.ctypes.data
        yield from _split(_Window(self.file, dtype, start, view.shape, view.strides), out)


@dataclass(frozen=True, slots=True)
class _Window:
    """An array whose elements lie in a file, `strides` bytes apart; outermost axis first."""

    file: Path
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def runs(self) -> tuple[int, int]:
        """Returns how many leading axes step from run to run, and the bytes of each run."""
        size = self.dtype.itemsize
        for axis in reversed(range(len(self.shape))):
            if self.shape[axis] > 1 and self.strides[axis] - size >= _PAGE:
                return axis + 1, size
            size += (self.shape[axis] - 1) * self.strides[axis]
        return 0, size

    def cut(self, first: int, count: int) -> "_Window":
        """Returns `count` indices of the outermost axis."""
        start = self.start + first * self.strides[0]
        return _Window(self.file, self.dtype, start, (count, *self.shape[1:]), self.strides)

    def inner(self) -> "_Window":
        """Returns the first index of the outermost axis."""
        return _Window(self.file, self.dtype, self.start, self.shape[1:], self.strides[1:])


def _split(window: _Window, out: np.ndarray) -> Iterator[Task]:
    """Yields tasks of about a block each that fill `out`, whose axes are those of the window."""
    order = sorted(range(out.ndim), key=lambda axis: -window.strides[axis])
    shape, strides = (tuple(x[axis] for axis in order) for x in (window.shape, window.strides))
    yield from _cut(
        _Window(window.file, window.dtype, window.start, shape, strides), out.transpose(order)
    )


def _cut(window: _Window, out: np.ndarray) -> Iterator[Task]:
    leading, size = window.runs()
    size *= math.prod(window.shape[:leading])
    limit = _STRAIGHT if _is_straight(window, out, size) else _BLOCK
    if size <= limit or not window.shape:
        yield lambda reader: _fill(reader, window, out)
    elif window.shape[0] == 1:
        yield from _cut(window.inner(), out[0, ...])
    else:
        count = max(1, window.shape[0] * limit // size)
        for first in range(0, window.shape[0], count):
            part = out[first : first + count]
            yield from _cut(window.cut(first, len(part)), part)


def _is_straight(window: _Window, out: np.ndarray, size: int) -> bool:
    """Whether the `size` bytes of all runs are those of `out`, in this order."""
    wanted = out.size * window.dtype.itemsize
    return size == wanted and out.dtype == window.dtype and out.flags.c_contiguous


def _fill(reader: Reader, window: _Window, out: np.ndarray) -> None:
    """Reads the runs of a window, straight into `out` where it holds the same bytes in a row."""
    leading, size = window.runs()
    steps = [range(0, n * s, s) for n, s in zip(window.shape, window.strides, strict=True)]
    count = math.prod(window.shape[:leading])
    straight = _is_straight(window, out, count * size)
    held = out.reshape(-1).view(np.uint8) if straight else reader.scratch(count * size)
    target = memoryview(held)
    for number, offsets in enumerate(itertools.product(*steps[:leading])):
        place = target[number * size : (number + 1) * size]
        reader.read(window.file, window.start + sum(offsets), place)
    if not straight:
        rows = [size * math.prod(window.shape[axis + 1 : leading]) for axis in range(leading)]
        strides = (*rows, *window.strides[leading:])
        out[...] = np.ndarray(window.shape, window.dtype, held.data, strides=strides)
