"""Writes the files of tests/golden: `python -m tests.write_golden [PATTERN]`; then read the diff.

A pattern such as `collectives_*_cp` writes only the files that match.
"""

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path

from tests import conftest  # eight CPU devices, before jax starts

assert conftest

import jax  # noqa: E402

from jaxft.compiled.layout import compile_step, describe, format_spec, make_program  # noqa: E402
from jaxft.config import RunConfig  # noqa: E402
from jaxft.models.families import architecture_from_hf  # noqa: E402
from jaxft.training.program import make_placement  # noqa: E402
from tests.oracle.cases import CASES  # noqa: E402
from tests.strategies import BUILT_IN, FOR_EXPERTS, MESHES  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
JAX = ".".join(jax.__version__.split(".")[:2])

# The shapes of Llama-3.1-8B and Qwen3-30B-A3B.
MODELS = {
    "llama_8b": CASES["gqa"]
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
    },
    "qwen3_30b_a3b": CASES["qwen3_moe_gqa_published"]
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
# Strategies whose collectives depend on there being experts; each takes ten seconds to compile.
_COMPILED_WITH_EXPERTS = FOR_EXPERTS


def config_of(strategy: str) -> RunConfig:
    """Eight rows of 128 tokens in each micro-batch; two of these where layers are a pipeline."""
    config = RunConfig(strategy=strategy)
    config.data.max_length = 128
    config.train.accumulation = 2 if "stage" in MESHES[strategy] else 1
    config.train.batch_size = 8 * config.train.accumulation
    for axis, size in MESHES[strategy].items():
        setattr(config.mesh, axis, size)
    return config


def shardings_text(model: str, strategy: str) -> str:
    """Path, shape, placement and bytes per device of every array."""
    config = config_of(strategy)
    placement = make_placement(config)
    architecture = architecture_from_hf(MODELS[model])
    found = describe(make_program(config, architecture, placement=placement), model=model)
    lines = [" ".join(f"{axis}={size}" for axis, size in found.mesh.items())]
    for parameter in found.parameters:
        for name, layout in parameter.layouts.items():
            title = parameter.path if name == "parameter" else f"  {name}"
            lines.append(
                f"{title:25} {layout.shape!s:24} {format_spec(layout.spec):26} "
                f"{layout.bytes_per_device:>15,}"
            )
    lines += [f"{name:77} {size:>15,}" for name, size in found.bytes_per_device.items()]
    return "\n".join(lines) + "\n"


def collectives_text(model: str, strategy: str) -> str:
    """Kind, mesh axes, count and payload of the collectives of the compiled training step."""
    config = config_of(strategy)
    placement = make_placement(config)
    architecture = architecture_from_hf(MODELS[model])
    found = compile_step(make_program(config, architecture, placement=placement))
    lines = [f"jax {JAX}, cpu", " ".join(f"{a}={size}" for a, size in placement.mesh.shape.items())]
    lines += [
        f"{total.kind:20} {'+'.join(total.axes):16} {total.count:>6,} {total.bytes:>16,}"
        for total in sorted(found.totals, key=lambda total: (total.kind, total.axes))
    ]
    return "\n".join(lines) + "\n"


def _expected() -> dict[str, tuple[Callable[[str, str], str], str, str]]:
    found = {}
    for model in MODELS:
        dense = "moe" not in MODELS[model]["model_type"]
        for strategy in BUILT_IN:
            if dense and strategy in FOR_EXPERTS:
                continue
            found[f"shardings_{model}_{strategy}"] = shardings_text, model, strategy
            if dense or strategy in _COMPILED_WITH_EXPERTS:
                found[f"collectives_{model}_{strategy}"] = collectives_text, model, strategy
    return found


# What each file of the folder holds: name to function and its arguments.
EXPECTED = _expected()


def main(pattern: str = "*") -> None:
    """Writes the files whose names match, and deletes those that no strategy has any more."""
    GOLDEN.mkdir(exist_ok=True)
    for name, (text, *arguments) in EXPECTED.items():
        if fnmatch.fnmatch(name, pattern):
            (GOLDEN / f"{name}.txt").write_text(text(*arguments))
            print(name, flush=True)
    for file in GOLDEN.glob("*.txt"):
        if file.stem not in EXPECTED:
            file.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
