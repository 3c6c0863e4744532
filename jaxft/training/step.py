"""One optimizer step: gradients of summed loss over micro-batches, normalised once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.data.batch import Batch
from jaxft.models.experts import balance_loss
from jaxft.models.module import Params, merge
from jaxft.sharding.rules import Placement, place
from jaxft.training import pipeline
from jaxft.training.objectives.terms import LossTerms
from jaxft.training.state import TrainState

Loss = Callable[[Any, Batch], LossTerms]


class ExpertMetrics(NamedTuple):
    """Float32 scalars of one step of a mixture of experts.

    Attributes:
      balance: Load-balancing loss, without its weight; k (experts of a token) is even.
      busiest: Tokens of the busiest expert of any layer over the mean of that layer; 1 is even.
      unused: Share of all layers' experts that no token went to.
      dropped: Share of choices that found their expert full.
    """

    balance: Any
    busiest: Any
    unused: Any
    dropped: Any


class StepMetrics(NamedTuple):
    """Float32 scalars of one step, left on the device.

    Attributes:
      total: Summed loss in nats.
      weight: Trained tokens.
      learning_rate: Used by this step.
      grad_norm: Global norm of the normalised gradient, before clipping.
      tokens: Tokens that are not padding.
      squared_lengths: Sum of squared document lengths, which attention's work grows with: twice
        the pairs of query and key that may see each other, less the tokens; the mean over layers,
        whose windows may hide some.
      experts: How evenly experts are used; None in a model without.
    """

    total: Any
    weight: Any
    learning_rate: Any
    grad_norm: Any
    tokens: Any
    squared_lengths: Any
    experts: ExpertMetrics | None = None


def make_train_step(
    graphdef: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    placement: Placement,
    abstract_state: TrainState,
    gradients: Mapping[str, Any],
    windows: Sequence[int],
) -> Any:
    """Returns `step(state, batch) -> (state, StepMetrics)`, jitted, with the state donated.

    Args:
      graphdef: Structure of the model.
      loss: Maps model and micro-batch to sums.
      optimizer: Transforms the normalised gradient.
      schedule: Learning rate by step, reported with the metrics.
      placement: Active while the step is traced.
      abstract_state: Gives the shardings that the state keeps.
      gradients: Sharding of the gradient of each trained parameter.
      windows: Of each layer, 0 for none; only the count of attention's work depends on them.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with placement.activate():
            rows = in_slots(batch, placement)
            if placement.split("layers"):
                sums, terms = pipeline.accumulate(
                    graphdef,
                    loss,
                    state.trainable,
                    state.frozen,
                    rows,
                    placement=placement,
                    shardings=gradients,
                )
            else:
                sums, terms = _accumulate(graphdef, loss, state, rows, gradients)
        # A batch of prompts alone has no trained token: its gradient is zero, not 0 / 0.
        scale = 1.0 / jnp.maximum(terms.weight, 1.0)
        normalised = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), sums, state.trainable)
        updates, opt_state = optimizer.update(normalised, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        real = (batch.segments > 0).astype(jnp.float32)
        metrics = StepMetrics(
            total=terms.total,
            weight=terms.weight,
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            grad_norm=optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), normalised)),
            tokens=jnp.sum(real),
            squared_lengths=jnp.sum(_squared_lengths(batch.positions, windows) * real),
            experts=_expert_metrics(terms),
        )
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, placement.micro_batches),
        out_shardings=(shardings, placement.replicated),
    )


def in_slots(batch: Batch, placement: Placement) -> Batch:
    """Lays the positions of rows out as devices that share rows hold them; sums do not change."""
    if not placement.split("seq"):
        return batch
    slots = placement.slots(batch.tokens.shape[-1])
    return Batch(*(jnp.take(field, slots, axis=-1) for field in batch))


def _accumulate(
    graphdef: Any, loss: Loss, state: TrainState, batch: Batch, shardings: Mapping[str, Any]
) -> tuple[Params, LossTerms]:
    """Sums gradients and loss terms over the leading axis of `batch`, in float32."""

    def gradients_of(micro: Batch) -> tuple[Params, LossTerms]:
        def total(trainable: Params) -> tuple[jax.Array, LossTerms]:
            terms = loss(merge(graphdef, {**trainable, **state.frozen}), micro)
            return terms.total + terms.auxiliary, terms

        (_, terms), gradients = jax.value_and_grad(total, has_aux=True)(state.trainable)
        return place(gradients, shardings), terms

    if batch.tokens.shape[0] == 1:
        return gradients_of(jax.tree.map(lambda x: x[0], batch))

    def body(sums: tuple[Params, LossTerms], micro: Batch) -> tuple[tuple[Params, LossTerms], None]:
        gradients, terms = gradients_of(micro)
        added = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums[0], gradients)
        return (place(added, shardings), sums[1] + terms), None

    first = jax.tree.map(lambda x: x[0], batch)
    gradients, terms = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape, jnp.float32), jax.eval_shape(gradients_of, first)
    )
    # Placed before and after: the compiler would split the sums as their reader does, and gather
    # them for each micro-batch.
    sums, _ = jax.lax.scan(body, (place(gradients, shardings), terms), batch)
    return place(sums[0], shardings), sums[1]


def _squared_lengths(positions: jax.Array, windows: Sequence[int]) -> jax.Array:
    """What each position adds to the squared length of its document, the mean over layers.

    1 + 3 + 5 + … is a square, and a position under a window adds as much as the last that sees all.
    """
    added = 2.0 * positions + 1.0
    total = jnp.zeros_like(added)
    for window in set(windows):
        seen = jnp.minimum(added, 2.0 * window - 1.0) if window else added
        total += windows.count(window) * seen
    return total / len(windows)


def _expert_metrics(terms: LossTerms) -> ExpertMetrics | None:
    if terms.routing is None:
        return None
    counts = terms.routing.counts
    asked = jnp.sum(counts, axis=-1, keepdims=True)
    return ExpertMetrics(
        balance=balance_loss(terms.routing),
        busiest=jnp.max(counts / jnp.maximum(asked, 1.0)) * counts.shape[-1],
        unused=jnp.mean((counts == 0).astype(jnp.float32)),
        dropped=jnp.sum(terms.routing.dropped) / jnp.maximum(jnp.sum(asked), 1.0),
    )
