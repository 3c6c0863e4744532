"""Gemma 3, text: Gemma 2's block with norms over heads, and two rotary bases."""

from typing import Any

from flax import nnx

from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.gemma2 import ABSENT, gemma_config
from jaxft.models.layers import GatedMLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, HEAD_NORMS, SANDWICH_NORMS
from jaxft.models.nonlinearity import gelu_tanh


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, qk_norm="head")
        mlp = GatedMLP(config, numerics, rngs, activation=gelu_tanh)
        super().__init__(config, numerics, attn=attn, mlp=mlp, post=True)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, **ABSENT, rope_theta=1e6, rope_local_base_freq=1e4)
    # Hugging Face's model has this field and never applies it.
    fields.require(attn_logit_softcapping=None)
    fields.need("sliding_window")
    fields.unused("_sliding_window_pattern")  # transformers 5 writes it beside layer_types
    period = fields.get("sliding_window_pattern", 6)
    windows = fields.windows(lambda layer: (layer + 1) % period != 0)
    local, everywhere = fields.ropes(
        fields.head_dim(),
        local=fields.need("rope_local_base_freq"),
        everywhere=fields.need("rope_theta"),
    )
    kinds = [LayerKind(window, local if window else everywhere) for window in windows]
    return gemma_config(fields, kinds)


HF_RULES = (*BODY, *SANDWICH_NORMS, *ATTENTION, *HEAD_NORMS, *GATED_MLP)
HF_IGNORED = ()
