"""Several real processes on loopback, as the hosts of one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig
from tests.tiny_run import command


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(devices: int, folder: Path) -> dict[str, str]:
    """Returns the environment of a process with so many CPU devices; it imports from `folder`."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(folder)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "PYTHONUNBUFFERED": "1",
    }


class Hosts:
    """Processes of one run; on leaving the context all of them are gone.

    Args:
      commands: The command line of each, without the flags that join them.
      folder: Gets `host0.txt`, … with what they print; modules in it can be imported.
      devices: CPU devices of each.
      absent: Numbers of those that are not started.
      folders: Current folder of each; by default that of the test.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        folder: Path,
        *,
        devices: int,
        absent: Sequence[int] = (),
        folders: Sequence[Path] | None = None,
    ):
        self._logs = [folder / f"host{i}.txt" for i in range(len(commands))]
        join = [f"--coordinator=localhost:{free_port()}", f"--processes={len(commands)}"]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for i, line in enumerate(commands):
            if i not in absent:
                with self._logs[i].open("wb") as log:
                    self.processes[i] = subprocess.Popen(
                        [*line, *join, f"--process={i}"],
                        env=environment(devices, folder),
                        cwd=folders[i] if folders else None,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def text(self, host: int) -> str:
        """What a host has printed so far."""
        return self._logs[host].read_text(errors="replace")

    def wait(self, timeout: float = 120) -> dict[int, int]:
        """Returns the exit status of each, once all have ended."""
        limit = time.monotonic() + timeout
        try:
            for process in self.processes.values():
                process.wait(max(limit - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a host hangs:\n{self.all_text()}") from None
        return {i: process.returncode for i, process in self.processes.items()}

    def succeed(self) -> None:
        """Waits; fails with what they printed unless all of them succeed."""
        assert set(self.wait().values()) == {0}, self.all_text()

    def wait_until(self, condition: Callable[[], Any], timeout: float = 120) -> None:
        """Waits until `condition` holds, while all of them run."""
        limit = time.monotonic() + timeout
        while not condition():
            ended = any(process.poll() is not None for process in self.processes.values())
            assert not ended and time.monotonic() < limit, self.all_text()
            time.sleep(0.05)

    def expect(self, host: int, text: str, timeout: float = 20) -> None:
        """Fails unless a host that has ended has printed `text`, its sentinel included."""
        limit = time.monotonic() + timeout
        while text not in self.text(host):
            assert time.monotonic() < limit, f"{text!r} is missing:\n{self.all_text()}"
            time.sleep(0.05)

    def send(self, host: int, number: signal.Signals) -> None:
        """Sends a signal to one of them."""
        self.processes[host].send_signal(number)

    def all_text(self) -> str:
        """What all of them printed."""
        return "\n".join(f"--- host {i}\n{self.text(i)[-6000:]}" for i in self.processes)


def train_on(
    hosts: int, config: RunConfig, folder: Path, *options: str, devices: int, **kwargs: Any
) -> Hosts:
    """Starts `jaxft train` on several hosts."""
    return Hosts([command(config, *options)] * hosts, folder, devices=devices, **kwargs)


def script(code: str, *, before: str = "") -> list[str]:
    """Returns the command line of a process that runs `code` as one of several.

    Args:
      code: Sees `distributed`, `jax` and `time`.
      before: Runs before the processes join.
    """
    return [sys.executable, "-c", _SCRIPT.format(code=code, before=before)]


_SCRIPT = """\
import sys, time
import jax
from jaxft import distributed
{before}
coordinator, processes, process = (a.partition("=")[2] for a in sys.argv[1:])
with distributed.together(
    coordinator=coordinator, processes=int(processes), process=int(process)
):
    {code}
"""
