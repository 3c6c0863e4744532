"""Asking a run to stop at the end of a step, by SIGINT or SIGTERM."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from jax.experimental import multihost_utils

from jaxft import distributed


class StopRequest:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def at(self, step: int) -> signal.Signals | None:
        """Returns the signal that the run stops for at the end of `step`, if there is one.

        A run of several processes stops for a signal to any of them, all at the same step, which is
        agreed on while they go on: every process must call this at every step.
        """
        if distributed.count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal

    def _handle(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number)
        _stop_at_once_next_time()

    def _pass_on(self, _number: int, _frame: object) -> None:
        # jax tells the other processes of SIGTERM alone.
        os.kill(os.getpid(), signal.SIGTERM)
        _stop_at_once_next_time()


def _stop_at_once_next_time() -> None:
    # A second Ctrl-C is not patient any more.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second SIGINT raises KeyboardInterrupt.

    With several processes SIGTERM is left to jax, which has caught it since they were joined; the
    block must ask `StopRequest.at`. Outside the main thread Python cannot handle signals: the
    request then stays empty, but for those that jax catches.
    """
    request = StopRequest()
    distributed.sigterm_is_answered.set()
    try:
        with _handled(request):
            yield request
    finally:
        if not request:  # One that was answered must not end the run a second time.
            distributed.sigterm_is_answered.clear()


@contextlib.contextmanager
def _handled(request: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if distributed.count() > 1:
        handlers = {signal.SIGINT: request._pass_on}
    else:
        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), request._handle)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
