"""Computes the stored reference numbers with torch and transformers.

Run from the project's root by a Python that has torch, transformers and safetensors:

  python -m tests.oracle.generate           writes tests/oracle/*.npz and published_*.json
  python -m tests.oracle.generate --new     writes cases that are not stored, and published_*.json
  python -m tests.oracle.generate --check   fails where they differ from what is stored
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from tests.oracle import delta, optimizers, preferences, reference, towers
from tests.oracle.adapter_cases import ADAPTERS
from tests.oracle.cases import (
    CASES,
    DELTA,
    FAMILY_CASES,
    FOLDER,
    FP8,
    MXFP4,
    NF4,
    OPTIMIZERS,
    PREFERENCES,
    PUBLISHED_SIZES,
    Case,
    load_case,
    load_published_sizes,
    published_configs,
    published_wholes,
    stored_path,
)

STEPS = 10
TOLERANCE = 1e-5
# Configs of published models, which lie beside the project where it is developed.
CONFIGS = FOLDER.parents[2] / "shared" / "configs"

Arrays = dict[str, np.ndarray]


def plain_batch(name: str, vocab: int, rows: int, length: int) -> Arrays:
    """Returns whole-row documents: progressions that can be learnt, and some unweighted targets."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    start = random.randint(vocab, size=(rows, 1))
    stride = random.randint(1, 4, size=(rows, 1))
    text = (start + stride * np.arange(length + 1)) % vocab
    noisy = random.rand(rows, length + 1) < 0.2
    text = np.where(noisy, random.randint(vocab, size=text.shape), text).astype(np.int32)
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "weights": (random.rand(rows, length) < 0.7).astype(np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segments": np.ones((rows, length), np.int32),
    }


def packed_batch(name: str, vocab: int) -> Arrays:
    """Returns rows of two documents and padding, with positions that restart."""
    length = 20
    batch = plain_batch(name, vocab, 2, length)
    for row, sizes in enumerate([(7, 9), (12, 8)]):
        ends = np.cumsum(sizes)
        batch["segments"][row] = (np.arange(length) >= ends[0]) + 1
        batch["segments"][row, ends[-1] :] = 0
        batch["positions"][row] = np.arange(length) - np.where(
            np.arange(length) >= ends[0], ends[0], 0
        )
        batch["weights"][row, ends - 1] = 0  # the next token belongs to another document
        for field in ("tokens", "targets", "weights", "positions"):
            batch[field][row, ends[-1] :] = 0
    return batch


def one_step(name: str, batch: Arrays) -> Case:
    """Returns logits, losses and gradient norms of one batch."""
    model, shapes = reference.build_model(CASES[name])
    routers = reference.record_routers(model)
    logits = reference.run_model(model, batch)
    total = reference.loss_sum(logits, batch)
    mean = total / float(batch["weights"].sum())
    mean.backward()
    norms = {key: float(np.linalg.norm(g)) for key, g in reference.gradients(model).items()}
    fixed = reference.unlearnt(model)
    if idle := [key for key, norm in norms.items() if norm < 1e-5 and key not in fixed]:
        raise SystemExit(f"{name}: the loss does not depend on {idle}")
    numbers = {
        "logits": logits.detach().numpy(),
        "loss_sum": np.float32(total.item()),
        "loss_mean": np.float32(mean.item()),
        "grad_norm": np.float32(np.sqrt(sum(norm**2 for norm in norms.values()))),
        "grad_norms": np.array([norms[key] for key in shapes], np.float32),
    }
    if routers:
        numbers["aux_loss"] = reference.balance_loss(routers, CASES[name])
    return Case(name, CASES[name], batch | numbers, shapes)


def trajectory(name: str) -> Case:
    """Returns losses and gradient norms of AdamW steps with decay on matrices and clipping at 1."""
    model, shapes = reference.build_model(CASES[name])
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    vocab = CASES[name]["vocab_size"]
    batches = [plain_batch(f"step {step}", vocab, 4, 16) for step in range(STEPS)]
    losses, norms = [], []
    for batch in batches:
        logits = reference.run_model(model, batch)
        loss = reference.loss_sum(logits, batch) / float(batch["weights"].sum())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    stacked = {field: np.stack([batch[field] for batch in batches]) for field in batches[0]}
    numbers = {
        "losses": np.array(losses, np.float32),
        "grad_norms": np.array(norms, np.float32),
        "final_logits": reference.run_model(model, batches[0]).detach().numpy(),
    }
    return Case(name, CASES[name], stacked | numbers, shapes)


def compute(name: str) -> Case:
    """Returns a case as computed now."""
    vocab = CASES[name]["vocab_size"]
    if name == "trajectory":
        return trajectory(name)
    if name.endswith("packed"):
        return one_step(name, packed_batch(name, vocab))
    # Long enough that positions leave the first wavelengths of scaled rotations.
    return one_step(name, plain_batch(name, vocab, 2, 40))


def mxfp4() -> Arrays:
    """Returns every code under scales from the smallest to the largest that keeps all finite."""
    random = np.random.RandomState(0)
    blocks = random.permutation(np.arange(2 * 6 * 3 * 16) % 256).astype(np.uint8)
    blocks = blocks.reshape(2, 6, 3, 16)
    scales = random.randint(118, 134, size=(2, 6, 3)).astype(np.uint8)
    scales[0, :, 0] = [0, 1, 2, 127, 251, 252]
    return {
        "blocks": blocks,
        "scales": scales,
        "values": reference.dequantise_mxfp4(blocks, scales),
    }


def fp8() -> Arrays:
    """Returns every code but those that are no numbers, in blocks of 8 x 16."""
    random = np.random.RandomState(0)
    codes = random.permutation(np.arange(32 * 48) % 256)
    codes = np.where(codes % 128 == 127, 0, codes).astype(np.uint8).reshape(32, 48)
    factors = np.exp(random.normal(size=(4, 3))).astype(np.float32)
    values = reference.dequantise_fp8(codes, factors)
    return {"codes": codes, "factors": factors, "values": values}


def published_sizes() -> dict[str, int]:
    """Returns the parameter count of every published model of a family that has cases."""
    return {
        name: reference.count_parameters(config)
        for name, config in published_configs(CONFIGS).items()
        if config["model_type"] in FAMILY_CASES
    }


def wholes() -> dict[str, Any]:
    """Returns the tensors of every published model that takes other senses too."""
    return {n: towers.whole_tensors(c) for n, c in published_wholes(CONFIGS).items()}


def differences(name: str, before: Arrays, now: Arrays) -> list[str]:
    """Returns what differs between two versions of some arrays, one line for each."""
    if before.keys() != now.keys():
        return [f"{name}: the names stored changed"]
    problems = []
    for field, value in now.items():
        if before[field].shape != value.shape:
            problems.append(f"{name}.{field}: shape {before[field].shape} became {value.shape}")
            continue
        error = np.abs(np.float64(before[field]) - value) / np.maximum(1, np.abs(value))
        if not error.max() <= TOLERANCE:
            problems.append(f"{name}.{field}: differs by {error.max():.2e}")
    return problems


def drift(stored: Case, computed: Case) -> list[str]:
    """Returns what differs between two versions of a case."""
    problems = []
    if stored.config != computed.config:
        problems.append(f"{stored.name}: the config changed")
    if stored.shapes != computed.shapes:
        problems.append(f"{stored.name}: names or shapes of tensors changed")
    return problems + differences(stored.name, stored.arrays, computed.arrays)


def towers_drift() -> list[str]:
    """Returns what of multimodal models differs from what is stored."""
    problems, numbers = [], []
    with np.load(towers.STORED) as stored:
        for found in (dict(stored), towers.compute()):
            numbers.append({name: x for name, x in found.items() if x.dtype.kind == "f"})
            problems.append({name: str(x) for name, x in found.items() if name not in numbers[-1]})
    changed = [] if problems[0] == problems[1] else ["towers: configs or names of tensors changed"]
    return changed + differences("towers", *numbers)


def check() -> list[str]:
    """Returns what differs from what is stored."""
    problems = []
    for name in CASES:
        problems += drift(load_case(name), compute(name))
    with np.load(MXFP4) as stored:
        problems += differences("mxfp4", dict(stored), mxfp4())
    with np.load(FP8) as stored:
        problems += differences("fp8", dict(stored), fp8())
    with np.load(PREFERENCES) as stored:
        problems += differences("preferences", dict(stored), preferences.compute())
    with np.load(OPTIMIZERS) as stored:
        problems += differences("optimizers", dict(stored), optimizers.compute())
    with np.load(DELTA) as stored:
        problems += differences("delta", dict(stored), delta.compute())
    problems += towers_drift()
    # The last two are made by nf4.py, of bitsandbytes, and adapters.py, of PEFT.
    single = [MXFP4, FP8, PREFERENCES, OPTIMIZERS, DELTA, NF4, ADAPTERS, towers.STORED]
    expected = {path.name for path in single}
    expected |= {stored_path(name).name for name in CASES}
    problems += [
        f"{path.name}: belongs to no case"
        for path in FOLDER.glob("*.npz")
        if path.name not in expected
    ]
    if CONFIGS.is_dir() and load_published_sizes() != published_sizes():
        problems.append("published_sizes.json: differs")
    if CONFIGS.is_dir() and towers.load_wholes() != wholes():
        problems.append("published_wholes.json: differs")
    return problems


def write_cases(names: Iterable[str]) -> None:
    """Writes some cases, and the parameter counts."""
    for name in names:
        case = compute(name)
        labels: dict[str, Any] = {
            "config": json.dumps(case.config),
            "shapes": json.dumps(case.shapes),
        }
        np.savez_compressed(stored_path(name), **labels, **case.arrays)
    if CONFIGS.is_dir():
        PUBLISHED_SIZES.write_text(json.dumps(published_sizes(), indent=2) + "\n")
        towers.WHOLES.write_text(json.dumps(wholes()) + "\n")


def write() -> None:
    """Writes everything."""
    write_cases(CASES)
    np.savez_compressed(MXFP4, **mxfp4())
    np.savez_compressed(FP8, **fp8())
    np.savez_compressed(PREFERENCES, **preferences.compute())
    np.savez_compressed(OPTIMIZERS, **optimizers.compute())
    np.savez_compressed(DELTA, **delta.compute())
    np.savez_compressed(towers.STORED, **towers.compute())


def main() -> None:
    """Writes or checks cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    parser.add_argument("--new", action="store_true", help="write what is not stored")
    torch.set_num_threads(1)
    options = parser.parse_args()
    if options.new:
        write_cases([name for name in CASES if not stored_path(name).exists()])
    elif not options.check:
        write()
    elif problems := check():
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
