"""Seed-OSS: Qwen2's block with heads of a size of their own."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.qwen2 import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, num_key_value_heads=8, head_dim=128)
    fields.require(hidden_act="silu", attention_bias=True, attention_out_bias=False, mlp_bias=False)
    fields.unused("residual_dropout")
    kind = LayerKind(rope=fields.rope(fields.head_dim()))
    return fields.decoder([kind] * fields.need("num_hidden_layers"))
