"""Whether a job can be run, and with which settings: what is done before it is queued.

This runs in `jaxft.service.checker`, a process of its own on CPU alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft import data
from jaxft.compiled.layout import cpu_devices
from jaxft.config import RunConfig, from_dict, to_dict
from jaxft.data import TokenRows
from jaxft.data.inspect import inspect
from jaxft.data.inspect_report import Report
from jaxft.data.units import units_of
from jaxft.errors import DataError, JaxftError
from jaxft.hardware.devices import Room, room
from jaxft.models.families import Architecture
from jaxft.planner.topology import Topology, parse
from jaxft.programs import capacity
from jaxft.programs.description import Description, context_of, read_description
from jaxft.programs.estimates import Estimates
from jaxft.service.advice import as_request
from jaxft.service.following import KEPT_EPOCHS
from jaxft.service.jsonl import Refusal, require_json_lines
from jaxft.service.target import Target
from jaxft.training.program import make_placement
from jaxft.workdir.metrics import require_wandb
from jaxft.workdir.source import Source, find_source, find_start

MINIMUM_EXAMPLES = 10

# "auto", by the number of examples: as many passes as make so many examples, within bounds.
_PASSES, _FEWEST, _MOST = 3, 100, 25_000
_MOST_PASSES = 25
# "auto": this share of the examples is in a step, within bounds.
_SHARE, _SMALLEST, _LARGEST = 0.002, 8, 256
_RANK = 16
# Learning rates that `learning_rate_multiplier` multiplies, by method and whether all is trained.
BASE_RATES = {
    ("supervised", False): 2e-4,
    ("supervised", True): 1e-5,
    ("dpo", False): 2e-5,
    ("dpo", True): 1e-6,
}
_BETA = 0.1
_WARMUP = 0.03
# Rows are a multiple of this.
_ROUND = 64
# Steps that a killed run may lose, where an epoch is longer.
_SAVED = 500
_LINES = 1000  # of figures that a run writes, about


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A job to be checked.

    Attributes:
      path: Model that it begins with, as `find_source` takes it.
      step: Checkpoint, where that is a run.
      method: `supervised` or `dpo`.
      asked: Hyperparameters as they were asked for.
      seed: Seed of the run.
      training: Content of the training file.
      training_name: Name that its user gave it.
      validation: Content of the validation file; empty without one.
      validation_name: Name that its user gave it.
      workdir: Workdir of the run.
      cache: Folder of tokens.
      wandb: Project; empty for none.
      name: Name of the run.
      shown: Whether the data is described for a page.
    """

    path: str
    step: str
    method: str
    asked: dict[str, Any]
    seed: int
    training: str
    training_name: str
    validation: str
    validation_name: str
    workdir: str
    cache: str
    wandb: str
    name: str = ""
    shown: bool = False


def check(request: Request, target: Target) -> dict[str, Any]:
    """Returns the settings of a job's run, and what it will take.

    Raises:
      Refusal: If it cannot be run.
    """
    try:
        return _check(request, target)
    except JaxftError as error:
        code = "invalid_file_format" if isinstance(error, DataError) else "invalid_job"
        param = "training_file" if isinstance(error, DataError) else None
        context = context_of(find_source(request.path, step=request.step))
        text = as_request(_named("\n".join(error.problems), request), context=context)
        if request.validation_name and f"{request.validation_name}:" in text:
            param = "validation_file"
        raise Refusal(text, code=code, param=param) from error


def _check(request: Request, target: Target) -> dict[str, Any]:
    require_json_lines(request.training, request.training_name, "training_file")
    if request.validation:
        require_json_lines(request.validation, request.validation_name, "validation_file")
    hardware = _make_up(target)
    config, source = _first_config(request)
    config = _with_keys(config, request)  # such as those by which data is read
    description = read_description(source, config)
    context = description.architecture.config.max_length
    asked = request.asked["max_length"]
    if asked != "auto" and asked > context:
        raise Refusal(
            f"max_length is {asked:,}, and the model's context has {context:,} tokens.",
            code="invalid_value",
            param="hyperparameters.max_length",
        )
    config.data.max_length = context if asked == "auto" else asked
    packed = _prepare(config, description, "train").statistics.packed
    examples = packed.documents
    if examples < MINIMUM_EXAMPLES:
        raise Refusal(
            f"{request.training_name} has {examples} examples, but must have at least "
            f"{MINIMUM_EXAMPLES}.",
            code="invalid_n_examples",
            param="training_file",
        )
    longest = _read_validation(config, description, packed.longest)
    if asked == "auto":
        config.data.max_length = min(context, -(-longest // _ROUND) * _ROUND)
    adaptation = description.architecture.adaptation
    rank = max((site.rank for site in adaptation.sites.values()), default=0)
    settings = _resolve(request, examples, config, rank)
    shards = make_placement(config, hardware.devices).batch_shards
    rows = _pack(config, description, settings["batch_size"], examples, shards)
    settings["max_length"] = config.data.max_length
    if request.asked["config"]:
        settings["config"] = request.asked["config"]
    steps = _set_length(config, rows, settings)
    config = _with_keys(config, request)  # in place of what was derived
    config.validate(training=True)
    seconds, takes = _judge(config, description.architecture, hardware)
    report = _describe_data(config, description, request, context) if request.shown else None
    return {
        "config": to_dict(config),
        "hyperparameters": settings,
        "examples": examples,
        "tokens": rows.statistics.tokens,
        "trained_tokens": rows.statistics.trained_tokens,
        "rows": len(rows),
        "left_out": rows.statistics.dropped,
        "bad_rows": rows.statistics.read.skipped,
        "steps": config.train.steps or steps,
        "epoch_steps": len(rows) / config.train.batch_size,
        "step_seconds": seconds,
        "takes": takes,
        "data": report,
    }


class _Hardware(NamedTuple):
    """Devices that stand for those of the job, what they are, and the memory of each."""

    devices: Sequence[Any]
    topology: Topology | None
    room: Room


def _make_up(target: Target) -> _Hardware:
    if not target.topology:
        devices = cpu_devices(target.count)
        limit = Room(target.limit, target.limit, f"a {target.kind}")
        return _Hardware(devices, None, room(devices) if target.platform == "cpu" else limit)
    topology = parse(target.topology)
    chip = topology.chip
    limit = target.limit or int(chip.memory * chip.usable) // chip.cores
    return _Hardware(
        cpu_devices(topology.device_count), topology, Room(limit, limit, f"a {chip.name}")
    )


def _first_config(request: Request) -> tuple[RunConfig, Source]:
    config = RunConfig()
    require_wandb(request.wandb)
    config.data.train, config.data.validation = request.training, request.validation
    config.data.cache = request.cache
    config.train.workdir, config.train.seed = request.workdir, request.seed
    config.train.wandb, config.train.name = request.wandb, request.name
    config.model.remat = "auto"
    config.optim.weight_decay = 0.0
    config.eval.samples = 0
    rank = request.asked["lora_rank"]
    source = find_source(request.path, step=request.step)
    config.model.path = request.path
    if source.is_adapter and source.base is not None:
        if rank != "auto":
            raise Refusal(
                f"The model is an adapter, which is trained further at its own rank; lora_rank is "
                f"{rank}. Leave it at 'auto', or begin with the base model.",
                code="invalid_value",
                param="hyperparameters.lora_rank",
            )
        config.model.path = source.base.path
        config.adapter.path = f"{request.path}/checkpoints/{request.step}"
        source = find_start(config, weights=True, step=request.step)
    else:
        if source.checkpoints is not None:
            config.model.path = f"{request.path}/checkpoints/{request.step}"
        config.adapter.rank = _RANK if rank == "auto" else rank
    if request.method == "dpo":
        config.objective.name = "dpo"
        beta = request.asked["beta"]
        config.objective.dpo.beta = _BETA if beta == "auto" else beta
    return config, source


def _with_keys(config: RunConfig, request: Request) -> RunConfig:
    """Returns a config with the further keys that a request sets."""
    return from_dict(to_dict(config) | request.asked["config"])


def _prepare(config: RunConfig, description: Description, name: str) -> TokenRows:
    units = config.objective.objective.units
    return data.prepare(
        config.data.train if name == "train" else config.data.validation,
        config.data,
        description.tokenizer,
        seed=config.train.seed,
        training=name == "train",
        name=name,
        units=units_of(name, units),
        on_log=lambda text: None,
    )


def _read_validation(config: RunConfig, description: Description, longest: int) -> int:
    """Checks the validation file; returns the tokens of the longest document of both."""
    if not config.data.validation:
        return longest
    return max(longest, _prepare(config, description, "validation").statistics.packed.longest)


def _resolve(request: Request, examples: int, config: RunConfig, rank: int) -> dict[str, Any]:
    """Returns the hyperparameters with a number for each `auto`."""
    asked = request.asked
    epochs, batch = asked["n_epochs"], asked["batch_size"]
    multiplier = asked["learning_rate_multiplier"]
    settings: dict[str, Any] = {
        "n_epochs": default_epochs(examples) if epochs == "auto" else epochs,
        "batch_size": default_batch(examples) if batch == "auto" else min(batch, examples),
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        "lora_rank": rank,
    }
    if request.method == "dpo":
        settings["beta"] = config.objective.dpo.beta
    rate = BASE_RATES[request.method, rank == 0] * settings["learning_rate_multiplier"]
    config.optim.learning_rate = rate
    return settings


def default_epochs(examples: int) -> int:
    """Returns the passes over so many examples: 3, more of few and fewer of many."""
    if examples * _PASSES < _FEWEST:
        return min(_MOST_PASSES, _FEWEST // examples)
    if examples * _PASSES > _MOST:
        return max(1, _MOST // examples)
    return _PASSES


def default_batch(examples: int) -> int:
    """Returns the examples in a step: 0.2 % of all, from 8 to 256, and no more than a tenth."""
    batch = min(max(round(_SHARE * examples), _SMALLEST), _LARGEST)
    return max(1, min(batch, examples // 10))


def _pack(
    config: RunConfig, description: Description, batch: int, examples: int, shards: int
) -> TokenRows:
    """Packs the data so that a step has as many examples as asked for, about.

    Rows are a multiple of the shards that a step is split into.
    """
    rows = _prepare(config, description, "train")
    held = examples / len(rows)  # examples in a row
    if held > batch / shards:
        config.data.packing, held = "none", 1.0
        rows = _prepare(config, description, "train")
    config.train.batch_size = max(shards, round(batch / held / shards) * shards)
    return rows


def _set_length(config: RunConfig, rows: TokenRows, settings: Mapping[str, Any]) -> int:
    """Sets how long the run is and when it warms up, logs and saves; returns its steps."""
    train = config.train
    train.epochs = float(settings["n_epochs"])
    iterator = data.batches(rows, batch_size=train.batch_size, epochs=train.epochs, seed=train.seed)
    steps, epoch = train.steps or iterator.steps, len(rows) // train.batch_size
    config.optim.warmup_steps = math.ceil(_WARMUP * steps) if steps > 1 else 0
    train.log_every = max(1, steps // _LINES)
    train.save_epochs = True
    train.save_every = _SAVED if epoch > _SAVED else 0
    train.keep_last = KEPT_EPOCHS * (1 + epoch // _SAVED)
    return steps


def _judge(config: RunConfig, architecture: Architecture, hardware: _Hardware) -> tuple[float, str]:
    """Returns the time of a step in seconds, 0 if it is not known, and what it takes in words.

    Raises:
      Refusal: If it cannot fit; with the smallest change that lets it.
    """
    estimates = Estimates(architecture, hardware.topology, hardware.devices)
    judged = capacity.judge(config, estimates, hardware.room)
    if not judged.fits_alone:
        advice = as_request(capacity.advise(judged.changes))
        raise Refusal(f"The job does not fit: it takes {judged}. {advice}", code="does_not_fit")
    return estimates.seconds(judged.settled), str(judged)


def _describe_data(
    config: RunConfig, description: Description, request: Request, context: int
) -> dict[str, Any]:
    report = inspect(
        config,
        description.tokenizer,
        context=context,
        units=config.objective.objective.units,
    )
    return _report_json(report, request)


def _report_json(report: Report, request: Request) -> dict[str, Any]:
    sets = [
        {
            "name": item.name,
            "formats": [_named(line, request) for line in item.rows.statistics.read.formats],
            "skipped": item.rows.statistics.read.skipped,
            "documents": item.rows.statistics.documents,
            "tokens": item.rows.statistics.packed.document_tokens,
            "trained_tokens": item.rows.statistics.packed.document_trained_tokens,
            "longest": item.rows.statistics.packed.longest,
            "duplicates": item.duplicates,
            "also_in_training": None if item.overlap is None else item.overlap.count,
            "refusal": _named(item.refusal, request),
            "histogram": [
                {"from": int(low), "to": int(high) - 1, "count": int(count)}
                for (low, high), count in zip(
                    itertools.pairwise(item.edges), item.counts, strict=True
                )
            ],
        }
        for item in report.sets
    ]
    samples = [
        {
            "origin": _named(sample.origin, request),
            "label": sample.label,
            "runs": [{"text": text, "trained": trained} for text, trained in sample.runs],
        }
        for sample in report.samples
    ]
    return {
        "tokenizer": report.tokenizer,
        "template": report.template,
        "sets": sets,
        "samples": samples,
    }


def _named(text: str, request: Request) -> str:
    """Returns a text with the names that users gave to files in place of where these lie."""
    for path, name in (
        (request.training, request.training_name),
        (request.validation, request.validation_name),
    ):
        if path:
            text = text.replace(path, name).replace(Path(path).name, name)
    return text
