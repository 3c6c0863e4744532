r"""What quantised weights lose, and what compilers make of them.

    python -m benchmarks.quantised ../shared/models/stories260K \
        --output benchmarks/results/quantised.jsonl

Errors are those of 2^22 normal numbers and of the matrices of a model: the root of the mean square
of what is lost, over that of the numbers, for each kind as it is stored and for what it could have
been. Programs are compiled and not run, for four devices of a CPU and, where libtpu is installed,
for TPU v5e: the bytes that a device holds and gathers of a layer under fsdp, and the cycles that
libtpu estimates for decoding one weight `[4096, 4096]` in several ways.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.lines import append
from jaxft.compiled.collectives import collectives
from jaxft.hf.read import Entry
from jaxft.hf.stored import stored_tensors
from jaxft.models import quantised
from jaxft.planner.topology import parse, use_compiler_alone
from jaxft.workdir.environment import environment

_BLOCK, _GROUP = 64, 256
_LEVELS = np.asarray(quantised.NF4, np.float32)


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def _scaled(w: np.ndarray, block: int, levels: np.ndarray, top: float) -> np.ndarray:
    """Returns what is left of numbers, with float32 scales."""
    blocks = w.reshape(-1, block)
    scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-30) / top
    return (_nearest(blocks / scale, levels) * scale).reshape(w.shape)


def _twice(w: np.ndarray) -> np.ndarray:
    """Returns what is left with scales that are quantised themselves, as bitsandbytes does it.

    Their mean is taken off and 256 of them share a scale; codes are of 8 bits, linear here.
    """
    blocks = w.reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(1)
    mean = scale.mean()
    levels = np.arange(-127, 128, dtype=np.float32)
    scale = _scaled(scale - mean, min(_GROUP, scale.size), levels, 127) + mean
    scale = np.maximum(scale, 1e-30)[:, None]
    return (_nearest(blocks / scale, _LEVELS) * scale).reshape(w.shape)


def _as_fp8(w: np.ndarray, block: int) -> np.ndarray:
    blocks = w.reshape(-1, block)
    scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-30) / 448
    codes = jnp.asarray(blocks / scale).astype(jnp.float8_e4m3fn)
    return (np.asarray(codes.astype(jnp.float32)) * scale).reshape(w.shape)


def _stored(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: np.asarray(
        quantised.decode(*quantised.encode(jnp.asarray(w), kind, block=_BLOCK), jnp.float32)
    )


def _ways() -> Iterator[tuple[str, float, Callable[[np.ndarray], np.ndarray]]]:
    """Yields a name, bits for each number in rows of 4096, and what is left of numbers."""
    bytes_, row = np.arange(-127, 128, dtype=np.float32), 4096
    for kind, dtype in quantised.DTYPES.items():
        bits = 8 if np.dtype(dtype).name in ("int8", "float8_e4m3fn") else 4
        yield f"{kind}, as it is stored", bits + 16 / _BLOCK, _stored(kind)
    levels = np.arange(-7, 8, dtype=np.float32)
    yield "nf4, float32 scales", 4 + 32 / _BLOCK, lambda w: _scaled(w, _BLOCK, _LEVELS, 1)
    bits = 4 + 8 / _BLOCK + 32 / _BLOCK / _GROUP
    yield "nf4, scales quantised too", bits, _twice
    yield "int4, 7 codes on each side", 4.25, lambda w: _scaled(w, _BLOCK, levels, 7)
    yield "int8, a scale a row", 8 + 16 / row, lambda w: _scaled(w, w.shape[-1], bytes_, 127)
    yield "fp8, a scale a row", 8 + 16 / row, lambda w: _as_fp8(w, w.shape[-1])


def errors(name: str, weights: list[np.ndarray]) -> Iterator[dict]:
    """Yields the error of each kind on some weights."""
    total = sum(float(np.sum(w.astype(np.float64) ** 2)) for w in weights)
    for way, bits, left in _ways():
        lost = sum(float(np.sum((left(w) - w).astype(np.float64) ** 2)) for w in weights)
        yield {"weights": name, "way": way, "bits": round(bits, 3), "lost": (lost / total) ** 0.5}


def _matrices(folder: Path) -> list[np.ndarray]:
    stored, problems = stored_tensors(folder)
    assert not problems, problems
    found = [
        entry.map()
        for name, entry in stored.items()
        if "layers" in name and isinstance(entry, Entry)
    ]
    return [np.asarray(w, np.float32) for w in found if w.ndim == 2]


def _by_hand(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Decodes codes that lie two to a byte along the last dimension."""
    both = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    return quantised.decode(both.astype(jnp.uint4), scales, dtype)


def held_and_gathered(platform: str, devices: Any) -> Iterator[dict]:
    """Yields what a device holds and gathers of two layers `[2048, 8192]`, compiled."""
    mesh = Mesh(np.asarray(devices[:4]), ("fsdp",))
    shape, count = (2, 2048, 8192), 2048 * 8192
    spec, last = P(None, None, "fsdp"), {"bf16": None, "nf4, by hand": (2048, 4096)}
    for kind in ("bf16", *quantised.DTYPES, "nf4, by hand"):
        if kind == "bf16":
            leaves: dict[str, Any] = {"w": (shape, jnp.bfloat16)}
        else:
            found = quantised.abstract(shape, ("x",) * 3, kind.partition(",")[0])
            leaves = {name: leaf[:2] for name, leaf in found.items()}
        if "hand" in kind:
            leaves["codes"] = ((2, *last[kind]), jnp.uint8)

        def value(leaves: dict, kind: str = kind) -> jax.Array:
            whole = {
                n: jax.lax.all_gather(x, "fsdp", axis=1, tiled=True) for n, x in leaves.items()
            }
            if kind == "bf16":
                return whole["w"]
            decode = _by_hand if "hand" in kind else quantised.decode
            return decode(whole["codes"], whole["scales"], jnp.bfloat16)

        def layer(x: jax.Array, leaves: dict, value: Any = value) -> tuple[jax.Array, None]:
            w = jax.shard_map(
                value, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=P(), check_vma=False
            )(leaves)
            return jax.lax.dot_general(x @ w.T, w, (((1,), (0,)), ((), ()))), None

        def step(x: jax.Array, leaves: dict, layer: Any = layer) -> jax.Array:
            return jax.lax.scan(layer, x, leaves)[0]

        x = jax.ShapeDtypeStruct(
            (4096, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp"))
        )
        specs = {
            name: jax.ShapeDtypeStruct(of_shape, dtype, sharding=NamedSharding(mesh, spec))
            for name, (of_shape, dtype) in leaves.items()
        }
        compiled: Any = jax.jit(step).lower(x, specs).compile()
        memory = compiled.memory_analysis()
        gathered = sum(
            sum(found.arrays)
            for found in collectives(compiled.as_text(), mesh)
            if found.kind == "all-gather"
        )
        yield {
            "platform": platform,
            "kind": kind,
            "held_bits": 8 * 4 * (memory.argument_size_in_bytes - 2 * 1024 * 8192) / 2 / count,
            "gathered_bits": 8 * gathered / count,
            "temporary": memory.temp_size_in_bytes,
        }


def cycles(device: Any) -> Iterator[dict]:
    """Yields cycles that libtpu estimates for decoding a weight."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    size = 4096

    def table(codes: jax.Array) -> jax.Array:
        return jnp.asarray(_LEVELS)[codes.astype(jnp.int32)]

    def repeated(scales: jax.Array) -> jax.Array:
        return jnp.repeat(scales.astype(jnp.float32), _BLOCK, axis=-1)

    def product(scales: jax.Array) -> jax.Array:
        return quantised._spread(scales, size)

    def way(values: Any, spread: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda codes, scales: (values(codes) * spread(scales)).astype(jnp.bfloat16)

    ways = {
        "selections, scales by a product": (way(quantised._nf4, product), jnp.uint4, size),
        "selections, scales repeated": (way(quantised._nf4, repeated), jnp.uint4, size),
        "table, scales by a product": (way(table, product), jnp.uint4, size),
        "packed by hand along lanes": (
            lambda codes, scales: _by_hand(codes, scales, jnp.bfloat16),
            jnp.uint8,
            size // 2,
        ),
    }
    for name, (decode, dtype, last) in ways.items():
        codes = jax.ShapeDtypeStruct((size, last), dtype, sharding=sharding)
        scales = jax.ShapeDtypeStruct((size, size // _BLOCK), jnp.bfloat16, sharding=sharding)
        compiled: Any = jax.jit(decode).lower(codes, scales).compile()
        main = compiled.as_text().partition("ENTRY")[2]
        yield {
            "platform": "tpu v5e",
            "way": name,
            "cycles": sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', main))),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }


def measure(folder: Path, *, tpu: bool) -> Iterator[dict]:
    """Yields every line."""
    random = np.random.RandomState(0)
    yield from errors("normal", [random.randn(1024, 4096).astype(np.float32)])
    yield from errors(folder.name, _matrices(folder))
    yield from held_and_gathered("cpu", jax.devices())
    if tpu:
        yield from held_and_gathered("tpu v5e", parse("v5e:2x2").devices())
        yield from cycles(parse("v5e:1x1").devices()[0])


def main() -> None:
    """Prints a line for each measurement."""
    parser = argparse.ArgumentParser(description="Measures quantised weights.")
    parser.add_argument("model", type=Path, help="folder with a model in safetensors")
    parser.add_argument("--no-tpu", action="store_true", help="where libtpu is not installed")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    use_compiler_alone()
    for line in measure(options.model, tpu=not options.no_tpu):
        print(json.dumps(line), flush=True)
        append(line | {"environment": environment()}, options.output)


if __name__ == "__main__":
    main()
