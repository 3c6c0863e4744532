"""The steps of evaluation: sums of each row or unit, compiled apart from training.

What is compiled is named after its function, by which traces tell it from the training step.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxft.data.batch import Batch
from jaxft.models.module import Params, merge
from jaxft.sharding.rules import Placement
from jaxft.training import pipeline
from jaxft.training.objectives.bound import BoundObjective
from jaxft.training.objectives.contract import Terms
from jaxft.training.step import in_slots, map_micros


def make_eval_step(graphdef: Any, objective: BoundObjective, *, placement: Placement) -> Any:
    """Returns `step(params, batch) -> Terms` of `[B]` or `[B, U]` for `[B, T]` batches, jitted.

    Sums leave the device, never logits: memory does not grow with the data, and the means that are
    made of them do not depend on batch size, packing or device count.
    """

    def evaluate(params: Params, batch: Batch) -> Terms:
        return _map_rows(graphdef, objective.rows, params, batch, placement)

    return jax.jit(evaluate, out_shardings=placement.replicated)


def make_whole_step(graphdef: Any, objective: BoundObjective, *, placement: Placement) -> Any:
    """Returns `step(params, batch) -> {name: (sum, count)}`, jitted.

    It is what the loss must know of all rows, of which these are a part.
    """

    def sum_up(params: Params, batch: Batch) -> dict[str, tuple[Any, Any]]:
        with placement.activate():
            micros = pipeline.deal(in_slots(batch, placement), placement)
            found = map_micros(graphdef, objective.whole, params, micros, placement)
        return jax.tree.map(jnp.sum, found)

    return jax.jit(sum_up, out_shardings=placement.replicated)


def make_score_step(graphdef: Any, objective: BoundObjective, *, placement: Placement) -> Any:
    """Returns `step(params, batch) -> log-probabilities` of the targets, float32 `[B, T]`, jitted.

    They stand as in the rows of the data, whichever devices hold which positions.
    """

    def score(params: Params, batch: Batch) -> jax.Array:
        found = _map_rows(graphdef, objective.log_probs, params, batch, placement)
        if not placement.split("seq"):
            return found
        slots = placement.slots(batch.tokens.shape[-1])
        return jnp.take(found, jnp.argsort(jnp.asarray(slots)), axis=-1)

    return jax.jit(score, out_shardings=placement.replicated)


def _map_rows(
    graphdef: Any, function: Any, params: Params, batch: Batch, placement: Placement
) -> Any:
    """Returns what a function makes of the model and rows `[B, T]`: arrays of rows first."""
    with placement.activate():
        rows = in_slots(batch, placement)
        if placement.split("layers"):
            return pipeline.map_rows(graphdef, function, params, rows, placement=placement)
        return function(merge(graphdef, params), rows)
