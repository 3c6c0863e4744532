"""Tokenised documents on disk: written as a stream, read through a memory map."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxft.data.chat import Example
from jaxft.data.sources import place_of
from jaxft.data.units import DOCUMENTS_IN

DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # of its first token, in tokens
        ("length", "<i8"),
        ("trained", "<i8"),  # tokens that carry loss; the first one has no prediction
        ("source", "<i4"),  # number in the list of sources
        ("line", "<i8"),
        ("row", "<i8"),  # number among the rows of the source; several may begin on one line
        ("hash", "<u8"),  # of the normalised content, for finding duplicates
    ]
)


@dataclass(kw_only=True)
class DocumentStatistics:
    """Counts of what was read; those of tokens are before packing and before any cut.

    Attributes:
      units: Kind of unit, one of `units.UNITS`: 'documents' alone, 'pairs', or 'labelled' answers
        with another.
      sources: Names, in the order that `DOCUMENT["source"]` counts.
      formats: Name and description of each source's format.
      chat: Whether there are conversations among the documents.
      template: Origin of the chat template; empty without conversations.
      stops: Stop tokens of the template.
      documents: Number of documents.
      tokens: All tokens.
      trained_tokens: Tokens with loss.
      thinking_blocks: Reasoning blocks in trained turns.
      lost_blocks: Reasoning blocks that the template left out.
      rewritten_turns: Trained turns that the template renders otherwise once they are history.
      rows: Rows that the documents are made of; a conversation may give several documents.
      skipped: Bad rows that were left out.
      skipped_kinds: Number of skipped rows of each kind.
      control_tokens: Control token -> how often rows spell it.
      control_rows: Number of rows that spell one.
      control_policy: Treatment of spelt control tokens: `data.control_tokens`.
      unused_keys: Key of messages that nobody reads -> number of conversations that have it.
      scores: Number of pairs that come with numbers in `score_chosen` and `score_rejected`.
      unordered_scores: Number of these whose chosen answer has no higher score.
      digest: Hash of all tokens, of which are trained, and of the labels.
    """

    units: str = "documents"
    sources: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    chat: bool = False
    template: str = ""
    stops: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    thinking_blocks: int = 0
    lost_blocks: int = 0
    rewritten_turns: int = 0
    rows: int = 0
    skipped: int = 0
    skipped_kinds: dict[str, int] = field(default_factory=dict)
    control_tokens: dict[str, int] = field(default_factory=dict)
    control_rows: int = 0
    control_policy: str = "text"
    unused_keys: dict[str, int] = field(default_factory=dict)
    scores: int = 0
    unordered_scores: int = 0
    digest: str = ""


class DocumentWriter:
    """Appends documents to a folder; memory use does not grow with their number.

    A context manager: leaving it completes the files.

    Args:
      folder: An empty folder.
      units: What belongs together; anything but 'documents' has labels.
    """

    def __init__(self, folder: Path, units: str = "documents"):
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._tokens = self._files.enter_context((folder / "tokens.bin").open("wb"))
        self._trained = self._files.enter_context((folder / "trained.bin").open("wb"))
        self._documents = self._files.enter_context((folder / "documents.bin").open("wb"))
        self._labels = None
        if units != "documents":
            self._labels = self._files.enter_context((folder / "labels.bin").open("wb"))
        self._digest = hashlib.sha256()
        self._row = (-1, -1)
        self.statistics = DocumentStatistics(units=units)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
        self.statistics.digest = self._digest.hexdigest()
        write_json(self._folder / "statistics.json", dataclasses.asdict(self.statistics))

    def add(
        self,
        example: Example,
        *,
        source: int,
        line: int,
        content_hash: int,
        row: int | None = None,
        label: int = 0,
    ) -> None:
        """Appends one document; `row` is by default that of its line; `label` is kept for units."""
        totals = self.statistics
        trained = int(example.trained[1:].sum())
        row = line - 1 if row is None else row
        record = (totals.tokens, len(example.ids), trained, source, line, row, content_hash)
        totals.rows += (source, row) != self._row
        self._row = (source, row)
        for file, values in (
            (self._tokens, example.ids.astype("<i4")),
            (self._trained, example.trained.astype("u1")),
        ):
            file.write(values.tobytes())
            self._digest.update(values.tobytes())
        self._documents.write(np.array([record], DOCUMENT).tobytes())
        if self._labels is not None:
            self._labels.write(np.int8(label).tobytes())
            self._digest.update(np.int8(label).tobytes())
        totals.documents += 1
        totals.tokens += len(example.ids)
        totals.trained_tokens += trained
        totals.thinking_blocks += example.thinking_blocks
        totals.lost_blocks += example.lost_blocks
        totals.rewritten_turns += example.rewritten_turns
        totals.control_rows += bool(example.control_tokens)
        add_counts(totals.control_tokens, example.control_tokens)


class Documents:
    """Memory-mapped documents of a folder that `DocumentWriter` filled.

    Attributes:
      tokens: int32 `[tokens]`, of all documents one behind the other.
      trained: uint8 `[tokens]`; 1 where a token carries loss.
      index: `DOCUMENT` records, one for each document.
      labels: int8 `[documents]`: 1 for preferred answers, -1 for rejected ones, 0 for answers of
        other rows; None if there are no units.
      units: Kind of unit, one of `units.UNITS`.
      unit_size: Number of documents in a unit; units stand one behind the other.
      statistics: Counts of what was read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.tokens = map_array(folder / "tokens.bin", np.dtype("<i4"))
        self.trained = map_array(folder / "trained.bin", np.dtype("u1"))
        self.index = map_array(folder / "documents.bin", DOCUMENT)
        self.statistics = DocumentStatistics(**json.loads((folder / "statistics.json").read_text()))
        self.units = self.statistics.units
        self.unit_size = DOCUMENTS_IN[self.units]
        self.labels = None
        if self.units != "documents":
            self.labels = map_array(folder / "labels.bin", np.dtype("i1"))

    def origin(self, number: int) -> str:
        """Returns `file:line` of a document."""
        return self.place(self.index[number])

    def place(self, record: np.void) -> str:
        """Returns `file:line` of a record of the index, as sources give it."""
        name = self.statistics.sources[record["source"]]
        return place_of(name, int(record["line"]), int(record["row"]))

    @property
    def skipped(self) -> Path:
        """File of the rows that were left out, one JSON object a line; absent without any."""
        return skipped_file(self._folder)


def prompt_hashes(documents: Documents, numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of the tokens before the answer of each document, uint64 `[documents]`."""
    return _hashes(documents, numbers, of_answer=False)


def answer_hashes(documents: Documents, numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of the tokens from the answer of each document on, uint64 `[documents]`."""
    return _hashes(documents, numbers, of_answer=True)


def _hashes(documents: Documents, numbers: np.ndarray, *, of_answer: bool) -> np.ndarray:
    tokens, trained = np.asarray(documents.tokens), np.asarray(documents.trained)
    hashes = np.empty(len(numbers), np.uint64)
    index = documents.index[numbers]
    for place, (start, length) in enumerate(
        zip(index["start"].tolist(), index["length"].tolist(), strict=True)
    ):
        split = start + int(trained[start : start + length].argmax())
        part = tokens[split : start + length] if of_answer else tokens[start:split]
        digest = hashlib.blake2b(part.tobytes(), digest_size=8).digest()
        hashes[place] = int.from_bytes(digest)
    return hashes


def skipped_file(folder: Path) -> Path:
    """Returns where the rows are listed that were left out of the documents of a folder."""
    return folder / "skipped.jsonl"


def add_counts(totals: dict[str, int], counts: Mapping[str, int]) -> None:
    """Adds counts to those that are there."""
    for name, count in counts.items():
        totals[name] = totals.get(name, 0) + count


def map_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """Maps a file of one dtype; an empty file, which cannot be mapped, becomes an empty array."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")
