"""Multimodal models by transformers: tiny ones and their logits of text, names of published ones.

`compute` gives what `tests/oracle/generate.py` stores in towers.npz, `whole_tensors` what it stores
in published_wholes.json; they need torch and transformers.
"""

import collections
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.oracle.weights import weight

STORED = Path(__file__).parent / "towers.npz"
WHOLES = Path(__file__).parent / "published_wholes.json"

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_GEMMA4_TEXT = {
    **_TEXT,
    "attention_k_eq_v": True,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_global_key_value_heads": 1,
    "sliding_window": 8,
    "use_bidirectional_attention": "vision",
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 8,
    "patch_size": 4,
}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_IDS = {"image_token_id": 60, "video_token_id": 61}
_ENDS = {"vision_start_token_id": 62, "vision_end_token_id": 63}


def _sections(theta: float, *parts: int) -> dict[str, Any]:
    named = {"mrope_section": list(parts), "mrope_interleaved": True}
    return {"rope_type": "default", "rope_theta": theta, **named}


# Content of config.json, as a person would write it, by what it is a case of.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        "text_config": {**_TEXT, "model_type": "gemma3_text", "sliding_window": 8},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
    "gemma4": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA4_TEXT,
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "top_k_experts": 2,
        },
        "vision_config": _GEMMA4_VISION,
        "audio_config": None,
        **_IDS,
        "audio_token_id": 62,
    },
    "gemma4_e2b": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA4_TEXT,
            "model_type": "gemma4_text",
            "attention_k_eq_v": False,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_global_key_value_heads": None,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "use_bidirectional_attention": None,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": 64,
        },
        "vision_config": _GEMMA4_VISION,
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "output_proj_dims": 16,
            "subsampling_conv_channels": [4, 4],
            "use_clipped_linears": False,
        },
        **_IDS,
        "audio_token_id": 62,
    },
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "text_config": {**_GEMMA4_TEXT, "model_type": "gemma4_unified_text"},
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        },
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 8},
        **_IDS,
        "audio_token_id": 62,
    },
    "llava": {
        "model_type": "llava",
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 8},
        "image_token_index": 60,
    },
    "llava_next": {
        "model_type": "llava_next",
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": 8},
        "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 8},
        "image_token_index": 60,
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_VISION, "model_type": "pixtral"},
        "tie_word_embeddings": False,
        "image_token_index": 60,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {**_sections(1e4, 1, 1, 0), "partial_rotary_factor": 0.25},
        },
        "vision_config": {**_QWEN_VISION, "model_type": "qwen3_5_vision"},
        **_IDS,
        **_ENDS,
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_5_moe_text",
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 20,
            "rope_parameters": {**_sections(1e4, 1, 1, 0), "partial_rotary_factor": 0.25},
        },
        "vision_config": {**_QWEN_VISION, "model_type": "qwen3_5_moe_vision"},
        **_IDS,
        **_ENDS,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": _sections(1e4, 2, 1, 1),
        },
        "vision_config": {
            **_QWEN_VISION,
            "model_type": "qwen3_vl_vision",
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": True,
        **_IDS,
        **_ENDS,
    },
}


def tokens() -> np.ndarray:
    """Returns the text whose logits are stored, `[2, 20]`, without ids of pictures."""
    return np.random.default_rng(0).integers(5, 60, (2, 20))


def write_tower(case: str, folder: Path) -> Path:
    """Writes config.json and model.safetensors of a case into an existing folder; returns it."""
    with np.load(STORED) as stored:
        config = json.loads(str(stored[f"{case}/config"]))
        shapes = json.loads(str(stored[f"{case}/shapes"]))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: weight(name, tuple(shape), case) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_logits(case: str) -> np.ndarray:
    """Returns the stored logits of `tokens`, `[2, 20, V]`."""
    with np.load(STORED) as stored:
        return stored[f"{case}/logits"]


def counted_tensors(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> list[list[Any]]:
    """Returns `[name, shape, count]` of tensors that are alike but for numbers in their names."""
    alike = collections.Counter((re.sub(r"\d+", "0", name), shape) for name, shape in tensors)
    return [[name, list(shape), count] for (name, shape), count in sorted(alike.items())]


def load_wholes() -> dict[str, list[list[Any]]]:
    """Returns `{name of a published model: counted_tensors}` of all its parts."""
    return json.loads(WHOLES.read_text())


def whole_tensors(config: dict[str, Any]) -> list[list[Any]]:
    """Returns `counted_tensors` of the model that a config.json describes, shared ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tests.oracle.reference import unlearnt_numbers

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    tensors = dict(model.named_parameters()) | unlearnt_numbers(model)
    return counted_tensors((name, tuple(x.shape)) for name, x in tensors.items())


def compute() -> dict[str, Any]:
    """Returns config.json and shapes, as JSON, and logits of each case."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    found = {}
    for case, fields in CONFIGS.items():
        config = AutoConfig.for_model(**fields)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
            shapes = {name: list(value.shape) for name, value in sorted(load_file(file).items())}
            tensors = {name: weight(name, tuple(shape), case) for name, shape in shapes.items()}
            save_file(tensors, file, metadata={"format": "pt"})
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
            found[f"{case}/config"] = np.array((Path(folder) / "config.json").read_text())
            with torch.no_grad():
                found[f"{case}/logits"] = model.eval()(torch.tensor(tokens())).logits.numpy()
        found[f"{case}/shapes"] = np.array(json.dumps(shapes))
    return found
