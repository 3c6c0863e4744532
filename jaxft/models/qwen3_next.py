"""Qwen3-Next: Qwen3.5-MoE with one projection for all that belongs to a key head."""

from typing import Any

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig
from jaxft.models.experts import ExpertsAndShared
from jaxft.models.fields import Fields
from jaxft.models.naming import ATTENTION, HEAD_NORMS
from jaxft.models.qwen3_5 import DELTA_NET, FULL, LINEAR, hybrid_blocks
from jaxft.models.qwen3_5_moe import HF_IGNORED, HF_OTHERS, HF_RENAMED, HF_RULES, with_experts

__all__ = [
    "BLOCKS",
    "HF_BLOCK_RULES",
    "HF_IGNORED",
    "HF_OTHERS",
    "HF_RENAMED",
    "HF_RULES",
    "config_from_hf",
]


BLOCKS = hybrid_blocks(ExpertsAndShared, by_key_head=True)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, head_dim=256, num_key_value_heads=2, intermediate_size=5632)
    return with_experts(fields, normalised=fields.get("norm_topk_prob", True))


_DELTA = "model.layers.{layer}.linear_attn."
HF_BLOCK_RULES = {
    LINEAR: (
        Rule("layers.attn.qkvg.w", _DELTA + "in_proj_qkvz.weight", "(k h) d -> k h d"),
        Rule("layers.attn.rates.w", _DELTA + "in_proj_ba.weight", "(k h) d -> k h d"),
        *DELTA_NET,
    ),
    FULL: (*ATTENTION, *HEAD_NORMS),
}
