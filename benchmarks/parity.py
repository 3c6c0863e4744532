"""How far each family's results lie from transformers', and the sizes of its published models.

    python -m benchmarks.parity ../shared/configs --output benchmarks/results/parity.jsonl
    python -m benchmarks.parity ../shared/configs --families glm,glm4

Runs the tiny models of `tests/oracle` in float32 on the CPU and compares them with the stored
numbers of Hugging Face's implementation. With a folder of published configs, each in
`ORG--NAME/config.json`, their parameters are counted too. Prints a table; each line goes to
`--output` as JSON.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from benchmarks.lines import append
from jaxft.config import ObjectiveConfig
from jaxft.data.batch import STANDARD, Batch
from jaxft.hf.load import load_params
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.families import FAMILIES, architecture_from_hf
from jaxft.models.module import merge
from jaxft.training.objectives.bound import bind
from jaxft.workdir.environment import environment
from tests.oracle.cases import (
    CASES,
    FAMILY_CASES,
    load_case,
    load_published_sizes,
    published_configs,
    write_folder,
)


def measure(name: str) -> tuple[float, float]:
    """Returns the largest difference of logits, and the relative one of the gradient's norm."""
    case = load_case(name)
    architecture = architecture_from_hf(CASES[name])
    abstract = architecture.abstract(Numerics())
    with tempfile.TemporaryDirectory() as folder:
        write_folder(name, Path(folder))
        params = load_params(Path(folder), architecture.naming, abstract.params)
    batch = Batch(**{name: case.arrays[name] for name in STANDARD})

    def total(params: Any) -> Any:
        model = merge(abstract.graphdef, params)
        logits = model(batch.tokens, batch.positions, batch.segments)
        return bind(ObjectiveConfig(chunk=0)).judge(model, batch).minimised, logits

    gradients, logits = jax.jit(jax.grad(total, has_aux=True))(params)
    real = (case.segments > 0)[..., None]
    difference = float(np.abs(np.where(real, logits, 0) - case.logits).max())
    norm = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in gradients.values()))
    norm /= case.weights.sum()
    return difference, float(abs(norm / case.grad_norm - 1))


def sizes(configs: Path | None) -> dict[str, dict[str, int]]:
    """Returns `{family: {model: parameters}}`, each equal to what transformers counts."""
    found: dict[str, dict[str, int]] = {family: {} for family in FAMILIES}
    known = published_configs(configs) if configs else {}
    for name, expected in load_published_sizes().items() if configs else ():
        config = known[name]
        abstract = architecture_from_hf(config).abstract(make_numerics("mixed"))
        count = sum(spec.size for spec in abstract.params.values())
        if count != expected:
            raise SystemExit(f"{name} has {count:,} parameters; transformers counts {expected:,}")
        found[config["model_type"]][name.replace("--", "/")] = count
    return found


def main() -> None:
    """Prints a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", type=Path, nargs="?", help="folder of published configs")
    parser.add_argument("--families", default="", help="comma-separated; all by default")
    parser.add_argument("--output", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    published = sizes(options.configs)
    print("| family | published models counted | cases | logits | gradient norm |")
    print("|---|---|---|---|---|")
    for family in options.families.split(",") if options.families else sorted(FAMILIES):
        results = [measure(name) for name in FAMILY_CASES[family]]
        logits, norm = (max(column) for column in zip(*results, strict=True))
        counts = ", ".join(
            f"{name.partition('/')[2]} {count:,}" for name, count in published[family].items()
        )
        print(f"| {family} | {counts} | {len(results)} | {logits:.1e} | {norm:.1e} |", flush=True)
        record = {
            "measurement": "parity",
            "family": family,
            "cases": FAMILY_CASES[family],
            "largest_logit_difference": logits,
            "largest_relative_gradient_norm_difference": norm,
            "parameters": published[family],
        } | environment()
        append(record, options.output)


if __name__ == "__main__":
    main()
