"""The one shape in which token rows reach a model."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens; every field is `[B, T]`, or `[A, B, T]` with A micro-batches of a step.

    Attributes:
      tokens: int32 ids, the model's input.
      targets: int32 ids, the token that follows each input token in its document.
      weights: float32; 1 where the target carries loss, 0 on prompts, on padding and on the last
        position of a document.
      positions: int32 position within the document.
      segments: int32 number of the document in its row, from 1; 0 on padding.
    """

    tokens: Any
    targets: Any
    weights: Any
    positions: Any
    segments: Any
