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
_FP8 = "F8_E4M3"
_BYTES = {**DTYPES, "U8": np.dtype(np.uint8), _FP8: np.dtype(ml_dtypes.float8_e4m3fn)}
# Reading waits for the disk and copies without the interpreter's lock; casting holds it.
_THREADS = 4
# What one thread reads at a time, and the most that it holds beside the result.
_BLOCK = 8 * 2**20
# Most values that one thread decodes at a time.
_DECODED = 2**20
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
        return np.memmap(self.file, _BYTES[self.dtype], "r", self.start, self.shape)

    def tasks(self, part: Part, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Task]:
        """Yields what reads a part of it in our layout, at `index`, into `out`, cast."""
        return self.select(lambda whole: part.to_ours(whole)[(*index, ...)], out)

    def select(
        self, view_of: Callable[[np.ndarray], np.ndarray], out: np.ndarray
    ) -> Iterator[Task]:
        """Does what `tasks` does, for any view of the tensor."""
        # Nobody looks into this array: where its view lies in it is where to read in the file.
        dtype = _BYTES[self.dtype]
        sizes = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        strides = tuple(dtype.itemsize * size for size in sizes)
        whole = np.lib.stride_tricks.as_strided(np.empty(1, dtype), self.shape, strides)
        view = view_of(whole)
        start = self.start + view.ctypes.data - whole.ctypes.data
        yield from _split(_Window(self.file, dtype, start, view.shape, view.strides), out)


# The values of the sixteen 4-bit floats (1 sign, 2 exponent and 1 mantissa bits), for each byte
# the lower half first.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NIBBLES = np.concatenate([_E2M1, -_E2M1])
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """A tensor `[E, C, R]` of experts stored transposed in 4 bits, 32 columns sharing an exponent.

    Attributes:
      blocks: Bytes `[E, R, C / 32, 16]`, two values each.
      scales: Bytes `[E, R, C / 32]`: powers of two, 127 standing for 1.
    """

    blocks: Entry
    scales: Entry

    @property
    def dtype(self) -> str:
        """Type it is unpacked to: bfloat16 holds each of its values."""
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it stands for."""
        experts, rows, groups = (*self.scales.shape, 1, 1, 1)[:3]
        return experts, 32 * groups, rows

    @property
    def size(self) -> int:
        """Number of bytes in the file."""
        return self.blocks.size + self.scales.size

    def problem(self) -> str:
        """Returns why it cannot be read, or an empty text."""
        blocks, scales = self.blocks, self.scales
        if (blocks.dtype, scales.dtype) != ("U8", "U8") or len(scales.shape) != 3:
            return f"is stored as {blocks.dtype} and {scales.dtype}; expected MXFP4's bytes."
        if blocks.shape != (*scales.shape, 16):
            return f"has blocks {list(blocks.shape)}, which scales {list(scales.shape)} do not fit."
        if any(entry.size != math.prod(entry.shape) for entry in (blocks, scales)):
            return f"takes {self.size} bytes, which is not its shape's size."
        return ""

    def tasks(self, part: Part, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Task]:
        """Yields what reads a part of it in our layout, at `index`, into `out`, cast.

        No more than a few million values of an expert are unpacked at a time.
        """
        experts, columns, rows = part.locate(index, self.shape)
        theirs = part.rule.in_their_order(out)
        step = max(1, _BLOCK // (8 * len(columns)))
        for place, expert in enumerate(experts):
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                target = theirs[place, :, first : first + step].T
                yield lambda reader, e=expert, r=some, t=target: self._read(
                    reader, e, r, columns, t
                )

    def _read(
        self, reader: Reader, expert: int, rows: range, columns: range, out: np.ndarray
    ) -> None:
        """Writes values `[R, C]` of some rows and columns of an expert into `out`."""
        groups = slice(columns.start // 32, -(-columns.stop // 32))
        index = (expert, slice(rows.start, rows.stop, rows.step), groups)
        count = groups.stop - groups.start
        packed = np.empty((len(rows), count, 16), np.uint8)
        scales = np.empty((len(rows), count), np.uint8)
        for entry, target in ((self.blocks, packed), (self.scales, scales)):
            for task in entry.select(lambda whole: whole[index], target):
                task(reader)
        values = _PAIRS[packed].reshape(len(rows), count, 32)
        np.ldexp(values, scales[..., None].astype(np.int32) - 127, out=values)
        start = columns.start - 32 * groups.start
        out[...] = values.reshape(len(rows), -1)[:, start : start + len(columns)]


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """A tensor in floats of 8 bits, of which each block of its last two axes has a factor.

    Attributes:
      codes: `[…, R, C]`, 4 bits of exponent and 3 of mantissa.
      factors: `[…, R / rows, C / columns]`, rounded up where blocks do not divide a side.
      block: Rows and columns of a block.
    """

    codes: Entry
    factors: Entry
    block: tuple[int, int]

    @property
    def dtype(self) -> str:
        """Type it is decoded to, which products with factors are rounded to."""
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it stands for."""
        return self.codes.shape

    @property
    def size(self) -> int:
        """Number of bytes in the file."""
        return self.codes.size + self.factors.size

    def problem(self) -> str:
        """Returns why it cannot be read, or an empty text."""
        codes, factors = self.codes, self.factors
        if codes.dtype != _FP8 or factors.dtype not in ("F32", "BF16"):
            return (
                f"is stored as {codes.dtype} with factors in {factors.dtype}; expected {_FP8} with "
                "factors in F32 or BF16."
            )
        *lead, rows, columns = codes.shape if len(codes.shape) > 1 else (0, 0)
        expected = (*lead, -(-rows // self.block[0]), -(-columns // self.block[1]))
        if factors.shape != expected:
            return (
                f"has shape {list(codes.shape)} and factors {list(factors.shape)}; blocks of "
                f"{self.block[0]} x {self.block[1]} (weight_block_size) ask for {list(expected)}."
            )
        if codes.size != math.prod(codes.shape):
            return f"takes {codes.size} bytes, which is not its shape's size."
        return factors.problem()

    def tasks(self, part: Part, index: tuple[slice, ...], out: np.ndarray) -> Iterator[Task]:
        """Yields what reads a part of it in our layout, at `index`, into `out`, cast.

        A million values are decoded at a time.
        """

        def view_of(whole: np.ndarray) -> np.ndarray:
            return part.to_ours(whole)[(*index, ...)]

        # Where each value lies along each axis of theirs: views that take no memory.
        places = []
        for axis, size in enumerate(self.shape):
            strides = tuple(8 * (other == axis) for other in range(len(self.shape)))
            whole = np.lib.stride_tricks.as_strided(np.arange(size), self.shape, strides)
            places.append(view_of(whole))
        for some in _boxes(places, _DECODED):
            yield lambda reader, s=some: self._read(
                reader, lambda whole: view_of(whole)[s], [place[s] for place in places], out[s]
            )

    def _read(
        self,
        reader: Reader,
        view_of: Callable[[np.ndarray], np.ndarray],
        places: list[np.ndarray],
        out: np.ndarray,
    ) -> None:
        """Writes the values that a view shows into `out`."""
        codes = np.empty(out.shape, _BYTES[_FP8])
        factors = np.empty(self.factors.shape, DTYPES[self.factors.dtype])
        for task in (
            *self.codes.select(view_of, codes),
            *self.factors.select(lambda whole: whole, factors),
        ):
            task(reader)
        steps = (*(1,) * (len(self.shape) - 2), *self.block)
        # Along axes of ours that do not move along one of theirs, one index is enough.
        blocks = tuple(
            place[tuple(slice(None if step else 1) for step in place.strides)] // step_of_block
            for place, step_of_block in zip(places, steps, strict=True)
        )
        values = codes.astype(np.float32) * factors.astype(np.float32)[blocks]
        out[...] = values.astype(DTYPES[self.dtype])


def _boxes(places: list[np.ndarray], limit: int) -> Iterator[tuple[slice, ...]]:
    """Yields slices that cover views of one shape, of at most so many values.

    They are cut along the axes that move furthest in the tensor, so that what is read lies close.

    Args:
      places: Where each value lies along each axis of the tensor, the first axis outermost.
      limit: Most values in a box.
    """
    shape = places[0].shape
    order = sorted(range(len(shape)), key=lambda axis: [-p.strides[axis] for p in places])

    def cut(box: tuple[slice, ...], axes: list[int]) -> Iterator[tuple[slice, ...]]:
        count = math.prod(s.stop - s.start for s in box)
        if count <= limit or not axes:
            yield box
            return
        [axis, *rest] = axes
        step = max(1, limit * shape[axis] // count)
        for start in range(0, shape[axis], step):
            part = slice(start, min(start + step, shape[axis]))
            yield from cut((*box[:axis], part, *box[axis + 1 :]), rest)

    yield from cut(tuple(slice(0, size) for size in shape), order)


type Stored = Entry | Mxfp4 | Fp8Blocks


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
