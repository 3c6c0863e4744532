"""The executor of this machine, with real processes."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jaxft.service.executors import Launch, State
from jaxft.service.executors.local import Local


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program(Launch):
    """A launch of a few lines of Python in place of a run."""

    code: str

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code]


def launch(tmp_path: Path, code: str, **values: str) -> Program:
    log = tmp_path / "log.txt"
    return Program(job="ftjob-a", attempt=0, config=tmp_path, log=log, code=code, **values)


def wait(local: Local, handle: str, state: State) -> None:
    for _ in range(500):
        if local.state(handle) is state:
            return
        time.sleep(0.02)
    raise AssertionError(f"{handle} is not {state}")


def log_of(tmp_path: Path, text: str) -> None:
    for _ in range(500):
        if text in (tmp_path / "log.txt").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("it printed nothing")


WAITS = "import time; print('up', flush=True); time.sleep(60)"


def test_a_process_is_found_by_another_executor_and_ends_by_a_signal(tmp_path: Path):
    local, program = Local(tmp_path / "l"), launch(tmp_path, WAITS)
    assert local.find(program) is None
    handle = local.submit(program)
    log_of(tmp_path, "up\n")
    other = Local(tmp_path / "l")  # as after a restart of the worker
    assert other.find(program) == handle and other.state(handle) is State.RUNNING
    assert other.submit(program) == handle  # and no second process
    other.stop(handle)
    wait(other, handle, State.ENDED)
    wait(local, handle, State.ENDED)
    other.stop(handle)
    assert (tmp_path / "log.txt").read_text() == "up\n"


def test_a_process_that_does_not_end_is_killed(tmp_path: Path):
    code = "import signal; signal.signal(15, signal.SIG_IGN); " + WAITS
    local, program = Local(tmp_path / "l", grace=0.2), launch(tmp_path, code)
    handle = local.submit(program)
    log_of(tmp_path, "up\n")
    local.stop(handle)
    time.sleep(0.1)
    assert local.state(handle) is State.RUNNING
    time.sleep(0.2)
    local.stop(handle)
    wait(local, handle, State.ENDED)


def test_a_killed_process_has_ended(tmp_path: Path):
    local, program = Local(tmp_path / "l"), launch(tmp_path, WAITS)
    handle = local.submit(program)
    log_of(tmp_path, "up\n")
    os.kill(int((tmp_path / "l" / handle).read_text()), signal.SIGKILL)
    wait(local, handle, State.ENDED)


def test_a_file_of_a_worker_that_died_before_the_start_is_no_launch(tmp_path: Path):
    local, program = Local(tmp_path / "l"), launch(tmp_path, "print('done')")
    (tmp_path / "l" / program.name).touch()
    assert local.find(program) is None
    wait(local, local.submit(program), State.ENDED)
    assert (tmp_path / "log.txt").read_text() == "done\n"


@pytest.mark.parametrize(
    ("platform", "name"), [("gpu", "CUDA_VISIBLE_DEVICES"), ("tpu", "TPU_VISIBLE_CHIPS")]
)
def test_a_process_sees_its_devices_alone(tmp_path: Path, platform: str, name: str):
    code = f"import os; print(os.environ['{name}'])"
    local = Local(tmp_path / "l")
    wait(
        local,
        local.submit(launch(tmp_path, code, devices="2,3", platform=platform)),
        State.ENDED,
    )
    assert (tmp_path / "log.txt").read_text() == "2,3\n"
