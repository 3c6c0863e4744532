"""Adapters of the tiny models: what PEFT is asked to make, and what it said the logits are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.oracle.cases import CASES, FOLDER
from tests.oracle.weights import weight

ADAPTERS = FOLDER / "adapters.npz"

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ALL = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_PHI3_PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.qkv_proj": 5, "down_proj": 2},
    "alpha_pattern": {"qkv_proj": 7, r".*\.0\.mlp\.down_proj": 3},
}


@dataclass(frozen=True)
class Making:
    """What an adapter is made from.

    Attributes:
      case: Of the model.
      settings: Of PEFT's LoraConfig; r is 3 and lora_alpha 4 unless they say otherwise.
      by_expert: Whether the file names each expert, as those made with transformers 4 do.
    """

    case: str
    settings: dict[str, Any]
    by_expert: bool = False


MAKINGS = {
    "llama": Making("gqa", {"target_modules": _ALL}),
    "llama_head": Making("gqa", {"target_modules": ["lm_head", "v_proj"], "r": 1}),
    "llama_dora": Making("gqa", {"target_modules": _ALL, "use_dora": True}),
    "llama_rslora": Making("gqa", {"target_modules": _ALL, "use_rslora": True}),
    "llama_patterns": Making(
        "gqa",
        {
            "target_modules": _ALL,
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"q_proj": 7, r".*\.0\.mlp\.down_proj": 3},
        },
    ),
    "llama_one_layer": Making("gqa", {"target_modules": _ALL, "layers_to_transform": [1]}),
    "llama_saved": Making(
        "gqa",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    ),
    "llama_rows": Making(
        "gqa",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [9, 3]},
        },
    ),
    "mistral": Making("mistral_window", {"target_modules": _ALL}),
    "qwen2": Making("qwen2_gqa", {"target_modules": _ALL}),
    "qwen3": Making("qwen3_mha", {"target_modules": _ALL}),
    "gemma2_tied": Making(
        "gemma2_gqa",
        {
            "target_modules": _ALL,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "gemma3_text_rows": Making(
        "gemma3_text_gqa", {"target_modules": _ALL, "trainable_token_indices": [1, 5, 4]}
    ),
    "gemma4_text": Making(
        "gemma4_text_packed",
        {
            "target_modules": _ALL,
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "gemma4_text_e2b": Making(
        "gemma4_text_e2b",
        {
            "target_modules": [
                *_ALL,
                *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
            ],
            "trainable_token_indices": {
                "embed_tokens": [9, 3],
                "embed_tokens_per_layer": [9, 3],
            },
        },
    ),
    "qwen3_5_text": Making(
        "qwen3_5_gqa",
        {
            "target_modules": [
                *_ALL,
                "in_proj_qkv",
                "in_proj_z",
                "in_proj_a",
                "in_proj_b",
                "out_proj",
            ]
        },
    ),
    "qwen3_5_moe_text": Making(
        "qwen3_5_moe_gqa",
        {
            "target_modules": [*_ALL, "in_proj_qkv", "in_proj_z", "shared_expert_gate"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "qwen3_next": Making(
        "qwen3_next_gqa", {"target_modules": [*_ALL, "in_proj_qkvz", "in_proj_ba"]}
    ),
    "deepseek_v3": Making(
        "deepseek_v3_published",
        {
            "target_modules": [
                *("q_a_proj", "q_b_proj", *_LATENT),
                *("gate_proj", "up_proj", "down_proj"),
            ]
        },
    ),
    "deepseek_v2": Making(
        "deepseek_v2_lite_published", {"target_modules": ["q_proj", *_LATENT], "use_dora": True}
    ),
    "glm4_moe": Making("glm4_moe_published", {"target_modules": _ALL}),
    "glm4_moe_lite": Making(
        "glm4_moe_lite_published", {"target_modules": ["q_a_proj", "q_b_proj", *_LATENT]}
    ),
    "olmo2": Making("olmo2_gqa", {"target_modules": _ALL}),
    "olmo3": Making("olmo3_gqa", {"target_modules": _ALL}),
    "smollm3": Making("smollm3_gqa", {"target_modules": _ALL}),
    "ministral": Making("ministral_gqa", {"target_modules": _ALL}),
    "seed_oss": Making("seed_oss_gqa", {"target_modules": _ALL}),
    "granite": Making("granite_gqa", {"target_modules": _ALL}),
    "glm": Making("glm_gqa", {"target_modules": [*_ATTENTION, "gate_up_proj", "down_proj"]}),
    "glm4": Making("glm4_gqa", {"target_modules": [*_ATTENTION, "gate_up_proj", "down_proj"]}),
    "exaone4": Making("exaone4_gqa", {"target_modules": _ALL}),
    "cohere": Making("cohere_gqa", {"target_modules": _ALL}),
    "cohere2": Making("cohere2_gqa", {"target_modules": _ALL}),
    "ministral3": Making("ministral3_gqa", {"target_modules": _ALL}),
    "hunyuan_v1_dense": Making("hunyuan_v1_dense_gqa", {"target_modules": _ALL}),
    "nanochat": Making("nanochat_gqa", {"target_modules": [*_ATTENTION, "fc1", "fc2"]}),
    "apertus": Making("apertus_gqa", {"target_modules": [*_ATTENTION, "up_proj", "down_proj"]}),
    "phi3": Making("phi3_partial_gqa", {"target_modules": _PHI3}),
    "phi3_dora": Making("phi3_partial_gqa", {"target_modules": _PHI3, "use_dora": True}),
    "phi3_rslora_patterns": Making(
        "phi3_partial_gqa", {"target_modules": _PHI3, "use_rslora": True, **_PHI3_PATTERNS}
    ),
    "gpt2": Making("gpt2_tied", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2_dora": Making("gpt2_tied", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "gpt_oss": Making(
        "gpt_oss_gqa",
        {
            "target_modules": _ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "gpt_oss_down": Making(
        "gpt_oss_gqa", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    ),
    "mixtral": Making(
        "mixtral_gqa_published", {"target_modules": [*_ATTENTION, "gate", "w1", "w2", "w3"]}
    ),
    "mixtral_by_expert": Making(
        "mixtral_gqa_published", {"target_modules": [*_ATTENTION, "w1", "w2", "w3"]}, True
    ),
    "qwen3_moe": Making("qwen3_moe_gqa_published", {"target_modules": _ALL}),
    "qwen3_moe_by_expert": Making("qwen3_moe_gqa_published", {"target_modules": _ALL}, True),
}


@dataclass(frozen=True)
class Made:
    """An adapter as PEFT wrote it, with values that its names stand for.

    Attributes:
      case: Of the model.
      config: Content of adapter_config.json.
      shapes: `{tensor name: shape}` of adapter_model.safetensors.
      tokens: `[B, T]`.
      logits: `[B, T, V]` of the model with the adapter.
    """

    case: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tokens: np.ndarray
    logits: np.ndarray

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Values of the file's tensors."""
        family = CASES[self.case]["model_type"]
        return {name: weight(name, shape, family) for name, shape in self.shapes.items()}

    def write(self, folder: Path) -> Path:
        """Writes both files into an existing folder; returns it."""
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        tensors = self.tensors
        for copy in ("lm_head", "model.embed_tokens"):
            name = f"base_model.model.{copy}.weight"
            if self.config.get("ensure_weight_tying") and name in tensors:
                tensors[name] = tensors["base_model.model.model.embed_tokens.weight"]
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder


def load_made(name: str) -> Made:
    """Returns a stored adapter."""
    with np.load(ADAPTERS) as stored:
        config, shapes = (
            json.loads(str(stored[f"{name}/{part}"])) for part in ("config", "shapes")
        )
        shapes = {tensor: tuple(shape) for tensor, shape in shapes.items()}
        case = MAKINGS[name].case
        return Made(case, config, shapes, stored[f"{name}/tokens"], stored[f"{name}/logits"])
