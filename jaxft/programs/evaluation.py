"""Evaluation of a model, a checkpoint or an export, on named held-out data, on any mesh."""

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxft import console, data, distributed
from jaxft.config import AdapterConfig, RunConfig, data_sets, from_dict, to_dict
from jaxft.data import TokenRows
from jaxft.data.units import NOUNS, units_of
from jaxft.errors import ConfigError
from jaxft.models.adapters import NOTHING, Adaptation
from jaxft.models.families import Architecture
from jaxft.programs import capacity
from jaxft.programs.answers import Answers, Prompts, answer, has_answers, read_prompts
from jaxft.programs.as_trained import say_differences
from jaxft.programs.description import Description, read_description
from jaxft.programs.held_out import HeldOut, UnitSums, evaluate_rows, take_rows
from jaxft.programs.model import Model
from jaxft.programs.reference import Reference, read_start, read_start_note
from jaxft.programs.weights import load_weights
from jaxft.sharding.rules import Placement
from jaxft.training.compilation import use_compilation_cache
from jaxft.training.program import (
    Evaluator,
    build_evaluator,
    make_placement,
    most_in_a_row,
)
from jaxft.workdir.source import Source, find_source, find_start, is_run
from jaxft.workdir.workdir import Workdir


class Compared(NamedTuple):
    """The model that preferences were compared with.

    Attributes:
      path: Folder or repository id of the model.
      weights: Digest of the model's weights.
    """

    path: str
    weights: str


@dataclass(frozen=True)
class Evaluation:
    """Result on one data set.

    Attributes:
      sums: Sums of each row or unit, from which all figures are made.
      answers: Generated answers, if `eval.answers` asks for them and the data has them.
      model: Name of the model.
      held_out: Rows it was evaluated on.
      reference: Model that preferences were compared with; None of other objectives.
    """

    sums: UnitSums
    answers: Answers | None
    model: Source
    held_out: HeldOut
    reference: Compared | None = None

    def record(self) -> dict[str, Any]:
        """Returns a JSON-able summary."""
        return (
            self.sums.record()
            | self.held_out.record()
            | (self.answers.record() if self.answers is not None else {})
        )


def evaluate(
    config: RunConfig, checkpoint: str | Path = "", *, step: str = "best", base: str = ""
) -> dict[str, Evaluation]:
    """Evaluates a model on `data.validation`, `eval.datasets` and `eval.retention`.

    Args:
      config: Names the data and how it is read; it is not changed.
      checkpoint: Workdir, checkpoint, Hugging Face folder or id; empty: `model.path`, with the
        adapter of `adapter.path` if that is set.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      base: Model that an adapter is made for, where it is not the one that the adapter names.

    Returns:
      Results by data set name.

    Raises:
      JaxftError: If model or data cannot be read.
    """
    return _evaluate(_prepare(config, checkpoint, step, base))


def evaluate_pair(
    config: RunConfig, a: str | Path, b: str | Path, *, step: str = "best", base: str = ""
) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Evaluates two models so that `compare` can pair their results.

    Models that read the data as different tokens are given one document a row: then documents are
    paired, and compared by bits per byte.

    Args:
      config: As for `evaluate`.
      a: The first model, as `checkpoint` there.
      b: The second one.
      step: As for `evaluate`; of whichever of the two is a workdir.
      base: As for `evaluate`, of both, which are adapters then.
    """
    has_steps = {path: is_run(path) for path in (a, b)}
    steps = [step if has_steps[path] or not any(has_steps.values()) else "best" for path in (a, b)]
    tasks = [_prepare(config, path, step, base) for path, step in zip((a, b), steps, strict=True)]
    digests = [[rows.digest for rows in task.rows.values()] for task in tasks]
    if digests[0] != digests[1]:
        console.log(_how_other_tokens_are_compared(config), style="yellow")
        tasks = [_with_a_row_for_each_document(task) for task in tasks]
    first, second = map(_evaluate, (_as_beside(*tasks), _as_beside(*reversed(tasks))))
    return first, second


def _as_beside(task: "_Task", other: "_Task") -> "_Task":
    """Returns a task whose model is held as one of its shape is that the other's adapter is of."""
    shape, of_other = (dataclasses.replace(t.architecture.config, vocab=0) for t in (task, other))
    adaptation = other.architecture.adaptation
    if task.architecture.adaptation or not adaptation or shape != of_other:
        return task
    if task.config.model.dtypes == "mixed":
        console.log(
            f"{task.source.name} is held as the base of {other.source.name} is, in bfloat16 where "
            "that adapter trains nothing: rounding is the same in both."
        )
    return dataclasses.replace(task, beside=adaptation)


def _how_other_tokens_are_compared(config: RunConfig) -> str:
    units = config.objective.objective.units
    if units != "documents":
        return (
            f"The two models read the data as different tokens. Each {NOUNS[units]} is compared "
            "with itself, in a row of its own; figures that are averages over tokens say nothing "
            "beside those of the other."
        )
    return (
        "The two models read the data as different tokens, so that a loss per token of one "
        "says nothing beside that of the other. They are compared by bits per byte of the "
        "trained text, paired by document; for that each document gets a row of its own."
    )


@dataclass(frozen=True)
class _Task:
    """An evaluation of which all but the weights has been read.

    Attributes:
      config: Config of this evaluation, with `model.path` of its model.
      reference: `model.path` that the command was given.
      source: Origin of the model.
      architecture: Shape of the model.
      tokenizer: Tokenizer of the model.
      new_tokens: Ids of tokens that the config adds to it, of those with a row of padding.
      placement: Strategy and mesh.
      sources: Held-out data by name.
      rows: The same as rows.
      prompts: Prompts that answers are generated for, of the sets that have them.
      beside: Adaptation of the adapter that a whole model is compared with: weights are then held
        in the types that they have beside it.
    """

    config: RunConfig
    reference: str
    source: Source
    architecture: Architecture
    tokenizer: Any
    new_tokens: tuple[int, ...]
    placement: Placement
    sources: dict[str, str]
    rows: dict[str, TokenRows]
    prompts: "dict[str, Prompts]"
    beside: Adaptation = NOTHING


def _prepare(config: RunConfig, checkpoint: str | Path, step: str, base: str) -> _Task:
    config, reference = copy.deepcopy(config), config.model.path
    config.model.path = str(checkpoint or config.model.path)
    distributed.require_joined()
    if not distributed.is_first():
        console.stderr.quiet = True
    distributed.check_same("config", {**to_dict(config), "step": step, "base": base})
    config.validate(evaluation=True)
    sources = named_sources(config)
    use_compilation_cache(config.train.compilation_cache)
    placement = make_placement(config)
    with console.phase("Model and tokenizer") as phase:
        source = _find_evaluated(config, checkpoint, step, base)
        phase.detail(source.name)
        description = read_description(source, _without_start(config))
        architecture, tokenizer = description.architecture, description.tokenizer
        say_differences(config, source)
    capacity.check(capacity.EVALUATION, config, architecture)
    with console.phase("Data"):
        rows = _read_rows(config, tokenizer, sources)
        prompts = {
            name: read_prompts(config, tokenizer, sources[name], rows[name], name=name)
            for name in rows
            if has_answers(config, name, rows[name])
        }
    return _Task(
        config,
        reference,
        source,
        architecture,
        tokenizer,
        description.new_tokens,
        placement,
        sources,
        rows,
        prompts,
    )


def _find_evaluated(config: RunConfig, checkpoint: str | Path, step: str, base: str) -> Source:
    """Returns the origin of what is evaluated: a model, or what `adapter.path` puts beside one."""
    if checkpoint or not config.adapter.path:
        revision = "" if checkpoint else config.model.revision
        return find_source(config.model.path, revision=revision, step=step, base=base)
    if base:
        raise ConfigError(
            f"adapter.path {config.adapter.path} is evaluated on model.path, and --base names "
            "another model; leave one of the two out."
        )
    return find_start(config, step=step, weights=True)


def _read_rows(
    config: RunConfig, tokenizer: Any, sources: Mapping[str, str]
) -> dict[str, TokenRows]:
    units = config.objective.objective.units
    with distributed.first_host_first("data", data.cache_folder(config.data)):
        rows = {
            name: data.prepare(
                text,
                config.data,
                tokenizer,
                seed=config.train.seed,
                training=False,
                units=units_of(name, units),
                name=name,
                on_log=console.log,
            )
            for name, text in sources.items()
        }
    distributed.check_same("data", {name: found.digest for name, found in rows.items()})
    return rows


def _with_a_row_for_each_document(task: _Task) -> _Task:
    config = copy.deepcopy(task.config)
    if config.data.packing == "stream":
        config.data.overlength = "split"  # a stream has no documents that are too long
    config.data.packing = "none"
    longest = max(rows.statistics.packed.longest for rows in task.rows.values())
    # No more padding than is needed; kernels of attention take multiples of this.
    config.data.max_length = min(config.data.max_length, -(-longest // 128) * 128)
    with console.phase("Data, one document a row"):
        rows = _read_rows(config, task.tokenizer, task.sources)
    return dataclasses.replace(task, config=config, rows=rows)


def _evaluate(task: _Task) -> dict[str, Evaluation]:
    with capacity.explained(capacity.EVALUATION, task.config):
        return _evaluate_all(task)


def _evaluate_all(task: _Task) -> dict[str, Evaluation]:
    config = task.config
    evaluator = build_evaluator(
        config,
        dataclasses.replace(
            task.architecture, adaptation=task.beside or task.architecture.adaptation
        ),
        placement=task.placement,
        **most_in_a_row(task.rows.values()),
    )
    evaluator = evaluator.bare if task.beside else evaluator
    sets = {
        name: take_rows(rows, task.tokenizer, maximum=config.eval.max_rows, seed=config.train.seed)
        for name, rows in task.rows.items()
    }
    reference = None
    if config.objective.uses_reference:
        compared = {name: found for name, found in sets.items() if name != "retention"}
        found = _reference(task, evaluator, compared)
        reference = Compared(found.config.model.path, found.attach()[0])
    with console.phase("Weights"):
        params = load_weights(
            task.source,
            task.architecture,
            evaluator.abstract,
            evaluator.shardings,
            tokenizer=task.tokenizer,
            new_tokens=task.new_tokens,
        )
    evaluator.check_kernels()
    model = Model(task.architecture, evaluator.abstract, params, task.tokenizer, task.source)
    plain = evaluator.on_text(config)
    return {
        name: _evaluate_one(
            task,
            plain if name == "retention" else evaluator,
            model,
            name,
            held_out,
            None if name == "retention" else reference,
        )
        for name, held_out in sets.items()
    }


def _reference(task: _Task, evaluator: Evaluator, sets: Mapping[str, HeldOut]) -> Reference:
    """Returns the model that the evaluated one is compared with.

    It is `model.path` where the command names one, else the one that the run started from.

    Raises:
      ConfigError: If neither is known, or it reads or is shaped otherwise than the evaluated model.
    """
    config, noted = copy.deepcopy(task.config), None
    config.model.path = task.reference
    if task.source.checkpoints is not None:
        run = Workdir(path=task.source.checkpoints.parent)
        start = read_start_note(run.reference)
        if start is not None and task.reference in ("", str(task.source.checkpoints.parent)):
            trained = from_dict(json.loads(run.config.read_text(encoding="utf-8")))
            config.model = dataclasses.replace(
                trained.model, path=start.model, dtypes=config.model.dtypes
            )
            config.adapter.path = start.adapter
            config.train.seed, noted = trained.train.seed, start
    if not config.model.path:
        raise ConfigError(
            f"{config.objective.name} compares with the weights that training started from, which "
            f"{task.source.name} does not name. Name them with --config.model.path=…."
        )
    weights = not config.model.random_init
    if config.adapter.path:
        source = find_start(config, weights=weights)
    else:
        model = config.model
        source = find_source(model.path, revision=model.revision, weights=weights)
    description = read_description(source, _without_start(config))
    _check_reference(task, description, config.model.path)
    begun = _evaluator_of_start(task, evaluator, config, description)
    load = functools.partial(read_start, config, begun, source, description)
    return Reference(config, begun, load, sets, noted=noted)


def _evaluator_of_start(
    task: _Task, evaluator: Evaluator, config: RunConfig, description: Description
) -> Evaluator:
    """Returns what scores rows with the reference: a model, or one with an adapter."""
    adaptation = description.architecture.adaptation
    if not config.adapter.path or not adaptation:
        return evaluator.bare
    if adaptation == task.architecture.adaptation:
        return evaluator
    return build_evaluator(
        config,
        dataclasses.replace(task.architecture, adaptation=adaptation),
        placement=task.placement,
        **most_in_a_row(task.rows.values()),
    )


def _without_start(config: RunConfig) -> RunConfig:
    """Returns a config by which no adapter starts: what is evaluated is there."""
    return dataclasses.replace(config, adapter=AdapterConfig())


def _check_reference(task: _Task, description: Description, name: str) -> None:
    here, there = (
        dataclasses.replace(found.config, vocab=0)
        for found in (task.architecture, description.architecture)
    )
    told = f"{name} cannot be the reference of {task.source.name}: "
    other = "Name the model that training started from with --config.model.path=…."
    if here != there:
        raise ConfigError(f"{told}the two are models of different shape. {other}")
    known, own = (tokenizer.get_vocab() for tokenizer in (description.tokenizer, task.tokenizer))
    if any(own.get(token) != number for token, number in known.items()):
        raise ConfigError(f"{told}their tokenizers give tokens different ids. {other}")


def named_sources(config: RunConfig) -> dict[str, str]:
    """Returns held-out sources by name.

    Raises:
      ConfigError: If there is none, or `eval.datasets` cannot be understood.
    """
    sources = {"validation": config.data.validation} if config.data.validation else {}
    sources |= data_sets(config.eval.datasets)
    if config.eval.retention:
        sources["retention"] = config.eval.retention
    if not sources:
        raise ConfigError(
            "There is nothing to evaluate on: set --config.data.validation, "
            "--config.eval.datasets or --config.eval.retention."
        )
    return sources


def _evaluate_one(
    task: _Task,
    evaluator: Evaluator,
    model: Model,
    name: str,
    held_out: HeldOut,
    reference: Compared | None,
) -> Evaluation:
    config, prompts = task.config, task.prompts.get(name)
    with console.phase(f"Evaluating {name}"):
        sums = evaluate_rows(
            evaluator,
            model.params,
            held_out,
            batch_size=config.eval.batch_size or config.train.batch_size,
        )
        answers = answer(config, model, prompts) if prompts is not None else None
    return Evaluation(sums, answers, task.source, held_out, reference)
