"""Measures the gated delta rule and its gradients, by the size of its chunks.

    .venv/bin/python -m benchmarks.delta --chunk 64 --heads 8 --keys 4 --torch-python python3.11
    .venv/bin/python -m benchmarks.delta --chunk 64 --dtype bfloat16 --slice v5e:1x1

Random queries, keys and values; heads of 128 as in Qwen3.5, whose models have 16 of keys and 32 to
64 of values. With --torch-python, jaxft and the chunked form of transformers in PyTorch take turns;
`core_seconds` are those that cores worked, which other work on a machine lengthens less.
With --slice the program is compiled for one chip of it, which need not be here, and played through
(docs/planning.md): `step_seconds` are those of its products and of what it moves to and from the
chip's memory, `cycles_seconds` the sum of the compiler's estimates of all instructions, in which
what the vector unit does counts too.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.lines import put

# What PyTorch's side is told.
_WORK = ("rows", "length", "keys", "heads", "size", "chunk", "dtype", "steps")


def main() -> None:
    """Runs as the orchestrator, as one measurement with --once, or compiles with --slice."""
    parser = argparse.ArgumentParser(description="Measures the gated delta rule.")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--packed", action="store_true", help="documents of random lengths")
    parser.add_argument("--keys", type=int, default=16, help="heads of keys")
    parser.add_argument("--heads", type=int, default=32, help="heads of values")
    parser.add_argument("--size", type=int, default=128, help="of each head")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a chunk")
    parser.add_argument("--span", type=int, default=0, help="chunks that are made ready at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=5, help="timed passes, after another")
    parser.add_argument("--slice", default="", help="compile for a chip of it, such as v5e:1x1")
    turns.add_options(parser)
    options = parser.parse_args()
    if options.torch_python and (options.packed or options.slice):
        parser.error("PyTorch's side knows nothing of --packed and --slice")
    if options.slice:
        put(planned(options), options.output)
    else:
        turns.run(options, measure, keys=_WORK[:-1], torch=measure_torch)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a record says of the work."""
    names = ("rows", "length", "packed", "keys", "heads", "size", "chunk", "span", "dtype")
    return {"measurement": "delta"} | {name: getattr(options, name) for name in names}


def forward(options: argparse.Namespace) -> Callable[..., Any]:
    """Returns the rule, of q, k, v, log_decay, beta and segments."""
    from jaxft.models.delta import gated_delta_rule

    return lambda *arrays: gated_delta_rule(*arrays, chunk=options.chunk, span=options.span)[0]


def passes(options: argparse.Namespace) -> Callable[..., Any]:
    """Returns the rule with its gradients; it takes the gradient of its output last."""
    import jax

    rule = forward(options)

    def both(*given: Any) -> Any:
        *arrays, segments, pulled = given
        out, back = jax.vjp(lambda *arrays: rule(*arrays, segments), *arrays)
        return out, back(pulled)

    return both


def shapes(options: argparse.Namespace) -> list[Any]:
    """Returns the shapes of what `passes` takes."""
    import jax
    import jax.numpy as jnp

    tokens, dtype = (options.rows, options.length), jnp.dtype(options.dtype)
    of_heads = (*tokens, options.heads)
    keys, values = (*tokens, options.keys, options.size), (*of_heads, options.size)
    found = [(keys, dtype), (keys, dtype), (values, dtype)]
    found += [(of_heads, jnp.float32), (of_heads, jnp.float32), (tokens, jnp.int32)]
    return [jax.ShapeDtypeStruct(*one) for one in [*found, (values, dtype)]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times the rule forward, and with its gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.workload import document_lengths
    from jaxft.workdir.environment import environment

    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=x.shape), x.dtype) for x in shapes(options)]
    arrays[3], arrays[4] = -jnp.abs(arrays[3]), jax.nn.sigmoid(arrays[4])
    lengths = document_lengths(options)
    segments = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    arrays[5] = jnp.asarray(np.stack(segments), jnp.int32)

    def seconds(step: Any) -> tuple[float, float]:
        jax.block_until_ready(step())
        started, worked = time.monotonic(), time.process_time()
        for _ in range(options.steps):
            jax.block_until_ready(step())
        passed = time.monotonic() - started, time.process_time() - worked
        return passed[0] / options.steps, passed[1] / options.steps

    alone = jax.jit(forward(options)).lower(*arrays[:-1]).compile()
    whole = jax.jit(passes(options)).lower(*arrays).compile()
    once, forward_cores = seconds(lambda: alone(*arrays[:-1]))
    both, cores = seconds(lambda: whole(*arrays))
    count, memory = options.rows * options.length, whole.memory_analysis()
    return {
        **described(options),
        "system": "jaxft",
        "forward_seconds": round(once, 6),
        "step_seconds": round(both, 6),
        "forward_core_seconds": round(forward_cores, 6),
        "core_seconds": round(cores, 6),
        "forward_tokens_per_second": round(count / once, 1),
        "tokens_per_second": round(count / both, 1),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "environment": environment(),
    }


def measure_torch(options: argparse.Namespace) -> dict[str, Any]:
    """Times the rule of transformers."""
    work = {name: getattr(options, name) for name in _WORK}
    script = Path(__file__).with_name("torch_delta.py")
    found = turns.once([options.torch_python, str(script), json.dumps(work)])
    return {**described(options), "system": "torch", **found}


def planned(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the rule with its gradients for a chip, and plays it through."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxft.compiled.collectives import Reader
    from jaxft.compiled.hlo import Module
    from jaxft.planner.compilation import compile_lowered
    from jaxft.planner.cost import totals
    from jaxft.planner.network import Network
    from jaxft.planner.timeline import Rates, Simulator
    from jaxft.planner.topology import parse, use_compiler_alone
    from jaxft.workdir.environment import environment

    use_compiler_alone()
    topology = parse(options.slice)
    mesh = Mesh(np.array(topology.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes(options)]
    lowered = jax.jit(passes(options)).lower(*arrays)
    compiled = compile_lowered(lowered, {}, target=f"{options.slice}, a chip", cache="off")
    if compiled.allocation is None:
        raise SystemExit(f"It does not fit {options.slice}: {compiled.needed:,} bytes.")
    module, chip = Module(compiled.text), topology.chip.core
    network = Network(topology.chip, mesh, topology.shape)
    reader = Reader(module, mesh)
    run = Simulator(module, reader, network, kernels=lambda *_: None, rates=Rates()).run()
    flops, moved = totals(module, lambda *_: None)
    cycles = compiled_cycles(module, module.entry)
    count = options.rows * options.length
    return {
        **described(options),
        "system": "jaxft",
        "slice": options.slice,
        "step_seconds": run.seconds,
        "cycles_seconds": cycles / chip.clock,
        "tokens_per_second": round(count / max(run.seconds, cycles / chip.clock), 1),
        "teraflops": sum(flops.values()) / 1e12,
        "moved_bytes": moved,
        "temporary_bytes": compiled.allocation.temporaries,
        "compile_seconds": round(compiled.seconds, 1),
        "environment": environment(),
    }


def compiled_cycles(module: Any, name: str) -> float:
    """Returns the compiler's estimates of all instructions that a computation runs, added up."""
    from jaxft.planner.cost import called, cost_of

    computation, cycles = module.computations[name], 0.0
    for instruction in computation.instructions.values():
        cycles += cost_of(module, computation, instruction).cycles
        for inner, times in called(module, computation, instruction):
            cycles += times * compiled_cycles(module, inner)
    return cycles


if __name__ == "__main__":
    main()
