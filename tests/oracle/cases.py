"""Tiny models with stored reference numbers: their configs, folders, batches and results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.oracle.weights import weight

FOLDER = Path(__file__).parent


def _llama(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 64,
    } | changes


# A rotation of wavelength w is kept below original / high, divided by `factor` above original / low
# and blended between. These sizes put frequencies of the 8 pairs into each of the three.
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
# Files written by transformers 4 keep theta outside and call the rest `rope_scaling`.
_PUBLISHED = {"rope_theta": 10000.0, "rope_scaling": _LLAMA3}
_GQA = _llama()

CASES: dict[str, dict[str, Any]] = {
    "gqa": _GQA,
    "mha": _llama(num_key_value_heads=4),
    "mqa_tied": _llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama3_rope": _llama(
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_theta": 10000.0} | _LLAMA3,
    ),
    "llama3_rope_tied_published": {
        name: value
        for name, value in _llama(
            head_dim=16, num_attention_heads=2, tie_word_embeddings=True, **_PUBLISHED
        ).items()
        if name != "rope_parameters"
    },
    "linear_rope": _llama(
        rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    ),
    "head_dim_6": _llama(
        head_dim=6, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, vocab_size=51
    ),
    "head_dim_10_tied": _llama(
        head_dim=10,
        hidden_size=24,
        intermediate_size=37,
        num_attention_heads=6,
        num_hidden_layers=3,
        tie_word_embeddings=True,
    ),
    "large_eps_theta": _llama(
        rms_norm_eps=0.1, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}
    ),
    "packed": _GQA,
    "trajectory": _llama(tie_word_embeddings=True, hidden_size=24),
}


@dataclass(frozen=True)
class Case:
    """One stored case.

    Attributes:
      name: Key of `CASES`.
      config: Content of config.json.
      arrays: `tokens`, `targets`, `weights`, `positions`, `segments`, each `[B, T]` as in a
        `Batch`, or `[steps, B, T]` for the trajectory. A case of one step also holds `logits`
        `[B, T, V]` (zero on padding), `loss_sum` (nats, weighted), `loss_mean`, `grad_norm` of the
        mean loss over all parameters and `grad_norms`, one for each name of `tensors`. The
        trajectory holds `losses` (mean), `grad_norms` (before clipping), both `[steps]`, and
        `final_logits` `[B, T, V]` of the first batch after the last step.
      tensors: Tensor names in the order of the per-tensor `grad_norms`.
    """

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    tensors: list[str]

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(name) from None


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns `{Hugging Face name: shape}` of a Llama config."""
    embed, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    block = {
        "input_layernorm": (embed,),
        "self_attn.q_proj": (queries, embed),
        "self_attn.k_proj": (keys, embed),
        "self_attn.v_proj": (keys, embed),
        "self_attn.o_proj": (embed, queries),
        "post_attention_layernorm": (embed,),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    shapes = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, embed)
    return shapes


def tensors_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns `{Hugging Face name: float32 array}` of a Llama config."""
    return {name: weight(name, shape) for name, shape in tensor_shapes(config).items()}


def write_folder(case: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors of a case into an existing folder; returns it."""
    config = CASES[case]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors_of(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_case(name: str) -> Case:
    """Returns the stored numbers of a case."""
    with np.load(FOLDER / f"llama_{name}.npz") as stored:
        arrays = dict(stored)
    config = json.loads(str(arrays.pop("config")))
    tensors = [str(tensor) for tensor in arrays.pop("tensors")]
    return Case(name, config, arrays, tensors)
