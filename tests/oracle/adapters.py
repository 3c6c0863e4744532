"""Makes adapters of the tiny models with PEFT, and stores what models with them compute.

Run from the project's root by a Python that has torch, transformers, peft and safetensors:

  python -m tests.oracle.adapters           writes tests/oracle/adapters.npz
  python -m tests.oracle.adapters --new     adds to it those that it does not hold
  python -m tests.oracle.adapters --check   fails where it differs from what is stored
"""

import argparse
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from tests.oracle import reference
from tests.oracle.adapter_cases import ADAPTERS, MAKINGS, Made, Making, load_made
from tests.oracle.cases import CASES

_NOT_STORED = ("base_model_name_or_path", "peft_version")
_TOLERANCE = 1e-5
_WEIGHT = ".weight"


def make(name: str) -> Made:
    """Returns an adapter whose names, shapes and settings are PEFT's, and the model's logits."""
    making = MAKINGS[name]
    tokens = np.random.RandomState(zlib.crc32(name.encode())).randint(60, size=(1, 16))
    config, shapes = describe(making)
    made = Made(making.case, config, shapes, tokens.astype(np.int32), np.zeros(0))
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder))
        logits = run(making.case, folder, tokens)
    return Made(making.case, config, shapes, made.tokens, logits)


def describe(making: Making) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Returns the config that PEFT writes, and names and shapes of what it writes."""
    settings = {"r": 3, "lora_alpha": 4, "task_type": "CAUSAL_LM"} | making.settings
    if making.by_expert:
        return settings | {"peft_type": "LORA"}, name_by_expert(making, settings["r"])
    model, _ = reference.build_model(CASES[making.case])
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        with safe_open(Path(folder) / "adapter_model.safetensors", "np") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    return {key: value for key, value in config.items() if key not in _NOT_STORED}, shapes


def name_by_expert(making: Making, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of a pair for each matrix of the model's files."""
    _, tensors = reference.build_model(CASES[making.case])
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        module = name.removesuffix(_WEIGHT)
        if module.rpartition(".")[2] in making.settings["target_modules"]:
            shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    return shapes


def run(case: str, folder: str, tokens: np.ndarray) -> np.ndarray:
    """Returns logits `[B, T, V]` of a case's model with the adapter that a folder holds."""
    model, _ = reference.build_model(CASES[case])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, folder).eval()
    routers = reference.record_routers(adapted)
    with torch.no_grad():
        logits = adapted(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    if routers:
        reference.balance_loss(routers, CASES[case])
    return logits.numpy()


def write(*, new: bool) -> None:
    """Writes everything, or what is not stored."""
    stored: dict[str, Any] = {}
    if new:
        with np.load(ADAPTERS) as before:
            stored = dict(before)
    for name in MAKINGS:
        if f"{name}/config" in stored:
            continue
        made = make(name)
        stored[f"{name}/config"] = json.dumps(made.config, sort_keys=True)
        stored[f"{name}/shapes"] = json.dumps(made.shapes)
        stored[f"{name}/tokens"], stored[f"{name}/logits"] = made.tokens, made.logits
    np.savez_compressed(ADAPTERS, **stored)


def check() -> list[str]:
    """Returns what differs from what is stored."""
    problems = []
    for name in MAKINGS:
        before, now = load_made(name), make(name)
        # A new version of PEFT may write more fields: the oracle is what it computes.
        changed = {key for key, value in before.config.items() if now.config.get(key) != value}
        if changed or before.shapes != now.shapes:
            problems.append(f"{name}: names, shapes or {sorted(changed)} changed")
        elif not np.max(np.abs(before.logits - now.logits)) <= _TOLERANCE:
            problems.append(f"{name}: logits differ")
    return problems


def main() -> None:
    """Writes or checks every adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    parser.add_argument("--new", action="store_true", help="write what is not stored")
    torch.set_num_threads(1)
    options = parser.parse_args()
    if not options.check:
        write(new=options.new)
    elif problems := check():
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
