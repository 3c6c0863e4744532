"""Measures loading: its speed beside `dd`, the memory it takes, and what one host of many reads.

    .venv/bin/python benchmarks/load.py --output benchmarks/results/load.jsonl

Writes a checkpoint of Qwen3-4B's shape with random weights (8 GB), then lets `dd` and jaxft read it
in turns, each in a process of its own and with the page cache dropped before (which needs root; the
files' own pages are given up otherwise). All memory is touched before, too: where the machine is a
virtual one, its host may hand memory out slower than a disk is read. Then writes sparse files of
Llama 3.1 70B's shape, and reads what host 3 of 32 needs for 4 devices under `fsdp`. Prints one JSON
line per measurement and exits with 1 if a bound does not hold:

    memory   peak resident memory of the process <= parameters + 1 GiB
    speed    bytes a second >= 70 % of dd's, medians; loading into the stored bfloat16
    bytes    what all system calls read <= 1.1 x what the host's devices hold
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lines import put
from benchmarks.shapes import SHAPES

HOSTS, DEVICES, HOST = 32, 4, 3
SHARD_BYTES = 4_000_000_000
GIB = 2**30


def main() -> int:
    """Runs as the orchestrator, or as one measurement with --worker."""
    options = _options()
    if options.worker:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        record = {"load": measure_load, "host": measure_host}[options.worker](options)
        print(json.dumps(record))
        return 0
    measurements = {"load": whole_model, "host": one_host}
    named = options.only or list(measurements)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="jaxft-load-") as scratch:
        options.folder = scratch
        records = [record for name in named for record in measurements[name](options)]
    return 0 if all(record.get("holds", True) for record in records) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures loading.")
    parser.add_argument("--scratch", type=Path, help="folder with 9 GB of room; else a temporary")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], help="to load into")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=("load", "host"))
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    parser.add_argument("--worker", choices=("load", "host"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    return parser.parse_args()


def whole_model(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the records of dd and jaxft reading a whole checkpoint in turns."""
    folder = Path(options.folder) / "qwen3-4b"
    write_checkpoint(folder, "qwen3-4b", sparse=False)
    speeds: dict[str, list[float]] = {"dd": [], **{dtype: [] for dtype in options.dtypes}}
    for _ in range(options.rounds):
        for system in speeds:
            cold = drop_caches(folder)
            _touch_memory()
            record = _dd(folder) if system == "dd" else _worker("load", folder, system)
            speeds[system].append(record["gigabytes_per_second"])
            yield put(record | {"cold": cold}, options.output)
    for dtype in options.dtypes:
        medians = [statistics.median(speeds[system]) for system in (dtype, "dd")]
        ratio = round(medians[0] / medians[1], 3)
        record = {"measurement": "load / dd", "dtype": dtype, "rounds": options.rounds}
        record["ratio"] = ratio
        if dtype == "bfloat16":
            record |= {"least": 0.7, "holds": ratio >= 0.7}
        yield put(record, options.output)
    _remove(folder)


def one_host(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the record of one host of many reading its part of sparse files."""
    folder = Path(options.folder) / "llama-3.1-70b"
    write_checkpoint(folder, "llama-3.1-70b", sparse=True)
    drop_caches(folder)
    yield put(_worker("host", folder, "bfloat16"), options.output)
    _remove(folder)


def write_checkpoint(folder: Path, shape: str, *, sparse: bool) -> None:
    """Writes config.json and shards in bfloat16: random values, or holes in their place."""
    import ml_dtypes
    import numpy as np

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    normal = np.random.default_rng(0).standard_normal(2**25, np.float32) * 0.02
    block = memoryview(normal.astype(ml_dtypes.bfloat16).view(np.uint8))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, tensor in _tensors(shape):
        room -= 2 * math.prod(tensor)
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD_BYTES - 2 * math.prod(tensor)
        shards[-1].append((name, tensor))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {name: file for name, _ in shard}
        _write_shard(folder / file, shard, None if sparse else block)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _tensors(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    from jaxft.hf.rules import expand
    from jaxft.models.config import make_numerics
    from jaxft.models.families import architecture_from_hf

    architecture = architecture_from_hf(SHAPES[shape])
    params = architecture.abstract(make_numerics("bfloat16")).params
    tensors = expand(architecture.naming.rules, {path: spec.shape for path, spec in params.items()})
    # As published files have them: layer after layer.
    order = sorted(tensors, key=lambda tensor: tensor.parts[0].index)
    return [(tensor.name, tensor.shape) for tensor in order]


def _write_shard(
    file: Path, shard: list[tuple[str, tuple[int, ...]]], block: memoryview | None
) -> None:
    header, end = {}, 0
    for name, shape in shard:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if block is None:
            stream.truncate(8 + len(text) + end)
            return
        for start in range(0, end, len(block)):
            stream.write(block[: min(len(block), end - start)])
        stream.flush()
        os.fsync(stream.fileno())


def drop_caches(folder: Path) -> bool:
    """Makes the next read come from the disk; returns whether the kernel was made to do so."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return False


def _touch_memory() -> None:
    """Writes to all memory that is free but 2 GiB, in a process that then ends."""
    program = (
        "import numpy, os\n"
        "free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') - 2 * 2**30\n"
        "numpy.empty(min(max(free, 0), 20 * 2**30), numpy.uint8)[::4096] = 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def _dd(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    started = time.monotonic()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=1M"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in files)
    return _speed("dd", size, seconds)


def _speed(system: str, size: int, seconds: float) -> dict[str, Any]:
    return {
        "measurement": "read",
        "system": system,
        "gigabytes": round(size / 1e9, 3),
        "seconds": round(seconds, 3),
        "gigabytes_per_second": round(size / 1e9 / seconds, 3),
    }


def _worker(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    if name == "host":
        flag = f"--xla_force_host_platform_device_count={HOSTS * DEVICES}"
        environment |= {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*command, "--dtype", dtype],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure_load(options: argparse.Namespace) -> dict[str, Any]:
    """Times loading into the arrays of one device, and says what memory the process took."""
    import jax

    from jaxft.hardware.devices import host_memory
    from jaxft.hf.folder import read_config
    from jaxft.hf.load import load_params
    from jaxft.models.config import make_numerics
    from jaxft.models.families import architecture_from_hf
    from jaxft.workdir.environment import environment

    folder = Path(options.folder)
    architecture = architecture_from_hf(read_config(folder))
    abstract = architecture.abstract(make_numerics(options.dtype)).params
    first = jax.devices()[0]
    before = host_memory().peak or 0
    started = time.monotonic()
    params = load_params(folder, architecture.naming, abstract)
    jax.block_until_ready(params)
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    held = sum(param.nbytes for param in params.values())
    peak = host_memory().peak or 0
    # On an accelerator the parameters are not in this memory.
    most = held + GIB if first.platform == "cpu" else before + GIB
    return _speed("jaxft", size, seconds) | {
        "dtype": options.dtype,
        "parameters": sum(param.size for param in params.values()),
        "parameter_bytes": held,
        "host_peak_bytes_before": before,
        "host_peak_bytes": peak,
        "most": most,
        "holds": peak <= most,
        "environment": environment(),
    }


def measure_host(options: argparse.Namespace) -> dict[str, Any]:
    """Reads what the devices of one host hold; all devices of all hosts are pretended here."""
    import jax

    from jaxft.config import RunConfig
    from jaxft.hardware.devices import host_memory
    from jaxft.hf.folder import read_config
    from jaxft.hf.load import read_slices
    from jaxft.models.config import make_numerics
    from jaxft.models.families import architecture_from_hf
    from jaxft.training.program import make_placement
    from jaxft.workdir.environment import environment

    folder = Path(options.folder)
    architecture = architecture_from_hf(read_config(folder))
    abstract = architecture.abstract(make_numerics(options.dtype))
    config = RunConfig()
    config.strategy = "fsdp"
    shardings = make_placement(config).shardings(abstract.params, abstract.axes)
    mine = jax.devices()[HOST * DEVICES : (HOST + 1) * DEVICES]
    indices = {}
    for path, spec in abstract.params.items():
        whole = shardings[path].devices_indices_map(spec.shape)
        indices[path] = list(dict.fromkeys(whole[device] for device in mine))
    before, started = _bytes_read(), time.monotonic()
    slices = read_slices(folder, architecture.naming, abstract.params, indices)
    seconds = time.monotonic() - started
    read = _bytes_read() - before
    held = sum(values.nbytes for parts in slices.values() for values in parts)
    return {
        "measurement": "one host",
        "shape": "llama-3.1-70b",
        "host": HOST,
        "hosts": HOSTS,
        "devices_per_host": DEVICES,
        "strategy": "fsdp",
        "parameters": sum(math.prod(spec.shape) for spec in abstract.params.values()),
        "held_bytes": held,
        "read_bytes": read,
        "ratio": round(read / held, 4),
        "most": 1.1,
        "holds": read <= 1.1 * held,
        "seconds": round(seconds, 2),
        "host_peak_bytes": host_memory().peak,
        "environment": environment(),
    }


def _bytes_read() -> int:
    """Returns what all system calls of this process have read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


if __name__ == "__main__":
    sys.exit(main())
