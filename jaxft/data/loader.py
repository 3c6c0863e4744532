"""Batches of packed rows in a deterministic order that can be entered at any step.

The order is one sequence of global positions: step s, micro-batch a, row b of a micro-batch of B
rows is position (s * A + a) * B + b. Each pass over the rows has its own permutation. What a step
holds therefore depends on its number alone, not on the number of hosts nor on what was read before.

The last step of a run over epochs may have places left over, which stay empty. If the run is made
longer, it goes on at the position after its last row and not after those places: every row is read
as often as the epochs say, in one go or in several.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxft.data.batch import Batch
from jaxft.data.rows import TokenRows
from jaxft.errors import ConfigError, DataError

_THREADS = 2
_PREFETCHED_STEPS = 4
_SHUFFLE_ROUNDS = 4
PACKED, EVALUATED, LIMITED = -1, -2, -3
"""Permutations apart from those of epochs, which count from 0: of the documents that are packed, of
the rows that a sample evaluates, and of the rows of a source with a limit."""


def shuffled(place: int, count: int, *, seed: int, epoch: int) -> int:
    """Returns which of `count` items stands at a place, without holding the permutation."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return grain.experimental.index_shuffle(
        place, max_index=count - 1, seed=int.from_bytes(digest), rounds=_SHUFFLE_ROUNDS
    )


def batches(
    rows: TokenRows,
    *,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    epochs: float = 0.0,
    steps: int = 0,
    start_step: int = 0,
    start_position: int | None = None,
    places: Sequence[int] | None = None,
) -> "BatchIterator":
    """Returns an iterator over training steps.

    Args:
      rows: From `prepare`.
      batch_size: Rows in a step, over all hosts and micro-batches.
      accumulation: Micro-batches in a step.
      seed: Of the order; each epoch has its own permutation.
      shuffle: Otherwise every epoch is in the order of the rows.
      epochs: Passes over the rows when `steps` is 0; the last step is then filled with rows of
        weight 0.
      steps: Steps in all, of full batches.
      start_step: The first step that is read: a resumed run continues exactly.
      start_position: Where that step begins, as `state` says; by default after full batches.
      places: Rows of every micro-batch that are read, by default all: those that a host's devices
        hold.

    Raises:
      ConfigError: If the sizes do not divide.
      DataError: If there are no rows.
    """
    return BatchIterator(
        rows,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        shuffle=shuffle,
        epochs=epochs,
        steps=steps,
        start_step=start_step,
        start_position=start_position,
        places=places,
    )


def is_over(state: Mapping[str, Any], *, epochs: float, steps: int) -> bool:
    """Whether a run that came to a `state` of its iterator has no step left.

    Args:
      state: As `BatchIterator.state` returns it.
      epochs: As `batches` takes it.
      steps: As `batches` takes it.
    """
    if steps:
        return state["step"] >= steps
    position = state.get("position", state["step"] * state["batch_size"])
    return position >= _end_of_epochs(epochs, state["rows"])


def _end_of_epochs(epochs: float, rows: int) -> int:
    return round(epochs * rows)


class BatchIterator(Iterator[Batch]):
    """Yields one `[A, B, T]` batch of NumPy arrays a step, read ahead in threads.

    Where only some places are read, B is their number.

    Attributes:
      steps: Steps in all, those before `start_step` included.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool,
        epochs: float,
        steps: int,
        start_step: int,
        start_position: int | None,
        places: Sequence[int] | None,
    ):
        if not len(rows):
            raise DataError("There are no rows to train on; see the report of dropped documents.")
        _check_sizes(batch_size, accumulation)
        self._rows = rows
        self._shape = (accumulation, batch_size // accumulation)
        self._seed = seed
        self._shuffle = shuffle
        self._step = start_step
        start = start_step * batch_size if start_position is None else start_position
        # Where step 0 would begin if all steps before the first one had been full.
        self._origin = start - start_step * batch_size
        if steps:
            self._end = self._origin + steps * batch_size
        else:
            self._end = max(_end_of_epochs(epochs, len(rows)), start)
        self._places = slice(None) if places is None else list(places)
        self.steps = math.ceil((self._end - self._origin) / batch_size)
        self._iterator = self._read_ahead()

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position as JSON: `step` and `position` are where to start to go on after it.

        The rest says of which order it is the position: another value of it is another order.
        """
        return {
            "step": self._step,
            "position": self.position(self._step),
            "rows": len(self._rows),
            "digest": self._rows.digest,
            "batch_size": self._shape[0] * self._shape[1],
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def position(self, steps: int) -> int:
        """Returns the global position after so many steps: how many rows they have read."""
        return min(self._origin + steps * self._shape[0] * self._shape[1], self._end)

    def row_numbers(self, step: int) -> list[int]:
        """Returns the rows in a step, over all hosts, in the order of the batch."""
        return [number for number in self._numbers(step).ravel().tolist() if number >= 0]

    def close(self) -> None:
        """Stops reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _read_ahead(self) -> Any:
        if self._step >= self.steps:
            return None
        steps = grain.MapDataset.range(self._step, self.steps).map(self._read)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED_STEPS)
        return iter(steps.to_iter_dataset(options))

    def _read(self, step: int) -> Batch:
        numbers = self._numbers(step)[:, self._places]
        flat = self._rows.batch(numbers.ravel().tolist())
        return flat.map(lambda column: column.reshape(*numbers.shape, -1))

    def _numbers(self, step: int) -> np.ndarray:
        """Returns the row at each place of a step, `[A, B]`; -1 past the end of the last epoch."""
        size = self._shape[0] * self._shape[1]
        numbers = [self._number(self._origin + step * size + place) for place in range(size)]
        return np.array(numbers).reshape(self._shape)

    def _number(self, position: int) -> int:
        if position >= self._end:
            return -1
        epoch, place = divmod(position, len(self._rows))
        if not self._shuffle:
            return place
        return shuffled(place, len(self._rows), seed=self._seed, epoch=epoch)


def sample_numbers(
    count: int, maximum: int, *, seed: int, permutation: int = EVALUATED
) -> Sequence[int]:
    """Returns which of `count` items stand for all, in order: a sample without repetition.

    Args:
      count: Items that there are.
      maximum: Size of the sample; 0 takes all.
      seed: Of the sample; it depends on this and the permutation alone.
      permutation: What is sampled, so that samples of unlike things are apart.
    """
    if not maximum or maximum >= count:
        return range(count)
    return sorted(shuffled(place, count, seed=seed, epoch=permutation) for place in range(maximum))


def eval_batches(
    rows: TokenRows,
    *,
    batch_size: int,
    places: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields `[B, T]` batches in order, the last one filled with rows of weight 0.

    Args:
      rows: From `prepare`.
      batch_size: Rows in a batch, over all hosts.
      places: Rows of every batch that are read, by default all; B is then their number.
      numbers: The rows to read; by default all.
    """
    chosen = range(len(rows)) if numbers is None else numbers
    held = range(batch_size) if places is None else places
    for first in range(0, len(chosen), batch_size):
        standing = [first + place for place in held]
        yield rows.batch([chosen[place] if place < len(chosen) else -1 for place in standing])


def _check_sizes(batch_size: int, accumulation: int) -> None:
    if batch_size % accumulation:
        raise ConfigError(
            f"A batch of {batch_size} rows does not divide into {accumulation} micro-batches; use "
            f"a multiple of {accumulation}."
        )
