"""Rows of the stored cases of preferences: units of two documents, packed as a test asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.data.batch import Batch
from jaxft.training.objectives.contract import Scores

# Log-probability and reference of what no loss may read: prompts' last words, ends, padding.
UNREAD = {"log_probs": -77.0, "reference": -55.0}


@dataclass(frozen=True)
class FixedPolicy:
    """A policy that gives the log-probabilities of an array."""

    log_probs: Any
    max_units: int

    def scores(self, batch: Batch) -> Scores:
        return Scores(self.log_probs, jnp.zeros_like(self.log_probs))


@dataclass(frozen=True)
class PackedUnits:
    """Rows `[B, T]` of units, and where each document is."""

    batch: Batch
    log_probs: np.ndarray
    places: dict[tuple[int, int], tuple[int, int, int]]
    numbers: dict[int, tuple[int, int]]

    def unpack(self, values: Any, like: np.ndarray) -> np.ndarray:
        """Returns `[N, 2, L]` of `[B, T]`, zero after each document's end."""
        result = np.zeros(like.shape)
        for (unit, document), (row, begin, end) in self.places.items():
            result[unit, document, : end - begin] = np.asarray(values)[row, begin:end]
        return result

    def of_units(self, values: Any) -> np.ndarray:
        """Returns `[N]` of `[B, U]`."""
        places = [self.numbers[unit] for unit in sorted(self.numbers)]
        return np.array([np.asarray(values)[row, number - 1] for row, number in places])


def pack_units(
    case: dict[str, np.ndarray],
    rows: Sequence[Sequence[int]],
    length: int,
    *,
    labelled: bool = False,
    kl: float = 0.0,
) -> PackedUnits:
    """Returns rows that hold these units of a case, in this order, then padding.

    Args:
      case: Stored inputs.
      rows: Units of each row.
      length: Positions of a row.
      labelled: Whether each unit is an answer with its label, and one to another prompt.
      kl: Repeated in a column of that name.
    """
    shape = (len(rows), length)
    columns = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "positions", "segments", "units")
    }
    columns |= {name: np.zeros(shape, np.float32) for name in ("weights", "labels")}
    columns["reference"] = np.full(shape, UNREAD["reference"], np.float32)
    columns["kl"] = np.full(shape, kl, np.float32)
    log_probs = np.full(shape, UNREAD["log_probs"], np.float32)
    places, numbers = {}, {}
    for row, units in enumerate(rows):
        end = 0
        for number, unit in enumerate(units, 1):
            numbers[unit] = (row, number)
            labels = (case["labels"][unit], 0) if labelled else (1, -1)
            for document, label in enumerate(labels):
                size = case["lengths"][unit, document]
                begin, end = end, end + size
                assert end <= length, "the rows do not hold these units"
                places[unit, document] = (row, begin, end)
                at = (row, slice(begin, end))
                columns["positions"][at] = np.arange(size)
                columns["segments"][at] = 2 * number + document - 1
                columns["units"][at] = number
                columns["labels"][at] = label
                for name in ("weights", "reference"):
                    columns[name][at] = case[name][unit, document, :size]
                log_probs[at] = case["log_probs"][unit, document, :size]
    unread = columns["weights"] == 0
    log_probs[unread], columns["reference"][unread] = UNREAD["log_probs"], UNREAD["reference"]
    return PackedUnits(Batch(**columns), log_probs, places, numbers)
