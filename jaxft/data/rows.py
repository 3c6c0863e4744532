"""Packed rows on disk, read one at a time as the columns of a `Batch`."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxft.data.batch import COLUMNS, STANDARD, Batch
from jaxft.data.documents import Documents, DocumentStatistics, map_array, write_json
from jaxft.data.packing import PackingStatistics, Piece
from jaxft.data.selection import Part


@dataclass(frozen=True, slots=True)
class Statistics:
    """Records of what was read and of what became of it."""

    read: DocumentStatistics
    packed: PackingStatistics

    @property
    def documents(self) -> int:
        """Number of documents of a pass; of preferences, of units."""
        return self.packed.documents

    @property
    def rows(self) -> int:
        """Rows of `max_length` tokens."""
        return self.packed.rows

    @property
    def tokens(self) -> int:
        """Tokens in rows, padding not counted."""
        return self.packed.tokens

    @property
    def trained_tokens(self) -> int:
        """Predictions that carry loss: the sum of all weights."""
        return self.packed.trained_tokens

    @property
    def dropped(self) -> int:
        """Number of documents, or units, that are in no row."""
        return self.packed.dropped

    @property
    def lost_share(self) -> float:
        """Share of the trained tokens that are in no row."""
        return self.packed.lost_trained_tokens / max(self.packed.document_trained_tokens, 1)

    @property
    def padding_share(self) -> float:
        """Share of the positions of all rows that hold padding."""
        return 1 - self.tokens / max(self.rows * self.packed.max_length, 1)


def write_rows(
    folder: Path,
    rows: Iterable[list[Piece]],
    statistics: PackingStatistics,
    *,
    pad: int,
    numbers: np.ndarray | None = None,
) -> None:
    """Writes the index of rows; `statistics` is filled while they are taken.

    Args:
      folder: Where to.
      rows: From `pack`.
      statistics: That `pack` fills.
      pad: Token of padding.
      numbers: Which documents the rows are made of; by default all.
    """
    digest = hashlib.sha256()
    with (
        (folder / "ranges.bin").open("wb") as ranges,
        (folder / "joined.bin").open("wb") as joined,
        (folder / "rows.bin").open("wb") as offsets,
    ):
        offsets.write(np.int64(0).tobytes())
        count = 0
        for row in rows:
            index = np.array([bound for piece in row for bound in piece], "<i8").tobytes()
            joins = bytes(place > 0 for piece in row for place in range(len(piece) // 2))
            ranges.write(index)
            joined.write(joins)
            count += len(joins)
            offsets.write(np.int64(count).tobytes())
            digest.update(b"row" + index + (joins if any(joins) else b""))
    if numbers is not None:
        (folder / "numbers.bin").write_bytes(numbers.astype("<i8").tobytes())
    values = {"pad": pad, "digest": digest.hexdigest(), **dataclasses.asdict(statistics)}
    write_json(folder / "statistics.json", values)


class TokenRows(Sequence[Batch]):
    """Packed rows of one data set; only what is read comes into memory.

    Attributes:
      documents: Documents that the rows are made of, and those of other rows.
      statistics: Records of what was read and of what became of it.
      max_length: Tokens in a row, T.
      digest: Hash of all that the rows hold, wherever the files lie that they were made from;
        attached columns are no part of it.
    """

    def __init__(self, documents: Documents, folder: Path):
        values = json.loads((folder / "statistics.json").read_text())
        self._pad = values.pop("pad")
        packing = values.pop("digest")
        parts = (documents.statistics.digest, packing, str(values["max_length"]), str(self._pad))
        self.digest = hashlib.sha256("".join(parts).encode()).hexdigest()[:32]
        values["parts"] = [Part(**part) for part in values["parts"]]
        self._ranges = map_array(folder / "ranges.bin", np.dtype("<i8")).reshape(-1, 2)
        self._joined = map_array(folder / "joined.bin", np.dtype("u1"))
        self._offsets = map_array(folder / "rows.bin", np.dtype("<i8"))
        self.documents = documents
        self.statistics = Statistics(documents.statistics, PackingStatistics(**values))
        self.max_length = self.statistics.packed.max_length
        self._numbers = folder / "numbers.bin"
        self._attached: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the documents that the rows are made of, int64 `[documents]`."""
        if not self._numbers.exists():
            return np.arange(len(self.documents.index))
        return map_array(self._numbers, np.dtype("<i8"))

    @property
    def unit_size(self) -> int:
        """Number of documents in a unit: 1, or 2 in preferences."""
        return self.documents.unit_size

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, before any cut; units may be longer."""
        return int(self.documents.index["length"][self.numbers].max(initial=0))

    @property
    def max_units(self) -> int:
        """Most units of one row."""
        return self.max_segments // self.unit_size

    def attach(self, name: str, values: np.ndarray) -> None:
        """Adds a column to all rows, which batches have from then on; 0 in rows of padding.

        Args:
          name: The column.
          values: float32 `[rows, T]`, an array or a memory map.

        Raises:
          ValueError: If they are of another shape or dtype.
        """
        shape = (len(self), self.max_length)
        if values.shape != shape or values.dtype != np.float32:
            raise ValueError(
                f"column {name!r} is {values.dtype} {list(values.shape)}; expected float32 "
                f"{list(shape)}"
            )
        self._attached[name] = values

    @property
    def is_chat(self) -> bool:
        """Whether there are conversations among the documents."""
        return self.statistics.read.chat

    @property
    def max_segments(self) -> int:
        """Most documents in one row that do not see one another."""
        begun = np.concatenate([[0], np.cumsum(self._joined == 0)])
        return int(np.diff(begun[self._offsets]).max(initial=1))

    def __getitem__(self, number: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the columns of a row, `[T]` each."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.batch([number % len(self)]).map(lambda column: column[0])

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Returns rows as one batch `[len(numbers), T]`; a negative number is a row of padding."""
        batch = self._empty_batch(len(numbers))
        for place, number in enumerate(numbers):
            if number >= 0:
                self._fill(batch, place, number)
        return batch

    def pieces(self, number: int) -> np.ndarray:
        """Returns begin and end of the ranges of tokens in a row, int64 `[ranges, 2]`.

        A document, or a piece of one, is one range, or several that are joined where tokens between
        them are left out; the first token of a range carries no loss.
        """
        return self._ranges[self._offsets[number] : self._offsets[number + 1]]

    def origins(self, number: int) -> list[str]:
        """Returns `file:line` of the documents in a row."""
        return [self.documents.origin(place) for place in self.begun(self.pieces(number))]

    def unit_origins(self, number: int) -> list[str]:
        """Returns `file:line` of each unit in a row."""
        return [self.documents.origin(place) for place in self._units_begun(number)]

    def unit_keys(self, number: int) -> list[tuple[int, int, int]]:
        """Returns (source, data row, place among the units of that data row) of each unit in a row.

        They are the same however units are packed, so that two evaluations can be compared by them.
        """
        index, size = self.documents.index, self.unit_size
        keys = []
        for first in self._units_begun(number).tolist():
            source, row = int(index[first]["source"]), int(index[first]["row"])
            place = 0
            while first >= size * (place + 1):
                before = index[first - size * (place + 1)]
                if (before["source"], before["row"]) != (source, row):
                    break
                place += 1
            keys.append((source, row, place))
        return keys

    def _units_begun(self, number: int) -> np.ndarray:
        """Returns the first document of each unit in a row."""
        return self._documents_begun(number)[:: self.unit_size]

    def _documents_begun(self, number: int) -> np.ndarray:
        """Returns the document of each segment of a row, int64 `[segments]`."""
        is_first = self._joined[self._offsets[number] : self._offsets[number + 1]] == 0
        return self.begun(self.pieces(number)[is_first])

    def begun(self, pieces: np.ndarray) -> np.ndarray:
        """Returns the documents in which pieces `[pieces, 2]` begin, int64 `[pieces]`."""
        return np.searchsorted(self.documents.index["start"], pieces[:, 0], side="right") - 1

    def count_documents(self, numbers: Sequence[int]) -> int:
        """Returns how many documents stand in some rows, whole or in part."""
        pieces = np.concatenate([self.pieces(number) for number in numbers])
        last = np.searchsorted(self.documents.index["start"], pieces[:, 1], side="left") - 1
        changes = np.zeros(len(self.documents.index) + 1, np.int64)
        np.add.at(changes, self.begun(pieces), 1)
        np.add.at(changes, last + 1, -1)
        return int(np.count_nonzero(np.cumsum(changes[:-1])))

    def _empty_batch(self, count: int) -> Batch:
        shape = (count, self.max_length)
        names = STANDARD if self.documents.labels is None else COLUMNS
        columns = {name: np.zeros(shape, COLUMNS[name]) for name in names}
        columns["tokens"][:] = columns["targets"][:] = self._pad
        columns |= {name: np.zeros(shape, np.float32) for name in self._attached}
        return Batch(**columns)

    def _fill(self, batch: Batch, place: int, number: int) -> None:
        start = first = segment = 0
        joined = self._joined[self._offsets[number] : self._offsets[number + 1]]
        for (begin, end), is_joined in zip(self.pieces(number), joined, strict=True):
            stop = start + int(end - begin)
            tokens = self.documents.tokens[begin:end]
            if is_joined:
                batch.targets[place, start - 1] = tokens[0]
            else:
                first, segment = start, segment + 1
            batch.tokens[place, start:stop] = tokens
            batch.targets[place, start : stop - 1] = tokens[1:]
            batch.weights[place, start : stop - 1] = self.documents.trained[begin + 1 : end]
            batch.positions[place, start:stop] = np.arange(start - first, stop - first)
            batch.segments[place, start:stop] = segment
            start = stop
        if self.documents.labels is not None:
            self._fill_labels(batch, place, number)
        for name, values in self._attached.items():
            batch[name][place] = values[number]

    def _fill_labels(self, batch: Batch, place: int, number: int) -> None:
        """Writes for each token the label of its document and the number of its unit."""
        segments = batch.segments[place]
        labels = np.asarray(self.documents.labels)[self._documents_begun(number)]
        batch["labels"][place] = np.append(0, labels)[segments]
        batch["units"][place] = (segments + self.unit_size - 1) // self.unit_size
