"""Gemma 2: norms before and after each part, soft bounds, windows in every other layer."""

import math
from typing import Any

from flax import nnx

from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import GatedMLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, SANDWICH_NORMS
from jaxft.models.nonlinearity import gelu_tanh


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs)
        mlp = GatedMLP(config, numerics, rngs, activation=gelu_tanh)
        super().__init__(config, numerics, attn=attn, mlp=mlp, post=True)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, **ABSENT, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    rope = fields.rope(fields.head_dim())
    windows = fields.windows(lambda layer: layer % 2 == 0)
    fields.unused("sliding_window_size")
    return gemma_config(fields, [LayerKind(window, rope) for window in windows])


# What absent fields mean, as Hugging Face's configurations of Gemma 2 and Gemma 3 have it.
ABSENT = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def gemma_config(fields: Fields, kinds: list[LayerKind]) -> DecoderConfig:
    """Reads what Gemma 2 and Gemma 3 share, and finishes."""
    fields.require(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        use_bidirectional_attention=False,
    )
    fields.unused("hidden_act")  # an older name, whose value Hugging Face's model ignores
    return fields.decoder(
        kinds,
        norm="rms_offset",
        attention_scale=fields.need("query_pre_attn_scalar") ** -0.5,
        attention_cap=fields.get("attn_logit_softcapping", 0.0),
        logit_cap=fields.get("final_logit_softcapping", 0.0),
        embed_scale=math.sqrt(fields.need("hidden_size")),
    )


HF_RULES = (*BODY, *SANDWICH_NORMS, *ATTENTION, *GATED_MLP)
HF_IGNORED = ()
