"""Tensors that files hold in fewer bits: MXFP4, and FP8 in blocks, decoded as they are read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxft.hf.read import BYTES, DTYPES, FP8, Entry, Reader, Task
from jaxft.hf.rules import Part

# Most values that one thread decodes at a time.
_VALUES = 2**20

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
        step = max(1, _VALUES // len(columns))
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

    @property
    def file(self) -> Path:
        """The file with its codes."""
        return self.codes.file

    @property
    def written(self) -> int:
        """Number of bytes that `parts` yields."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def parts(self) -> Iterator[np.ndarray]:
        """Yields the bytes of what it is decoded to in order, some rows at a time."""
        step = max(1, _VALUES // math.prod(self.shape[1:]))
        with Reader() as reader:
            for start in range(0, self.shape[0], step):
                rows = slice(start, min(start + step, self.shape[0]))
                out = np.empty((rows.stop - start, *self.shape[1:]), DTYPES[self.dtype])
                for task in self._select(lambda whole, rows=rows: whole[rows], out):
                    task(reader)
                yield out.reshape(-1).view(np.uint8)

    def problem(self) -> str:
        """Returns why it cannot be read, or an empty text."""
        codes, factors = self.codes, self.factors
        if codes.dtype != FP8 or factors.dtype not in ("F32", "BF16"):
            return (
                f"is stored as {codes.dtype} with factors in {factors.dtype}; expected {FP8} with "
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
        return self._select(lambda whole: part.to_ours(whole)[(*index, ...)], out)

    def _select(
        self, view_of: Callable[[np.ndarray], np.ndarray], out: np.ndarray
    ) -> Iterator[Task]:
        """Does what `tasks` does, for any view of the tensor."""
        # Where each value lies along each axis of theirs: views that take no memory.
        places = []
        for axis, size in enumerate(self.shape):
            strides = tuple(8 * (other == axis) for other in range(len(self.shape)))
            whole = np.lib.stride_tricks.as_strided(np.arange(size), self.shape, strides)
            places.append(view_of(whole))
        for some in _boxes(places, _VALUES):
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
        codes = np.empty(out.shape, BYTES[FP8])
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
# What can be written without being a parameter.
type Passed = Entry | Fp8Blocks
