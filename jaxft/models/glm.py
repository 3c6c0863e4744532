"""GLM-4 of 2024: Llama's block with biases, half of each head turned, neighbours as pairs."""

from typing import Any

from flax import nnx

from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import GatedMLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, ATTENTION_BIAS, BODY, FUSED_GATED_MLP, PRE_NORMS


class Block(ResidualBlock):
    """One layer."""

    def __init__(
        self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs, *, post: bool = False
    ):
        bias = config.attention_bias
        attn = SelfAttention(config, numerics, rngs, bias=bias, interleaved=True)
        mlp = GatedMLP(config, numerics, rngs)
        super().__init__(config, numerics, attn=attn, mlp=mlp, post=post)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.5)
    fields.require(hidden_act="silu")
    kind = LayerKind(rope=fields.rope(fields.head_dim(), partial=True))
    return fields.decoder(
        [kind] * fields.need("num_hidden_layers"),
        attention_bias=fields.get("attention_bias", True),
    )


HF_RULES = (*BODY, *PRE_NORMS, *ATTENTION, *ATTENTION_BIAS, *FUSED_GATED_MLP)
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
