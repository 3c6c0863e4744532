"""Makes pieces of documents that are longer than a row, as `data.overlength` says."""

from dataclasses import dataclass

import numpy as np

from jaxft.data.documents import Documents

Piece = tuple[int, ...]
"""First token of a range and the one after its last, counted over all documents; then the next."""

Group = tuple[Piece, ...]
"""Pieces that stand beside one another in a row: one of a document, or those of a unit."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Makes pieces of documents, none longer than a row.

    Attributes:
      documents: The tokens that are cut, and which of them are trained.
      max_length: Tokens in a row.
      begin_token: Id that stays at the beginning of a prompt that is cut there; None: no such.
    """

    documents: Documents
    max_length: int
    begin_token: int | None

    def groups(self, records: np.ndarray, overlength: str) -> list[Group]:
        """Returns what is left of a document or of a unit: all of it, parts of it, or nothing.

        Args:
          records: Of the index: one document, or those of a unit.
          overlength: `data.overlength`.
        """
        if len(records) == 1:
            return [(piece,) for piece in self.pieces(records[0], overlength)]
        group = self._cut_unit(records, overlength)
        # Without one of its answers a unit compares nothing.
        return [group] if group and all(count_trained(self.documents, p) for p in group) else []

    def has_equal_answers(self, group: Group) -> bool:
        """Whether the pieces of a pair end alike, so that nothing tells one from the other."""
        first, *others = (self._trained_tokens(piece) for piece in group)
        return all(np.array_equal(first, other) for other in others)

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
        return [piece for piece in pieces if count_trained(self.documents, piece)]

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
        if answer - begin <= room:  # what comes after the answer was too much
            return [(begin, last)]
        return [self._shorten(begin, answer, last, room, middle=middle)]

    def _shorten(self, begin: int, answer: int, last: int, kept: int, *, middle: bool) -> Piece:
        """Returns an answer with `kept` tokens of the prompt before it."""
        if middle:
            head = kept // 2
        else:
            head = int(kept > 1 and self.documents.tokens[begin] == self.begin_token)
        resumed = answer - (kept - head)
        return (begin, begin + head, resumed, last) if head else (resumed, last)

    def _cut_unit(self, records: np.ndarray, overlength: str) -> Group:
        """Returns a piece of each document, which together fit a row; none where they cannot."""
        begins = records["start"].tolist()
        lengths = records["length"].tolist()
        whole = tuple((begin, begin + n) for begin, n in zip(begins, lengths, strict=True))
        if sum(lengths) <= self.max_length:
            return whole
        if overlength == "truncate":
            limit = _shared_limit(lengths, self.max_length)
            return tuple((begin, min(end, begin + limit)) for begin, end in whole)
        if overlength.startswith("cut_prompt"):
            return self._cut_prompts(whole, middle=overlength.endswith("middle"))
        return ()

    def _cut_prompts(self, whole: Group, *, middle: bool) -> Group:
        """Takes the same part of the prompt from all documents, so that their prompts stay equal.

        What comes after the answers is given up first.
        """
        flags = [self.documents.trained[begin:end].astype(bool) for begin, end in whole]
        prompt = int(np.argmax(flags[0]))
        lasts = [
            begin + len(trained) - int(np.argmax(trained[::-1]))
            for (begin, _), trained in zip(whole, flags, strict=True)
        ]
        excess = sum(lasts) - sum(begin for begin, _ in whole) - self.max_length
        kept = prompt - max(0, -(-excess // len(whole)))
        if kept < 1:
            return ()
        if kept == prompt:
            return tuple((begin, last) for (begin, _), last in zip(whole, lasts, strict=True))
        return tuple(
            self._shorten(begin, begin + prompt, last, kept, middle=middle)
            for (begin, _), last in zip(whole, lasts, strict=True)
        )

    def _trained_tokens(self, piece: Piece) -> np.ndarray:
        parts = [
            self.documents.tokens[begin:end][self.documents.trained[begin:end].astype(bool)]
            for begin, end in zip(piece[::2], piece[1::2], strict=True)
        ]
        return np.concatenate(parts)


def _shared_limit(lengths: list[int], room: int) -> int:
    """Returns the largest length to which all can be cut so that together they fit."""
    left = room
    for number, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - number)
        if length > share:
            return share
        left -= length
    return max(lengths)


def group_length(group: Group) -> int:
    """Returns the number of tokens in pieces."""
    return sum(sum(piece[1::2]) - sum(piece[::2]) for piece in group)


def count_trained(documents: Documents, piece: Piece) -> int:
    """Counts predictions with loss in a piece: the first token of a range has none."""
    return sum(
        int(np.count_nonzero(documents.trained[begin + 1 : end]))
        for begin, end in zip(piece[::2], piece[1::2], strict=True)
    )
