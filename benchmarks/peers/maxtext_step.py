"""Compiles MaxText's training step ahead of time; runs under the Python of its own environment.

    ENV/bin/python benchmarks/peers/maxtext_step.py OUTPUT CONFIG key=value ...

The arguments are those of MaxText's `train_compile`. Writes the compiled program and its mesh.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Lets MaxText compile, and stops it there."""
    output = Path(sys.argv.pop(1))
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    os.environ["JAX_PLATFORMS"] = "cpu"
    module: Any = importlib.import_module("maxtext.trainers.pre_train.train_compile")
    compile_step = module.jit_and_compile

    def compiled(function: Any, arguments: Any, keywords: Any, mesh: Any, *rest: Any) -> None:
        step = compile_step(function, arguments, keywords, mesh, *rest)
        found = {
            "text": step.as_text(),
            "axes": dict(mesh.shape),
            "coordinates": [list(device.coords) for device in mesh.devices.flat],
            "bytes": getattr(step.memory_analysis(), "total_allocation_bytes", 0),
        }
        output.write_text(json.dumps(found))
        sys.exit()

    module.jit_and_compile = compiled
    importlib.import_module("absl.app").run(module.main)


if __name__ == "__main__":
    main()
