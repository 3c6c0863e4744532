"""GLM-4.5, 4.6 and 4.7: grouped heads, partly turned, and experts as in DeepSeek-V3."""

from typing import Any

from flax import nnx

from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.deepseek_v3 import (
    HF_BLOCK_RULES,
    HF_IGNORED,
    HF_RENAMED,
    blocks_of,
    corrected_experts,
    sparse_decoder,
)
from jaxft.models.fields import Fields
from jaxft.models.layers import SelfAttention
from jaxft.models.naming import ATTENTION, ATTENTION_BIAS, BODY, HEAD_NORMS, PRE_NORMS

__all__ = ["BLOCKS", "HF_BLOCK_RULES", "HF_IGNORED", "HF_RENAMED", "HF_RULES", "config_from_hf"]


def _attention(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Module:
    bias, qk_norm = config.attention_bias, config.qk_norm
    return SelfAttention(config, numerics, rngs, bias=bias, qk_norm=qk_norm)


BLOCKS = blocks_of(_attention)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, num_key_value_heads=8)
    return sparse_decoder(
        fields,
        corrected_experts(fields, factor=1.0),
        fields.rope(fields.head_dim(), partial=True, share=0.5),
        dense=fields.count("first_k_dense_replace", 1),
        attention_bias=fields.get("attention_bias", False),
        qk_norm="head" if fields.get("use_qk_norm", False) else "",
    )


HF_RULES = (*BODY, *PRE_NORMS, *ATTENTION, *ATTENTION_BIAS, *HEAD_NORMS)
