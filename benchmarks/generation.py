"""Measures generation, and transformers' beside it where a Python with torch is at hand.

    .venv/bin/python benchmarks/generation.py --rows 1 --torch-python python3.11 \
        --output benchmarks/results/generation.jsonl

Greedy continuations of random prompts by a model with random weights; what is timed depends on
neither. Prints one JSON line per measurement, each made in a process of its own; with
--torch-python both take turns, and a last line gives the ratio of the medians with its interval.
Seconds are those of a whole call, reading the prompts included, of which the best of a few is
taken, after one that compiles. `bandwidth_share` is what a decoding step reads of weights over its
time, as a share of what a triad (McCalpin's STREAM: a = b + s c, three arrays counted) moves in the
same process, and `products_share` the same of a step that does nothing but multiply one row with
each weight: what is between the two is the work beside products.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.shapes import SHAPES, shape_of

_KEYS = ("shape", "rows", "length", "new", "dtypes")


def main() -> None:
    """Runs as the orchestrator, or as one measurement with --once."""
    parser = argparse.ArgumentParser(description="Measures generation.")
    parser.add_argument("--shape", default="110m", help=f"folder, or {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=1, help="prompts")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each")
    parser.add_argument("--dtypes", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=3, help="calls, of which the best counts")
    turns.add_options(parser)
    turns.run(parser.parse_args(), measure, keys=_KEYS, torch=measure_torch)


def measure_torch(options: argparse.Namespace) -> dict[str, Any]:
    """Times transformers' `generate`, by `torch_generate.py`."""
    work = {key: getattr(options, key) for key in (*_KEYS, "repeats")}
    work["config"] = shape_of(options.shape)
    script = Path(__file__).with_name("torch_generate.py")
    found = turns.once([options.torch_python, str(script), json.dumps(work)])
    return _record("torch", options, found)


def _record(system: str, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    best = options.rows * options.new / min(found["seconds"])
    described = {key: getattr(options, key) for key in _KEYS}
    measured = {"tokens_per_second": round(best, 1), **found}
    return {"measurement": "generation", "system": system, **described, **measured}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times `generate_tokens`, which compiles nothing after its first call."""
    import jax
    import numpy as np

    from jaxft.models.config import make_numerics
    from jaxft.models.families import architecture_from_hf
    from jaxft.models.module import init_params
    from jaxft.programs.generate import generate_tokens
    from jaxft.workdir.environment import environment

    architecture = architecture_from_hf(shape_of(options.shape))
    numerics = make_numerics(options.dtypes)
    build, abstract = architecture.build(numerics), architecture.abstract(numerics)
    params = jax.jit(lambda: init_params(build, 0))()
    shape = (options.rows, options.length)
    prompts = np.random.default_rng(0).integers(0, architecture.config.vocab, shape).tolist()

    def seconds(new: int) -> float:
        started = time.monotonic()
        found = generate_tokens(
            architecture.config,
            abstract.graphdef,
            params,
            prompts,
            max_new_tokens=new,
            stop_ids=(),
        )
        assert all(len(ids) == new for ids in found)
        return time.monotonic() - started

    # The cache of the short call has another size, so both are compiled first.
    first, _ = seconds(options.new), seconds(1)
    triad, products, whole, short = 0.0, float("inf"), [], []
    for _ in range(options.repeats):
        triad = max(triad, _triad(jax))
        products = min(products, _products(jax, params, abstract.axes))
        whole.append(seconds(options.new))
        short.append(seconds(1))
    step = (min(whole) - min(short)) / max(1, options.new - 1)
    read = sum(w.nbytes for w in params.values())
    found = {
        "seconds": whole,
        "first_seconds": round(first, 2),
        "prompt_seconds": round(min(short), 4),
        "step_seconds": round(step, 5),
        "weight_bytes": read,
        "triad_bytes_per_second": round(triad),
        "bandwidth_share": round(read / step / triad, 3),
        "products_share": round(read / products / triad, 3),
    }
    return _record("jaxft", options, found) | {"environment": environment()}


def _products(jax: Any, params: Mapping[str, Any], axes: Mapping[str, Any]) -> float:
    """Returns the seconds in which a row is multiplied with each layer's weights and the head."""
    from jaxft.sharding.cores import product

    weights = []
    for path, w in params.items():
        stacked = axes[path][0] == "layers"
        if w.ndim - stacked < 2:
            continue
        outputs = w.shape[stacked] if axes[path][stacked] == "embed" else -1
        inputs = -1 if outputs > 0 else w.shape[-1]
        weights += [one.reshape(outputs, inputs) for one in (w if stacked else [w])]
    run: Callable[..., Any] = jax.jit(
        lambda ws: [product(jax.numpy.ones((1, w.shape[1]), w.dtype), w) for w in ws]
    )
    best = float("inf")
    for _ in range(6):  # the first one compiles
        started = time.monotonic()
        jax.block_until_ready(run(weights))
        best = min(best, time.monotonic() - started)
    return best


def _triad(jax: Any) -> float:
    """Returns the bytes a second of a = b + s c, over arrays larger than caches."""
    count = 2**26
    triad: Callable[..., Any] = jax.jit(lambda a, b: a + 3.0 * b, donate_argnums=0)
    a, b = (jax.numpy.ones(count, jax.numpy.float32) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.monotonic()
        a = jax.block_until_ready(triad(a, b))
        best = min(best, time.monotonic() - started)
    return 3 * 4 * count / best


if __name__ == "__main__":
    main()
