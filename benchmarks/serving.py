"""Measures text over HTTP: tokens a second by how many ask, and of adapters in one batch.

    .venv/bin/python -m benchmarks.serving --output benchmarks/results/serving.jsonl

A server with the routes of `jaxft serve` and the generator behind it continue prompts of random
tokens greedily, by a model with random weights; clients ask again as soon as they have an answer.
Prints one JSON line per workload: by clients of one base, then of one adapter and of several, each
asked by its share of the clients. Workloads take turns, after a round that compiles; the fastest
round counts.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from benchmarks.lines import put
from benchmarks.shapes import SHAPES, shape_of
from benchmarks.turns import processor


def main() -> None:
    """Measures as the options say."""
    parser = argparse.ArgumentParser(description="Measures text over HTTP.")
    add = parser.add_argument
    add("--shape", default="15m", help=f"folder, or {', '.join(SHAPES)}")
    add("--clients", type=int, nargs="*", default=[1, 8, 32])
    add("--adapters", type=int, default=4, help="asked in one batch")
    add("--rank", type=int, default=16, help="of the adapters")
    add("--length", type=int, default=32, help="tokens of a prompt")
    add("--new", type=int, default=64, help="new tokens of each answer")
    add("--answers", type=int, default=2, help="of each client in a round")
    add("--rounds", type=int, default=3)
    add("--dtypes", default="float32", choices=("float32", "bfloat16"))
    add("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxft-serving-") as scratch:
        folder = Path(scratch)
        names = write_models(folder, options)
        most = options.clients[-1]
        work = [(["base"], clients) for clients in options.clients]
        work += [(models, most) for models in (names[:1], names) if names]
        found: list[list[Round]] = [[] for _ in work]
        with served(folder, options) as url:
            for number in range(options.rounds + 1):
                for rounds, (models, clients) in zip(found, work, strict=True):
                    one = asyncio.run(ask(url, models, clients, options))
                    rounds += [one] if number else []
        for rounds, (models, clients) in zip(found, work, strict=True):
            put(record(rounds, models, clients, options), options.output)


def write_models(folder: Path, options: argparse.Namespace) -> list[str]:
    """Writes a base with random weights and adapters of it; returns the names of these."""
    import jax

    import jaxft.demo
    from jaxft.hf.peft.adapter import Adapter
    from jaxft.hf.peft.write import write_adapter
    from jaxft.hf.rules import expand
    from jaxft.hf.save import write_tensors
    from jaxft.models.adapters import weights_in
    from jaxft.models.config import make_numerics
    from jaxft.models.families import architecture_from_hf
    from jaxft.models.module import init_params, without_memory

    shape = shape_of(options.shape)
    architecture = architecture_from_hf(shape)
    build = architecture.build(make_numerics("float32"))
    params = jax.device_get(jax.jit(lambda: init_params(build, 0))())
    shapes = {path: value.shape for path, value in params.items()}
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(shape))
    for file in (Path(jaxft.demo.__file__ or "").parent / "base").glob("*token*"):
        shutil.copy(file, base)
    tensors = list(expand(architecture.naming.rules, shapes))
    write_tensors(
        base / "model.safetensors",
        {tensor.name: (np.dtype(np.float32), tensor.shape) for tensor in tensors},
        (t.to_theirs([params[p.rule.ours][p.index] for p in t.parts]) for t in tensors),
    )
    random, names = np.random.default_rng(0), []
    weights = weights_in(without_memory(build))
    sites = {path: w for path, w in weights.items() if path.startswith("layers.")}
    for number in range(options.adapters):
        arrays = {}
        for path, weight in sites.items():
            whole = shapes[f"{path}.w"]
            outputs, inputs = whole[1 : -weight.inputs], whole[-weight.inputs :]
            for leaf, size in (
                ("lora_a", (whole[0], options.rank, *inputs)),
                ("lora_b", (whole[0], *outputs, options.rank)),
            ):
                arrays[f"{path}.{leaf}"] = 0.02 * random.normal(size=size).astype(np.float32)
        alpha: float = 2.0 * options.rank
        adapter = Adapter(arrays, dict.fromkeys(sites, alpha), base=str(base))
        names.append(f"adapter-{number}")
        (folder / names[-1]).mkdir()
        write_adapter(folder / names[-1], adapter, architecture.naming, shapes)
    return names


class _Folders:
    """Models by name: the folders of one."""

    def __init__(self, folder: Path):
        self.folder = folder

    async def find(self, name: str) -> Any:
        return argparse.Namespace(path=str(self.folder / name), step="best")


@contextlib.contextmanager
def served(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Serves the models of a folder; gives the URL."""
    import uvicorn
    from starlette.applications import Starlette

    from jaxft.service.completions import ROUTES
    from jaxft.service.generator.client import Generator

    generator = Generator(folder / "g.sock", options={"dtypes": options.dtypes})
    app = Starlette(routes=ROUTES)
    app.state.models, app.state.generator = _Folders(folder), generator
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        generator.close()


class Round(NamedTuple):
    """All answers to some clients.

    Attributes:
      tokens: New tokens of all answers.
      seconds: From the first question to the last answer.
      waits: Seconds of each answer.
    """

    tokens: int
    seconds: float
    waits: list[float]


def record(
    rounds: Sequence[Round], models: Sequence[str], clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the record of a workload."""
    from jaxft.workdir.environment import environment

    best = max(rounds, key=lambda one: one.tokens / one.seconds)
    return {
        "measurement": "serving",
        "models": "base" if models == ["base"] else f"{len(models)} x rank {options.rank}",
        "clients": clients,
        **{key: getattr(options, key) for key in ("shape", "length", "new", "dtypes")},
        "tokens_per_second": round(best.tokens / best.seconds, 1),
        "tokens": best.tokens,
        "seconds": [round(one.seconds, 2) for one in rounds],
        "median_answer_seconds": round(statistics.median(best.waits), 3),
        "environment": environment(),
        "processor": processor(),
    }


async def ask(url: str, models: Sequence[str], clients: int, options: argparse.Namespace) -> Round:
    """Lets clients ask models in turn, each for some answers one after the other."""
    random = np.random.default_rng(1)
    prompts = random.integers(300, 1000, (clients, options.length)).tolist()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def answers(number: int) -> list[tuple[int, float]]:
            found = []
            for _ in range(options.answers):
                started = time.monotonic()
                body = {
                    "model": models[number % len(models)],
                    "prompt": prompts[number],
                    "max_tokens": options.new,
                    "temperature": 0,
                }
                response = await client.post("/completions", json=body)
                response.raise_for_status()
                tokens = response.json()["usage"]["completion_tokens"]
                found.append((tokens, time.monotonic() - started))
            return found

        started = time.monotonic()
        found = await asyncio.gather(*(answers(number) for number in range(clients)))
        seconds = time.monotonic() - started
    every = [one for of_client in found for one in of_client]
    return Round(sum(tokens for tokens, _ in every), seconds, [waited for _, waited in every])


if __name__ == "__main__":
    main()
