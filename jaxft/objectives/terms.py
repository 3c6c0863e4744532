"""What every objective returns."""

from typing import Any, NamedTuple


class LossTerms(NamedTuple):
    """Sums over a batch, or over each row of it; normalised once, after accumulation.

    Then packing, accumulation, ragged last batches and any device count give the same gradient.

    Attributes:
      total: float32, the loss summed over trained tokens, in nats.
      weight: float32, the number of trained tokens.
      correct: float32, trained tokens whose most likely prediction is the target.
    """

    total: Any
    weight: Any
    correct: Any

    def __add__(self, other: Any) -> "LossTerms":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds term by term (a tuple's own `+` would concatenate)."""
        return LossTerms(*(a + b for a, b in zip(self, other, strict=True)))
