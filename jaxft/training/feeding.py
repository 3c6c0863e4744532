"""Moves rows from the host to the devices that hold them."""

import bisect
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxft.data.batch import Batch


def put(
    batch: Batch,
    sharding: jax.sharding.Sharding,
    *,
    places: Sequence[int] | None = None,
    rows: int = 0,
) -> Batch:
    """Moves rows to the devices of this process that hold them.

    Args:
      batch: NumPy arrays of `[B, T]` or `[A, B, T]`.
      sharding: Of the arrays over all processes.
      places: Where the rows of `batch` stand among all rows, in order, as
        `Placement.held_rows` gives them; by default they are all rows.
      rows: Number of all rows, where `places` is given.
    """
    return batch.map(lambda column: _put_column(column, sharding, places, rows))


def _put_column(
    column: np.ndarray, sharding: jax.sharding.Sharding, places: Sequence[int] | None, rows: int
) -> jax.Array:
    if places is None or len(places) == rows:
        places, rows = range(column.shape[-2]), column.shape[-2]

    def part(index: Any) -> np.ndarray:
        *before, row, token = index
        # What one device holds of the rows is contiguous, here as well.
        first, stop, _ = row.indices(rows)
        start = bisect.bisect_left(places, first)
        return column[(*before, slice(start, start + stop - first), token)]

    shape = (*column.shape[:-2], rows, column.shape[-1])
    return jax.make_array_from_callback(shape, sharding, part)
