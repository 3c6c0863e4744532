"""Command R: attention and feed-forward part beside each other, layer norms without biases."""

from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import GatedMLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, qk_norm=config.qk_norm, interleaved=True)
        super().__init__(config, numerics, attn=attn, mlp=GatedMLP(config, numerics, rngs))


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, tie_word_embeddings=True)
    fields.unused("model_max_length")
    kind = LayerKind(rope=fields.rope(fields.head_dim(), theta=500000.0))
    norm = "own" if fields.get("use_qk_norm", False) else ""
    return cohere_config(fields, [kind] * fields.need("num_hidden_layers"), qk_norm=norm)


def cohere_config(fields: Fields, kinds: list[LayerKind], **family: Any) -> DecoderConfig:
    """Reads what both generations share, and finishes."""
    fields.require(hidden_act="silu", attention_bias=False)
    return fields.decoder(
        kinds,
        epsilon="layer_norm_eps",
        norm="layer_unbiased",
        parallel=True,
        logit_scale=fields.factor("logit_scale", 0.0625),
        **family,
    )


_LAYER = "model.layers.{layer}."
HF_RULES = (
    *BODY,
    Rule("layers.attn_norm.scale", _LAYER + "input_layernorm.weight", "d -> d"),
    *ATTENTION,
    Rule("layers.attn.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "n h -> n h"),
    Rule("layers.attn.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "k h -> k h"),
    *GATED_MLP,
)
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
