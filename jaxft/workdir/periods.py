"""Figures of training steps, summed by log period and read a period late."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxft.errors import CheckpointError
from jaxft.training.step import StepFigures


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of the figures of a period's steps.

    Attributes:
      ratios: Sum and count of each figure that becomes a mean, by name.
      counts: Tokens, trained tokens and squared lengths.
      largest: The largest value of each figure of which that counts.
      seconds: Time of training, pauses left out.
    """

    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Sums":
        """Returns the sums that `dataclasses.asdict` made JSON of.

        Raises:
          CheckpointError: If an earlier version of jaxft wrote them.
        """
        if unknown := values.keys() - {item.name for item in dataclasses.fields(cls)}:
            raise CheckpointError(
                f"The checkpoint was written by another version of jaxft: it counts {unknown} in "
                "its log period. Go on with that version, or start a run from its weights with "
                "--config.model.path=WORKDIR."
            )
        return cls(**values)

    def plus(self, figures: StepFigures) -> "Sums":
        """Returns the sums with one more step; its time is not known by itself."""
        ratios = dict(self.ratios)
        for name, (total, count) in figures.ratios.items():
            before = ratios.get(name, (0.0, 0.0))
            ratios[name] = (before[0] + float(total), before[1] + float(count))
        counts = {name: self.count(name) + int(value) for name, value in figures.counts.items()}
        largest = {
            name: max(self.largest.get(name, -math.inf), float(value))
            for name, value in figures.largest.items()
        }
        return Sums(ratios, counts, largest, self.seconds)

    def count(self, name: str) -> int:
        """Returns one of the counts; 0 before the first step."""
        return self.counts.get(name, 0)

    def figures(self) -> dict[str, float]:
        """Returns the mean or the largest value of each figure."""
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in self.ratios.items()
        }
        return means | self.largest


@dataclass(frozen=True, slots=True)
class Period:
    """A period that is over.

    Attributes:
      step: Last step of the period.
      sums: Sums over all its steps.
      latest: Figures of its last step.
    """

    step: int
    sums: Sums
    latest: dict[str, float]


class Periods:
    """Keeps the figures of steps on the device until the device has other work.

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
        check: Callable[[int, StepFigures], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._before = sums
        self._check = check
        self._clock = clock
        self._open: list[tuple[int, StepFigures]] = []
        self._closed: list[tuple[int, StepFigures]] = []
        # Seconds of the first unread period up to the last pause, and when the clock was started.
        self._partial = sums.seconds
        self._since = clock()
        # A thread sees when the closed period is done: the host may be busy or far ahead then.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="periods")
        self._done: Future[float] | None = None

    def add(self, step: int, figures: StepFigures) -> None:
        """Takes a step that was dispatched."""
        self._open.append((step, figures))

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
        return Period(step, sums, {name: float(value) for name, value in last.latest.items()})

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

    def _add_up(self, steps: list[tuple[int, StepFigures]]) -> Sums:
        sums = self._before
        for step, figures in steps:
            self._check(step, figures)
            sums = sums.plus(figures)
        return sums

    def _wait(self, figures: StepFigures) -> float:
        jax.block_until_ready(figures)
        return self._clock()
