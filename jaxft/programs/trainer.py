"""A training run from config to report: read it top to bottom."""

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxft import console, data, distributed
from jaxft.config import RunConfig, to_dict
from jaxft.data import BatchIterator, TokenRows
from jaxft.distributed.signals import StopRequest, stop_on_signals
from jaxft.hf.hub import found_anywhere
from jaxft.models.module import Params
from jaxft.programs import (
    announcements,
    capacity,
    folder,
    patience,
    rematerialisation,
    run_data,
)
from jaxft.programs.advice import warn, warn_of_format
from jaxft.programs.answers import read_sample_prompts
from jaxft.programs.description import Description, read_description
from jaxft.programs.digests import digest_of_base
from jaxft.programs.held_out import HeldOut
from jaxft.programs.profiler import Profiler
from jaxft.programs.reference import Reference, read_start, read_start_note
from jaxft.programs.session import Session
from jaxft.reporting.progress import TrainProgress
from jaxft.reporting.report import write_report
from jaxft.sharding.rules import Placement
from jaxft.training.compilation import use_compilation_cache
from jaxft.training.feeding import put
from jaxft.training.program import (
    Evaluator,
    Program,
    build,
    build_evaluator,
    check_run,
    make_placement,
)
from jaxft.training.state import TrainState, init_state
from jaxft.training.step import StepFigures
from jaxft.workdir.adapter_note import AdapterNote
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.goodput import Goodput, goodput_record
from jaxft.workdir.lock import Lock
from jaxft.workdir.metrics import MetricsWriter, require_wandb
from jaxft.workdir.periods import Periods, Sums
from jaxft.workdir.result import TrainResult, recorded
from jaxft.workdir.source import Source, find_resumed, find_start
from jaxft.workdir.workdir import Workdir, absolute, explained_files

# Steps that the host may be ahead of the device: enough to keep it busy, few enough that a signal
# is answered soon and that batches do not pile up in its memory.
_STEPS_AHEAD = 2


def train(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, profile: int = 0
) -> TrainResult:
    """Fine-tunes a model as `config` says.

    Args:
      config: The run; it is not changed.
      resume: Continue the run in `train.workdir` from its newest complete checkpoint.
      overwrite: Delete the run in `train.workdir` first.
      profile: Steps to trace into the workdir's `profile`, after the first two; 0 for none.

    Raises:
      JaxftError: For whatever the user can fix; see `jaxft.errors`.
    """
    goodput = Goodput()
    config = copy.deepcopy(config)
    distributed.require_joined()
    if not distributed.is_first():
        console.stderr.quiet = True
    options = {"resume": resume, "overwrite": overwrite, "profile": profile}
    distributed.check_same("config", {**to_dict(config), **options})
    config.validate(training=True)
    if distributed.is_first():
        require_wandb(config.train.wandb)
    use_compilation_cache(config.train.compilation_cache)
    placement = make_placement(config)
    folder.refuse_workdir_of_start(config)
    path = absolute(config.train.workdir)
    existed = path.is_dir()
    # Host 0 takes the folder only when no host has anything against the run.
    distributed.barrier("the run is described alike")
    with (
        goodput,
        explained_files(path),
        capacity.explained(capacity.TRAINING, config),
        folder.claimed_by_first(path) as lock,
    ):
        workdir = folder.check_workdir(path, config, resume=resume, overwrite=overwrite)
        if resume and not workdir.resumed:
            announcements.say_anew(path)
        with recorded(workdir, writes=lock is not None, existed=existed) as note:
            result = _train(config, placement, workdir, lock, profile, goodput)
            note(result)
        return result


def _train(
    config: RunConfig,
    placement: Placement,
    workdir: Workdir,
    lock: Lock | None,
    profile: int,
    goodput: Goodput,
) -> TrainResult:
    """Trains in a workdir that no other run uses."""
    start, reached = folder.newest_checkpoint(workdir)
    if workdir.resumed and not start:
        console.log(
            f"The run in {workdir.path} saved no checkpoint: it starts anew.", style="yellow"
        )
    if _has_all_steps(config, reached) and folder.has_report(workdir, start):
        return _finished(config, workdir, start, reached, "end")
    with console.phase("Model and tokenizer"):
        resumed = find_resumed(config, workdir, start)
        # What preferences are compared with is the adapter as it was, where one was gone on from.
        if resumed is None or (config.adapter.path and config.objective.uses_reference):
            source = find_start(config, weights=not config.model.random_init)
        else:
            source = resumed
        description = read_description(source, config)
        architecture, tokenizer = description.architecture, description.tokenizer
    evaluator = build_evaluator(config, architecture, placement=placement)
    check_run(config, evaluator, steps=config.train.steps)
    warn_of_format(architecture)
    cheaper = rematerialisation.settle(config, architecture, workdir, start=start)
    capacity.check(capacity.TRAINING, config, architecture)
    with console.phase("Data"):
        rows, held_out = run_data.read_data(config, tokenizer, workdir)
        prompts = run_data.read_questions(config, tokenizer, held_out.get("validation"))
    yardstick = patience.name_yardstick(config, held_out)
    reached = patience.measured_by(yardstick, reached)
    if patience.is_over(config, reached) and folder.has_report(workdir, start):
        return _finished(config, workdir, start, reached, "patience")
    for change in workdir.changes:
        console.log(f"Changed since the run was started: {change}", style="yellow")
    iterator = _make_iterator(config, rows, placement, start, reached)
    profiler = Profiler(profile, start=start, total=iterator.steps, resumed=workdir.resumed)
    sets = {"train": rows, **{name: found.rows for name, found in held_out.items()}}
    evaluator = evaluator.for_rows(config, sets.values())
    program = build(config, evaluator, steps=iterator.steps)
    announcements.say_start(config, evaluator, iterator.steps)
    warn(
        config,
        rows,
        held_out,
        steps=iterator.steps,
        context=architecture.config.max_length,
        row_multiple=config.train.accumulation * placement.batch_shards,
        parameters=evaluator.parameters,
    )
    evaluator.check_kernels()
    with goodput.spend("compile"):
        program, step = rematerialisation.compile_step(
            config, program, cheaper, steps=iterator.steps
        )
    if not start:
        folder.begin(workdir, config, lock)
    checkpoints = Checkpoints(
        workdir.checkpoints, keep_last=config.train.keep_last, yardstick=yardstick
    )
    checkpoints.check_space(program.state, count=config.train.keep_last + 2)
    if start:
        folder.check_same_data(reached, iterator, workdir)
    load = functools.partial(read_start, config, source=source, description=description)
    reference = _make_reference(config, program, workdir, load, rows, held_out)
    with console.phase("Weights") as phase:
        if start:
            fixed = reference.resume(workdir.reference) if reference else {}
            base = _read_base(program, functools.partial(load, source=resumed or source))
            state = checkpoints.restore(program.state, start, base)[0]
            note = None if resumed is None else _on_its_base(config, resumed.note)
        else:
            params = load(program.evaluator)
            note = _note_of(config, program.evaluator, source, description, params)
            fixed = reference.begin(params, workdir.reference) if reference else {}
            state = _start(config, program, params)
        origin = "random" if config.model.random_init else config.model.path
        phase.detail(f"checkpoint of step {start}" if start else origin)
    if start and start < iterator.steps:  # what cannot be resumed keeps its config
        folder.begin(workdir, config, lock)
    if distributed.is_first():
        if not start:
            folder.keep_model_files(
                workdir, config, source, architecture, tokenizer, is_chat=rows.is_chat
            )
        if note is not None and start < iterator.steps:
            note.write(workdir.model)
    if not start:
        distributed.barrier("model files")
    if start < iterator.steps:
        folder.list_skipped(workdir, sets)
    session = Session(
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
        goodput=goodput,
        lock=lock,
    )
    with contextlib.closing(iterator), session.writer, checkpoints:
        if not start:
            with goodput.spend("evaluation"):
                session.evaluate(state)
                if not session.has_samples(0):
                    session.write_samples(state.evaluated, 0)
        with stop_on_signals() as stop, profiler, goodput.spend("steps"):
            state, reason = _loop(session, step, state, fixed, start, stop, profiler)
        done = int(state.step)
        exported = session.find_exported(done)
        if reason in ("end", "patience"):
            with goodput.spend("evaluation"):
                session.write_samples_of_exported(state, exported.step)
        seconds = goodput.seconds
        session.writer.write_goodput(
            goodput_record(seconds, start_step=start, step=done, reason=reason)
        )
    if distributed.is_first():
        write_report(workdir, exported)
    announcements.say_end(config, session.counts, done, reason, workdir, seconds)
    return _result(workdir, done, reason, session.counts)


def _make_iterator(
    config: RunConfig, rows: TokenRows, placement: Placement, start: int, reached: Progress
) -> BatchIterator:
    train = config.train
    iterator = data.batches(
        rows,
        batch_size=train.batch_size,
        accumulation=train.accumulation,
        seed=train.seed,
        shuffle=config.data.shuffle,
        epochs=train.epochs,
        steps=train.steps,
        start_step=start,
        start_position=reached.data.get("position"),
        places=placement.held_rows(train.batch_size // train.accumulation),
    )
    distributed.check_same("training data", iterator.state())
    return iterator


def _read_base(program: Program, load: Callable[[Evaluator], Params]) -> Params:
    """Returns the weights that checkpoints of an adapter do not hold."""
    if not program.state.base:
        return {}
    params = load(program.evaluator.bare)
    return {path: params[path] for path in program.state.base}


def _start(config: RunConfig, program: Program, params: Params) -> TrainState:
    """Returns the state of step 0; the weights are its own from now on."""
    make = functools.partial(
        init_state,
        optimizer=program.optimizer,
        freeze=config.optim.freeze,
        adaptation=program.evaluator.architecture.adaptation,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    return jax.jit(make, donate_argnums=0, out_shardings=shardings)(params)


def _note_of(
    config: RunConfig,
    evaluator: Evaluator,
    source: Source,
    description: Description,
    params: Params,
) -> AdapterNote | None:
    """Returns the note of a run's adapter, which says of which weights it is one."""
    adaptation, dtype = evaluator.architecture.adaptation, evaluator.numerics.compute_dtype.__name__
    if not adaptation:
        return None
    new_tokens = description.new_tokens
    digest = digest_of_base(
        source.base or source, adaptation, params, dtype=dtype, new_tokens=new_tokens
    )
    model = config.model
    return AdapterNote(
        adaptation, found_anywhere(model.path), model.revision, digest, dtype, new_tokens
    )


def _on_its_base(config: RunConfig, note: AdapterNote | None) -> AdapterNote | None:
    """Returns a note that names the base where it is now: it may have moved."""
    model = config.model
    if note is None:
        return None
    return dataclasses.replace(note, base=found_anywhere(model.path), revision=model.revision)


def _make_reference(
    config: RunConfig,
    program: Program,
    workdir: Workdir,
    load: Callable[[Evaluator], Params],
    rows: TokenRows,
    held_out: Mapping[str, HeldOut],
) -> Reference | None:
    if not config.objective.uses_reference:
        return None
    sets = {name: found for name, found in held_out.items() if name != "retention"}
    if config.objective.uses_reference == "cached":
        sets["train"] = HeldOut(rows, range(len(rows)), None)
    noted = read_start_note(workdir.reference) if workdir.resumed else None
    start = program.evaluator.of_start(config)
    own = tuple(program.fixed)
    return Reference(config, start, functools.partial(load, start), sets, own, noted)


def _has_all_steps(config: RunConfig, reached: Progress) -> bool:
    train = config.train
    return bool(reached.data) and data.is_over(reached.data, epochs=train.epochs, steps=train.steps)


def _finished(
    config: RunConfig, workdir: Workdir, step: int, reached: Progress, reason: str
) -> TrainResult:
    """Says that nothing of a run is left to be done."""
    announcements.say_finished(config, workdir, step, reason)
    return _result(workdir, step, reason, reached)


def _result(workdir: Workdir, step: int, reason: str, counts: Progress) -> TrainResult:
    checkpoint = workdir.checkpoints / str(step)
    return TrainResult(
        workdir.path,
        checkpoint,
        step,
        reason,
        counts.best_loss,
        counts.tokens,
        counts.trained_tokens,
    )


def _loop(
    session: Session,
    step: Any,
    state: TrainState,
    fixed: Params,
    start: int,
    stop: StopRequest,
    profiler: Profiler,
) -> tuple[TrainState, str]:
    """Runs steps until the last one, a signal or the end of patience; returns why it ended."""
    config, placement = session.config.train, session.program.evaluator.placement
    steps, rows = session.iterator.steps, config.batch_size // config.accumulation
    to_devices = functools.partial(
        put, sharding=placement.micro_batches, places=placement.held_rows(rows), rows=rows
    )
    if start < steps and session.patience_is_over:
        return state, "patience"
    reason = "end"
    periods = Periods(Sums.from_json(session.counts.period), check=session.require_finite)
    in_flight: collections.deque[StepFigures] = collections.deque()
    with session.bar:
        for done, batch in zip(
            range(start + 1, steps + 1), session.batches(in_flight), strict=False
        ):
            if session.lock is not None:
                session.lock.check()
            profiler.begin(done, session, periods)
            with profiler.step(done):
                state, figures = step(state, fixed, to_devices(batch))
            periods.add(done, figures)
            profiler.end(done, session, periods, step)
            if done == 1:
                session.check_first_step(figures)
            in_flight.append(figures)
            if len(in_flight) > _STEPS_AHEAD:
                jax.block_until_ready(in_flight.popleft())
            session.bar.update(done)
            last = done == steps
            if last or done % config.log_every == 0:
                session.record(periods.end())
            signal = stop.at(done)
            if signal and not last:
                reason = signal.name
                console.log(f"{reason}: saving step {done}; Ctrl-C stops at once.")
            evaluated = None
            if session.held_out and (last or session.evaluation_due(done)):
                with session.paused(periods, "evaluation"):
                    evaluated = session.evaluate(state)
            if reason == "end" and not last and session.patience_is_over:
                reason = "patience"
                session.record(periods.end())
            improved = evaluated is not None and evaluated <= session.counts.best_score
            if session.save_due(done) or improved or last or reason != "end":
                with session.paused(periods, "checkpoint") as sums:
                    session.save(state, done, sums, evaluated)
            if reason != "end":
                break
    # While signals still only ask: the run is not over before its last checkpoint is on disk.
    with session.goodput.spend("checkpoint"):
        session.checkpoints.wait()
    return state, reason
