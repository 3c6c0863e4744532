"""Qwen3-VL's text: Qwen3, whose rotary pairs are shared out among time, height and width."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.qwen3 import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads text_config of config.json; raises ModelError with all that is not understood."""
    fields = Fields(config, num_key_value_heads=32, head_dim=128)
    fields.require(hidden_act="silu", attention_bias=False)
    rope = fields.rope(fields.head_dim(), theta=5e5, sections=True)
    return fields.decoder([LayerKind(rope=rope)] * fields.size("num_hidden_layers"))
