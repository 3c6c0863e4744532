"""`jaxft serve` as a process, for tests of real runs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.tiny_run import write_base, write_chats


class Server:
    """A server on a folder with a tiny model; it can be killed and started again.

    Args:
      folder: Empty; holds the model, data and the service's workdir.
      options: Further options of the command.
    """

    def __init__(self, folder: Path, *options: str):
        self.folder, self.workdir = folder, folder / "service"
        write_base(folder / "base")
        write_chats(folder / "train.jsonl", 40)
        write_chats(folder / "valid.jsonl", 12, seed=1)
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def environment(self) -> dict[str, str]:
        more = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(self.folder / "cache")}
        more |= {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": "none"}
        return {**os.environ, **more, "XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def start(self) -> None:
        command = [sys.executable, "-m", "jaxft", "serve", f"--models={self.folder / 'base'}"]
        command += [f"--workdir={self.workdir}", f"--port={self.port}", *self._options]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{self.port}/health")
                return
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        raise TimeoutError(self.log)

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def processes(self, *words: str) -> list[int]:
        """Returns the ids of processes of this service whose command has all words."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_bytes().decode().split("\0")
                if all(any(word in part for part in command) for word in words):
                    found.append(int(path.parent.name))
        return found

    def end_runs(self) -> None:
        """Kills what outlives a server: its runs."""
        for process in self.processes(str(self.workdir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[Server]:
    """Serves during the block."""
    found = Server(folder, *options)
    found.start()
    try:
        yield found
    finally:
        found.stop()
        found.end_runs()


def client_of(found: Server, **options: object) -> OpenAI:
    return OpenAI(base_url=found.url, api_key="none", **options)  # pyright: ignore


def wait(client: OpenAI, job: str, *statuses: str, seconds: float = 180) -> FineTuningJob:
    """Returns a job that has one of the statuses, once it has; another end is an error."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in statuses:
            return found
        assert found.status not in ("failed", "succeeded", "cancelled"), found
        time.sleep(0.2)
    raise TimeoutError(f"{job} is {found.status}")


def upload(client: OpenAI, found: Server, name: str = "train.jsonl") -> str:
    """Returns the id of a file of the server's folder."""
    return client.files.create(file=found.folder / name, purpose="fine-tune").id
