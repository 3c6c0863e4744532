"""Lays documents out in rows of a fixed length.

A row is a list of pieces that do not see one another: a document, a part of one, or in a stream
several. A piece is a range of tokens, or more than one where tokens between them are left out.
Which pieces share a row is decided once and kept as an index; the tokens themselves are not copied.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxft.config import OVERLENGTH
from jaxft.data.documents import Documents
from jaxft.data.selection import Part
from jaxft.errors import DataError

WINDOW = 10_000
"""Documents that are considered together; bounds the memory of packing."""

Piece = tuple[int, ...]
"""First token of a range and the one after its last, counted over all documents; then the next."""


class PackingError(DataError):
    """Documents that could be read, but make no rows as the configuration asks for them."""


@dataclass(kw_only=True)
class PackingStatistics:
    """What became of the documents.

    Attributes:
      documents: Documents of a pass, which rows are made of.
      document_tokens: Their tokens, before any cut.
      document_trained_tokens: Those with loss.
      parts: What a pass has of each source.
      rows: Rows of `max_length` tokens.
      max_length: Tokens in a row.
      tokens: Tokens in rows, padding not counted.
      trained_tokens: Predictions that carry loss: the sum of all weights.
      over_length: Documents longer than a row.
      longest: Tokens of the longest document.
      dropped: Documents left out: over-length ones under 'drop', and those of which no trained
        token is left.
      lost_trained_tokens: Trained tokens of the documents that are in no row.
    """

    documents: int = 0
    document_tokens: int = 0
    document_trained_tokens: int = 0
    parts: list[Part] = field(default_factory=list)
    rows: int = 0
    max_length: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    over_length: int = 0
    longest: int = 0
    dropped: int = 0
    lost_trained_tokens: int = 0


def pack(
    documents: Documents,
    *,
    packing: str,
    overlength: str,
    max_length: int,
    order: Callable[[int], int],
    statistics: PackingStatistics,
    numbers: np.ndarray | None = None,
    begin_token: int | None = None,
    name: str = "data",
) -> Iterator[list[Piece]]:
    """Yields rows; the same documents and options always give the same rows.

    Args:
      documents: What is laid out.
      packing: `data.packing`.
      overlength: `data.overlength`; of no effect on a stream.
      max_length: Tokens in a row.
      order: From place to place among `numbers`, a permutation.
      statistics: Filled while rows are taken.
      numbers: Which of the documents, int64; by default all.
      begin_token: Id that stays at the beginning of a prompt that is cut there; None: no such.
      name: Which data, for the error.

    Raises:
      PackingError: If documents are too long and the policy is 'error'.
    """
    index = documents.index if numbers is None else documents.index[numbers]
    lengths = index["length"]
    statistics.documents = len(index)
    statistics.document_tokens = int(lengths.sum())
    statistics.document_trained_tokens = int(index["trained"].sum())
    statistics.max_length = max_length
    statistics.longest = int(lengths.max(initial=0))
    cut = _Cut(documents, max_length, begin_token)
    if packing == "stream":
        rows = _stream(index, max_length)
    else:
        statistics.over_length = int((lengths > max_length).sum())
        if statistics.over_length and overlength == "error":
            raise PackingError(_over_length_report(cut, index, name))
        rows = _separate_rows(cut, index, packing, overlength, order, statistics)
    for row in rows:
        statistics.rows += 1
        for piece in row:
            statistics.tokens += _length(piece)
            statistics.trained_tokens += _trained(documents, piece)
        yield row
    if packing != "stream":
        lost = statistics.document_trained_tokens - statistics.trained_tokens
        statistics.lost_trained_tokens = lost


def _stream(index: np.ndarray, max_length: int) -> Iterator[list[Piece]]:
    piece: list[int] = []
    space = max_length
    for begin, length in zip(index["start"].tolist(), index["length"].tolist(), strict=True):
        end = begin + length
        while begin < end:
            taken = min(space, end - begin)
            if piece and piece[-1] == begin:
                piece[-1] += taken
            else:
                piece += (begin, begin + taken)
            begin += taken
            space -= taken
            if not space:
                yield [tuple(piece)]
                piece, space = [], max_length
    if piece:
        yield [tuple(piece)]


def _separate_rows(
    cut: "_Cut",
    index: np.ndarray,
    packing: str,
    overlength: str,
    order: Callable[[int], int],
    statistics: PackingStatistics,
) -> Iterator[list[Piece]]:
    count = len(index)
    for first in range(0, count, WINDOW):
        pieces = []
        for place in range(first, min(first + WINDOW, count)):
            kept = cut.pieces(index[order(place)], overlength)
            statistics.dropped += not kept
            pieces += kept
        if packing == "documents":
            yield from best_fit(pieces, cut.max_length)
        else:
            yield from ([piece] for piece in pieces)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Makes pieces of documents, none longer than a row."""

    documents: Documents
    max_length: int
    begin_token: int | None

    def pieces(self, record: np.void, overlength: str) -> list[Piece]:
        """Returns the pieces of a document in which anything is trained."""
        begin, length = int(record["start"]), int(record["length"])
        if length <= self.max_length:
            pieces: list[Piece] = [(begin, begin + length)]
        elif overlength == "drop":
            pieces = []
        elif overlength == "truncate":
            pieces = [(begin, begin + self.max_length)]
        elif overlength.startswith("cut_prompt"):
            pieces = self._cut_prompt(begin, begin + length, middle=overlength.endswith("middle"))
        else:
            pieces = self._split(begin, begin + length)
        return [piece for piece in pieces if _trained(self.documents, piece)]

    def _split(self, begin: int, end: int) -> list[Piece]:
        size = self.max_length
        return [(start, min(start + size, end)) for start in range(begin, end, size)]

    def _cut_prompt(self, begin: int, end: int, *, middle: bool) -> list[Piece]:
        """Keeps the last run of trained tokens whole, and as much as fits of what is before it."""
        trained = self.documents.trained[begin:end].astype(bool)
        last = len(trained) - int(np.argmax(trained[::-1]))
        masked = np.flatnonzero(~trained[:last])
        if not trained.any():
            return []
        if not len(masked):  # no prompt: plain text, or all that there is is trained
            return self._split(begin, end)
        answer, last = begin + int(masked[-1]) + 1, begin + last
        room = self.max_length - (last - answer)
        if room < 1:
            return []
        if middle:
            head = room // 2
        else:
            head = int(room > 1 and self.documents.tokens[begin] == self.begin_token)
        resumed = answer - (room - head)
        if resumed <= begin + head:  # what comes after the answer was too much
            return [(begin, last)]
        return [(begin, begin + head, resumed, last)] if head else [(resumed, last)]


def _length(piece: Piece) -> int:
    return sum(piece[1::2]) - sum(piece[::2])


def _trained(documents: Documents, piece: Piece) -> int:
    """Counts predictions with loss in a piece: the first token of a range has none."""
    return sum(
        int(np.count_nonzero(documents.trained[begin + 1 : end]))
        for begin, end in zip(piece[::2], piece[1::2], strict=True)
    )


def best_fit(pieces: list[Piece], max_length: int) -> Iterator[list[Piece]]:
    """Yields rows filled longest piece first, each piece where the least space is left over.

    Rows with a given space are found by the lowest set bit of an integer, so that a window costs
    little more than sorting it. Pieces of a row keep the order in which they came.

    A row stands where its longest piece stood. So rows keep the order of the source about as well
    as rows of several pieces can, and the first rows are a fair sample of all: by their first
    pieces, rows of many short ones would lead, and of pieces equally long the later ones would open
    rows if position decided which is laid first.
    """
    lengths = [_length(piece) for piece in pieces]
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces = 0
    for number in sorted(range(len(pieces)), key=lambda i: (-lengths[i], _hash(i))):
        length = lengths[number]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(number)
        left = space - length
        rows_by_space.setdefault(left, []).append(row)
        spaces |= 1 << left
    for row in sorted(rows, key=lambda row: row[0]):
        yield [pieces[number] for number in sorted(row)]


def _hash(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8), digest_size=8).digest()


def _over_length_report(cut: _Cut, index: np.ndarray, name: str) -> str:
    lengths = index["length"]
    over = np.flatnonzero(lengths > cut.max_length)
    total = max(int(index["trained"].sum()), 1)
    longest = sorted(over, key=lambda i: -lengths[i])[:3]
    places = ", ".join(f"{cut.documents.place(index[i])} with {lengths[i]:,}" for i in longest)
    lost = {
        policy: sum(_lost(cut, index[i], policy) for i in over) / total
        for policy in OVERLENGTH
        if policy != "error"
    }
    choices = ", ".join(f"{policy} {share:.1%}" for policy, share in lost.items())
    return (
        f"{name}: {len(over):,} of {len(lengths):,} documents ({len(over) / len(lengths):.1%}) are "
        f"longer than data.max_length {cut.max_length:,}; the longest: {places} tokens. Set "
        f"--config.data.max_length={lengths.max()} to keep all of them, or choose what is lost "
        f"with --config.data.overlength=…. Of the trained tokens these lose: {choices}. 'split' "
        "makes pieces that do not see one another; 'cut_prompt_start' and 'cut_prompt_middle' keep "
        "the last answer whole and shorten what comes before it."
    )


def _lost(cut: _Cut, record: np.void, overlength: str) -> int:
    kept = sum(_trained(cut.documents, piece) for piece in cut.pieces(record, overlength))
    return int(record["trained"]) - kept
