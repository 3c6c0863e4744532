"""Apertus: Qwen3's attention, and a feed-forward part whose activation has learnt parameters."""

from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import MLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, HEAD_NORMS
from jaxft.models.nonlinearity import XIELU


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, qk_norm="head")
        mlp = MLP(config, numerics, rngs, activation=XIELU(numerics))
        super().__init__(config, numerics, attn=attn, mlp=mlp)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="xielu", attention_bias=False, mlp_bias=False)
    # What files say of the model beside what transformers reads.
    fields.require(qk_norm=True, post_norm=False)
    fields.unused("hidden_dropout")
    settings = fields.get("rope_scaling", fields.get("rope_parameters", _LLAMA3))
    rope = fields.rope(fields.head_dim(), theta=fields.get("rope_theta", 12e6), parameters=settings)
    return fields.decoder([LayerKind(rope=rope)] * fields.need("num_hidden_layers"))


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LAYER = "model.layers.{layer}."
_XIELU = "layers.mlp.activation."
HF_RULES = (
    *BODY,
    Rule("layers.attn_norm.scale", _LAYER + "attention_layernorm.weight", "d -> d"),
    Rule("layers.mlp_norm.scale", _LAYER + "feedforward_layernorm.weight", "d -> d"),
    *ATTENTION,
    *HEAD_NORMS,
    Rule("layers.mlp.up.w", _LAYER + "mlp.up_proj.weight", "f d -> f d"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.down_proj.weight", "d f -> d f"),
    Rule(_XIELU + "alpha_p", _LAYER + "mlp.act_fn.alpha_p", "d -> d"),
    Rule(_XIELU + "alpha_n", _LAYER + "mlp.act_fn.alpha_n", "d -> d"),
    Rule(_XIELU + "beta", _LAYER + "mlp.act_fn.beta", "->"),
    Rule(_XIELU + "eps", _LAYER + "mlp.act_fn.eps", "->"),
)
HF_IGNORED = ()
