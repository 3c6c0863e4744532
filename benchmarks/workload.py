"""The work that steps are timed on: a model with random weights, and random rows for it.

What is timed depends on neither. All of a run can be set, as in a run: `--set adapter.rank=16`.
"""

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.shapes import SHAPES, shape_of
from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.flags import read_config
from jaxft.hardware.devices import peak_flops
from jaxft.models.activations import AUTO
from jaxft.models.adapters import is_beside, start_values
from jaxft.models.families import architecture_from_hf
from jaxft.models.module import Params, init_params
from jaxft.training.adaptation import as_run
from jaxft.training.flops import TrainingFlops, training_flops
from jaxft.training.program import Evaluator, Program, build, build_evaluator, make_placement
from jaxft.training.state import TrainState, init_state

# As the published figures of CPUs were measured; `--set` goes on top.
DEFAULTS = ("model.dtypes=float32", "model.remat=none")
_STEPS = 1000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the model and its rows are."""
    parser.add_argument("--shape", default="15m", help=f"folder, or {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=16, help="rows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--packed", action="store_true", help="documents of random lengths")
    parser.add_argument(
        "--trained", type=float, default=1.0, help="share of a row, at its end, that is trained"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"key of the run, as often as you like, on top of {', '.join(DEFAULTS)}",
    )


def config_of(options: argparse.Namespace) -> RunConfig:
    """Returns the config that the options of `add_options` describe.

    Raises:
      ConfigError: For what is wrong with it.
    """
    if not 0 < options.trained <= 1:
        raise ConfigError(f"--trained is {options.trained}; it is a share above 0, at most 1.")
    named = {
        "model.path": options.shape,
        "data.max_length": options.length,
        "train.batch_size": options.rows,
    }
    keys = [*DEFAULTS, *options.set, *(f"{key}={value}" for key, value in named.items())]
    config = read_config("", [f"--config.{key}" for key in keys])
    if config.objective.name != "sft":
        raise ConfigError(
            f"objective.name is {config.objective.name!r}; the rows here are plain documents, of "
            "which sft alone can learn."
        )
    if config.model.remat == AUTO:
        raise ConfigError(
            f"model.remat is {AUTO!r}, which depends on the memory that a run finds; name a policy."
        )
    return config


@dataclass(frozen=True)
class Workload:
    """A step that can be run.

    Attributes:
      config: The run.
      evaluator: Model, placement and evaluation step.
      rows: `[B, T]` arrays on the host.
    """

    config: RunConfig
    evaluator: Evaluator
    rows: Batch

    def program(self) -> Program:
        """Returns the training step and what it needs, without memory."""
        return build(self.config, self.evaluator, steps=_STEPS)

    def batch(self) -> Batch:
        """Returns the rows as the micro-batches `[A, B, T]` of a step, on the host."""
        count = self.config.train.accumulation
        return self.rows.map(lambda column: column.reshape(count, -1, column.shape[-1]))

    def params(self) -> Params:
        """Returns random parameters where they belong; adapters as a run starts them."""
        evaluator = self.evaluator
        architecture, abstract = evaluator.architecture, evaluator.abstract_params
        make = functools.partial(init_params, architecture.build(evaluator.numerics))
        params = jax.jit(make, static_argnums=0, out_shardings=evaluator.shardings)(0)
        if not architecture.adaptation:
            return params
        base = {path: value for path, value in params.items() if not is_beside(path)}
        graphdef = evaluator.plain.graphdef
        leaves = start_values(graphdef, base, architecture.adaptation, abstract, seed=0)
        return base | leaves

    def state(self, program: Program) -> TrainState:
        """Returns the state of step 0."""
        make = functools.partial(
            init_state,
            optimizer=program.optimizer,
            freeze=self.config.optim.freeze,
            adaptation=self.evaluator.architecture.adaptation,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
        return jax.jit(make, donate_argnums=0, out_shardings=shardings)(self.params())

    def described(self) -> dict[str, Any]:
        """Returns what a record says of the work."""
        model = self.config.model
        return {
            "parameters": self.evaluator.parameters,
            "trained_parameters": self.evaluator.trained(self.config.optim.freeze),
            "rows": self.config.train.batch_size,
            "length": self.config.data.max_length,
            "dtypes": model.dtypes,
            "remat": model.remat,
            "attention": self.evaluator.attention.backend,
            "strategy": self.config.strategy,
        }

    def flops(self, program: Program, counts: Mapping[str, Any]) -> TrainingFlops:
        """Returns the operations that a training step needs.

        Args:
          program: The step.
          counts: As the step gives them.
        """
        evaluator, config = self.evaluator, self.evaluator.architecture.config
        return training_flops(
            evaluator.multiplied_parameters,
            learning=evaluator.learning(program.state.trainable),
            layers=len(config.windows),
            heads=config.heads,
            head_dim=config.mean_head_dim,
            tokens=int(counts["tokens"]),
            squared_lengths=int(counts["squared_lengths"]),
            states=config.states,
            untrained_tokens=int(counts["tokens"]) - int(counts["trained_tokens"]),
        )

    def peak(self) -> float | None:
        """Returns the FLOP/s that all devices can do; None for a CPU."""
        devices = self.evaluator.placement.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind, self.evaluator.numerics.compute_dtype)
        return peak * devices.size if peak else None


def make_workload(options: argparse.Namespace) -> Workload:
    """Returns the work that the options of `add_options` describe.

    Raises:
      ConfigError: For what is wrong with them.
    """
    config = config_of(options)
    architecture = as_run(architecture_from_hf(shape_of(options.shape)), config)
    lengths = document_lengths(options)
    evaluator = build_evaluator(
        config,
        architecture,
        max_segments=max(map(len, lengths)),
        placement=make_placement(config),
    )
    rows = _random_rows(lengths, options.length, architecture.config.vocab, options.trained)
    return Workload(config, evaluator, rows)


def document_lengths(options: argparse.Namespace) -> list[list[int]]:
    """Returns the lengths of the documents in each row; they fill it."""
    if not options.packed:
        return [[options.length]] * options.rows
    generator, rows = np.random.default_rng(0), []
    for _ in range(options.rows):
        left, lengths = options.length, []
        while left:
            length = min(left, int(generator.lognormal(6.0, 0.8)) + 2)
            lengths.append(length)
            left -= length
        rows.append(lengths)
    return rows


def _random_rows(lengths: list[list[int]], length: int, vocab: int, trained: float) -> Batch:
    """Returns `[rows, length]` arrays of random tokens."""
    tokens = np.random.default_rng(1).integers(0, vocab, (len(lengths), length + 1), np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
    weights = np.ones(positions.shape, np.float32)
    # The last token of a document has nothing to predict.
    weights[:, :-1] = segments[:, 1:] == segments[:, :-1]
    weights[:, -1] = 0
    weights[:, : length - round(trained * length)] = 0
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights,
        positions=positions.astype(np.int32),
        segments=segments.astype(np.int32),
    )
