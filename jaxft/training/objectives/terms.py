"""What every objective asks of a model, and what it returns."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from jaxft.models.config import DecoderConfig
from jaxft.models.layers import Routing


@runtime_checkable
class Predictor(Protocol):
    """A model as objectives see it, whether its layers run here or in the stages of a pipeline."""

    config: DecoderConfig

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns the normalised residual stream, and what the routers of all layers did."""
        ...

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The weight that logits are made with."""
        ...

    def precision(self) -> AbstractContextManager:
        """Returns the context of matrix products."""
        ...


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
