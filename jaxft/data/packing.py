"""Lays documents out in rows of a fixed length.

A row is a list of pieces, ranges of tokens that lie one after another. Which pieces share a row is
decided once and kept as an index; the tokens themselves are not copied.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxft.data.documents import Documents
from jaxft.errors import DataError

WINDOW = 10_000
"""Documents that are considered together; bounds the memory of packing."""

Piece = tuple[int, int]
"""First token and the one after the last, counted over all documents."""


class PackingError(DataError):
    """Documents that could be read, but make no rows as the configuration asks for them."""


@dataclass(kw_only=True)
class PackingStatistics:
    """What became of the documents.

    Attributes:
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

    rows: int = 0
    max_length: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    over_length: int = 0
    longest: int = 0
    dropped: int = 0
    lost_trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Losses:
    """Trained tokens that each policy would lose."""

    drop: int
    truncate: int
    split: int


def pack(
    documents: Documents,
    *,
    packing: str,
    overlength: str,
    max_length: int,
    order: Callable[[int], int],
    statistics: PackingStatistics,
    name: str = "data",
) -> Iterator[list[Piece]]:
    """Yields rows; the same documents and options always give the same rows.

    Args:
      documents: What is laid out.
      packing: `data.packing`.
      overlength: `data.overlength`; of no effect on a stream.
      max_length: Tokens in a row.
      order: From place to number of document, a permutation.
      statistics: Filled while rows are taken.
      name: Which data, for the error.

    Raises:
      PackingError: If documents are too long and the policy is 'error'.
    """
    lengths = documents.index["length"]
    statistics.max_length = max_length
    statistics.longest = int(lengths.max(initial=0))
    if packing == "stream":
        rows = _stream(documents, max_length)
    else:
        statistics.over_length = int((lengths > max_length).sum())
        if statistics.over_length and overlength == "error":
            raise PackingError(_over_length_report(documents, max_length, name))
        rows = _separate_rows(documents, packing, overlength, max_length, order, statistics)
    for row in rows:
        statistics.rows += 1
        for begin, end in row:
            statistics.tokens += end - begin
            statistics.trained_tokens += _trained(documents, begin, end)
        yield row
    statistics.lost_trained_tokens = (
        documents.statistics.trained_tokens - statistics.trained_tokens
        if packing != "stream"
        else 0
    )


def _stream(documents: Documents, max_length: int) -> Iterator[list[Piece]]:
    total = len(documents.tokens)
    for begin in range(0, total, max_length):
        yield [(begin, min(begin + max_length, total))]


def _separate_rows(
    documents: Documents,
    packing: str,
    overlength: str,
    max_length: int,
    order: Callable[[int], int],
    statistics: PackingStatistics,
) -> Iterator[list[Piece]]:
    count = len(documents.index)
    for first in range(0, count, WINDOW):
        pieces = []
        for place in range(first, min(first + WINDOW, count)):
            kept = [
                piece
                for piece in _pieces(documents.index[order(place)], overlength, max_length)
                if _trained(documents, *piece)
            ]
            statistics.dropped += not kept
            pieces += kept
        yield from best_fit(pieces, max_length) if packing == "documents" else ([p] for p in pieces)


def _pieces(record: np.void, overlength: str, max_length: int) -> list[Piece]:
    begin, length = int(record["start"]), int(record["length"])
    end = begin + length
    if length <= max_length:
        return [(begin, end)]
    if overlength == "drop":
        return []
    if overlength == "truncate":
        return [(begin, begin + max_length)]
    return [(start, min(start + max_length, end)) for start in range(begin, end, max_length)]


def _trained(documents: Documents, begin: int, end: int) -> int:
    """Counts predictions with loss in a piece: its first token is predicted by nothing."""
    return int(np.count_nonzero(documents.trained[begin + 1 : end]))


def best_fit(pieces: list[Piece], max_length: int) -> Iterator[list[Piece]]:
    """Yields rows filled longest piece first, each piece where the least space is left over.

    Rows with a given space are found by the lowest set bit of an integer, so that a window costs
    little more than sorting it. Pieces of a row keep the order in which they came.

    A row stands where its longest piece stood. So rows keep the order of the source about as well
    as rows of several pieces can, and the first rows are a fair sample of all: by their first
    pieces, rows of many short ones would lead, and of pieces equally long the later ones would open
    rows if position decided which is laid first.
    """
    lengths = [end - begin for begin, end in pieces]
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


def _over_length_report(documents: Documents, max_length: int, name: str) -> str:
    lengths = documents.index["length"]
    over = np.flatnonzero(lengths > max_length)
    total = max(documents.statistics.trained_tokens, 1)
    losses = _losses(documents, over, max_length)
    longest = sorted(over, key=lambda i: -lengths[i])[:3]
    places = ", ".join(f"{documents.origin(int(i))} with {lengths[i]:,}" for i in longest)
    return (
        f"{name}: {len(over):,} of {len(lengths):,} documents ({len(over) / len(lengths):.1%}) are "
        f"longer than data.max_length {max_length:,}; the longest: {places} tokens. "
        f"Set data.max_length to {lengths.max()} to keep all of them, or choose what is lost: "
        f"data.overlength=drop loses {losses.drop / total:.1%} of the trained tokens, "
        f"truncate {losses.truncate / total:.1%}, split {losses.split / total:.1%} (pieces of a "
        "document then do not see one another)."
    )


def _losses(documents: Documents, over: np.ndarray, max_length: int) -> _Losses:
    truncate = split = 0
    for record in documents.index[over]:
        begin, end = int(record["start"]), int(record["start"] + record["length"])
        truncate += int(np.count_nonzero(documents.trained[begin + max_length : end]))
        split += int(np.count_nonzero(documents.trained[begin + max_length : end : max_length]))
    return _Losses(int(documents.index["trained"][over].sum()), truncate, split)
