"""A training run from config to report: read it top to bottom."""

import collections
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console, data, distributed
from jaxft.config import RunConfig, to_dict
from jaxft.data import BatchIterator, TokenRows
from jaxft.data.template import resolve_template
from jaxft.distributed.signals import StopRequest, stop_on_signals
from jaxft.errors import CheckpointError, ConfigError, TrainingError
from jaxft.files import read_jsonl, rewrite_jsonl, write_text
from jaxft.hardware.devices import peak_flops
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.models.attention import check_backend
from jaxft.models.families import Architecture
from jaxft.models.module import Params, init_params
from jaxft.programs import capacity
from jaxft.programs.advice import warn
from jaxft.programs.answers import (
    Answers,
    Prompts,
    SamplePrompt,
    answer,
    has_answers,
    read_prompts,
    read_sample_prompts,
)
from jaxft.programs.held_out import HeldOut, describe_figures, evaluate_rows, take_rows
from jaxft.programs.model import (
    Description,
    Model,
    hf_config,
    load_weights,
    read_description,
    tensor_dtypes_of,
)
from jaxft.reporting.progress import TrainProgress
from jaxft.reporting.report import Exported, write_report
from jaxft.sharding.rules import Placement
from jaxft.training.flops import training_flops
from jaxft.training.program import (
    Evaluator,
    Program,
    build,
    build_evaluator,
    make_placement,
    put,
    use_compilation_cache,
)
from jaxft.training.state import TrainState, init_state
from jaxft.training.step import StepFigures
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.lock import Lock
from jaxft.workdir.metrics import MetricsWriter, require_wandb, train_record
from jaxft.workdir.periods import Period, Periods, Sums
from jaxft.workdir.source import Source, find_source
from jaxft.workdir.workdir import Workdir, absolute, claimed, explained_files, nearest_run

# Steps that the host may be ahead of the device: enough to keep it busy, few enough that a signal
# is answered soon and that batches do not pile up in its memory.
_STEPS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
      workdir: Folder of the run.
      checkpoint: Its newest checkpoint.
      step: Optimizer steps done.
      reason: `end`, `patience` (no improvement), or the name of the signal that stopped it.
      best_loss: Lowest validation loss; infinite without validation data.
    """

    workdir: Path
    checkpoint: Path
    step: int
    reason: str
    best_loss: float

    @property
    def exit_code(self) -> int:
        """Status that a program ends with, so that what comes next sees a run that is to go on.

        0 at the end, early or not; as in a shell 130 after Ctrl-C and 143 after SIGTERM.
        """
        return 0 if self.reason in ("end", "patience") else 128 + Signals[self.reason]


@dataclass
class _Run:
    """The parts of a run that its loop needs, and what it has counted so far."""

    config: RunConfig
    program: Program
    tokenizer: Any
    workdir: Workdir
    sample_prompts: list[SamplePrompt]
    rows: TokenRows
    held_out: dict[str, HeldOut]
    prompts: Prompts | None
    writer: MetricsWriter
    checkpoints: Checkpoints
    iterator: Any
    bar: TrainProgress
    counts: Progress
    lock: Lock | None

    @property
    def patience_is_over(self) -> bool:
        """Whether nothing has improved for as long as the config bears."""
        return _patience_is_over(self.config, self.counts)


def train(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Fine-tunes a model as `config` says.

    Args:
      config: The run; it is not changed.
      resume: Continue the run in `train.workdir` from its newest complete checkpoint.
      overwrite: Delete the run in `train.workdir` first.

    Raises:
      JaxftError: For whatever the user can mend; see `jaxft.errors`.
    """
    config = copy.deepcopy(config)
    distributed.require_joined()
    if not distributed.is_first():
        console.stderr.quiet = True
    distributed.check_same("config", {**to_dict(config), "resume": resume, "overwrite": overwrite})
    config.validate(training=True)
    if distributed.is_first():
        require_wandb(config.train.wandb)
    use_compilation_cache(config.train.compilation_cache)
    placement = make_placement(config)
    _refuse_workdir_of_model(config)
    folder = absolute(config.train.workdir)
    # Host 0 takes the folder only when no host has anything against the run.
    distributed.barrier("the run is described alike")
    with (
        explained_files(folder),
        capacity.explained(capacity.TRAINING, config),
        _claimed(folder) as lock,
    ):
        workdir = _check_workdir(folder, config, resume=resume, overwrite=overwrite)
        if resume and not workdir.resumed:
            _announce_anew(folder)
        return _train(config, placement, workdir, lock)


def _train(
    config: RunConfig, placement: Placement, workdir: Workdir, lock: Lock | None
) -> TrainResult:
    """Trains in a workdir that no other run uses."""
    start, reached = _newest_checkpoint(workdir)
    if workdir.resumed and not start:
        console.log(
            f"The run in {workdir.path} saved no checkpoint: it starts anew.", style="yellow"
        )
    if _has_all_steps(config, reached) and _has_report(workdir, start):
        return _finished(config, workdir, start, reached, "end")
    with console.phase("Model and tokenizer"):
        source = find_source(
            config.model.path,
            revision=config.model.revision,
            weights=not config.model.random_init,
        )
        description = read_description(source, config)
        architecture, tokenizer = description.architecture, description.tokenizer
    _check_before_reading_data(config, architecture, placement)
    capacity.check(capacity.TRAINING, config, architecture)
    with console.phase("Data"):
        rows, held_out = _read_data(config, tokenizer, workdir)
        prompts = _read_prompts(config, tokenizer, held_out.get("validation"))
    yardstick = _yardstick(config, held_out)
    reached = _measured_by(yardstick, reached)
    if _patience_is_over(config, reached) and _has_report(workdir, start):
        return _finished(config, workdir, start, reached, "patience")
    for change in workdir.changes:
        console.log(f"Changed since the run was started: {change}", style="yellow")
    iterator = data.batches(
        rows,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        epochs=config.train.epochs,
        steps=config.train.steps,
        start_step=start,
        start_position=reached.data.get("position"),
        places=placement.held_rows(config.train.batch_size // config.train.accumulation),
    )
    distributed.check_same("training data", iterator.state())
    evaluator = build_evaluator(
        config,
        architecture,
        max_segments=max(r.max_segments for r in (rows, *(h.rows for h in held_out.values()))),
        placement=placement,
    )
    program = build(config, evaluator, steps=iterator.steps)
    _announce(config, evaluator, iterator.steps)
    warn(
        config,
        rows,
        held_out,
        steps=iterator.steps,
        context=architecture.config.max_length,
        row_multiple=config.train.accumulation * placement.batch_shards,
    )
    check_backend(evaluator.attention.backend, architecture.config)
    with console.phase("Compiling the training step"):
        step = program.compile()
    capacity.check_compiled(capacity.TRAINING, config, architecture, step)
    if not start:
        _begin(workdir, config, lock)
    checkpoints = Checkpoints(
        workdir.checkpoints, keep_last=config.train.keep_last, yardstick=yardstick
    )
    checkpoints.check_space(program.state, count=config.train.keep_last + 2)
    with console.phase("Weights") as phase:
        if start:
            state, _ = checkpoints.restore(program.state, start)
            _check_same_data(reached, iterator, workdir)
            if start < iterator.steps:
                _begin(workdir, config, lock)
            phase.detail(f"checkpoint of step {start}")
        else:
            state = _init_state(config, program, source, description)
            phase.detail("random" if config.model.random_init else config.model.path)
            if distributed.is_first():
                _keep_model_files(
                    workdir, config, source, architecture, tokenizer, is_chat=rows.is_chat
                )
            distributed.barrier("model files")
    if start < iterator.steps:
        _list_skipped(workdir, {"train": rows, **{n: found.rows for n, found in held_out.items()}})
    run = _Run(
        config=config,
        program=program,
        tokenizer=tokenizer,
        workdir=workdir,
        sample_prompts=read_sample_prompts(
            config,
            tokenizer,
            held_out["validation"].rows if "validation" in held_out else rows,
            context=architecture.config.max_length,
        ),
        rows=rows,
        held_out=held_out,
        prompts=prompts,
        # Without a checkpoint the run begins anew: records of step 0 are not kept either.
        writer=MetricsWriter(workdir, start_step=start or -1, wandb_project=config.train.wandb),
        checkpoints=checkpoints,
        iterator=iterator,
        bar=TrainProgress(iterator.steps, start),
        counts=reached,
        lock=lock,
    )
    with contextlib.closing(iterator), run.writer, checkpoints:
        if not start:
            _evaluate(run, state)
            if not _has_samples(run, 0):
                _write_samples(run, state.params, 0)
        with stop_on_signals() as stop:
            state, reason = _loop(run, step, state, start, stop)
        done = int(state.step)
        exported = _find_exported(run, done)
        if reason in ("end", "patience"):
            _write_samples_of_exported(run, state, exported.step)
    if distributed.is_first():
        write_report(workdir, exported)
    _announce_end(run, done, reason, workdir)
    newest = workdir.checkpoints / str(done)
    return TrainResult(workdir.path, newest, done, reason, run.counts.best_loss)


def _loop(
    run: _Run, step: Any, state: TrainState, start: int, stop: StopRequest
) -> tuple[TrainState, str]:
    """Runs steps until the last one, a signal or the end of patience; returns why it ended."""
    config, placement = run.config.train, run.program.evaluator.placement
    steps, rows = run.iterator.steps, config.batch_size // config.accumulation
    to_devices = functools.partial(
        put, sharding=placement.micro_batches, places=placement.held_rows(rows), rows=rows
    )
    if start < steps and run.patience_is_over:
        return state, "patience"
    reason = "end"
    periods = Periods(
        Sums.from_json(run.counts.period), check=functools.partial(_require_finite, run)
    )
    in_flight: collections.deque[StepFigures] = collections.deque()
    with run.bar:
        for done, batch in zip(range(start + 1, steps + 1), run.iterator, strict=False):
            if run.lock is not None:
                run.lock.check()
            state, figures = step(state, {}, to_devices(batch))
            periods.add(done, figures)
            in_flight.append(figures)
            if len(in_flight) > _STEPS_AHEAD:
                jax.block_until_ready(in_flight.popleft())
            run.bar.update(done)
            last = done == steps
            if last or done % config.log_every == 0:
                _record(run, periods.end())
            signal = stop.at(done)
            if signal and not last:
                reason = signal.name
                console.log(f"{reason}: saving step {done}; Ctrl-C stops at once.")
            evaluated = None
            if run.held_out and (last or _evaluation_due(run, done)):
                with _paused(run, periods):
                    evaluated = _evaluate(run, state)
            if reason == "end" and not last and run.patience_is_over:
                reason = "patience"
                _record(run, periods.end())
            improved = evaluated is not None and evaluated <= run.counts.best_score
            due = config.save_every and done % config.save_every == 0
            if due or improved or last or reason != "end":
                with _paused(run, periods) as sums:
                    _save(run, state, done, sums, evaluated)
            if reason != "end":
                break
    # While signals still only ask: the run is not over before its last checkpoint is on disk.
    run.checkpoints.wait()
    return state, reason


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[Lock | None]:
    """Keeps other runs out of the folder; one host holds its lock for all."""
    if distributed.is_first():
        with claimed(folder) as lock:
            yield lock
    else:
        yield None


def _check_workdir(path: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> Workdir:
    """Returns the workdir as host 0 finds it: the others must not see what it changes later."""
    distributed.require_shared(path)

    def find() -> dict[str, Any]:
        found = Workdir.check(path, config, resume=resume, overwrite=overwrite)
        return {"resumed": found.resumed, "changes": found.changes}

    found = distributed.from_first("workdir", find)
    return Workdir(path=path, resumed=found["resumed"], changes=tuple(found["changes"]))


def _begin(workdir: Workdir, config: RunConfig, lock: Lock | None) -> None:
    """Prepares the folder on host 0, once no other host looks at what was in it."""
    distributed.barrier("workdir is read")
    if lock is not None:
        lock.check()
        workdir.begin(config)
    distributed.barrier("workdir is ready")


def _newest_checkpoint(workdir: Workdir) -> tuple[int, Progress]:
    """Returns the step that the run goes on from, 0 if it starts, and how far it had come."""
    start, reached = 0, Progress(data={})
    if workdir.resumed and workdir.checkpoints.is_dir():
        checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
        start = max(checkpoints.steps(), default=0)
        distributed.check_same("newest checkpoint", {"step": start})
        if start:
            reached = checkpoints.restore_progress(start)
        checkpoints.close()
    return start, reached


def _has_all_steps(config: RunConfig, reached: Progress) -> bool:
    train = config.train
    return bool(reached.data) and data.is_over(reached.data, epochs=train.epochs, steps=train.steps)


def _patience_is_over(config: RunConfig, reached: Progress) -> bool:
    return bool(config.eval.patience) and reached.stale_evaluations >= config.eval.patience


def _has_report(workdir: Workdir, start: int) -> bool:
    """Whether nothing is left to write of a run that has done its steps, as if it was killed."""
    return distributed.from_first("report", lambda: workdir.has_report_since(start))


def _finished(
    config: RunConfig, workdir: Workdir, step: int, reached: Progress, reason: str
) -> TrainResult:
    """Says that nothing of a run is left to be done."""
    _announce_finished(config, workdir, step, reason)
    checkpoint = workdir.checkpoints / str(step)
    return TrainResult(workdir.path, checkpoint, step, reason, reached.best_loss)


def _check_before_reading_data(
    config: RunConfig, architecture: Architecture, placement: Placement
) -> None:
    """Raises what is wrong with model, mesh and batch, before data takes its time."""
    steps = config.train.steps or max(config.optim.warmup_steps, 1)
    build(
        config,
        build_evaluator(config, architecture, max_segments=1, placement=placement),
        steps=steps,
    )


def _refuse_workdir_of_model(config: RunConfig) -> None:
    workdir, model = (
        Path(os.path.realpath(os.path.expanduser(p)))
        for p in (config.train.workdir, config.model.path)
    )
    if workdir in (model, *model.parents) and os.path.exists(model):
        raise ConfigError(
            f"train.workdir and model.path are the same folder, {workdir}, which the run would "
            "overwrite. Name another one with --config.train.workdir=…."
        )


def _read_data(
    config: RunConfig, tokenizer: Any, workdir: Workdir
) -> tuple[TokenRows, dict[str, HeldOut]]:
    """Returns the training rows, and what is evaluated by name."""
    sources = {"validation": config.data.validation, "retention": config.eval.retention}

    def prepare(source: str, name: str) -> TokenRows:
        return data.prepare(
            source,
            config.data,
            tokenizer,
            seed=config.train.seed,
            training=name == "train",
            name=name,
            listed=workdir.skipped,
            on_log=console.log,
        )

    with distributed.first_host_first("data", data.cache_folder(config.data)):
        found = {name: prepare(source, name) for name, source in sources.items() if source}
        rows = prepare(config.data.train, "train")
    # Hosts with other rows would evaluate in other numbers of batches, and wait for each other.
    distributed.check_same("held-out data", {name: held.digest for name, held in found.items()})
    maximum, seed = config.eval.max_rows, config.train.seed
    return rows, {
        name: take_rows(held_out, tokenizer, maximum=maximum, seed=seed)
        for name, held_out in found.items()
    }


def _read_prompts(config: RunConfig, tokenizer: Any, validation: HeldOut | None) -> Prompts | None:
    """Returns what each evaluation answers; None if no answers are wanted.

    Raises:
      ConfigError: If answers are wanted and the validation data asks nothing.
    """
    if validation is not None and has_answers(config, "validation", validation.rows):
        source = config.data.validation
        return read_prompts(config, tokenizer, source, validation.rows, name="validation")
    if config.eval.answers != "none":
        also = " and --config.eval.best=loss" if config.eval.best == "answers" else ""
        raise ConfigError(
            f"eval.answers is {config.eval.answers!r}, but data.validation "
            f"{config.data.validation} is plain text, which asks nothing. Set "
            f"--config.eval.answers=none{also}, or name conversations with "
            "--config.data.validation=…."
        )
    return None


def _list_skipped(workdir: Workdir, sets: Mapping[str, TokenRows]) -> None:
    """Lists in the workdir the bad rows that the data was read without."""
    # A held-out part of the training data was read together with it.
    read = {rows.documents.skipped: name for name, rows in reversed(list(sets.items()))}
    records = [
        {"set": name, **record}
        for name, rows in sets.items()
        if read[rows.documents.skipped] == name
        for record in data.skipped_rows(rows)
    ]
    # An earlier part of the run may have had other validation data, with bad rows of its own.
    if distributed.is_first() and (records or workdir.skipped.exists()):
        rewrite_jsonl(workdir.skipped, records)


def _init_state(
    config: RunConfig, program: Program, source: Source, description: Description
) -> TrainState:
    """Returns the state of step 0, from a model's weights or from chance."""
    evaluator = program.evaluator
    if config.model.random_init:
        build_model = evaluator.architecture.build(evaluator.numerics)
        seed = config.train.seed
        params = jax.jit(
            lambda: init_params(build_model, seed), out_shardings=evaluator.shardings
        )()
    else:
        params = load_weights(
            source,
            evaluator.architecture,
            evaluator.abstract,
            evaluator.shardings,
            tokenizer=description.tokenizer,
            new_tokens=description.new_tokens,
        )
    return jax.jit(
        lambda p: init_state(p, program.optimizer, config.optim.freeze),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, program.state),
    )(params)


def _check_same_data(counts: Progress, iterator: BatchIterator, workdir: Workdir) -> None:
    now = iterator.state()
    if {"position": now["position"]} | counts.data != now:
        raise CheckpointError(
            f"The data has changed since {workdir.path} was started: "
            f"{'; '.join(_describe_changes(counts.data, now))}. Restore the training data, or "
            "start a run in another folder."
        )


def _describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between the data of a checkpoint and that of now."""
    forms = {
        "rows": "{:,} rows then, {:,} now",
        "batch_size": "batches of {:,} rows then, of {:,} now",
        "shuffle": "--config.data.shuffle={} then, {} now",
        "seed": "--config.train.seed={} then, {} now",
    }
    changed = [key for key in forms if before.get(key) != now[key] and key in before]
    found = [forms[key].format(before[key], now[key]) for key in changed]
    if not found and before.get("digest") != now["digest"]:
        return [f"there are as many rows, {now['rows']:,}, but with other tokens"]
    return found or [f"{before.get('position', 0):,} rows were read, which is no place in it now"]


def _keep_model_files(
    workdir: Workdir,
    config: RunConfig,
    source: Source,
    architecture: Architecture,
    tokenizer: Any,
    *,
    is_chat: bool,
) -> None:
    """Puts config.json, tokenizer and template beside the checkpoints, so that they stand alone."""
    folder = workdir.model
    template = resolve_template(tokenizer, config.data).text if is_chat else None
    dtypes = {} if config.model.random_init else tensor_dtypes_of(source)
    try:
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            if (source.folder / name).is_file():
                (folder / name).write_bytes((source.folder / name).read_bytes())
        described = hf_config(source, architecture)
        if described != source.described.config:
            (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_tokenizer(tokenizer, folder, chat_template=template)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TrainingError(
            f"{folder} cannot be written: {error}. Free some disk space or mend the folder's "
            "permissions, then start again."
        ) from error
    write_text(folder / "tensor_dtypes.json", json.dumps(dtypes, indent=1))


def _evaluation_due(run: _Run, done: int) -> bool:
    every = run.config.train.eval_every
    if every:
        return done % every == 0
    # An epoch ends at the step that reads its last row.
    before, after = (run.iterator.position(step) // len(run.rows) for step in (done - 1, done))
    return after > before


def _evaluate(run: _Run, state: TrainState) -> float | None:
    """Evaluates held-out data, records it and returns the score of the validation data, if any."""
    score = None
    for name, held_out in run.held_out.items():
        result = evaluate_rows(
            run.program.evaluator,
            state.params,
            held_out,
            batch_size=run.config.eval.batch_size or run.config.train.batch_size,
        )
        record = {"step": int(state.step), "dataset": name}
        record |= result.record() | held_out.record()
        text = f"step {record['step']}: {name} {', '.join(describe_figures(result))}"
        if held_out.is_sample:
            text += f" over {len(held_out.numbers):,} of {len(held_out.rows):,} rows"
        if name == "validation":
            score = result.loss.value
            run.counts = _count_loss(run.counts, score)
            if run.prompts is not None:
                answers = _answer(run, state, run.prompts)
                record |= answers.record()
                text += f", {answers.summary}"
                if run.config.eval.best == "answers":
                    score = 1 - answers.accuracy.value
        run.writer.write_eval(record)
        console.log(text)
    if score is not None:
        run.counts = _count_score(run.counts, score, run.config.eval.minimum_change)
    return score


def _answer(run: _Run, state: TrainState, prompts: Prompts) -> Answers:
    """Generates answers; the first time it says what that costs."""
    start = time.monotonic()
    with console.phase("Answers") as phase:
        answers = answer(run.config, _model(run, state.params), prompts)
        phase.detail(f"{len(prompts.rows):,} of {prompts.of_rows:,} rows")
    seconds = console.format_duration(time.monotonic() - start)
    if not int(state.step):
        console.log(
            f"Answers to {len(prompts.rows):,} rows took {seconds}, compiling included, and are "
            "generated at each evaluation. --config.eval.answer_rows sets their number."
        )
    return answers


def _count_loss(counts: Progress, loss: float) -> Progress:
    return dataclasses.replace(counts, best_loss=_least(counts.best_loss, loss))


def _count_score(counts: Progress, score: float, minimum_change: float) -> Progress:
    """Updates best score and patience; a score that is not a number never improves anything."""
    improved = score < counts.reference_score - minimum_change
    return dataclasses.replace(
        counts,
        best_score=_least(counts.best_score, score),
        reference_score=score if improved else counts.reference_score,
        stale_evaluations=0 if improved else counts.stale_evaluations + 1,
    )


def _least(best: float, value: float) -> float:
    return min(best, value) if value == value else best


def _yardstick(config: RunConfig, held_out: dict[str, HeldOut]) -> str:
    """Names what evaluations are judged by; scores by other yardsticks are not comparable."""
    if "validation" not in held_out:
        return ""
    if config.eval.best == "loss":
        return f"loss {held_out['validation'].digest}"
    keys = ("answers", "answer_rows", "max_new_tokens")
    how = " ".join(f"{key}={getattr(config.eval, key)}" for key in keys)
    return f"answers {held_out['validation'].rows.digest[:12]} {how}"


def _measured_by(yardstick: str, counts: Progress) -> Progress:
    """Returns the counts of a checkpoint; if its scores are of something else, without them."""
    if counts.yardstick == yardstick:
        return counts
    new = Progress(data={})
    names = ("best_loss", "best_score", "reference_score", "stale_evaluations")
    if any(getattr(counts, name) != getattr(new, name) for name in names):
        console.log(
            "The validation data, or what of it the best checkpoint goes by, is not what it was in "
            "the earlier part of the run: the best checkpoint and patience begin anew.",
            style="yellow",
        )
    changes = {name: getattr(new, name) for name in names}
    return dataclasses.replace(counts, yardstick=yardstick, **changes)


def _save(run: _Run, state: TrainState, step: int, period: Sums, score: float | None) -> None:
    """Saves the state, once it is known to be finite."""
    # The metrics of a step tell of the weights before its update.
    if not _is_finite((state.trainable, state.opt_state)):
        raise TrainingError(_not_finite(run, step, "the updated weights are not finite"))
    counts = dataclasses.replace(
        run.counts, data=run.iterator.state(), period=dataclasses.asdict(period)
    )
    known = score if score is not None and math.isfinite(score) else None
    run.checkpoints.save(state, progress=counts, config=to_dict(run.config), score=known)


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


@contextlib.contextmanager
def _paused(run: _Run, periods: Periods) -> Iterator[Sums]:
    """Stops the clock for what is not training, once all steps are done and known to be finite."""
    _record(run, periods.read())
    with periods.paused() as sums:
        yield sums


def _record(run: _Run, period: Period | None) -> None:
    """Writes the record of a period that is over."""
    if period is None:
        return
    sums = period.sums
    run.counts = dataclasses.replace(
        run.counts,
        tokens=run.counts.tokens + sums.count("tokens"),
        trained_tokens=run.counts.trained_tokens + sums.count("trained_tokens"),
        seconds=run.counts.seconds + sums.seconds,
    )
    record = train_record(
        period,
        tokens=run.counts.tokens,
        trained_tokens=run.counts.trained_tokens,
        seconds=run.counts.seconds,
        flops=_flops(run, sums.count("tokens"), sums.count("squared_lengths")),
        peak_flops=_peak_flops(run.program.evaluator),
    )
    run.writer.write(record)
    run.bar.write(record)


def _require_finite(run: _Run, step: int, figures: StepFigures) -> None:
    (total, weight), norm = figures.ratios["loss"], figures.latest["grad_norm"]
    if not (np.isfinite(total) and np.isfinite(norm)):
        what = f"the loss is {total / max(weight, 1):g} and the gradient norm {norm:g}"
        raise TrainingError(_not_finite(run, step, what))


def _not_finite(run: _Run, step: int, what: str) -> str:
    numbers = run.iterator.row_numbers(step - 1)
    shown = [f"row {n} ({', '.join(run.rows.origins(n)[:3])})" for n in numbers[:8]]
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    run.checkpoints.wait()
    saved = run.checkpoints.steps()
    go_on = (
        f"The last good checkpoint is step {saved[-1]}; continue from it with --resume"
        if saved
        else "No checkpoint was saved yet; start again with --overwrite"
    )
    return (
        f"Step {step}: {what}. The step read {'; '.join(shown)}{more}. {go_on} after lowering "
        "--config.optim.learning_rate, raising --config.optim.warmup_steps, or fixing those rows."
    )


def _flops(run: _Run, tokens: int, squared_lengths: float) -> Any:
    evaluator = run.program.evaluator
    config = evaluator.architecture.config
    return training_flops(
        evaluator.multiplied_parameters,
        learning=evaluator.learning(run.program.state.trainable),
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
        tokens=tokens,
        squared_lengths=squared_lengths,
    )


def _peak_flops(evaluator: Evaluator) -> float | None:
    devices = evaluator.placement.mesh.devices
    peak = peak_flops(devices.flat[0].device_kind, evaluator.numerics.compute_dtype)
    return peak * devices.size if peak else None


def _find_exported(run: _Run, step: int) -> Exported:
    best = distributed.from_first("best checkpoint", run.checkpoints.best_step)
    return Exported(step, "") if best is None else Exported(best, run.config.eval.best)


def _write_samples_of_exported(run: _Run, state: TrainState, step: int) -> None:
    """Answers the prompts with the checkpoint that an export takes, which may be an earlier one.

    The state is then deleted, which makes room for the other one's weights.
    """
    if _has_samples(run, step):
        return
    params = state.params
    if step != int(state.step):
        for array in jax.tree.leaves(state):
            array.delete()
        with console.phase(f"Weights of step {step}, the best"):
            shapes: Any = run.program.state.params
            params = run.checkpoints.restore_params(shapes, step)
    _write_samples(run, params, step)


def _has_samples(run: _Run, step: int) -> bool:
    """Whether there are none to make: a finished run that is resumed has them already."""
    return not run.sample_prompts or distributed.from_first(
        "samples", lambda: any(r["step"] == step for r in read_jsonl(run.workdir.samples))
    )


def _write_samples(run: _Run, params: Params, step: int) -> None:
    """Answers a few held-out prompts, for the report's comparison of before and after."""
    if not run.sample_prompts:
        return
    with console.phase(f"Sample answers of step {step}"):
        outputs = _model(run, params).generate_from_ids(
            [p.ids for p in run.sample_prompts], max_new_tokens=run.config.eval.max_new_tokens
        )
    for prompt, output in zip(run.sample_prompts, outputs, strict=True):
        run.writer.write_sample(
            {
                "step": step,
                "prompt": prompt.text,
                "output": output,
                "reference": prompt.reference,
            }
        )


def _model(run: _Run, params: Params) -> Model:
    evaluator = run.program.evaluator
    source = Source(run.workdir.model)
    return Model(evaluator.architecture, evaluator.abstract, params, run.tokenizer, source)


def _announce(config: RunConfig, evaluator: Evaluator, steps: int) -> None:
    mesh = evaluator.placement.mesh
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    hosts = f" of {distributed.count()} hosts" if distributed.count() > 1 else ""
    console.log(
        f"{evaluator.parameters:,} parameters in {config.model.dtypes}, strategy "
        f"{config.strategy} on {mesh.size} of {jax.device_count()} "
        f"{mesh.devices.flat[0].device_kind} devices{hosts} ({shape}), "
        f"attention {evaluator.attention.backend} ({evaluator.attention.reason}), "
        f"{console.counted(steps, 'step')}."
    )


def _announce_anew(folder: Path) -> None:
    near = nearest_run(folder)
    hint = f" Did you mean --config.train.workdir={folder.parent / near}?" if near else ""
    console.log(f"There is no run in {folder} to resume: it starts anew.{hint}", style="yellow")


def _announce_finished(config: RunConfig, workdir: Workdir, step: int, reason: str) -> None:
    train = config.train
    if reason == "patience":
        evaluations = console.counted(config.eval.patience, "evaluation")
        ended = f"as {_stale(config)} in {evaluations}"
        longer = f"--config.eval.patience={2 * config.eval.patience}"
    elif train.steps:
        ended, longer = "", f"--config.train.steps={2 * max(step, train.steps)}"
    else:
        ended, longer = "", f"--config.train.epochs={2 * train.epochs:g}"
    console.log(
        f"Already finished: {workdir.path} ended at step {step}{ended and f', {ended}'}. Nothing "
        f"was changed. Make the run longer with {longer}, or name another folder with "
        "--config.train.workdir=…."
    )
    for change in workdir.changes:
        console.log(f"Not applied, as no step is left: {change}", style="yellow")


def _stale(config: RunConfig) -> str:
    """Says what did not happen to the figure that patience goes by."""
    change = config.eval.minimum_change
    by = f" by eval.minimum_change ({change:g})" if change else ""
    if config.eval.best == "answers":
        return f"the share of right answers did not rise{by}"
    return f"the validation loss did not fall{by}"


def _announce_end(run: _Run, step: int, reason: str, workdir: Workdir) -> None:
    if reason == "end":
        console.log(f"Done: {console.counted(step, 'step')}. Report: {workdir.report}")
    elif reason == "patience":
        console.log(
            f"Stopped at step {step}: {_stale(run.config)} in "
            f"{console.counted(run.counts.stale_evaluations, 'evaluation')}. "
            f"Report: {workdir.report}"
        )
    else:
        console.log(
            f"Stopped by {reason} after step {step}, which is saved. Continue with the same "
            "command and --resume."
        )
