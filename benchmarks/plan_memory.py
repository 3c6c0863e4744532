r"""What a plan says of memory, beside what a run of the same step takes.

    python -m benchmarks.plan_memory ../shared/configs/HuggingFaceTB--SmolLM2-135M \
        --set adapter.rank=16 --output benchmarks/results/plan_memory.jsonl

`--set` changes a key of the run and may be repeated. Each strategy runs in its own process: the
step is compiled for eight CPU devices of this machine, the state is made, and two steps run. Eight
times what the plan says of a device is held against the growth of the process's memory from before
the state was made to its peak, of which the kernel keeps account. On a GPU (`--devices=local`) it
is held against the peak that the device reports.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.lines import append

_DEVICES, _LENGTH, _ROWS = 8, 256, 8
_MESHES = {
    "fsdp": {"fsdp": 8},
    "zero2": {"data": 8},
    "fsdp_cp": {"fsdp": 4, "context": 2},
}
_REMATS = ("none", "full")


def measure(folder: str, strategy: str, remat: str, keys: dict[str, str], *, local: bool) -> dict:
    """Plans a step, runs it, and returns bytes of both."""
    import jax
    import jax.numpy as jnp

    from jaxft.compiled.layout import make_program
    from jaxft.config import RunConfig, to_dict
    from jaxft.hardware.devices import device_memory, host_memory
    from jaxft.hf.folder import read_config
    from jaxft.models.families import architecture_from_hf
    from jaxft.models.module import init_params
    from jaxft.planner.candidates import with_flags
    from jaxft.planner.planner import Planner
    from jaxft.planner.prices import read_prices
    from jaxft.planner.topology import parse
    from jaxft.training.adaptation import as_run
    from jaxft.training.program import make_placement
    from jaxft.training.state import init_state

    config = RunConfig(strategy=strategy)
    config.model.path, config.model.dtypes, config.model.remat = folder, "float32", remat
    config.data.max_length, config.train.batch_size = _LENGTH, _ROWS
    for axis, size in {} if local else _MESHES[strategy].items():
        setattr(config.mesh, axis, size)
    types = {path: type(value) for path, value in to_dict(config).items()}
    config = with_flags(config, {path: types[path](text) for path, text in keys.items()})
    architecture = as_run(architecture_from_hf(read_config(Path(folder))), config)
    planner = Planner(architecture=architecture, prices=read_prices(), cache="off")
    plan = planner.plan(config, parse("local"))
    program = make_program(config, architecture, placement=make_placement(config))
    step = program.compile()
    before = host_memory().resident
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    build_model = architecture.build(program.evaluator.numerics)
    state = jax.jit(
        lambda: init_state(
            init_params(build_model, 0), program.optimizer, "", architecture.adaptation
        ),
        out_shardings=shardings,
    )()
    batch = program.batch.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding)
    )
    jax.block_until_ready(state)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's account of the peak begins anew
    for _ in range(2):
        state, metrics = step(state, {}, batch)
    jax.block_until_ready(metrics)
    memory = device_memory(jax.devices()[0])
    peak = memory.peak if memory else _peak_resident() - before
    devices = 1 if memory else len(jax.devices())
    return {
        "strategy": strategy,
        "remat": remat,
        "keys": keys,
        "predicted": plan.memory.used * devices,
        "measured": peak,
        "ratio": plan.memory.used * devices / peak,
    }


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM.")


def main() -> None:
    """Measures every strategy, each in a process of its own."""
    parser = argparse.ArgumentParser(description="Compares planned memory with measured memory.")
    parser.add_argument("model", help="folder with config.json")
    parser.add_argument("--devices", default="cpu", choices=("cpu", "local"))
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "REMAT"), help="this one, here")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the run"
    )
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    if options.one:
        keys = dict(pair.split("=", 1) for pair in options.set)
        strategy, remat = options.one
        found = measure(options.model, strategy, remat, keys, local=options.devices == "local")
        print(json.dumps(found))
        return
    environment = dict(os.environ)
    if options.devices == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_DEVICES}"
    os.environ |= environment  # jax is asked for its version here, too
    from jaxft.workdir.environment import environment as describe

    for strategy in _MESHES if options.devices == "cpu" else ("fsdp",):
        for remat in _REMATS:
            command = [sys.executable, "-m", "benchmarks.plan_memory", options.model]
            command += ["--devices", options.devices, "--one", strategy, remat]
            command += [part for pair in options.set for part in ("--set", pair)]
            run = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            line = json.loads(run.stdout.splitlines()[-1])
            print(
                f"{strategy:8} {remat:5} predicted {line['predicted'] / 2**20:8,.0f} MiB, "
                f"measured {line['measured'] / 2**20:8,.0f} MiB, {line['ratio']:.3f}",
                flush=True,
            )
            append(line | {"environment": describe()}, options.output)


if __name__ == "__main__":
    main()
