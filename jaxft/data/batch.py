"""The shape in which token rows reach a model: named columns, all laid out like the tokens."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

# Dtype of each column that data gives; objectives may add float32 columns of their own.
COLUMNS = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "positions": np.int32,
    "segments": np.int32,
    "labels": np.float32,
    "units": np.int32,
}
STANDARD = ("tokens", "targets", "weights", "positions", "segments")


@jax.tree_util.register_pytree_with_keys_class
class Batch(Mapping[str, Any]):
    """Columns by name, each `[B, T]`, or `[A, B, T]` with A micro-batches of a step.

    A value of a document is repeated on its tokens, so that packing, splitting and accumulation
    treat every column as they treat the tokens. Five columns are always there, as attributes too:

    Attributes:
      tokens: int32 ids, the model's input.
      targets: int32 ids, the token that follows each input token in its document.
      weights: float32; 1 where the target carries loss, 0 on prompts, on padding and on the last
        position of a document.
      positions: int32 position within the document.
      segments: int32 number of the document in its row, from 1; 0 on padding.

    Rows of preferences have two more: `labels`, float32, is 1 in a preferred answer's document,
    -1 in a rejected one's and 0 in one that is neither; `units`, int32, numbers the documents that
    belong together from 1. A step adds `seeds`, uint32, where adapters have dropout.
    """

    tokens: Any
    targets: Any
    weights: Any
    positions: Any
    segments: Any

    def __init__(self, **columns: Any):
        self._columns = columns
        for name in STANDARD:
            setattr(self, name, columns[name])

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"Batch({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Returns a batch of what a function makes of each column."""
        return type(self)(**{name: function(column) for name, column in self.items()})

    def with_columns(self, **columns: Any) -> Self:
        """Returns a batch with these columns added or replaced."""
        return type(self)(**{**self._columns, **columns})

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple[str, ...]]:
        """Returns the columns with their names, as jax asks of a pytree."""
        keyed = ((jax.tree_util.DictKey(name), column) for name, column in self.items())
        return tuple(keyed), tuple(self._columns)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], columns: tuple) -> Self:
        """Returns the batch that was flattened, with other columns."""
        return cls(**dict(zip(names, columns, strict=True)))
