"""The compiled parts of a run, from its config: placement, abstract state, training and eval step.

Nothing here allocates parameters: the trainer materialises a program, and whoever only wants to
know what it would cost compiles it.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.config import ObjectiveConfig, RunConfig, compiler_options, to_dict
from jaxft.data.batch import COLUMNS, STANDARD, Batch
from jaxft.data.rows import TokenRows
from jaxft.errors import ConfigError
from jaxft.formatting import counted
from jaxft.hardware.chips import chip_of
from jaxft.models.attention import Choice, check_backend, choose_backend
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.families import Architecture, after_layers, reaches_layers
from jaxft.models.grouped import check_groups
from jaxft.models.module import AbstractModel
from jaxft.models.quantised import parameter_count
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, load_strategy
from jaxft.training.checks import (
    check_length,
    check_matmul,
    check_rows,
    check_strategy,
    check_weights,
)
from jaxft.training.compilation import refused_options
from jaxft.training.compiler_options import step_options
from jaxft.training.evaluation_step import make_eval_step, make_score_step, make_whole_step
from jaxft.training.flops import Learning
from jaxft.training.objectives.bound import BoundObjective, bind
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.state import TrainState, abstract_state, partition
from jaxft.training.step import ReferenceModel, make_train_step


@dataclass(frozen=True)
class Evaluator:
    """The needs of an evaluation: a model without weights, its placement and the step.

    Attributes:
      architecture: Shape and naming of the model.
      abstract: Structure, shapes, dtypes and axes.
      placement: Strategy and mesh.
      shardings: Sharding of each parameter.
      numerics: Dtypes and attention back end; what layers keep concerns the training step alone.
      attention: The back end, and why.
      objective: Objective with the run's keys.
      eval_step: `(params, batch [B, T]) -> Terms` of rows `[B]` or units `[B, U]`.
    """

    architecture: Architecture
    abstract: AbstractModel
    placement: Placement
    shardings: dict[str, jax.sharding.NamedSharding]
    numerics: Numerics
    attention: Choice
    objective: BoundObjective
    eval_step: Any

    def for_rows(self, config: RunConfig, sets: Iterable[TokenRows]) -> "Evaluator":
        """Returns the evaluator for these rows, which may hold several documents.

        Raises:
          ConfigError: If attention cannot take so many.
        """
        return build_evaluator(
            config, self.architecture, placement=self.placement, **most_in_a_row(sets)
        )

    def on_text(self, config: RunConfig) -> "Evaluator":
        """Returns the evaluator of the same model by its loss on text, in nats per token."""
        plain = ObjectiveConfig(chunk=config.objective.chunk)
        if config.objective.name == plain.name:
            return self
        objective = bind(plain)
        return dataclasses.replace(
            self,
            objective=objective,
            eval_step=make_eval_step(self.abstract.graphdef, objective, placement=self.placement),
        )

    def check_kernels(self) -> None:
        """Compares the kernels in use with plain operations, on the device.

        Raises:
          ConfigError: If results or gradients differ by more than bfloat16 explains.
        """
        check_backend(self.attention.backend, self.architecture.config)
        check_groups(self.architecture.config)

    @property
    def abstract_params(self) -> dict[str, Any]:
        """Shape, dtype and sharding of each parameter."""
        return {
            path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self.shardings[path])
            for path, spec in self.abstract.params.items()
        }

    @functools.cached_property
    def whole_step(self) -> Any:
        """`(params, batch [B, T]) -> {name: (sum, count)}`: what the loss must know of all rows."""
        return make_whole_step(self.abstract.graphdef, self.objective, placement=self.placement)

    @functools.cached_property
    def score_step(self) -> Any:
        """`(params, batch [B, T]) -> log-probabilities` of the targets, float32 `[B, T]`."""
        return make_score_step(self.abstract.graphdef, self.objective, placement=self.placement)

    def abstract_rows(self, config: RunConfig, rows: int) -> Batch:
        """Returns a batch of `[rows, T]` as it is evaluated, with shardings and without memory."""
        dtypes = column_dtypes(config)
        if self.objective.objective.reference:
            dtypes["reference"] = np.float32
        shape, sharding = (rows, config.data.max_length), self.placement.rows
        make = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
        batch = Batch(**{name: make(dtype=dtype) for name, dtype in dtypes.items()})
        if self.objective.objective.whole is None:
            return batch
        names = jax.eval_shape(self.whole_step, self.abstract_params, batch)
        return batch.with_columns(**{name: make(dtype=np.float32) for name in names})

    @functools.cached_property
    def bare(self) -> "Evaluator":
        """The evaluator of the same model without what is learnt beside it."""
        if not self.architecture.adaptation:
            return self
        plain = self.plain
        params = {path: self.abstract.params[path] for path in plain.params}
        return dataclasses.replace(
            self,
            architecture=self.architecture.plain,
            abstract=dataclasses.replace(plain, params=params),
            shardings={path: self.shardings[path] for path in params},
            eval_step=make_eval_step(plain.graphdef, self.objective, placement=self.placement),
        )

    def of_start(self, config: RunConfig) -> "Evaluator":
        """Returns the evaluator of what training begins with: no adapter has learnt anything yet.

        A run that goes on from an adapter begins with that.
        """
        return self if config.adapter.path else self.bare

    @functools.cached_property
    def plain(self) -> AbstractModel:
        """The model without what is learnt beside it."""
        return self.architecture.plain.abstract(self.numerics)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied table counts once."""
        return parameter_count(self.abstract.params)

    def trained(self, freeze: str) -> int:
        """Returns the number of parameters that learn, given `optim.freeze`."""
        parts = partition(self.abstract.params, freeze, self.architecture.adaptation)
        return sum(math.prod(spec.shape) for spec in parts.trainable.values())

    @property
    def multiplied_parameters(self) -> int:
        """Number of parameters that a token is multiplied with.

        Tables that are looked up in are left out, but a tied one counts as the head; of experts the
        chosen ones count.
        """
        return self._multiplied(self.abstract.params)

    def learning(self, trainable: Collection[str]) -> Learning:
        """Returns how much learns if the parameters at these paths have gradients."""
        back = reaches_layers(trainable)
        passed = set(self.abstract.params) if back else set()
        if after_layers(trainable):
            passed.add(self.architecture.head_path)
        head = self.architecture.head_path
        return Learning(
            self._multiplied(trainable),
            self._multiplied(passed),
            back,
            head=self._multiplied([head]),
            # Gradients go back through the head to whatever learns before it.
            head_products=1 + (head in trainable) + bool(set(trainable) - {head}),
        )

    def _multiplied(self, paths: Collection[str]) -> int:
        config, counted = self.architecture.config, 0
        for path in paths:
            size = math.prod(self.abstract.params[path].shape)
            if not self.architecture.is_multiplied(path):
                continue
            if config.experts is not None and "experts" in self.abstract.axes[path]:
                size = size * config.experts.chosen // config.experts.count
            counted += size
        return counted


@dataclass(frozen=True)
class Program:
    """An evaluator, and what training needs beside it.

    Attributes:
      evaluator: Model, placement and eval step.
      optimizer: optax transformation.
      state: Abstract `TrainState` with shardings.
      gradients: Sharding of each trained parameter's gradient, as the optimizer reads it.
      fixed: Abstract parameters that the reference has of its own, where the step computes its
        log-probabilities; else empty.
      batch: Abstract `Batch` of `[A, B, T]` arrays with shardings.
      train_step: `(state, fixed, batch) -> (state, StepFigures)`, donating the state.
      compiler_options: Options of the compiler for it, by name.
    """

    evaluator: Evaluator
    optimizer: Any
    state: TrainState
    gradients: dict[str, jax.sharding.NamedSharding]
    fixed: dict[str, Any]
    batch: Batch
    train_step: Any
    compiler_options: dict[str, str | bool]

    def lower(self) -> Any:
        """Traces the training step."""
        return self.train_step.lower(self.state, self.fixed, self.batch)

    def compile(self, lowered: Any = None) -> Any:
        """Compiles the training step, ahead of the first batch.

        Args:
          lowered: From `lower`, if it was traced before.

        Raises:
          ConfigError: If the compiler does not know one of the options, or its value.
        """
        with refused_options():
            return (lowered or self.lower()).compile(compiler_options=self.compiler_options)


def make_placement(config: RunConfig, devices: Sequence[Any] | None = None) -> Placement:
    """Lays out the devices as the config's strategy and mesh say.

    Raises:
      ConfigError: If the strategy is unknown or the mesh does not fit.
    """
    strategy = load_strategy(config.strategy)
    sizes = to_dict(config.mesh)
    mesh = make_mesh(sizes, strategy, name=config.strategy, devices=devices)
    return Placement(config.strategy, strategy, mesh)


def build_evaluator(
    config: RunConfig,
    architecture: Architecture,
    *,
    placement: Placement,
    max_segments: int = 1,
    max_units: int = 1,
) -> Evaluator:
    """Resolves dtypes, attention and shardings.

    Args:
      config: The run.
      architecture: Of the model.
      placement: From `make_placement`.
      max_segments: Most documents in one row of the data.
      max_units: Most units of documents that belong together in one row.

    Raises:
      ConfigError: If the strategy cannot place the model, or its attention is not available.
    """
    check_length(config, architecture)
    check_strategy(config, architecture, placement)
    numerics = make_numerics(config.model.dtypes)
    device = placement.mesh.devices.flat[0]
    check_matmul(config, chip_of(device.device_kind))
    attention = choose_backend(
        config.model.attention,
        architecture.config,
        platform=device.platform,
        length=config.data.max_length,
        compute_dtype=numerics.compute_dtype,
        max_segments=max_segments,
        compute_capability=str(getattr(device, "compute_capability", "")),
        parts=placement.parts("seq"),
    )
    numerics = dataclasses.replace(numerics, attention=attention.backend)
    abstract = architecture.abstract(numerics)
    objective = bind(config.objective, max_units=max_units)
    return Evaluator(
        architecture=architecture,
        abstract=abstract,
        placement=placement,
        shardings=placement.shardings(abstract.params, abstract.axes),
        numerics=numerics,
        attention=attention,
        objective=objective,
        eval_step=make_eval_step(abstract.graphdef, objective, placement=placement),
    )


def most_in_a_row(sets: Iterable[TokenRows]) -> dict[str, int]:
    """Returns the most documents and units of one row, as `build_evaluator` takes them."""
    sets = list(sets)
    return {
        "max_segments": max(rows.max_segments for rows in sets),
        "max_units": max(rows.max_units if rows.unit_size > 1 else 1 for rows in sets),
    }


def check_run(config: RunConfig, evaluator: Evaluator, *, steps: int) -> None:
    """Raises what is wrong with batch, schedule, mesh and frozen parameters, before data is read.

    Args:
      config: The run.
      evaluator: From `build_evaluator`.
      steps: Optimizer steps of the whole run; 0 if these are not known yet.

    Raises:
      ConfigError: If a micro-batch or an array cannot be split over the mesh, the warm-up is longer
        than the run, or nothing would train.
    """
    _check_steps(config, evaluator, steps)
    abstract, placement = evaluator.abstract, evaluator.placement
    for rules in (placement.moment_rules, placement.gradient_rules):
        placement.shardings(abstract.params, abstract.axes, rules=rules)
    partition(abstract.params, config.optim.freeze, evaluator.architecture.adaptation)


def _check_steps(config: RunConfig, evaluator: Evaluator, steps: int) -> None:
    rows = check_rows(config, evaluator.placement)
    if steps and config.optim.warmup_steps > steps:
        raise ConfigError(
            f"optim.warmup_steps {config.optim.warmup_steps} exceeds the run's "
            f"{counted(steps, 'step')}."
        )
    check_weights(evaluator.abstract, evaluator.placement, (rows, config.data.max_length))


def build(config: RunConfig, evaluator: Evaluator, *, steps: int) -> Program:
    """Adds optimizer, abstract state and the training step.

    Args:
      config: The run.
      evaluator: From `build_evaluator`.
      steps: Optimizer steps of the whole run, which the schedule depends on.

    Raises:
      ConfigError: If a micro-batch cannot be split over the mesh, or nothing would train.
    """
    abstract, placement = evaluator.abstract, evaluator.placement
    train = config.train
    if not steps:
        raise ConfigError(
            f"train.epochs {train.epochs} of this data is less than one step of "
            f"{train.batch_size} rows; set --config.train.steps, more epochs or a smaller batch."
        )
    _check_steps(config, evaluator, steps)
    schedule = make_schedule(config.optim, steps)
    optimizer = make_optimizer(config.optim, schedule, abstract)
    of_moments, of_gradients = (
        placement.shardings(abstract.params, abstract.axes, rules=rules)
        for rules in (placement.moment_rules, placement.gradient_rules)
    )
    state = abstract_state(
        abstract.params,
        evaluator.shardings,
        optimizer,
        config.optim.freeze,
        evaluator.architecture.adaptation,
        placement=placement,
        moments=of_moments,
    )
    gradients = {path: of_gradients[path] for path in state.trainable}
    shape = (train.accumulation, train.batch_size // train.accumulation, config.data.max_length)
    # Evaluation and samples drop no token and round no product; training may.
    numerics = dataclasses.replace(
        evaluator.numerics,
        expert_capacity=config.model.expert_capacity,
        matmul=config.model.matmul,
    )
    fixed, reference = _reference_of(config, evaluator, state, numerics)
    batch = Batch(
        **{
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.micro_batches)
            for name, dtype in column_dtypes(config).items()
        }
    )
    # What layers keep concerns the step alone.
    numerics = dataclasses.replace(numerics, remat=config.model.remat, offload=config.model.offload)
    step = make_train_step(
        evaluator.architecture.abstract(numerics).graphdef,
        evaluator.objective,
        optimizer,
        schedule=schedule,
        placement=placement,
        abstract_state=state,
        fixed=fixed,
        gradients=gradients,
        windows=evaluator.architecture.config.windows,
        reference=reference,
        dropout_seed=train.seed if evaluator.architecture.adaptation.has_dropout else None,
    )
    device = placement.mesh.local_devices[0]
    options = step_options(device, compiler_options(train.compiler_options))
    return Program(evaluator, optimizer, state, gradients, fixed, batch, step, options)


def _reference_of(
    config: RunConfig, evaluator: Evaluator, state: TrainState, numerics: Numerics
) -> tuple[dict[str, Any], ReferenceModel | None]:
    """Returns what the reference has of its own, without memory, and its model.

    It is computed as the learner is: the two are the same until something is learnt.
    """
    if config.objective.uses_reference != "fixed":
        return {}, None
    start = evaluator.of_start(config).architecture.abstract(numerics)
    model = ReferenceModel(start.graphdef, tuple(start.params))
    params = evaluator.abstract_params
    return {path: params[path] for path in model.paths if path in state.trainable}, model


def column_dtypes(config: RunConfig) -> dict[str, Any]:
    """Returns the dtype of each column of a training batch."""
    names = STANDARD if config.objective.objective.units == "documents" else COLUMNS
    dtypes = {name: COLUMNS[name] for name in names}
    cached = config.objective.uses_reference == "cached"
    return dtypes | ({"reference": np.float32} if cached else {})
