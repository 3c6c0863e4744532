"""Ministral: Mistral's block, where `layer_types` says which layers have the window."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.llama import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, sliding_window=4096, num_key_value_heads=8)
    fields.require(hidden_act="silu")
    fields.need("head_dim")
    rope = fields.rope(fields.head_dim())
    windows = fields.windows(lambda layer: True)
    return fields.decoder([LayerKind(window, rope) for window in windows])
