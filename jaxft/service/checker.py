"""The process that checks jobs: `python -m jaxft.service.checker TARGET`, a `Target` as JSON.

It reads one JSON object a line, a `checking.Request`, and answers each with a line: the result, or
`{"error": …}`. One is kept, as reading its libraries takes longer than most checks.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from jaxft.service.target import Target

FAILED = "The files could not be checked, by a fault of the server; its log has more."
_DIED = (
    "The check of the files ended before its time again and again, perhaps for lack of memory. The "
    "server's log has more."
)
_TRIES = 5
_SECONDS = 3600  # for one check; tokenising gigabytes takes its time


class Checker:
    """Starts the process when it is needed, and asks it. One thread at a time may ask.

    Args:
      target: The devices that jobs run on.

    Attributes:
      is_given_up: Whether it checks no more.
    """

    def __init__(self, target: Target):
        self._target = target
        self._process: subprocess.Popen[str] | None = None
        self.is_given_up = False

    def give_up(self) -> None:
        """Ends the process under a check, and begins no other."""
        self.is_given_up = True
        if (process := self._process) is not None:  # which another thread may take away
            process.kill()

    def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the result of `checking.check`, or an object with `error`.

        A process that dies is asked again; one that dies each time, such as for lack of memory,
        is an error of its own.
        """
        for _ in range(_TRIES):
            if self.is_given_up:
                break
            if line := self._ask(json.dumps(request)):
                return json.loads(line)
            self.stop()
        return {"error": {"code": "check_failed", "message": _DIED, "param": None}}

    def _ask(self, request: str) -> str:
        """Returns the line that answers; empty if the process ended before."""
        process = self._started()
        if self.is_given_up:  # before there was a process to be killed
            return ""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_SECONDS, self.give_up)
        timer.start()
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        return line if line.endswith("\n") else ""

    def stop(self) -> None:
        """Ends the process, if there is one; the next check starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            command = [sys.executable, "-m", "jaxft.service.checker"]
            self._process = subprocess.Popen(
                [*command, json.dumps(dataclasses.asdict(self._target))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        return self._process


class Checkers:
    """Processes that check: one that is kept, and others as long as several checks are under way.

    Args:
      target: Finds the devices that jobs run on.
    """

    def __init__(self, target: Callable[[], Target]):
        self._target = target
        self._kept: Checker | None = None
        self._asked: dict[Checker, str] = {}
        self._closed = False
        self._changing = threading.Lock()

    def check(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """Returns what `Checker.check` does; several threads may ask at a time.

        Args:
          name: Name of the check, for `give_up`.
          request: What is checked.
        """
        target = self._target()
        with self._changing:
            checker = self._kept or Checker(target)
            self._kept, self._asked[checker] = None, name
            if self._closed:
                checker.give_up()
        try:
            return checker.check(request)
        finally:
            with self._changing:
                del self._asked[checker]
                if self._kept is None and not checker.is_given_up:
                    self._kept = checker
                is_kept = self._kept is checker
            if not is_kept:
                checker.stop()

    def give_up(self, name: str) -> None:
        """Ends a check, if it is under way; nobody waits for it."""
        with self._changing:
            for checker, asked in self._asked.items():
                if asked == name:
                    checker.give_up()

    def close(self) -> None:
        """Ends all processes under their checks, and begins no other."""
        with self._changing:
            self._closed = True
            for checker in (self._kept, *self._asked):
                if checker is not None:
                    checker.give_up()


def main(target: Target) -> None:
    """Answers requests until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from jaxft.service.checking import Refusal, Request, check

    for line in sys.stdin:
        try:
            result = check(Request(**json.loads(line)), target)
        except Refusal as error:
            shown = {"code": error.code, "message": error.message, "param": error.param}
            result = {"error": shown}
        except Exception:
            traceback.print_exc()
            shown = {"code": "check_failed", "message": FAILED, "param": None}
            result = {"error": shown}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(Target(**json.loads(sys.argv[1])))
