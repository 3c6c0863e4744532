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
      seconds: Time of training, pauses and steps that are not timed left out.
      untimed: Counts of the steps that are not timed.
    """

    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    untimed: dict[str, int] = field(default_factory=dict)

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

    def plus(self, figures: StepFigures, *, timed: bool) -> "Sums":
        """Returns the sums with one more step; its time is not known by itself."""
        ratios = dict(self.ratios)
        for name, (total, count) in figures.ratios.items():
            before = ratios.get(name, (0.0, 0.0))
            ratios[name] = (before[0] + float(total), before[1] + float(count))
        counts = _plus(self.counts, figures.counts)
        untimed = self.untimed if timed else _plus(self.untimed, figures.counts)
        largest = {
            name: max(self.largest.get(name, -math.inf), float(value))
            for name, value in figures.largest.items()
        }
        return Sums(ratios, counts, largest, self.seconds, untimed)

    def count(self, name: str) -> int:
        """Returns one of the counts; 0 before the first step."""
        return self.counts.get(name, 0)

    def timed(self, name: str) -> int:
        """Returns one of the counts, of the steps that `seconds` are of."""
        return self.count(name) - self.untimed.get(name, 0)

    def figures(self) -> dict[str, float]:
        """Returns the mean or the largest value of each figure."""
        means = {
            name: total / count if count else math.nan
            for name, (total, count) in self.ratios.items()
        }
        return means | self.largest


def _plus(counts: dict[str, int], more: dict[str, Any]) -> dict[str, int]:
    return {name: counts.get(name, 0) + int(value) for name, value in more.items()}


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

    Attributes:
      timed: Whether time and steps count for the throughput; changed in a pause only.
      untimed_seconds: Time of all training that was not timed, pauses left out.
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
        self.timed, self.untimed_seconds = True, 0.0
        self._untimed: set[int] = set()
        self._open: list[tuple[int, StepFigures]] = []
        self._closed: list[tuple[int, StepFigures]] = []
        # Timed seconds of the first unread period so far, and up to when these are counted.
        self._partial = sums.seconds
        self._since = clock()
        # A thread sees when the closed period is done: the host may be busy or far ahead then.
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="periods")
        self._done: Future[float] | None = None

    def add(self, step: int, figures: StepFigures) -> None:
        """Takes a step that was dispatched."""
        self._open.append((step, figures))
        if not self.timed:
            self._untimed.add(step)

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
        self._count_until(self._done.result())
        sums = dataclasses.replace(self._add_up(steps), seconds=self._partial)
        self._before, self._partial = Sums(), 0.0
        self._closed, self._done = [], None
        step, last = steps[-1]
        return Period(step, sums, {name: float(value) for name, value in last.latest.items()})

    @contextlib.contextmanager
    def paused(self) -> Iterator[Sums]:
        """Stops the clock for what is not training; waits for the device and checks its steps.

        Yields the sums of the period under way. The closed one must have been read.
        """
        sums = self._add_up(jax.device_get(self._open))
        self._count_until(self._clock())
        try:
            yield dataclasses.replace(sums, seconds=self._partial)
        finally:
            self._since = self._clock()

    def _add_up(self, steps: list[tuple[int, StepFigures]]) -> Sums:
        sums = self._before
        for step, figures in steps:
            self._check(step, figures)
            sums = sums.plus(figures, timed=step not in self._untimed)
        return sums

    def _count_until(self, now: float) -> None:
        seconds, self._since = now - self._since, now
        if self.timed:
            self._partial += seconds
        else:
            self.untimed_seconds += seconds

    def _wait(self, figures: StepFigures) -> float:
        jax.block_until_ready(figures)
        return self._clock()
