"""A lock between real processes: who is refused, and that a dead one is not in the way."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxft.errors import CheckpointError
from jaxft.workdir import lock
from jaxft.workdir.lock import Lock, hold

# Holds a lock until its input ends. WITHOUT_LOCKS is storage that does not know them.
HOLDER = """
import errno, fcntl, sys
from jaxft.workdir import lock
lock._BEAT = lock._FIRST_BEAT = 0.1
if sys.argv[2] == "WITHOUT_LOCKS":
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = refuse
from pathlib import Path
with lock.hold(Path(sys.argv[1])) as held:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("holds", flush=True)
        except Exception as error:
            print("lost:", error, flush=True)
"""
# Makes a process and its children live in a container's own numbers of processes.
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.lock"


@pytest.fixture
def start(file):
    """Starts processes that hold the lock, and ends them after the test."""
    processes = []

    def start(*, container=False, storage="WITH_LOCKS"):
        command = [sys.executable, "-c", HOLDER, str(file), storage]
        process = subprocess.Popen(
            [*(CONTAINER if container else []), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def soon(monkeypatch):
    """Lets a holder on another machine count as dead after a second."""
    monkeypatch.setattr(lock, "_DEAD", 1.0)
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_FIRST_BEAT", 0.1)


def needs_containers():
    found = shutil.which("unshare") and subprocess.run([*CONTAINER, "true"], capture_output=True)
    if not found or found.returncode:
        pytest.skip("needs the right to make a namespace of processes")


def kill(process):
    """Kills a process and what it started; a zombie is left, as nobody asks how it ended."""
    os.killpg(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("storage", ["WITH_LOCKS", "WITHOUT_LOCKS"])
def test_a_living_holder_is_named_and_keeps_others_out(file, start, storage):
    process = start(storage=storage)
    with pytest.raises(CheckpointError) as error, hold(file):
        pass
    said = str(error.value)
    assert f"process {process.pid} on host {os.uname().nodename}, since 20" in said
    assert "--config.train.workdir=" in said
    assert json.loads(file.read_text())["pid"] == process.pid


@pytest.mark.parametrize("storage", ["WITH_LOCKS", "WITHOUT_LOCKS"])
def test_a_killed_holder_is_not_in_the_way_for_a_moment(file, start, storage):
    kill(start(storage=storage))
    before = time.monotonic()
    with hold(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert time.monotonic() - before < 1
    assert not file.exists()


def test_a_later_process_of_the_same_number_is_not_the_holder(file, start):
    process = start()
    kill(process)
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"pid": os.getpid()}))
    with hold(file):
        pass


def test_one_process_cannot_hold_it_twice(file):
    with hold(file), pytest.raises(CheckpointError, match=f"process {os.getpid()} on host"):
        Lock(file)


def test_a_holder_that_ended_leaves_no_file(file, start):
    process = start()
    process.stdin.close()
    assert process.wait() == 0
    assert not file.exists()


def test_a_living_holder_in_another_container_is_seen_by_its_signs_of_life(file, start, soon):
    needs_containers()
    process = start(container=True)
    with (
        pytest.raises(CheckpointError, match="in use by another run: process 1 on host"),
        hold(file),
    ):
        pass
    process.stdin.close()
    process.wait()
    with hold(file):
        pass


def test_a_dead_holder_in_another_container_is_taken_over_after_the_stated_time(
    file, start, soon, capfd
):
    needs_containers()
    kill(start(container=True))
    before = time.monotonic()
    with hold(file) as held:
        held.check()
    assert 1 <= time.monotonic() - before < 3
    assert "Waiting up to 1 s for a sign of life" in " ".join(capfd.readouterr().err.split())


def test_a_holder_that_was_suspended_learns_that_it_was_taken_over(file, start, soon, monkeypatch):
    process = start(storage="WITHOUT_LOCKS")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "holds\n"
    os.killpg(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    with hold(file) as held:
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(1)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(f"lost: {file.parent} was taken over")
        process.stdin.close()
        process.wait()
        held.check()
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_of_two_that_start_at_once_where_nothing_locks_one_stays(file, soon, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(Lock, "_refuse_if_held", lambda *_, **__: None)  # both look before either
    first, second = Lock(file), Lock(file)
    time.sleep(1)
    with pytest.raises(CheckpointError, match="was taken over by another run"):
        first.check()
    second.check()
    first.release()
    assert file.exists()
    second.release()
    assert not file.exists()


@pytest.mark.parametrize("content", ["", " \n", "\0" * 1024])
def test_a_file_that_a_crash_left_empty_is_taken(file, content):
    file.write_text(content)
    with hold(file):
        pass


@pytest.mark.parametrize("content", ["mine", "[1]", '{"pid": 1}'])
def test_a_file_of_others_is_left_alone(file, content):
    file.write_text(content)
    with pytest.raises(CheckpointError, match="is not a lock of jaxft"), hold(file):
        pass
    assert file.read_text() == content
