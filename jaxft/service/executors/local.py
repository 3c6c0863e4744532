"""Runs jobs as processes of this machine, which go on when the server ends.

A launch holds the lock of a file as long as its process lives, whoever started it: that is how a
new worker finds the runs of the one before. The process writes its id there itself, before it
becomes the run.
"""

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import time
from pathlib import Path

from jaxft.service.executors import ExecutorError, Launch, State
from jaxft.service.settings import Settings
from jaxft.service.target import variables_of

# Time that a run has to save after SIGTERM.
_GRACE = 120.0
_SCRIPT = 'echo "$$" > "$0" && exec "$@"'


def make(settings: Settings) -> "Local":
    """Returns the executor."""
    return Local(settings.workdir / "launches")


class Local:
    """An executor of this machine.

    Args:
      folder: Holds a file for each launch.
      grace: Seconds that a run has to save and end.
    """

    def __init__(self, folder: Path, *, grace: float = _GRACE):
        self._folder, self._grace = folder, grace
        self._asked: dict[str, float] = {}  # when a launch was asked to end
        self._children: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def submit(self, launch: Launch) -> str:
        """Starts a process; returns the name of its file."""
        path = self._folder / launch.name
        with path.open("a") as lock, launch.log.open("a") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return launch.name  # it runs
            try:
                self._children[launch.name] = subprocess.Popen(
                    ["/bin/sh", "-c", _SCRIPT, str(path), *launch.command],
                    env=os.environ | variables_of(launch.platform, launch.devices),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,  # Ctrl-C at the server is not for it
                )
            except OSError as error:
                raise ExecutorError(f"{launch.command[0]} cannot be started: {error}.") from error
        return launch.name

    def find(self, launch: Launch) -> str | None:
        """Returns the name of the file of a launch."""
        path = self._folder / launch.name
        if not path.exists():
            return None
        # An empty file without a lock is of a worker that died before it started the process.
        return launch.name if path.stat().st_size or self._is_held(launch.name) else None

    def state(self, handle: str) -> State:
        """Says whether the process lives."""
        child = self._children.get(handle)
        if child is not None and child.poll() is not None:
            del self._children[handle]
        if self._is_held(handle):
            return State.RUNNING
        self._asked.pop(handle, None)
        return State.ENDED

    def stop(self, handle: str) -> None:
        """Sends SIGTERM, and SIGKILL after the time of grace."""
        if self.state(handle) is State.ENDED or (process := self._process(handle)) is None:
            return
        late = time.monotonic() - self._asked.get(handle, math.inf) > self._grace
        if handle in self._asked and not late:
            return
        self._asked.setdefault(handle, time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL if late else signal.SIGTERM)

    def _is_held(self, handle: str) -> bool:
        try:
            with (self._folder / handle).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _process(self, handle: str) -> int | None:
        """Returns the id of a launch that runs, once it has written it."""
        text = (self._folder / handle).read_text()
        return int(text) if text.strip().isdecimal() else None
