r"""MaxText's training step beside jaxft's: the same compiler, played through by the same simulator.

    python -m benchmarks.peers.maxtext ../shared/configs ENV --output benchmarks/results/peers.jsonl

Installs MaxText from the package index into the environment ENV, which is made if it is not there,
with the jax and libtpu of this one; compiles its step for each shape, with its own defaults or
with `--options` of the compiler, and prints a line. Needs libtpu and no TPU.

One shape is a step that MaxText published: what it took beside what the simulator gives the same
program says how right the simulator is, whatever jaxft's own program does. Of its options of the
compiler those are used that libtpu takes; logits are made in parts, or the step would not fit.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from benchmarks.lines import put
from benchmarks.published_runs import HELD_OUT_RUNS
from jaxft.compiled.collectives import Reader
from jaxft.compiled.hlo import Module
from jaxft.hf.folder import read_config
from jaxft.models.config import DecoderConfig
from jaxft.models.families import architecture_from_hf
from jaxft.planner.kernels import kernels_of
from jaxft.planner.network import Network
from jaxft.planner.timeline import CORE, Rates, Simulator
from jaxft.planner.topology import parse, use_compiler_alone
from jaxft.workdir.environment import environment

_VERSION = "0.2.5"
_LLAMA = "meta-llama--Meta-Llama-3.1-8B"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of Llama-3.1-8B with float32 masters, AdamW and, if not set, full rematerialisation.

    Attributes:
      slice: Where, as jaxft names it.
      theirs: As MaxText names it.
      length: Tokens of a row.
      rows: Rows of one device.
      settings: Of MaxText, on top.
      options: For the compiler.
      published: Seconds that the step took; 0 if nobody said.
    """

    slice: str
    theirs: str
    length: int
    rows: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    published: float = 0.0


_HELD_OUT = {run.name: run for run in HELD_OUT_RUNS}


def _published(name: str, settings: Mapping[str, Any]) -> Case:
    """Returns a step of `published_runs.HELD_OUT_RUNS` as MaxText's recipe has it."""
    run = _HELD_OUT[name]
    return Case(
        slice=run.topology,
        theirs=run.topology,
        length=run.length,
        rows=run.rows,
        settings=settings,
        options=run.options,
        published=run.step,
    )


# Of the attention kernel.
_BLOCKS = tuple(
    f"sa_block_{name}"
    for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
)
_ON_HOST = ("decoder_layer_input", "out_proj", "query_proj", "key_proj", "value_proj")
CASES = (
    Case(slice="v5e:4x4", theirs="v5e-16", length=4096, rows=1),
    Case(slice="v5p-64", theirs="v5p-64", length=8192, rows=2),
    Case(slice="v6e-16", theirs="v6e-16", length=4096, rows=2),
    _published(
        "Llama-3.1-8B, v6e-16",
        settings={
            "remat_policy": "custom",
            **dict.fromkeys(_ON_HOST, "offload"),
            "num_vocab_tiling": 4,
            "sa_use_fused_bwd_kernel": "true",
            **dict.fromkeys(_BLOCKS, 2048),
        },
    ),
)


def install(folder: Path) -> Path:
    """Returns the Python of an environment with MaxText, its requirements and our compiler."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "--no-deps", f"maxtext=={_VERSION}"], check=True)
        [names] = folder.glob("lib/*/site-packages/dependencies/requirements/generated_*/tpu-req*")
        ours = [f"{name}=={metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu")]
        subprocess.run([*pip, "-r", names, *ours], check=True)
    return python


def compiled(python: Path, case: Case, options: str) -> dict[str, Any]:
    """Returns what `maxtext_step.py` writes."""
    [config] = python.parent.parent.glob("lib/*/site-packages/maxtext/configs/base.yml")
    flags = " ".join(f"--{option}" for option in filter(None, options.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        settings = {
            "compile_topology": case.theirs,
            "compile_topology_num_slices": 1,
            "model_name": "llama3.1-8b",
            "per_device_batch_size": case.rows,
            "max_target_length": case.length,
            "remat_policy": "full",
            "attention": "flash",
            "dataset_type": "synthetic",
            "enable_checkpointing": "false",
            "run_name": "plan",
            "base_output_directory": folder,
            "dtype": "bfloat16",
            "weight_dtype": "float32",
            "ici_fsdp_parallelism": -1,
            **case.settings,
        }
        if flags:
            settings["compile_xla_flags"] = flags
        arguments = [f"{key}={value}" for key, value in settings.items()]
        script = Path(__file__).with_name("maxtext_step.py")
        subprocess.run([python, "-I", script, output, config, *arguments], check=True)
        return json.loads(output.read_text())


def measure(step: dict[str, Any], case: Case, config: DecoderConfig) -> dict[str, Any]:
    """Returns how long a compiled step takes, by jaxft's simulator."""
    topology = parse(case.slice)
    devices = {tuple(device.coords): device for device in topology.devices()}
    places = np.array([devices[tuple(place)] for place in step["coordinates"]])
    mesh = Mesh(places.reshape(list(step["axes"].values())), tuple(step["axes"]))
    module = Module(step["text"])

    network = Network(topology.chip, mesh, topology.shape)
    reader = Reader(module, mesh)
    kernels = kernels_of(config, topology.chip.core, Rates())
    found = Simulator(module, reader, network, kernels=kernels, rates=Rates()).run()
    spent: dict[str, float] = collections.defaultdict(float)
    for span, times in found.every():
        if span.lane == CORE:
            spent[span.kind] += span.seconds * times
    return {"seconds": found.seconds, "spent": spent, "memory_gib": step["bytes"] / 2**30}


def main() -> None:
    """Compiles and times every case."""
    parser = argparse.ArgumentParser(description="Times MaxText's step by jaxft's simulator.")
    parser.add_argument("models", type=Path, help="folder of folders with config.json")
    parser.add_argument("environment", type=Path, help="folder of MaxText's environment")
    parser.add_argument("--only", default="", help="of slice and row, as 'v6e-16 8192'")
    parser.add_argument("--options", default="", help="options of the compiler, comma-separated")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    use_compiler_alone()
    python = install(options.environment)
    config = architecture_from_hf(read_config(options.models / _LLAMA)).config
    for case in CASES:
        if options.only not in f"{case.slice} {case.length}":
            continue
        chosen = ",".join(filter(None, [*case.options, options.options]))
        step = compiled(python, case, chosen)
        line = {
            "program": f"maxtext {_VERSION}",
            "model": _LLAMA,
            "slice": case.slice,
            "length": case.length,
            "rows_per_device": case.rows,
            "options": chosen,
            "published_seconds": case.published,
            **measure(step, case, config),
            "environment": environment(),
        }
        put(line, options.output)


if __name__ == "__main__":
    main()
