"""Runs other people's models with torch and transformers; needs both."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.oracle.weights import weight

# Plain PyTorch for all, so that nothing depends on the machine.
_PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
# Below this difference of router logits, rounding could choose another expert.
_MARGIN = 1e-4

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def build_model(config: dict[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Returns the model in float32 with the weights that tensor names stand for, and the shapes.

    Names and shapes are those of the files that transformers writes.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **_PLAIN)
        shapes = {name: value.shape for name, value in _as_files(empty).items()}
        tensors = {
            name: weight(name, shape, config["model_type"]) for name, shape in shapes.items()
        }
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **_PLAIN
        )
    if any(loading.values()):
        raise SystemExit(f"transformers does not read what it wrote: {loading}")
    if model.get_input_embeddings().padding_idx is not None:
        raise SystemExit("pad_token_id must be null: it would zero a gradient")
    return model.eval(), shapes


def _as_files(model: Any) -> dict[str, np.ndarray]:
    """Returns the values of a model's parameters as its files name and lay them out."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return dict(sorted(load_file(Path(folder) / "model.safetensors").items()))


def unlearnt_numbers(model: Any) -> dict[str, torch.Tensor]:
    """Returns what files hold and no model learns."""
    stored = model.state_dict().keys()
    return {name: value for name, value in model.named_buffers() if name in stored}


def unlearnt(model: Any) -> set[str]:
    """Returns the names of what files hold and no model learns."""
    return set(unlearnt_numbers(model))


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Returns the gradients as files would hold them, in place of the model's weights."""
    total = 0.0
    for name, value in model.named_parameters():
        if value.grad is None:
            raise SystemExit(f"{name} has no gradient")
        total += float(value.grad.double().square().sum())
        value.data = value.grad
    for value in unlearnt_numbers(model).values():
        value.zero_()
    found = _as_files(model)
    named = sum(float(np.square(value, dtype=np.float64).sum()) for value in found.values())
    if abs(named / total - 1) > 1e-6:
        raise SystemExit(f"files hold {named / total} of the squared gradients")
    return found


def run_model(model: Any, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Returns logits `[B, T, V]`, zero on padding.

    Each document is run alone, under the mask and positions that transformers makes for it: what
    packing must not change.
    """
    segments = batch["segments"]
    logits = torch.zeros(*segments.shape, model.config.vocab_size)
    for row, row_segments in enumerate(segments):
        for number in range(1, row_segments.max() + 1):
            place = torch.from_numpy(np.flatnonzero(row_segments == number))
            tokens = torch.from_numpy(batch["tokens"])[row, place].long()
            logits[row, place] = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits


def loss_sum(logits: torch.Tensor, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Returns the weighted sum of cross entropies in nats."""
    targets = torch.from_numpy(batch["targets"]).long()
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return (nats * torch.from_numpy(batch["weights"])).sum()


class Routed(NamedTuple):
    """What a router did in one run.

    Attributes:
      logits: `[tokens, E]`.
      chosen: Experts of each token, `[tokens, k]`.
      router: The module.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    router: Any


def record_routers(model: Any) -> list[Routed]:
    """Returns a list to which a router adds what it does whenever it runs."""
    found: list[Routed] = []

    def record(module: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits = output[0].detach()
        if type(module).__name__ == "Gemma4TextRouter":  # gives probabilities
            logits = logits.log()
        one = Routed(logits, output[2], module)
        if hasattr(module, "num_group"):
            _check_margin(one)
        found.append(one)

    for module in model.modules():
        kind = type(module).__name__
        if kind.lower().endswith("topkrouter") or kind == "Gemma4TextRouter":
            module.register_forward_hook(record)
    return found


def balance_loss(routed: list[Routed], config: dict[str, Any]) -> np.ndarray:
    """Returns the load-balancing loss over all that routers of a model did."""
    chosen = config.get("top_k_experts") or config["num_experts_per_tok"]
    logits = tuple(one.logits for one in routed)
    experts = logits[0].shape[1]
    if hasattr(routed[0].router, "num_group"):
        return _balance_of_groups(routed, experts)
    ranked = torch.cat(logits).sort(descending=True).values
    if chosen < experts and (ranked[:, chosen - 1] - ranked[:, chosen]).min() < _MARGIN:
        raise SystemExit("rounding could choose another expert; take another name for the case")
    return load_balancing_loss_func(logits, experts, chosen).numpy()


def _balance_of_groups(routed: list[Routed], experts: int) -> np.ndarray:
    """Does what `balance_loss` does for routers with groups, of which transformers has none.

    Probabilities are softmax, or sigmoid over its sum where scores are corrected.
    """
    shares, means = torch.zeros(experts), torch.zeros(experts)
    for logits, chosen, router in routed:
        if hasattr(router, "e_score_correction_bias"):
            scores = logits.sigmoid()
            scores = scores / scores.sum(-1, keepdim=True)
        else:
            scores = logits.softmax(-1)
        shares += torch.nn.functional.one_hot(chosen, experts).sum((0, 1))
        means += scores.sum(0)
    tokens = sum(len(one.logits) for one in routed)
    return (experts * (shares / tokens * means / tokens).sum()).numpy()


def _check_margin(routed: Routed) -> None:
    """Ends the program if moving a logit a little, one at a time, would choose other experts."""
    logits, chosen, router = routed
    own, experts = (router.weight.data, router.hidden_dim), logits.shape[1]
    router.weight.data, router.hidden_dim = torch.eye(experts), experts
    for moved in _MARGIN * torch.cat([torch.eye(experts), -torch.eye(experts)]):
        again = router.forward(logits + moved)[2]
        if not torch.equal(again.sort().values, chosen.sort().values):
            raise SystemExit("rounding could choose another expert; take another name for the case")
    router.weight.data, router.hidden_dim = own


def count_parameters(config: dict[str, Any]) -> int:
    """Returns how many numbers files of a config.json hold, shared ones once, without memory."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(value.numel() for value in (*model.parameters(), *unlearnt_numbers(model).values()))


def dequantise_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns bfloat16 values, as float32, in the layout that transformers gives parameters."""
    values = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    return values.float().numpy()


def dequantise_fp8(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Returns bfloat16 values, as float32, that transformers makes of FP8 in blocks."""
    quantised = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    made = Fp8Dequantize(None)._dequantize_one(quantised, torch.from_numpy(factors), torch.bfloat16)
    return made.float().numpy()
