"""What a first and a second signal do."""

import signal
import threading

import pytest

from jaxft.distributed.signals import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.signal is number


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_the_first_signal_stops_at_once(first):
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)


def test_a_scheduler_may_repeat_its_request():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM


def test_the_handlers_of_before_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError), stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_nothing_is_handled_and_nothing_fails():
    requests = []

    def run():
        with stop_on_signals() as stop:
            requests.append(stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not requests[0]
