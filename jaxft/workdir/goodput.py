"""Wall time of a run by what it went into: training steps, and all that is none."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

# What wall time goes into, and what it is called.
KINDS = {
    "steps": "training steps",
    "data": "waiting for data",
    "compile": "compiling",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "startup": "start-up",
    "other": "the rest",
}
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Goodput:
    """Adds up the wall time of a process, all of it and each second once.

    Time is of the kind of the innermost `spend`, and start-up outside of all. What XLA compiles
    meanwhile in the same thread counts as compiling. Use it as a context manager: only then
    compiling is noticed.

    Args:
      clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "startup", clock()
        self._thread = threading.get_ident()

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._notice)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by the names of `KINDS`."""
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._since = now
        return dict(self._seconds)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as one of `KINDS`."""
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def wait(self, ready: Callable[[], Any], *, is_idle: Callable[[], bool]) -> Any:
        """Returns what `ready` returns; its time is of waiting for data if `is_idle` after it.

        Where devices still have work then, they have waited for nothing.
        """
        start = self._clock()
        found = ready()
        if is_idle():
            self._move("data", self._clock() - start)
        return found

    def _switch(self, kind: str) -> str:
        """Counts from now on as `kind`; returns what it was before."""
        self._seconds = self.seconds
        before, self._kind = self._kind, kind
        return before

    def _move(self, kind: str, seconds: float) -> None:
        """Counts the last seconds of the present kind as another one."""
        self._seconds[self._kind] -= seconds
        self._seconds[kind] += seconds

    def _notice(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread:
            self._move("compile", duration_secs)


def shares(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """Returns names and shares of wall time, the steps first and then the longest first."""
    total = sum(seconds.values()) or 1.0
    others = sorted((kind for kind in KINDS if kind != "steps"), key=lambda k: -seconds[k])
    return [(kind, seconds[kind] / total) for kind in ("steps", *others)]


def goodput_record(
    seconds: dict[str, float], *, start_step: int, step: int, reason: str
) -> dict[str, Any]:
    """Returns the object that a part of a run writes to goodput.jsonl at its end.

    Args:
      seconds: By the names of `KINDS`.
      start_step: Steps that earlier parts had done.
      step: Steps done.
      reason: Why the part ended.
    """
    return {
        "start_step": start_step,
        "step": step,
        "reason": reason,
        "wall_seconds": sum(seconds.values()),
        "goodput": shares(seconds)[0][1],
        "seconds": seconds,
    }


def add_up(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns the seconds of all parts of a run; all 0 without records."""
    total = dict.fromkeys(KINDS, 0.0)
    for record in records:
        for kind, seconds in record.get("seconds", {}).items():
            total[kind if kind in KINDS else "other"] += seconds
    return total
