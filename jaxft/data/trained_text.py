"""The amount of text behind trained tokens: it makes losses of unlike tokenizers comparable."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.data.rows import TokenRows

# Texts that are decoded together; bounds the memory it takes.
_TOGETHER = 4096


def count_bytes(rows: TokenRows, tokenizer: Any, numbers: Sequence[int]) -> np.ndarray:
    """Returns the bytes of UTF-8 that the trained tokens of each row decode to, int64 `[numbers]`.

    Special tokens count nothing: the token that ends an answer is in the loss, but is no text. What
    a run of trained tokens adds is the length with it less the length of what stands before it, so
    that a space which a tokenizer drops at the start of a text alone is counted where it is kept.

    Args:
      rows: From `prepare`.
      tokenizer: The one that made them.
      numbers: Rows.
    """
    counts = np.zeros(len(numbers), np.int64)
    places, signs, texts = [], [], []
    for place, sign, ids in _parts(rows, numbers):
        places.append(place)
        signs.append(sign)
        texts.append(ids)
        if len(texts) == _TOGETHER:
            _add(counts, places, signs, texts, tokenizer)
            places, signs, texts = [], [], []
    _add(counts, places, signs, texts, tokenizer)
    return counts


def _parts(rows: TokenRows, numbers: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yields (place, 1 or -1, ids): bytes of ids to add to those of a row, or to take off."""
    tokens, trained = rows.documents.tokens, rows.documents.trained
    for place, number in enumerate(numbers):
        for begin, end in rows.pieces(number).tolist():
            # Nothing predicts the first token of a piece.
            flags = np.concatenate([[False], trained[begin + 1 : end].astype(bool), [False]])
            borders = np.flatnonzero(np.diff(flags)) + 1
            for first, stop in borders.reshape(-1, 2).tolist():
                yield place, 1, tokens[begin : begin + stop].tolist()
                yield place, -1, tokens[begin : begin + first].tolist()


def _add(
    counts: np.ndarray, places: list[int], signs: list[int], texts: list[list[int]], tokenizer: Any
) -> None:
    if not texts:
        return
    decoded = tokenizer.batch_decode(
        texts, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    lengths = [len(text.encode("utf-8", "surrogatepass")) for text in decoded]
    np.add.at(counts, places, np.array(signs) * np.array(lengths))
