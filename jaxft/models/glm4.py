"""GLM-4 of 2025 (0414): GLM's block with norms after each part as well."""

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models import glm
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.glm import HF_IGNORED, config_from_hf
from jaxft.models.naming import ATTENTION, ATTENTION_BIAS, BODY, FUSED_GATED_MLP, PRE_NORMS

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


class Block(glm.Block):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        super().__init__(config, numerics, rngs, post=True)


_LAYER = "model.layers.{layer}."
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    Rule("layers.attn_post_norm.scale", _LAYER + "post_self_attn_layernorm.weight", "d -> d"),
    Rule("layers.mlp_post_norm.scale", _LAYER + "post_mlp_layernorm.weight", "d -> d"),
    *ATTENTION,
    *ATTENTION_BIAS,
    *FUSED_GATED_MLP,
)
