"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in every layer."""

from typing import Any

from flax import nnx

from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.experts import Experts
from jaxft.models.fields import Fields
from jaxft.models.layers import ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, EXPERTS, FUSED_EXPERTS, HEAD_NORMS, PRE_NORMS


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, qk_norm="head")
        super().__init__(config, numerics, attn=attn, mlp=Experts(config, numerics, rngs))


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, sliding_window=4096, num_key_value_heads=4)
    fields.require(
        hidden_act="silu",
        attention_bias=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        # Fields of some published files that repeat what the family is.
        qkv_bias=False,
        use_qk_norm=True,
        shared_expert_intermediate_size=0,
    )
    experts = fields.experts(normalised=fields.get("norm_topk_prob", False))
    mlp = fields.size("moe_intermediate_size")
    fields.unused("max_window_layers")
    rope = fields.rope(fields.head_dim())
    windows = fields.uniform_windows(in_use=fields.get("use_sliding_window", False))
    kinds = [LayerKind(window, rope) for window in windows]
    return fields.decoder(kinds, experts=experts, mlp=mlp)


HF_RULES = (
    *BODY,
    *PRE_NORMS,
    *ATTENTION,
    *HEAD_NORMS,
    *EXPERTS,
)
HF_IGNORED = ()
HF_RENAMED = FUSED_EXPERTS
