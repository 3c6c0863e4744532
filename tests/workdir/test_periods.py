"""Sums of log periods and the time they took, by a clock and a device that the test moves."""

import threading

import jax
import numpy as np
import pytest

from jaxft.training.step import StepFigures
from jaxft.workdir.periods import Periods, Sums


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Pending:
    """A number on a device that is busy until `finish`."""

    def __init__(self, value):
        self._value = np.float32(value)
        self._done = threading.Event()

    def finish(self):
        self._done.set()

    def block_until_ready(self):
        self._done.wait()
        return self

    def __array__(self, *_, **__):
        self._done.wait()
        return self._value


def step(loss, weight=2.0, tokens=3.0):
    ratios = {"loss": (np.float32(loss), np.float32(weight))}
    counts = {"tokens": tokens, "trained_tokens": weight, "squared_lengths": 9.0}
    latest = {"learning_rate": np.float32(0.1), "grad_norm": np.float32(1.0)}
    return StepFigures(ratios, jax.tree.map(np.float32, counts), latest, {})


def sums_of(loss, tokens, trained, squared, seconds):
    counts = {"tokens": tokens, "trained_tokens": trained, "squared_lengths": squared}
    return Sums({"loss": (loss, float(trained))}, counts, {}, seconds)


@pytest.fixture
def clock():
    return Clock()


def make(clock, sums=None, check=lambda step, metrics: None):
    return Periods(sums or Sums(), check=check, clock=clock)


def test_a_period_is_returned_when_the_next_one_ends(clock):
    periods = make(clock)
    periods.add(1, step(1.0))
    periods.add(2, step(2.5))
    clock.now = 4.0
    assert periods.end() is None
    periods.add(3, step(7.0))
    first = periods.end()
    assert (first.step, first.latest["learning_rate"]) == (2, np.float32(0.1))
    assert first.sums == sums_of(3.5, 6, 4, 18.0, 4.0)
    assert periods.read().sums.ratios["loss"] == (7.0, 2.0)
    assert periods.read() is None
    assert periods.end() is None


def test_a_period_ends_when_its_last_step_does_not_when_it_is_read(clock):
    periods = make(clock)
    slow = Pending(1.0)
    periods.add(1, step(0.0)._replace(ratios={"loss": (slow, np.float32(2.0))}))
    periods.end()
    clock.now = 10.0
    slow.finish()
    periods._done.result()
    clock.now = 15.0
    assert periods.read().sums.seconds == 10.0
    periods.add(2, step(0.0))
    periods.end()
    assert periods.read().sums.seconds == 5.0


def test_pauses_do_not_count(clock):
    periods = make(clock)
    periods.add(1, step(1.0))
    clock.now = 2.0
    with periods.paused() as sums:
        assert sums == sums_of(1.0, 3, 2, 9.0, 2.0)
        clock.now = 102.0
    periods.add(2, step(1.0))
    clock.now = 105.0
    with periods.paused() as sums:
        assert sums.seconds == 5.0
        clock.now = 205.0
    clock.now = 206.0
    periods.end()
    assert periods.read().sums.seconds == 6.0


def test_steps_that_are_not_timed_count_for_all_but_the_throughput(clock):
    periods = make(clock)
    periods.add(1, step(1.0))
    clock.now = 2.0
    with periods.paused():
        clock.now, periods.timed = 10.0, False
    periods.add(2, step(1.0))
    clock.now = 15.0
    with periods.paused():
        clock.now = 100.0
    periods.add(3, step(1.0))
    clock.now = 107.0
    with periods.paused():
        clock.now, periods.timed = 200.0, True
    periods.add(4, step(1.0))
    clock.now = 203.0
    periods.end()
    sums = periods.read().sums
    assert (sums.seconds, periods.untimed_seconds) == (5.0, 12.0)
    assert (sums.count("tokens"), sums.timed("tokens")) == (12, 6)
    assert sums.ratios["loss"] == (4.0, 8.0)


def test_a_period_that_is_not_timed_takes_no_time(clock):
    periods = make(clock)
    with periods.paused():
        periods.timed = False
    periods.add(1, step(1.0))
    clock.now = 4.0
    periods.end()
    sums = periods.read().sums
    assert (sums.seconds, sums.timed("tokens"), periods.untimed_seconds) == (0.0, 0, 4.0)


def test_a_pause_counts_even_if_what_it_is_for_fails(clock):
    periods = make(clock)
    with pytest.raises(ValueError), periods.paused():
        clock.now = 100.0
        raise ValueError
    periods.add(1, step(1.0))
    clock.now = 101.0
    periods.end()
    assert periods.read().sums.seconds == 1.0


def test_the_period_of_an_earlier_part_goes_on(clock):
    whole, first = make(clock), make(clock)
    for number in (1, 2, 3):
        whole.add(number, step(0.1 * number))
    whole.end()
    first.add(1, step(0.1))
    clock.now = 1.0
    with first.paused() as sums:
        pass
    second = make(clock, sums)
    for number in (2, 3):
        second.add(number, step(0.1 * number))
    clock.now = 3.0
    second.end()
    end = second.read()
    assert end.sums.ratios == whole.read().sums.ratios
    assert (end.sums.count("tokens"), end.sums.seconds) == (9, 3.0)
    second.add(4, step(1.0))
    second.end()
    assert second.read().sums.count("tokens") == 3


def test_every_step_is_checked_before_it_counts(clock):
    def check(number, metrics):
        if not np.isfinite(metrics.ratios["loss"][0]):
            raise ArithmeticError(number)

    periods = make(clock, check=check)
    periods.add(1, step(1.0))
    periods.add(2, step(np.nan))
    with pytest.raises(ArithmeticError, match="2"), periods.paused():
        pass
    periods.end()
    with pytest.raises(ArithmeticError, match="2"):
        periods.read()


def test_use_of_experts_is_averaged_but_of_the_busiest_the_most_is_kept(clock):
    periods = make(clock)
    for number, experts in ((1, (2.0, 1.5, 0.25, 0.0)), (2, (4.0, 1.25, 0.75, 0.5))):
        names = ("expert_balance", "expert_busiest", "expert_unused", "expert_dropped")
        used = dict(zip(names, map(np.float32, experts), strict=True))
        one = step(1.0)
        largest = {"expert_busiest": used.pop("expert_busiest")}
        ratios = {name: (value, np.float32(1.0)) for name, value in used.items()}
        periods.add(number, one._replace(ratios=one.ratios | ratios, largest=largest))
    periods.end()
    assert periods.read().sums.figures() == {
        "loss": 0.5,
        "expert_balance": 3.0,
        "expert_busiest": 1.5,
        "expert_unused": 0.5,
        "expert_dropped": 0.25,
    }
    periods.add(3, step(1.0))
    periods.end()
    dense = periods.read()
    assert (dense.sums.figures(), dense.latest["grad_norm"]) == ({"loss": 0.5}, 1.0)
