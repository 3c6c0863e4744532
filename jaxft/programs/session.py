"""A training run under way: what a loop asks of it."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console, data, distributed
from jaxft.config import RunConfig, to_dict
from jaxft.data import Batch, TokenRows
from jaxft.errors import ConfigError, TrainingError
from jaxft.files import read_jsonl
from jaxft.formatting import format_duration
from jaxft.hardware.devices import peak_flops
from jaxft.models.module import Params
from jaxft.programs import patience
from jaxft.programs.answers import Answers, Prompts, SamplePrompt, answer
from jaxft.programs.held_out import HeldOut, describe_figures, evaluate_rows
from jaxft.programs.model import Model
from jaxft.reporting.progress import TrainProgress
from jaxft.reporting.report import Exported
from jaxft.training.flops import training_flops
from jaxft.training.program import Evaluator, Program
from jaxft.training.state import TrainState
from jaxft.training.step import StepFigures
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.goodput import Goodput
from jaxft.workdir.lock import Lock
from jaxft.workdir.metrics import MetricsWriter, train_record
from jaxft.workdir.periods import Period, Periods, Sums
from jaxft.workdir.source import Source
from jaxft.workdir.workdir import Workdir

# How far figures of the start may be from what they must be, relative beyond 1.
_START_TOLERANCE = 0.02


@dataclass
class Session:
    """The parts of a run, and what it has counted so far.

    A loop of training steps, or of another kind, evaluates, records, saves and answers samples
    through it.
    """

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
    goodput: Goodput
    lock: Lock | None

    @functools.cached_property
    def _evaluators(self) -> dict[str, Evaluator]:
        """The evaluator of each data set: what a model has kept is judged by its loss on text."""
        learnt = self.program.evaluator
        kept = learnt.on_text(self.config)
        return {name: kept if name == "retention" else learnt for name in self.held_out}

    @property
    def patience_is_over(self) -> bool:
        """Whether nothing has improved for as long as the config bears."""
        return patience.is_over(self.config, self.counts)

    def evaluation_due(self, done: int) -> bool:
        """Whether held-out data is evaluated after so many steps."""
        every = self.config.train.eval_every
        return done % every == 0 if every else self._ends_epoch(done)

    def save_due(self, done: int) -> bool:
        """Whether a checkpoint is saved after so many steps, whatever else happens then."""
        train = self.config.train
        due = train.save_every and done % train.save_every == 0
        return bool(due) or (train.save_epochs and self._ends_epoch(done))

    def _ends_epoch(self, done: int) -> bool:
        """Whether a step reads the last row of an epoch."""
        before, after = (
            self.iterator.position(step) // len(self.rows) for step in (done - 1, done)
        )
        return after > before

    def evaluate(self, state: TrainState) -> float | None:
        """Evaluates and records held-out data; returns the score of validation data, if any."""
        score = None
        params = state.evaluated
        for name, held_out in self.held_out.items():
            evaluator = self._evaluators[name]
            result = evaluate_rows(
                evaluator,
                params,
                held_out,
                batch_size=self.config.eval.batch_size or self.config.train.batch_size,
            )
            record = {"step": int(state.step), "dataset": name}
            record |= result.record() | held_out.record()
            if not int(state.step) and name != "retention":
                sums = {key: (a.sum(), b.sum()) for key, (a, b) in result.by_name.items()}
                self._check_start(sums, at="evaluation")
            figures = describe_figures(result, evaluator.objective.objective.units)
            text = f"step {record['step']}: {name} {', '.join(figures)}"
            if held_out.is_sample:
                text += f" over {len(held_out.numbers):,} of {len(held_out.rows):,} rows"
            if name == "validation":
                score = result.loss.value
                self.counts = patience.count_loss(self.counts, score)
                if self.prompts is not None:
                    answers = self._answer(params, self.prompts, step=record["step"])
                    record |= answers.record()
                    text += f", {answers.summary}"
                    if self.config.eval.best == "answers":
                        score = 1 - answers.accuracy.value
            self.writer.write_eval(record)
            console.log(text)
        if score is not None:
            self.counts = patience.count_score(self.counts, score, self.config.eval.minimum_change)
        return score

    def _answer(self, params: Params, prompts: Prompts, *, step: int) -> Answers:
        """Generates answers; the first time it says what that costs."""
        start = time.monotonic()
        with console.phase("Answers") as phase:
            answers = answer(self.config, self._model(params), prompts)
            phase.detail(f"{len(prompts.rows):,} of {prompts.of_rows:,} rows")
        seconds = format_duration(time.monotonic() - start)
        if not step:
            console.log(
                f"Answers to {len(prompts.rows):,} rows took {seconds}, compiling included, and "
                "are generated at each evaluation. --config.eval.answer_rows sets their number."
            )
        return answers

    def save(self, state: TrainState, step: int, period: Sums, score: float | None) -> None:
        """Saves the state, once it is known to be finite."""
        # The metrics of a step tell of the weights before its update.
        if not all_finite((state.trainable, state.opt_state)):
            raise TrainingError(self._not_finite(step, "the updated weights are not finite"))
        counts = dataclasses.replace(
            self.counts, data=self.iterator.state(), period=dataclasses.asdict(period)
        )
        known = score if score is not None and math.isfinite(score) else None
        self.checkpoints.save(state, progress=counts, config=to_dict(self.config), score=known)

    def batches(self, under_way: Sequence[StepFigures]) -> Iterator[Batch]:
        """Yields the batches of the steps that are left.

        Args:
          under_way: Steps that devices may not have done yet, the newest last; it changes.
        """

        def is_idle() -> bool:
            return not under_way or under_way[-1].latest["grad_norm"].is_ready()

        ready = functools.partial(next, iter(self.iterator), None)
        while (batch := self.goodput.wait(ready, is_idle=is_idle)) is not None:
            yield batch

    @contextlib.contextmanager
    def paused(self, periods: Periods, kind: str) -> Iterator[Sums]:
        """Stops the clock for what is not training, once all steps are known to be finite.

        Args:
          periods: What times the steps.
          kind: What the time goes into, one of `goodput.KINDS`.
        """
        self.record(periods.read())
        with periods.paused() as sums, self.goodput.spend(kind):
            yield sums

    def record(self, period: Period | None) -> None:
        """Writes the record of a period that is over."""
        if period is None:
            return
        sums = period.sums
        self.counts = dataclasses.replace(
            self.counts,
            tokens=self.counts.tokens + sums.count("tokens"),
            trained_tokens=self.counts.trained_tokens + sums.count("trained_tokens"),
            seconds=self.counts.seconds + sums.seconds,
        )
        record = train_record(
            period,
            tokens=self.counts.tokens,
            trained_tokens=self.counts.trained_tokens,
            seconds=self.counts.seconds,
            flops=self._flops(sums),
            peak_flops=_peak_flops(self.program.evaluator),
        )
        self.writer.write(record)
        self.bar.write(record)

    def require_finite(self, step: int, figures: StepFigures) -> None:
        """Raises TrainingError for a step whose loss or gradient is not finite."""
        (total, weight), norm = figures.ratios["loss"], figures.latest["grad_norm"]
        if not (np.isfinite(total) and np.isfinite(norm)):
            what = f"the loss is {total / max(weight, 1):g} and the gradient norm {norm:g}"
            raise TrainingError(self._not_finite(step, what))

    def _not_finite(self, step: int, what: str) -> str:
        numbers = self.iterator.row_numbers(step - 1)
        shown = [f"row {n} ({', '.join(self.rows.origins(n)[:3])})" for n in numbers[:8]]
        more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        go_on = (
            f"The last good checkpoint is step {saved[-1]}; continue from it with --resume"
            if saved
            else "No checkpoint was saved yet; start again with --overwrite"
        )
        return (
            f"Step {step}: {what}. The step read {'; '.join(shown)}{more}. {go_on} after lowering "
            "--config.optim.learning_rate, raising --config.optim.warmup_steps, or fixing those "
            "rows."
        )

    def check_first_step(self, figures: StepFigures) -> None:
        """Holds the first step, which sees the starting weights, to what these must give."""
        objective = self.program.evaluator.objective
        if objective.objective.start(objective.keys):
            self._check_start(jax.device_get(figures.ratios), at="step")

    def _check_start(self, sums: Mapping[str, tuple[Any, Any]], *, at: str) -> None:
        """Raises TrainingError if figures are not what the starting weights must give.

        Args:
          sums: Sum and count of each figure, by name. One without any count says nothing.
          at: Whether an evaluation or a step made them: the two have the reference from elsewhere.

        Raises:
          ConfigError: If the objective expects a figure that it does not give.
        """
        objective = self.program.evaluator.objective
        expectations = objective.objective.start(objective.keys)
        if unknown := expectations.keys() - sums.keys():
            raise ConfigError(
                f"objective {self.config.objective.name!r} expects {', '.join(sorted(unknown))} at "
                f"the start, and gives no such figure; it gives {', '.join(sums)}."
            )
        # Two passes that are compiled apart round differently.
        exact = self.program.evaluator.numerics.compute_dtype == jnp.float32
        tolerance = _START_TOLERANCE if exact else 5 * _START_TOLERANCE
        is_kept = at == "evaluation" or not self.program.fixed
        cache = data.cache_folder(self.config.data)
        remedy = f" Delete {cache}/reference-* and start again." if is_kept else ""
        for name, expected in expectations.items():
            total, count = sums[name]
            if not count:
                continue
            found = float(total) / float(count)
            if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
                raise TrainingError(
                    f"At the start the {name} is {found:.4f}, and must be {expected:.4f}, as the "
                    "weights are still those of the reference: its log-probabilities are of other "
                    f"weights or other rows.{remedy}"
                )

    def _flops(self, sums: Any) -> Any:
        tokens = sums.timed("tokens")
        evaluator = self.program.evaluator
        config = evaluator.architecture.config
        return training_flops(
            evaluator.multiplied_parameters,
            learning=evaluator.learning(self.program.state.trainable),
            layers=len(config.windows),
            heads=config.heads,
            head_dim=config.mean_head_dim,
            tokens=tokens,
            squared_lengths=sums.timed("squared_lengths"),
            states=config.states,
            untrained_tokens=max(0, tokens - sums.timed("trained_tokens")),
            forward_passes=self.config.objective.forward_passes,
        )

    def find_exported(self, step: int) -> Exported:
        """Returns the checkpoint that an export takes, after so many steps."""
        best = distributed.from_first("best checkpoint", self.checkpoints.best_step)
        return Exported(step, "") if best is None else Exported(best, self.config.eval.best)

    def write_samples_of_exported(self, state: TrainState, step: int) -> None:
        """Answers the prompts with the checkpoint that an export takes, maybe an earlier one.

        What the checkpoint holds is then deleted of the state, to make room for it.
        """
        if self.has_samples(step):
            return
        if step == int(state.step):
            params = state.evaluated
        else:
            for array in jax.tree.leaves((state.saved, state.opt_state)):
                array.delete()
            with console.phase(f"Weights of step {step}, the best"):
                shapes: Any = self.program.state.saved
                params = {**self.checkpoints.restore_params(shapes, step), **state.base}
        self.write_samples(params, step)

    def has_samples(self, step: int) -> bool:
        """Whether there are none to make: a finished run that is resumed has them already."""
        return not self.sample_prompts or distributed.from_first(
            "samples", lambda: any(r["step"] == step for r in read_jsonl(self.workdir.samples))
        )

    def write_samples(self, params: Params, step: int) -> None:
        """Answers a few held-out prompts, for the report's comparison of before and after."""
        if not self.sample_prompts:
            return
        with console.phase(f"Sample answers of step {step}"):
            outputs = self._model(params).generate_from_ids(
                [p.ids for p in self.sample_prompts], max_new_tokens=self.config.eval.max_new_tokens
            )
        for prompt, output in zip(self.sample_prompts, outputs, strict=True):
            self.writer.write_sample(
                {
                    "step": step,
                    "prompt": prompt.text,
                    "output": output,
                    "reference": prompt.reference,
                }
            )

    def _model(self, params: Params) -> Model:
        evaluator = self.program.evaluator
        source = Source(self.workdir.model)
        return Model(evaluator.architecture, evaluator.abstract, params, self.tokenizer, source)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns whether no number in a tree of arrays is NaN or infinite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _peak_flops(evaluator: Evaluator) -> float | None:
    devices = evaluator.placement.mesh.devices
    peak = peak_flops(devices.flat[0].device_kind, evaluator.numerics.compute_dtype)
    return peak * devices.size if peak else None
