"""One run at a time in a folder: a lock that ends with the process that holds it.

Three things together say whether a holder lives, as no one of them works on all storage. The
system's lock on the file ends with its process, but some network file systems hide it from other
hosts and do not say so. The file names its process, of which its machine knows whether it runs. And
the process renews the file every few seconds, which is seen from everywhere.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from jaxft import console
from jaxft.errors import CheckpointError

# Seconds between signs of life, and without one until a holder on another machine counts as dead.
# File systems of object stores show a change up to a minute late.
_BEAT = 15.0
_DEAD = 120.0
# Seconds until the first sign of life: of two that started at once it finds the one too many.
_FIRST_BEAT = 1.0
# Bytes of the file: always as many, so that it is renewed in a single write.
_SIZE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that holds a lock, as the lock's file names it.

    Attributes:
      token: Tells this holder from any other.
      host: Name of its machine.
      machine: Tells a machine, and a container on it, from others whatever they are called.
      pid: Number of its process.
      started: Start of the process, as the system counts; tells it from a later one of its number.
      since: Time at which it took the lock, ISO 8601.
      beat: Signs of life so far.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


class Lock:
    """A lock that this process holds; `hold` makes one."""

    def __init__(self, path: Path):
        self._path = path
        self._me = Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._over, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._show_life, daemon=True, name="lock")
        self._descriptor = self._take()
        self._thread.start()

    def check(self) -> None:
        """Raises CheckpointError if another process has taken the lock over."""
        if self._lost.is_set():
            raise CheckpointError(
                f"{self._path.parent} was taken over by another run, {_read(self._path)}: this one "
                f"was seen to give no sign of life for {_DEAD:.0f} s, as if its machine had been "
                "suspended or cut off. It ends here, so that the two do not write at once."
            )

    def release(self) -> None:
        """Gives the lock back and deletes its file."""
        self._over.set()
        self._thread.join(timeout=_BEAT)  # storage that hangs must not hang the end
        with contextlib.suppress(OSError, CheckpointError):
            found = _read(self._path)
            if found is not None and found.token == self._me.token:
                self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _take(self) -> int:
        """Returns the open file, locked if its file system can."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                free = _lock(descriptor)
                if _is_file_at(descriptor, self._path):
                    self._refuse_if_held(descriptor, free=free)
                    if _is_file_at(descriptor, self._path):
                        _write(self._path, self._me)
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder has just deleted it

    def _refuse_if_held(self, descriptor: int, *, free: bool) -> None:
        holder = _read(self._path)
        limit = time.monotonic() + _FIRST_BEAT
        while holder is None and not free and time.monotonic() < limit:  # it is being written
            time.sleep(0.05)
            holder = _read(self._path)
        if holder is None:
            held = not free
        elif holder.machine == self._me.machine:
            held = _lives(holder)
        else:
            held = self._beats(holder) or not (free or _lock(descriptor))
        if held:
            raise CheckpointError(
                f"{self._path.parent} is in use by another run: {holder or 'it has just started'}. "
                "Wait until it has ended, or name another folder with --config.train.workdir=…."
            )

    def _beats(self, holder: Holder) -> bool:
        """Watches for a sign of life of a holder on another machine, whose clock may be wrong."""
        console.log(
            f"{self._path.parent} was locked by {holder}. Waiting up to {_DEAD:.0f} s for a sign "
            "of life from there."
        )
        limit = time.monotonic() + _DEAD
        while time.monotonic() < limit:
            time.sleep(min(1.0, _DEAD / 10))
            if _read(self._path) != holder:
                return self._path.exists()
        return False

    def _show_life(self) -> None:
        wait = min(_FIRST_BEAT, _BEAT)
        while not self._over.wait(wait):
            wait = _BEAT
            # Storage that fails may be back at the next beat.
            with contextlib.suppress(OSError, CheckpointError):
                found = _read(self._path)
                if found is not None and found.token != self._me.token:
                    self._lost.set()
                    return
                self._me = replace(self._me, beat=self._me.beat + 1)
                _write(self._path, self._me)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[Lock]:
    """Holds the lock whose file is `path` during the block.

    Args:
      path: The file, in a folder that exists. It is deleted at the end; one that a killed process
        left is taken over, if it was on another machine after two minutes.

    Raises:
      CheckpointError: If a living process holds it, or the file is none of a lock.
      OSError: If the file cannot be written.
    """
    lock = Lock(path)
    try:
        yield lock
    finally:
        lock.release()


def _lock(descriptor: int) -> bool:
    """Returns False if the system knows another process that has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: what the file says decides
    return True


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write(path: Path, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).ljust(_SIZE - 1) + "\n"
    # Another open file than the locked one: object stores upload a file when it is closed.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, text.encode(), 0)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Holder | None:
    """Returns what the file says; None if there is none, or nothing was written to it yet.

    Raises:
      CheckpointError: If it says something else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not data.strip(b" \n\0"):
        return None
    try:
        values = json.loads(data)
        return Holder(**{field.name: values[field.name] for field in fields(Holder)})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a lock of jaxft, and a run would replace it. Move it away, or name "
            "another folder with --config.train.workdir=…."
        ) from error


def _machine() -> str:
    """Returns what a process number belongs to: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _lives(holder: Holder) -> bool:
    """Whether a process of this machine still runs, and is not a later one of the same number."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    try:
        return _started(holder.pid) == holder.started
    except OSError:
        return True  # hidden from this user


def _started(pid: int) -> str:
    """Returns when a process was started; empty if it has ended and nobody has asked how.

    Raises:
      OSError: If it cannot be known.
    """
    if Path("/proc/self/stat").exists():
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *rest = text.rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return "" if not state or state.startswith("Z") else started.strip()
