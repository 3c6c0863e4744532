"""Phi-3 and Phi-4-mini: Llama's block from files whose projections are fused, and LongRoPE."""

from typing import Any

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.llama import HF_IGNORED, Block
from jaxft.models.naming import BODY, FUSED_GATED_MLP, PRE_NORMS

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        lm_head_bias=False,
        full_attn_mod=1,
        interpolate_factor=1,
    )
    # Code that was needed before transformers knew the family; it is not run.
    fields.unused("auto_map", "original_max_position_embeddings")
    rope = fields.rope(fields.head_dim(), partial=True)
    windows = fields.uniform_windows()
    return fields.decoder([LayerKind(window, rope) for window in windows])


_LAYER = "model.layers.{layer}."
_QKV = _LAYER + "self_attn.qkv_proj.weight"
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    Rule("layers.attn.q.w", _QKV, "(+ n h) d -> n h d"),
    Rule("layers.attn.k.w", _QKV, "(+ k h) d -> k h d"),
    Rule("layers.attn.v.w", _QKV, "(+ k h) d -> k h d"),
    Rule("layers.attn.o.w", _LAYER + "self_attn.o_proj.weight", "d (n h) -> d n h"),
    *FUSED_GATED_MLP,
)
