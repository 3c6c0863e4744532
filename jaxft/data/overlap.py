"""Held-out documents that are trained on too."""

from dataclasses import dataclass

import numpy as np

from jaxft.data.rows import TokenRows

# Documents of the training data that are compared at a time; bounds the memory it takes.
_STRETCH = 1 << 20
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Overlap:
    """Documents of a held-out set that are trained on too.

    Attributes:
      count: Number of such documents.
      examples: Some of them: `file:line` of the set, and that of the training data.
    """

    count: int
    examples: list[str]


def find_overlap(held_out: TokenRows, train: TokenRows) -> Overlap:
    """Finds the documents of a set whose content, but for case and white space, is trained on.

    Of the training data a stretch at a time is in memory.
    """
    numbers = held_out.numbers[:: held_out.unit_size]
    hashes = held_out.documents.index["hash"][numbers]
    trained = train.numbers[:: train.unit_size]
    wanted = np.unique(hashes)
    where = np.full(len(wanted), -1)  # of each the first document of the training data
    for start in range(0, len(trained), _STRETCH):
        part = train.documents.index["hash"][trained[start : start + _STRETCH]]
        places = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
        hits = np.flatnonzero((wanted[places] == part) & (where[places] < 0))[::-1]
        where[places[hits]] = start + hits
    found = where[np.searchsorted(wanted, hashes)]
    hits = np.flatnonzero(found >= 0)
    examples = [
        f"{held_out.documents.origin(int(numbers[hit]))} = "
        f"{train.documents.origin(int(trained[found[hit]]))}"
        for hit in hits[:_EXAMPLES]
    ]
    return Overlap(len(hits), examples)
