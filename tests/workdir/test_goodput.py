"""Wall time by what it went into, by a clock that the test moves."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.workdir.goodput import Goodput, add_up, goodput_record, shares


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def known(seconds):
    return {kind: value for kind, value in seconds.items() if value}


def test_each_second_counts_once_for_the_innermost_kind(clock):
    goodput = Goodput(clock)
    clock.now += 3
    with goodput.spend("steps"):
        clock.now += 10
        with pytest.raises(ValueError), goodput.spend("checkpoint"):
            clock.now += 2
            raise ValueError
        clock.now += 5
    clock.now += 1
    assert known(goodput.seconds) == {"steps": 15.0, "checkpoint": 2.0, "startup": 4.0}


def test_a_wait_is_for_data_only_if_devices_have_nothing_to_do_after_it(clock):
    goodput = Goodput(clock)

    def ready():
        clock.now += 4
        return "batch"

    with goodput.spend("steps"):
        assert goodput.wait(ready, is_idle=lambda: False) == "batch"
        goodput.wait(ready, is_idle=lambda: True)
    assert known(goodput.seconds) == {"steps": 4.0, "data": 4.0}


def test_compiling_is_noticed_wherever_it_happens():
    with Goodput() as goodput, goodput.spend("evaluation"):
        jax.jit(lambda x: jnp.sin(x) * 3.25)(jnp.ones(7)).block_until_ready()
        seconds = goodput.seconds
    assert seconds["compile"] > 0
    assert seconds["evaluation"] > 0
    after = goodput.seconds["compile"]
    jax.jit(lambda x: jnp.cos(x) * 3.25)(jnp.ones(7)).block_until_ready()
    assert goodput.seconds["compile"] == after


def test_parts_of_a_run_add_up_and_steps_come_first(clock):
    goodput = Goodput(clock)
    clock.now += 6
    with goodput.spend("steps"):
        clock.now += 2
    record = goodput_record(goodput.seconds, start_step=0, step=8, reason="end")
    assert (record["wall_seconds"], record["goodput"]) == (8.0, 0.25)
    total = add_up([record, record])
    assert shares(total)[:2] == [("steps", 0.25), ("startup", 0.75)]
    assert sum(add_up([]).values()) == 0
