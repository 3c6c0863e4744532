"""The server's side of the generator: starts its process on first use, asks it, and ends it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import httpx

from jaxft.service.errors import ApiError
from jaxft.service.generator.protocol import Generate

_START_SECONDS = 120  # until the process listens; importing jax takes most of it
_STOP_SECONDS = 10
_AT_ONCE = 1.0
_LONGEST_PATH = 100  # bytes of a socket's path, of which systems allow 104 or more


def runtime_folder() -> str:
    """Returns a folder of this machine for sockets, which file systems of networks cannot hold."""
    return os.environ.get("XDG_RUNTIME_DIR") or "/tmp"


class Generator:
    """A process that generates text, started when it is first needed and again if it has ended.

    Args:
      socket: Path of its unix socket.
      log: File that gets what it prints; absent: the server's own output.
      options: Of its command line, such as `{"dtypes": "bfloat16", "idle": "30"}`.
      environment: Variables that it has beside those of the server, such as which devices it sees.
    """

    def __init__(
        self,
        socket: Path,
        *,
        log: Path | None = None,
        options: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self._folder = ""
        if len(os.fsencode(socket)) > _LONGEST_PATH:
            # Of this user alone, and not below the temporary files, which may lie as deep.
            self._folder = tempfile.mkdtemp(prefix="jaxft-", dir=runtime_folder())
            socket = Path(self._folder) / "generator.sock"
        self._socket, self._log, self._options = socket, log, dict(options or {})
        # Devices may be those of a job: what is not needed is not taken.
        spared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._environment = spared | os.environ | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = asyncio.Lock()
        self._client: httpx.AsyncClient | None = None

    @property
    def pid(self) -> int:
        """Id of the process; 0 if there is none."""
        return 0 if not self._is_alive() or self._process is None else self._process.pid

    async def generate(self, asked: Generate) -> AsyncGenerator[dict[str, Any]]:
        """Yields what the generator says of some texts; leaving the iterator ends these.

        Raises:
          ApiError: If it refuses, fails or cannot be started; under way, too.
        """
        client = await self._started()
        process, begun, sent = self._process, False, time.monotonic()
        try:
            async with contextlib.aclosing(self._lines(client, asked)) as lines:
                async for line in lines:
                    begun = True
                    yield line
            return
        except httpx.TransportError as error:
            # It may end, as it does when it was idle for long, or be killed, while the request is
            # on its way. One that takes its time to die may do so of the request.
            at_once = time.monotonic() - sent < _AT_ONCE
            if begun or not await asyncio.to_thread(_has_ended, process, at_once):
                raise _failed("its process ended while it wrote") from error
        client = await self._started()
        try:
            async with contextlib.aclosing(self._lines(client, asked)) as lines:
                async for line in lines:
                    yield line
        except httpx.TransportError as error:
            raise _failed("its process ended while it wrote") from error

    async def status(self) -> dict[str, Any] | None:
        """Returns what is loaded and under way; None if there is no process."""
        if not self._is_alive() or self._client is None:
            return None
        try:
            return (await self._client.get("/status")).json()
        except httpx.TransportError:
            return None

    async def stop(self) -> None:
        """Ends the process, and with it what is under way; the next request starts another."""
        async with self._starting:
            if self._client is not None:
                await self._client.aclose()
                self._client = None
            await asyncio.to_thread(self._end)

    def close(self) -> None:
        """Ends the process once and for all, when no event loop runs any more."""
        self._end()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _lines(
        self, client: httpx.AsyncClient, asked: Generate
    ) -> AsyncGenerator[dict[str, Any]]:
        body = asked.model_dump_json()
        headers = {"content-type": "application/json"}
        async with client.stream("POST", "/generate", content=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                raise _refused(response)
            async for text in response.aiter_lines():
                line = json.loads(text)
                if "error" in line:
                    raise _error_of(line["error"], 500)
                yield line

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _started(self) -> httpx.AsyncClient:
        """Returns a client of a process that listens."""
        async with self._starting:
            if not self._is_alive() or self._client is None:
                if self._client is not None:
                    await self._client.aclose()
                self._socket.parent.mkdir(parents=True, exist_ok=True)
                self._socket.unlink(missing_ok=True)
                self._start()
                transport = httpx.AsyncHTTPTransport(
                    uds=str(self._socket),
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
                )
                # An answer takes as long as it takes; a model is loaded before its first line.
                self._client = httpx.AsyncClient(
                    transport=transport, base_url="http://generator", timeout=None
                )
                await self._wait_for(self._client)
            return self._client

    def _start(self) -> None:
        command = [sys.executable, "-m", "jaxft.service.generator", f"--socket={self._socket}"]
        command += [f"--parent={os.getpid()}"]
        command += [f"--{name}={value}" for name, value in self._options.items()]
        # In a session of its own, so that Ctrl-C is the server's to answer.
        with contextlib.ExitStack() as stack:
            log = None if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    async def _wait_for(self, client: httpx.AsyncClient) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _START_SECONDS
        while loop.time() < until:
            if self._process is not None and (code := self._process.poll()) is not None:
                said = f" It said: {self._last_words()}" if self._log is not None else ""
                raise _failed(f"its process ended at once with exit code {code}.{said}")
            try:
                await client.get("/status")
                return
            except httpx.TransportError:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(self._end)
        raise _failed(f"its process did not listen within {_START_SECONDS} s")

    def _last_words(self) -> str:
        assert self._log is not None
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " ".join(lines[-3:])

    def _end(self) -> None:
        """Ends the process: by SIGTERM, and by SIGKILL if that takes too long."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._socket.unlink(missing_ok=True)


def _has_ended(process: subprocess.Popen[bytes] | None, at_once: bool) -> bool:
    """Returns whether a process has ended, or is about to: as it was told to, or at once."""
    try:
        return process is None or process.wait(_STOP_SECONDS) == 0 or at_once
    except subprocess.TimeoutExpired:
        return False


def _refused(response: httpx.Response) -> ApiError:
    try:
        return _error_of(response.json()["error"], response.status_code)
    except (ValueError, KeyError, TypeError):
        return _failed(f"it answered {response.status_code}: {response.text[:200]}")


def _error_of(error: Mapping[str, Any], status: int) -> ApiError:
    return ApiError(
        error["message"],
        status=status,
        param=error["param"],
        code=error["code"],
        kind=error["type"],
    )


def _failed(what: str) -> ApiError:
    return ApiError(
        f"The process that generates text failed: {what}",
        status=503,
        code="generator_unavailable",
        kind="server_error",
    )
