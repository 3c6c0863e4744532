"""One optimizer step: gradients of summed loss over micro-batches, normalised once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.data.batch import Batch
from jaxft.models.experts import balance_loss
from jaxft.models.layers import Routing
from jaxft.models.module import Params, merge
from jaxft.sharding.rules import Placement, place
from jaxft.training import pipeline
from jaxft.training.objectives.bound import BoundObjective, Judged
from jaxft.training.optimizers.rounding import apply_updates
from jaxft.training.state import TrainState


class StepFigures(NamedTuple):
    """Float32 scalars of one step, left on the device, by what is made of those of many steps.

    Attributes:
      ratios: Sum and count of what becomes a mean: `loss`, the objective's figures, and the use of
        experts in a model that has some: `expert_balance`, the load-balancing loss without its
        weight (k, the experts of a token, is even); `expert_unused`, the share of all layers'
        experts that no token went to; `expert_dropped`, the share of choices that found their
        expert full.
      counts: Sums: `tokens` without padding, `trained_tokens` and `squared_lengths`, the sum of
        squared document lengths, which attention's work grows with: twice the pairs of query and
        key that may see each other, less the tokens; the mean over layers, whose windows may hide
        some.
      latest: Figures of the last step: `learning_rate`, and `grad_norm`, the global norm of the
        normalised gradient before clipping.
      largest: Figures of which the largest counts: `expert_busiest`, tokens of the busiest expert
        of any layer over the mean of that layer; 1 is even.
    """

    ratios: dict[str, tuple[Any, Any]]
    counts: dict[str, Any]
    latest: dict[str, Any]
    largest: dict[str, Any]


class ReferenceModel(NamedTuple):
    """The model that preferences are compared with: the starting weights.

    What never changes it shares with the model that learns: with adapters it is the same weights
    without them.

    Attributes:
      graphdef: Structure of the model.
      paths: Paths of all its parameters.
    """

    graphdef: Any
    paths: tuple[str, ...]

    def params(self, fixed: Params, params: Params) -> Params:
        """Returns its parameters: those it has of its own, and the others of the learner."""
        return {path: fixed[path] if path in fixed else params[path] for path in self.paths}


def make_train_step(
    graphdef: Any,
    objective: BoundObjective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    placement: Placement,
    abstract_state: TrainState,
    fixed: Mapping[str, Any],
    gradients: Mapping[str, Any],
    windows: Sequence[int],
    reference: ReferenceModel | None = None,
    dropout_seed: int | None = None,
) -> Any:
    """Returns `step(state, fixed, batch) -> (state, StepFigures)`, jitted, with the state donated.

    Args:
      graphdef: Structure of the model.
      objective: Maps model and micro-batch to sums.
      optimizer: Transforms the normalised gradient.
      schedule: Learning rate by step, reported with the figures.
      placement: Active while the step is traced.
      abstract_state: Gives the shardings that the state keeps.
      fixed: Abstract parameters that the reference has of its own.
      gradients: Sharding of the gradient of each trained parameter.
      windows: Of each layer with attention, 0 for none; only the count of attention's work depends
        on them.
      reference: The model that the objective compares with; None if its log-probabilities are a
        column of the batch, or not needed.
      dropout_seed: Of the masks of adapters; None where they have no dropout.
    """

    def step(state: TrainState, fixed: Params, batch: Batch) -> tuple[TrainState, StepFigures]:
        with placement.activate():
            rows = in_slots(batch, placement)
            if reference is not None:
                others = reference.params(fixed, state.params)
                made = map_micros(reference.graphdef, objective.log_probs, others, rows, placement)
                rows = rows.with_columns(reference=jax.lax.stop_gradient(made))
            rows = complete(graphdef, objective, rows, params=state.params, placement=placement)
            if dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
                # Of positions in their row's order, so that they do not depend on who holds them.
                seeds = jax.random.bits(key, batch.tokens.shape, jnp.uint32)
                seeds = in_slots(batch.with_columns(seeds=seeds), placement)["seeds"]
                rows = rows.with_columns(seeds=seeds)
            if placement.split("layers"):
                sums, judged = pipeline.accumulate(
                    graphdef,
                    objective.judge,
                    state.trainable,
                    {**state.frozen, **state.base},
                    rows,
                    placement=placement,
                    shardings=gradients,
                )
            else:
                sums, judged = _accumulate(graphdef, objective.judge, state, rows, gradients)
        # A batch of prompts alone has no trained token: its gradient is zero, not 0 / 0.
        scale = 1.0 / jnp.maximum(judged.terms.weight, 1.0)
        normalised = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), sums, state.trainable)
        with placement.activate():
            updates, opt_state = optimizer.update(normalised, state.opt_state, state.trainable)
        trainable = apply_updates(state.trainable, updates, state.step)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), normalised))
        figures = _figures(judged, batch, windows)._replace(
            latest={
                "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
                "grad_norm": norm,
            }
        )
        state = TrainState(state.step + 1, trainable, state.frozen, opt_state, state.base)
        return state, figures

    shardings, of_fixed = (
        jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (abstract_state, dict(fixed))
    )
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, of_fixed, placement.micro_batches),
        out_shardings=(shardings, placement.replicated),
    )


def complete(
    graphdef: Any,
    objective: BoundObjective,
    batch: Batch,
    *,
    params: Params,
    placement: Placement,
) -> Batch:
    """Adds the columns that the model makes of a step's micro-batches, without gradients.

    Args:
      graphdef: Structure of the model.
      objective: Says which columns it needs.
      batch: `[A, B, T]`.
      params: Those of the model that learns.
      placement: As the step's.
    """
    if objective.objective.whole is not None:
        found = map_micros(graphdef, objective.whole, params, batch, placement)
        batch = with_ratios(batch, jax.tree.map(jnp.sum, found))
    return jax.lax.stop_gradient(batch)


def with_ratios(batch: Batch, sums: Mapping[str, tuple[Any, Any]]) -> Batch:
    """Adds a column for each name, the ratio of its sum and count."""
    ratios = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.items()}
    shape = batch.tokens.shape
    return batch.with_columns(
        **{name: jnp.broadcast_to(ratio, shape) for name, ratio in ratios.items()}
    )


def map_micros(
    graphdef: Any, function: Callable, params: Params, batch: Batch, placement: Placement
) -> Any:
    """Returns what a function makes of the model and each micro-batch, along a leading axis.

    Args:
      graphdef: Structure of the model.
      function: Maps model and micro-batch to arrays; it may ask for hidden states once.
      params: All parameters.
      batch: `[A, B, T]`.
      placement: As the step's.
    """
    if placement.split("layers"):
        return pipeline.map_micros(graphdef, function, params, batch, placement=placement)
    return jax.lax.map(lambda micro: function(merge(graphdef, params), micro), batch)


def in_slots(batch: Batch, placement: Placement) -> Batch:
    """Lays the positions of rows out as devices that share rows hold them; sums do not change."""
    if not placement.split("seq"):
        return batch
    slots = placement.slots(batch.tokens.shape[-1])
    return batch.map(lambda column: jnp.take(column, slots, axis=-1))


def _accumulate(
    graphdef: Any,
    judge: Callable[[Any, Batch], Judged],
    state: TrainState,
    batch: Batch,
    shardings: Mapping[str, Any],
) -> tuple[Params, Judged]:
    """Sums gradients and terms over the leading axis of `batch`, in float32."""

    def gradients_of(micro: Batch) -> tuple[Params, Judged]:
        def total(trainable: Params) -> tuple[jax.Array, Judged]:
            judged = judge(merge(graphdef, {**state.params, **trainable}), micro)
            return judged.minimised, judged

        (_, judged), gradients = jax.value_and_grad(total, has_aux=True)(state.trainable)
        return place(gradients, shardings), judged

    if batch.tokens.shape[0] == 1:
        return gradients_of(batch.map(lambda x: x[0]))

    def body(sums: tuple[Params, Judged], micro: Batch) -> tuple[tuple[Params, Judged], None]:
        gradients, judged = gradients_of(micro)
        added = jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums[0], gradients)
        return (place(added, shardings), sums[1] + judged), None

    first = batch.map(lambda x: x[0])
    gradients, judged = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape, jnp.float32), jax.eval_shape(gradients_of, first)
    )
    # Placed before and after: the compiler would split the sums as their reader does, and gather
    # them for each micro-batch.
    sums, _ = jax.lax.scan(body, (place(gradients, shardings), judged), batch)
    return place(sums[0], shardings), sums[1]


def _figures(judged: Judged, batch: Batch, windows: Sequence[int]) -> StepFigures:
    terms, real = judged.terms, (batch.segments > 0).astype(jnp.float32)
    ratios: dict[str, Any] = {"loss": (terms.total, terms.weight), **terms.figures}
    counts = {
        "tokens": jnp.sum(real),
        "trained_tokens": jnp.sum(batch.weights),
        "squared_lengths": jnp.sum(_squared_lengths(batch.positions, windows) * real),
    }
    largest: dict[str, Any] = {}
    if judged.routing is not None:
        means, largest = _expert_figures(judged.routing)
        ratios |= {name: (value, jnp.float32(1.0)) for name, value in means.items()}
    return StepFigures(ratios, counts, {}, largest)


def _squared_lengths(positions: jax.Array, windows: Sequence[int]) -> jax.Array:
    """Returns each position's part of the squared length of its document, the mean over layers.

    1 + 3 + 5 + … is a square, and a position under a window adds as much as the last that sees all.
    """
    added = 2.0 * positions + 1.0
    total = jnp.zeros_like(added)
    for window in set(windows):
        seen = jnp.minimum(added, 2.0 * window - 1.0) if window else added
        total += windows.count(window) * seen
    return total / len(windows)


def _expert_figures(routing: Routing) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = routing.counts
    asked = jnp.sum(counts, axis=-1, keepdims=True)
    means = {
        "expert_balance": balance_loss(routing),
        "expert_unused": jnp.mean((counts == 0).astype(jnp.float32)),
        "expert_dropped": jnp.sum(routing.dropped) / jnp.maximum(jnp.sum(asked), 1.0),
    }
    busiest = jnp.max(counts / jnp.maximum(asked, 1.0)) * counts.shape[-1]
    return means, {"expert_busiest": busiest}
