"""The end of the processes of a run: all together, and saying why."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn

import jax

from jaxft.distributed.talk import (
    AGAIN,
    client,
    count,
    host_name,
    is_first,
    key_of,
    me,
    process,
    read_all,
)

# Seconds without a sign of life after which a host counts as lost.
LOST = 40
# Seconds between signs of life, and between looks at how the others are.
PULSE = 1.0
# Seconds that host 0, which the others talk through, waits for them to read why it ends.
FAREWELL = 10

# Where jax tells all hosts that one of them caught SIGTERM.
_SIGTERM = "RECEIVED_PREEMPTION_NOTICE"

# Set while a loop asks jax at every step whether to stop; else SIGTERM ends the run at once.
sigterm_is_answered = threading.Event()

# Runs beside a process of several and speaks for it if it is torn down from below Python.
_SENTINEL = """\
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1])
"""

# Held by the thread that ends the process, whose exit status counts; it is never given back.
_ending = threading.Lock()
_sentinel: subprocess.Popen[bytes] | None = None


class Watch(threading.Thread):
    """Shows that this host lives, and ends the process when another one ended or was lost."""

    over = threading.Event()  # the run is over, there is nothing to watch any more
    leaving = threading.Event()  # this process has said why it ends

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self._seen: dict[str, tuple[str, float]] = {}

    def run(self) -> None:
        """Looks at the other hosts until the run is over, or ends this process after another."""
        beat = 0
        while not self.over.wait(PULSE):
            beat += 1
            try:
                client().key_value_set(key_of("alive", me()), str(beat), allow_overwrite=True)
                stopped = not sigterm_is_answered.is_set() and _sigterm_arrived()
                ended = read_all("ended")
                lost = self._lost_hosts() if is_first() and not ended else {}
            except jax.errors.JaxRuntimeError as error:
                stopped, ended, lost = (
                    False,
                    {},
                    {0: f"it cannot be reached ({_first_line(error)})"},
                )
            if self.over.is_set() or self.leaving.is_set():
                return
            if stopped and not sigterm_is_answered.is_set():
                fail([f"Stopped by SIGTERM outside of training steps. {AGAIN}"], 143)
            for number, text in lost.items():
                say([f"{host_name(number)} was lost: {text}. {AGAIN}"])
            if lost:
                self._excuse(lost)
                _leave(1, "; ".join(f"{host_name(i)} was lost: {t}" for i, t in lost.items()))
            if ended:
                self.follow(ended)

    def _lost_hosts(self) -> dict[int, str]:
        """Returns hosts that have shown no sign of life for too long, and what is known of them."""
        now, beats = time.monotonic(), read_all("alive")
        for number in range(1, count()):
            beat = beats.get(key_of("alive", str(number)), "")
            if self._seen.get(str(number), ("none", 0.0))[0] != beat:
                self._seen[str(number)] = (beat, now)
        return {
            int(number): f"no sign of life for {LOST} s, as if it was killed or its network failed"
            for number, (_, since) in self._seen.items()
            if now - since > LOST
        }

    def _excuse(self, lost: Mapping[int, str]) -> None:
        """Spares host 0 the wait for those that will not read why it ends."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for number in lost.keys() - {0}:
                client().key_value_set(key_of("gone", str(number)), "")

    def follow(self, ended: Mapping[str, str]) -> None:
        """Ends this process after others; an error of its own that is on its way goes first."""
        if self.leaving.wait(2 * PULSE):
            return
        texts = []
        for key, text in ended.items():
            number = int(key.rpartition("/")[2])
            texts.append(f"{host_name(number)} ended, and so this one does. It said: {text}")
        say([*texts, AGAIN])
        _leave(1, "")


def _sigterm_arrived() -> bool:
    """Returns whether jax has caught SIGTERM on any host."""
    try:
        return bool(client().key_value_try_get(_SIGTERM))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def say(problems: list[str]) -> None:
    """Prints problems with the number of this process."""
    for problem in problems:
        print(f"jaxft: host {process()}: {problem}", file=sys.stderr, flush=True)


def fail(problems: list[str], status: int) -> NoReturn:
    """Says why this process ends, tells the others, and ends it with an exit status."""
    Watch.leaving.set()
    say(problems)
    _leave(status, " ".join(problems))


def _leave(status: int, reason: str) -> NoReturn:
    """Ends this process at once: others hang in collectives, and threads in what they wait for.

    Args:
      status: Exit status.
      reason: What the other hosts are told; empty if they know.
    """
    Watch.leaving.set()
    _ending.acquire()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if reason:
            client().key_value_set(key_of("ended", me()), reason)
        client().key_value_set(key_of("gone", me()), "")
        limit = time.monotonic() + FAREWELL
        # The others hear of it through this process.
        while is_first() and len(read_all("gone")) < count() and time.monotonic() < limit:
            time.sleep(0.1)
    dismiss_sentinel()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_sentinel() -> None:
    """Starts a small process that speaks if this one ends without a word.

    jax ends a process from below Python when its coordinator is gone, gloo may when another host
    is, and schedulers kill.
    """
    global _sentinel
    text = (
        f"jaxft: {socket.gethostname()}: this process was ended from outside Python. As a rule "
        "another host was lost, host 0 or one that its log names, or this one was killed for "
        f"memory or by the scheduler: the first error in all logs is the cause. {AGAIN}\n"
    )
    _sentinel = subprocess.Popen(
        [sys.executable, "-ISc", _SENTINEL, text], stdin=subprocess.PIPE, start_new_session=True
    )


def dismiss_sentinel() -> None:
    """Ends what `start_sentinel` started, before it says anything."""
    if _sentinel is None or _sentinel.stdin is None or _sentinel.stdin.closed:
        return
    with contextlib.suppress(OSError):
        _sentinel.stdin.write(b"end")
        _sentinel.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        _sentinel.wait(5)
