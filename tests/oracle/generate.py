"""Computes the stored reference numbers with torch and transformers.

Run from the project's root by a Python that has torch, transformers and safetensors:

  python -m tests.oracle.generate           writes tests/oracle/llama_*.npz
  python -m tests.oracle.generate --check   fails where they differ from what is stored
"""

import argparse
import json
import sys
import zlib

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle.cases import CASES, FOLDER, Case, load_case, tensor_shapes, tensors_of

STEPS = 10
TOLERANCE = 1e-5


def build_model(config: dict) -> LlamaForCausalLM:
    """Returns the reference model in float32 with the weights that tensor names stand for."""
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).train()
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    if shapes != tensor_shapes(config):
        raise SystemExit(f"tensor_shapes() disagrees with transformers: {shapes}")
    with torch.no_grad():
        for name, value in tensors_of(config).items():
            parameters[name].copy_(torch.from_numpy(value))
    return model


def plain_batch(name: str, vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
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


def packed_batch(vocab: int) -> dict[str, np.ndarray]:
    """Returns rows of two documents and padding, with positions that restart."""
    length = 20
    batch = plain_batch("packed", vocab, 2, length)
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


def run_model(model: LlamaForCausalLM, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Returns logits `[B, T, V]`; the mask lets a token see its own document up to itself."""
    segments = torch.from_numpy(batch["segments"])
    length = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return model(
        input_ids=torch.from_numpy(batch["tokens"]).long(),
        position_ids=torch.from_numpy(batch["positions"]).long(),
        attention_mask=mask,
        use_cache=False,
    ).logits


def loss_sum(logits: torch.Tensor, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Returns the weighted sum of cross entropies in nats."""
    targets = torch.from_numpy(batch["targets"]).long()
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return (nats * torch.from_numpy(batch["weights"])).sum()


def one_step(config: dict, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns logits, losses and gradient norms of one batch, and the names of the tensors."""
    model = build_model(config)
    logits = run_model(model, batch)
    total = loss_sum(logits, batch)
    mean = total / float(batch["weights"].sum())
    mean.backward()
    norms = {name: float(value.grad.norm()) for name, value in model.named_parameters()}
    real = torch.from_numpy(batch["segments"] > 0)[..., None]
    return batch | {
        "logits": torch.where(real, logits, 0.0).detach().numpy(),
        "loss_sum": np.float32(total.item()),
        "loss_mean": np.float32(mean.item()),
        "grad_norm": np.float32(np.sqrt(sum(norm**2 for norm in norms.values()))),
        "grad_norms": np.array(list(norms.values()), np.float32),
    }, list(norms)


def trajectory(config: dict) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns losses and gradient norms of AdamW steps with decay on matrices and clipping at 1."""
    model = build_model(config)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    batches = [plain_batch(f"step {step}", config["vocab_size"], 4, 16) for step in range(STEPS)]
    losses, norms = [], []
    for batch in batches:
        loss = loss_sum(run_model(model, batch), batch) / float(batch["weights"].sum())
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    stacked = {field: np.stack([batch[field] for batch in batches]) for field in batches[0]}
    return stacked | {
        "losses": np.array(losses, np.float32),
        "grad_norms": np.array(norms, np.float32),
        "final_logits": run_model(model, batches[0]).detach().numpy(),
    }, []


def compute(name: str) -> Case:
    """Returns a case as computed now."""
    config = CASES[name]
    if name == "trajectory":
        arrays, tensors = trajectory(config)
    elif name == "packed":
        arrays, tensors = one_step(config, packed_batch(config["vocab_size"]))
    else:
        # Long enough that positions leave the first wavelengths of scaled rotations.
        arrays, tensors = one_step(config, plain_batch(name, config["vocab_size"], 2, 40))
    return Case(name, config, arrays, tensors)


def drift(stored: Case, computed: Case) -> list[str]:
    """Returns what differs between two versions of a case, one line for each array."""
    problems = []
    if stored.config != computed.config:
        problems.append(f"{stored.name}: the config changed")
    if stored.tensors != computed.tensors or stored.arrays.keys() != computed.arrays.keys():
        return [*problems, f"{stored.name}: the names stored changed"]
    for field, now in computed.arrays.items():
        before = stored.arrays[field]
        if before.shape != now.shape:
            problems.append(f"{stored.name}.{field}: shape {before.shape} became {now.shape}")
        elif (error := (np.abs(before - now) / np.maximum(1, np.abs(now))).max()) > TOLERANCE:
            problems.append(f"{stored.name}.{field}: differs by {error:.2e}")
    return problems


def main() -> None:
    """Writes or checks every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    problems = []
    for name in CASES:
        case = compute(name)
        if check:
            problems += drift(load_case(name), case)
        else:
            np.savez_compressed(
                FOLDER / f"llama_{name}.npz",
                config=json.dumps(case.config),
                tensors=np.array(case.tensors, dtype=str),
                **case.arrays,  # pyright: ignore[reportArgumentType]
            )
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
