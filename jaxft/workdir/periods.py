"""Metrics of training steps, summed by log period and read a period late."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from jaxft.training.step import ExpertMetrics, StepMetrics


@dataclass(frozen=True, slots=True)
class Sums:
    """What the steps of a period add up to.

    Attributes:
      loss: Nats.
      tokens: Padding left out.
      trained_tokens: Those of them that carried loss.
      squared_lengths: Sum of squared document lengths.
      seconds: Time of training, pauses left out.
    """

    loss: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    squared_lengths: float = 0.0
    seconds: float = 0.0

    def plus(self, metrics: StepMetrics) -> "Sums":
        """Returns the sums with one more step; its time is not known by itself."""
        return dataclasses.replace(
            self,
            loss=self.loss + float(metrics.total),
            tokens=self.tokens + int(metrics.tokens),
            trained_tokens=self.trained_tokens + int(metrics.weight),
            squared_lengths=self.squared_lengths + float(metrics.squared_lengths),
        )


@dataclass(frozen=True, slots=True)
class Period:
    """A period that is over: its last step, its sums and what that step reported.

    Attributes:
      step: The last.
      sums: Of all steps.
      learning_rate: Of the last step.
      grad_norm: Of the last step.
      experts: How evenly the steps used experts, by the names of metrics.jsonl.
    """

    step: int
    sums: Sums
    learning_rate: float
    grad_norm: float
    experts: dict[str, float]


class Periods:
    """Keeps the metrics of steps on the device until the device has other work.

    `add` takes each step, `end` closes a period and returns the one before it. Reading that one
    blocks until its steps are done, when those of the new one have been dispatched: the device
    never waits for the host.

    Args:
      sums: Of the steps of the first period that an earlier part of the run has done.
      check: Called with each step that is read; raises for one that must not be counted.
      clock: Gives seconds.
    """

    def __init__(
        self,
        sums: Sums,
        *,
        check: Callable[[int, StepMetrics], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._before = sums
        self._check = check
        self._clock = clock
        self._open: list[tuple[int, StepMetrics]] = []
        self._closed: list[tuple[int, StepMetrics]] = []
        # Seconds of the first unread period up to the last pause, and when the clock was started.
        self._partial = sums.seconds
        self._since = clock()
        # A thread sees when the closed period is done: the host may be busy or far ahead then.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="periods")
        self._done: Future[float] | None = None

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes a step that was dispatched."""
        self._open.append((step, metrics))

    def end(self) -> Period | None:
        """Closes the period of the steps added; returns the one before, if it is unread."""
        before = self.read()
        self._closed, self._open = self._open, []
        if self._closed:
            self._done = self._watcher.submit(self._wait, self._closed[-1][1])
        return before

    def read(self) -> Period | None:
        """Returns the closed period, once it is done; None if it was read already."""
        if self._done is None:
            return None
        steps = jax.device_get(self._closed)
        done = self._done.result()
        seconds = self._partial + done - self._since
        sums = dataclasses.replace(self._add_up(steps), seconds=seconds)
        self._before, self._partial, self._since = Sums(), 0.0, done
        self._closed, self._done = [], None
        step, last = steps[-1]
        experts = _expert_record([metrics.experts for _, metrics in steps])
        return Period(step, sums, float(last.learning_rate), float(last.grad_norm), experts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[Sums]:
        """Stops the clock for what is not training; waits for the device and checks its steps.

        Yields the sums of the period under way. The closed one must have been read.
        """
        sums = self._add_up(jax.device_get(self._open))
        self._partial += self._clock() - self._since
        try:
            yield dataclasses.replace(sums, seconds=self._partial)
        finally:
            self._since = self._clock()

    def _add_up(self, steps: list[tuple[int, StepMetrics]]) -> Sums:
        sums = self._before
        for step, metrics in steps:
            self._check(step, metrics)
            sums = sums.plus(metrics)
        return sums

    def _wait(self, metrics: StepMetrics) -> float:
        jax.block_until_ready(metrics)
        return self._clock()


def _expert_record(steps: Sequence[ExpertMetrics | None]) -> dict[str, float]:
    """Returns the mean over steps, but of the busiest expert the maximum."""
    used = [experts for experts in steps if experts is not None]
    if not used:
        return {}
    mean = ExpertMetrics(*(float(np.mean(column)) for column in zip(*used, strict=True)))
    return {
        "expert_balance": mean.balance,
        "expert_busiest": float(max(experts.busiest for experts in used)),
        "expert_unused": mean.unused,
        "expert_dropped": mean.dropped,
    }
