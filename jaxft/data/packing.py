"""Lays documents out in rows of a fixed length.

A row is a list of pieces that do not see one another: a document, a part of one, or in a stream
several. A piece is a range of tokens, or more than one where tokens between them are left out.
The documents of a unit, such as a pair of answers, are neighbours in one row, cut together or not
at all. Which pieces share a row is decided once and kept as an index; the tokens themselves are not
copied.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxft.config import OVERLENGTH
from jaxft.data.cutting import Cut, Group, Piece, count_trained, group_length
from jaxft.data.documents import Documents
from jaxft.data.selection import Part
from jaxft.data.units import NOUNS, counted_units
from jaxft.errors import DataError

WINDOW = 10_000
"""Units that are considered together; bounds the memory of packing."""


class PackingError(DataError):
    """Documents that could be read, but make no rows as the configuration asks for them."""


@dataclass(kw_only=True)
class PackingStatistics:
    """Counts of what became of the documents.

    Attributes:
      documents: Documents of a pass, which rows are made of.
      document_tokens: Tokens of these documents, before any cut.
      document_trained_tokens: Tokens among them with loss.
      parts: Share of a pass that each source has.
      rows: Rows of `max_length` tokens.
      max_length: Tokens in a row.
      tokens: Tokens in rows, padding not counted.
      trained_tokens: Predictions that carry loss: the sum of all weights.
      over_length: Documents longer than a row.
      longest: Tokens of the longest document.
      longest_origin: `file:line` of that document.
      dropped: Documents left out: over-length ones under 'drop', and those of which no trained
        token is left.
      made_equal: Pairs among them whose answers a cut made equal.
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
    longest_origin: str = ""
    dropped: int = 0
    made_equal: int = 0
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
      packing: `data.packing`; units of several documents are never in a stream.
      overlength: `data.overlength`; of no effect on a stream.
      max_length: Tokens in a row.
      order: From place to place among the units of `numbers`, a permutation.
      statistics: Filled while rows are taken.
      numbers: Which of the documents, int64, with units whole; by default all.
      begin_token: Id that stays at the beginning of a prompt that is cut there; None: no such.
      name: Which data, for the error.

    Raises:
      PackingError: If documents are too long and the policy is 'error'.
    """
    index = documents.index if numbers is None else documents.index[numbers]
    units = index.reshape(-1, documents.unit_size)
    lengths = units["length"].sum(axis=1)
    statistics.documents = len(units)
    statistics.document_tokens = int(lengths.sum())
    statistics.document_trained_tokens = int(index["trained"].sum())
    statistics.max_length = max_length
    statistics.longest = int(lengths.max(initial=0))
    if len(units):
        statistics.longest_origin = documents.place(units[int(lengths.argmax()), 0])
    cut = Cut(documents, max_length, begin_token)
    if packing == "stream":
        rows = _stream(index, max_length)
    else:
        statistics.over_length = int((lengths > max_length).sum())
        if statistics.over_length and overlength == "error":
            raise PackingError(_over_length_report(cut, units, name))
        rows = _separate_rows(cut, units, packing, overlength, order, statistics)
    for row in rows:
        statistics.rows += 1
        for piece in row:
            statistics.tokens += group_length((piece,))
            statistics.trained_tokens += count_trained(documents, piece)
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
    cut: Cut,
    units: np.ndarray,
    packing: str,
    overlength: str,
    order: Callable[[int], int],
    statistics: PackingStatistics,
) -> Iterator[list[Piece]]:
    count = len(units)
    for first in range(0, count, WINDOW):
        groups: list[Group] = []
        for place in range(first, min(first + WINDOW, count)):
            kept = _kept(cut, units[order(place)], overlength, statistics)
            statistics.dropped += not kept
            groups += kept
        rows = best_fit(groups, cut.max_length) if packing == "documents" else ([g] for g in groups)
        for row in rows:
            yield [piece for group in row for piece in group]


def _kept(
    cut: Cut, records: np.ndarray, overlength: str, statistics: PackingStatistics
) -> list[Group]:
    """Returns what is left of a unit, counting the pairs whose answers a cut made equal."""
    groups = cut.groups(records, overlength)
    if cut.documents.units == "pairs" and any(map(cut.has_equal_answers, groups)):
        statistics.made_equal += 1
        return []
    return groups


def best_fit(groups: list[Group], max_length: int) -> Iterator[list[Group]]:
    """Yields rows filled longest group first, each group where the least space is left over.

    Rows with a given space are found by the lowest set bit of an integer, so that a window costs
    little more than sorting it. Groups of a row keep the order in which they came.

    A row stands where its longest group stood. So rows keep the order of the source about as well
    as rows of several groups can, and the first rows are a fair sample of all: by their first
    groups, rows of many short ones would lead, and of groups equally long the later ones would open
    rows if position decided which is laid first.
    """
    lengths = [group_length(group) for group in groups]
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces = 0
    for number in sorted(range(len(groups)), key=lambda i: (-lengths[i], _hash(i))):
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
        yield [groups[number] for number in sorted(row)]


def _hash(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8), digest_size=8).digest()


def policies(units: str) -> list[str]:
    """Returns what can become of units that are too long, beside refusing them."""
    whole = units != "documents"
    return [p for p in OVERLENGTH if p != "error" and not (whole and p == "split")]


def _over_length_report(cut: Cut, units: np.ndarray, name: str) -> str:
    kind = cut.documents.units
    lengths, trained = units["length"].sum(axis=1), units["trained"].sum(axis=1)
    over = np.flatnonzero(lengths > cut.max_length)
    total = max(int(trained.sum()), 1)
    longest = sorted(over, key=lambda i: -lengths[i])[:3]
    places = ", ".join(f"{cut.documents.place(units[i, 0])} with {lengths[i]:,}" for i in longest)
    lost = {
        policy: sum(_lost(cut, units[i], policy) for i in over) / total for policy in policies(kind)
    }
    choices = ", ".join(f"{policy} {share:.1%}" for policy, share in lost.items())
    return (
        f"{name}: {len(over):,} of {counted_units(len(lengths), kind)} "
        f"({len(over) / len(lengths):.1%}) are "
        f"longer than data.max_length {cut.max_length:,}; the longest: {places} tokens. Set "
        f"--config.data.max_length={lengths.max()} to keep all of them, or choose what is lost "
        f"with --config.data.overlength=…. Of the trained tokens these lose: {choices}. "
        f"{_what_policies_do(kind)}"
    )


def _what_policies_do(units: str) -> str:
    if units == "documents":
        return (
            "'split' makes pieces that do not see one another; 'cut_prompt_start' and "
            "'cut_prompt_middle' keep the last answer whole and shorten what comes before it."
        )
    return (
        f"The two answers of a {NOUNS[units]} share a row, so that their tokens count together; "
        "'cut_prompt_start' and 'cut_prompt_middle' keep both whole and take the same part of the "
        "prompt from both."
    )


def _lost(cut: Cut, records: np.ndarray, overlength: str) -> int:
    kept = _kept(cut, records, overlength, PackingStatistics())
    return int(records["trained"].sum()) - sum(
        count_trained(cut.documents, piece) for group in kept for piece in group
    )
