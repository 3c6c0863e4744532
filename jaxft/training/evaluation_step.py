"""One evaluation step: summed loss and counts of each row, compiled apart from training."""

from typing import Any

import jax

from jaxft.data.batch import Batch
from jaxft.models.module import Params, merge
from jaxft.sharding.rules import Placement
from jaxft.training import pipeline
from jaxft.training.objectives.terms import LossTerms
from jaxft.training.step import Loss, in_slots


def make_eval_step(graphdef: Any, row_terms: Loss, *, placement: Placement) -> Any:
    """Returns `step(params, batch) -> LossTerms` of `[B]` for `[B, T]` batches, jitted.

    Sums leave the device, never logits: memory does not grow with the data, and the means that are
    made of them do not depend on batch size, packing or device count.
    """

    def step(params: Params, batch: Batch) -> LossTerms:
        with placement.activate():
            rows = in_slots(batch, placement)
            if placement.split("layers"):
                return pipeline.row_terms(graphdef, row_terms, params, rows, placement=placement)
            return row_terms(merge(graphdef, params), rows)

    return jax.jit(step, out_shardings=placement.replicated)
