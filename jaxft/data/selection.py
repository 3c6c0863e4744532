"""The documents of one pass: the held-out part, and shares of the sources of a mixture.

Rows stay whole: the documents that one row of the data gave are taken together or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.documents import Documents, prompt_hashes
from jaxft.data.specs import SourceSpec
from jaxft.errors import DataError


@dataclass(frozen=True, slots=True)
class Part:
    """The documents of one source in a pass.

    Attributes:
      name: The source as it is written, a glob for all of its files.
      documents: Documents that there are, or units of preferences, without those held out.
      taken: Documents that are in a pass.
      trained_tokens: Trained tokens of these, before any cut.
    """

    name: str
    documents: int
    taken: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The documents of a pass.

    Attributes:
      numbers: Numbers of the documents, in order, int64 `[documents]`.
      parts: Part of each source.
    """

    numbers: np.ndarray
    parts: list[Part]


def select(
    documents: Documents,
    specs: Sequence[SourceSpec],
    *,
    share: float,
    held_out: bool,
    seed: int,
    name: str,
) -> Selection:
    """Returns the documents of one pass.

    With weights a pass is as long as it can be with every row in it at most once: all of the
    scarcest source, and of the others a seeded subset. Weights are shares of the rows.

    Args:
      documents: All that were read.
      specs: How each source was written, by its number; files of a glob share one.
      share: How much of the documents is held out for validation; 0: nothing.
      held_out: Whether that part is returned, or the rest.
      seed: Of what is held out and of the subsets.
      name: Which data, for errors.

    Raises:
      DataError: If nothing is left.
    """
    index = documents.index
    groups = list(dict.fromkeys(specs))
    group_of_source = np.array([groups.index(spec) for spec in specs], np.int64)
    first = _first_of_row(index)
    row_of = np.cumsum(first) - 1
    group = group_of_source[index["source"][first]]
    kept = np.ones(len(group), bool)
    if share:
        kept = _held_out(_keys(documents, first), group, share, seed)
        _check_sides(kept, share, name, "content" if documents.units == "documents" else "prompt")
        kept = kept if held_out else ~kept
    there = np.bincount(group[row_of][kept[row_of]], minlength=len(groups))
    if groups[0].weight:
        kept &= _weighted(group, kept, [spec.weight for spec in groups], seed)
    numbers = np.flatnonzero(kept[row_of])
    taken, trained = group[row_of][numbers], index["trained"][numbers]
    if not len(numbers):
        empty = next(spec.name for spec, count in zip(groups, there, strict=True) if not count)
        raise DataError(
            f"{name}: a pass with these weights has no document, because {empty} has none. Leave "
            "that source out."
        )
    size = documents.unit_size
    parts = [
        Part(
            spec.name,
            int(there[i]) // size,
            int((taken == i).sum()) // size,
            int(trained[taken == i].sum()),
        )
        for i, spec in enumerate(groups)
    ]
    return Selection(numbers, parts)


def _first_of_row(index: np.ndarray) -> np.ndarray:
    """Returns for each document whether it is the first one of its row, bool `[documents]`."""
    first = np.ones(len(index), bool)
    first[1:] = (index["source"][1:] != index["source"][:-1]) | (
        index["row"][1:] != index["row"][:-1]
    )
    return first


def _keys(documents: Documents, first: np.ndarray) -> np.ndarray:
    """Returns what rows on the same side have in common, uint64 `[rows]`.

    That is their content. Rows of preferences of one prompt are on the same side too: what a model
    learns of one answer tells of the others.
    """
    contents = documents.index["hash"][first]
    if documents.units == "documents":
        return contents
    keys, before = contents, None
    groups = [
        np.unique(values, return_inverse=True)[1]
        for values in (prompt_hashes(documents, np.flatnonzero(first)), contents)
    ]
    while before is None or (keys != before).any():  # content -> prompt -> content ...
        before = keys
        for group in groups:
            least = np.full(group.max() + 1, np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(least, group, keys)
            keys = least[group]
    return keys


def _held_out(hashes: np.ndarray, group: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns which rows are held out, bool `[rows]`: the same share of every source.

    Rows with the same content are on the same side, in whatever source they stand. They are taken
    in an order that depends on seed and content alone, for as long as no source exceeds its share.
    """
    wanted = np.floor(share * np.bincount(group) + 0.5).astype(int)
    order = np.argsort(_mixed(hashes, seed), kind="stable")
    ends = np.flatnonzero(np.append(hashes[order][1:] != hashes[order][:-1], True)) + 1
    held_out = np.zeros(len(hashes), bool)
    start = 0
    for end in ends.tolist():
        rows = order[start:end]
        start = end
        counts = np.bincount(group[rows], minlength=len(wanted))
        if (counts <= wanted).all():
            held_out[rows] = True
            wanted -= counts
            if not wanted.any():
                break
    return held_out


def _check_sides(held_out: np.ndarray, share: float, name: str, shared: str) -> None:
    count = int(held_out.sum())
    if 0 < count < len(held_out):
        return
    raise DataError(
        f"{name}: data.validation {100 * share:g}% of {len(held_out):,} rows leaves "
        f"{'nothing to train on' if count else 'no row for validation'}; rows with the same "
        f"{shared} stay together. Choose another share, or a file of its own."
    )


def _weighted(
    group: np.ndarray, kept: np.ndarray, weights: Sequence[float], seed: int
) -> np.ndarray:
    """Returns a subset of the kept rows in which the sources have the shares of their weights."""
    shares = np.array(weights) / sum(weights)
    there = np.bincount(group[kept], minlength=len(shares))
    total = (there / shares).min()
    taken = np.minimum(np.floor(total * shares + 0.5).astype(int), there)
    chosen = np.zeros(len(group), bool)
    for number, count in enumerate(taken.tolist()):
        rows = np.flatnonzero(kept & (group == number))
        keys = _mixed(rows.astype(np.uint64), seed + number)
        chosen[rows[np.argsort(keys, kind="stable")[:count]]] = True
    return chosen


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Returns numbers as good as random that depend on a seed and uint64 values (splitmix64)."""
    start = (seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % (1 << 64)
    mixed = values.astype(np.uint64) + np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
