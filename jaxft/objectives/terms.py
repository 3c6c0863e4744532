"""What every objective returns."""

from typing import Any, NamedTuple

import jax

from jaxft.models.layers import Routing


class LossTerms(NamedTuple):
    """Sums over a batch, or over each row of it; normalised once, after accumulation.

    Then packing, accumulation, ragged last batches and any device count give the same gradient.

    Attributes:
      total: float32, the loss summed over trained tokens, in nats.
      weight: float32, the number of trained tokens.
      correct: float32, trained tokens whose most likely prediction is the target.
      auxiliary: float32, what is minimised beside `total`, such as the load-balancing loss of a
        batch times its trained tokens. It is 0 where terms are kept for each row.
      routing: What the routers of all layers did, or None without experts and for rows.
    """

    total: Any
    weight: Any
    correct: Any
    auxiliary: Any = 0.0
    routing: Routing | None = None

    def __add__(self, other: Any) -> "LossTerms":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds term by term (a tuple's own `+` would concatenate)."""
        return jax.tree.map(lambda a, b: a + b, self, other)
