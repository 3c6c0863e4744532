"""Measures a server under many clients while a job trains beside it, on the same cores.

    .venv/bin/python -m benchmarks.service_load --output benchmarks/results/service-load.jsonl

Starts `jaxft serve` in a temporary folder with a tiny model and one job, takes the time of the
job's steps alone, then lets clients read (files, jobs, events, models), upload files of 64 kB and
follow the stream of events, each a request every `--pause` seconds. Times are of whole requests at
the client, which shares the cores; `step_ratio` is the time of the job's steps meanwhile over that
alone, `clients_share_of_cores` what the clients themselves took of the cores, and
`server_share_of_cores` what server and worker took. Linux alone tells the latter.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.lines import put
from jaxft.workdir.environment import environment

_READS = ("/files", "/fine_tuning/jobs", "/models", "/fine_tuning/jobs/{job}/events")
_CONTENT = b'{"messages": []}\n' * 4096


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description="Measures a server under load.")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between requests of one")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of both phases")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxft-load-") as folder:
        found = measure(options, Path(folder))
    put(found | {"environment": environment()}, options.output)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns what one server did."""
    _write_model(folder)
    with _server(folder) as (url, server):
        job = _start_job(folder, url)
        metrics = folder / "service" / "jobs" / job / "run" / "metrics.jsonl"
        alone = _step_seconds(metrics, options.seconds)
        first = _last(metrics)
        start, ours, theirs = time.monotonic(), time.process_time(), _core_seconds(server)
        times = asyncio.run(_load(options, url, job))
        cores = (time.monotonic() - start) * (os.cpu_count() or 1)
        ours, theirs = time.process_time() - ours, _core_seconds(server) - theirs
        loaded = _between(first, _last(metrics))
        httpx.post(f"{url}/fine_tuning/jobs/{job}/cancel")
    return {
        "measurement": "service_load",
        "clients": options.clients,
        "pause": options.pause,
        "step_seconds_alone": alone,
        "step_seconds_loaded": loaded,
        "step_ratio": loaded / alone,
        "clients_share_of_cores": ours / cores,
        "server_share_of_cores": theirs / cores,
        "server_seconds_per_1000_requests": 1000 * theirs / (times["reads"] + times["writes"]),
        **times,
    }


def _write_model(folder: Path) -> None:
    """Writes a tiny model of random weights, and its data."""
    from tests.tiny_run import write_base, write_chats

    write_base(folder / "base")
    write_chats(folder / "train.jsonl", 2000)


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[tuple[str, int]]:
    """Yields the address of a server, and the id of its process."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "jaxft", "serve", f"--models={folder / 'base'}"]
    command += [f"--workdir={folder / 'service'}", f"--port={port}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", process.pid
            time.sleep(5)  # for the job to end
        finally:
            process.send_signal(signal.SIGTERM)


def _core_seconds(server: int) -> float:
    """Returns what a server and its worker have taken of the cores; jobs are of the worker."""
    lists = Path(f"/proc/{server}/task").glob("*/children")
    processes = [server, *(int(child) for found in lists for child in found.read_text().split())]
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # as user, and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK")


def _start_job(folder: Path, url: str) -> str:
    with (folder / "train.jsonl").open("rb") as file:
        form = {"purpose": "fine-tune"}
        number = httpx.post(f"{url}/files", files={"file": file}, data=form).json()["id"]
    settings = {"n_epochs": 50, "batch_size": 256, "config": {"train.steps": 100_000}}
    body = {"model": "base", "training_file": number, "hyperparameters": settings}
    job = httpx.post(f"{url}/fine_tuning/jobs", json=body).json()["id"]
    while (found := httpx.get(f"{url}/fine_tuning/jobs/{job}").json())["status"] != "running":
        assert found["error"] is None, found["error"]
        time.sleep(0.5)
    return job


def _step_seconds(metrics: Path, seconds: float) -> float:
    """Waits; returns the mean time of the steps meanwhile, by the run's own clock."""
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.5)
    first = _last(metrics)
    time.sleep(seconds)
    return _between(first, _last(metrics))


def _last(metrics: Path) -> dict[str, Any]:
    return json.loads(metrics.read_text().splitlines()[-1])


def _between(first: dict[str, Any], last: dict[str, Any]) -> float:
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


async def _load(options: argparse.Namespace, url: str, job: str) -> dict[str, Any]:
    reads: list[float] = []
    writes: list[float] = []
    errors: list[str] = []
    streamed = 0

    async def client(number: int, http: httpx.AsyncClient) -> None:
        nonlocal streamed
        chance, end = random.Random(number), time.monotonic() + options.seconds
        await asyncio.sleep(chance.uniform(0, options.pause))
        if number % 10 == 0:  # one in ten follows the events
            path = f"{url}/fine_tuning/jobs/{job}/events?stream=true"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(end - time.monotonic()):
                    async for _ in _lines(http, path):
                        streamed += 1
            return
        while time.monotonic() < end:
            start = time.perf_counter()
            try:
                if chance.random() < 0.1:
                    files = {"file": ("a.jsonl", _CONTENT)}
                    answer = await http.post(
                        f"{url}/files", files=files, data={"purpose": "fine-tune"}
                    )
                    writes.append(time.perf_counter() - start)
                else:
                    path = chance.choice(_READS).format(job=job)
                    answer = await http.get(f"{url}{path}", params={"limit": 20})
                    reads.append(time.perf_counter() - start)
                if answer.is_error:
                    errors.append(answer.text)
            except httpx.HTTPError as error:
                errors.append(repr(error))
            await asyncio.sleep(options.pause * chance.uniform(0.5, 1.5))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http:
        await asyncio.gather(*(client(number, http) for number in range(options.clients)))
    return {
        "reads": len(reads),
        "writes": len(writes),
        "errors": len(errors),
        "lines_streamed": streamed,
        "read_median_seconds": statistics.median(reads),
        "read_p99_seconds": statistics.quantiles(reads, n=100)[-1],
        "write_p99_seconds": statistics.quantiles(writes, n=100)[-1],
    }


async def _lines(http: httpx.AsyncClient, path: str) -> AsyncIterator[str]:
    async with http.stream("GET", path) as answer:
        async for line in answer.aiter_lines():
            yield line


if __name__ == "__main__":
    main()
