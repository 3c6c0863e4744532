"""Mixtral: Mistral's attention, and a mixture of experts in every layer."""

from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.experts import Experts
from jaxft.models.fields import Fields
from jaxft.models.layers import ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, FUSED_EXPERTS, PRE_NORMS


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs)
        super().__init__(config, numerics, attn=attn, mlp=Experts(config, numerics, rngs))


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, rope_theta=1e6, num_key_value_heads=8)
    fields.require(hidden_act="silu", router_jitter_noise=0.0)
    experts = fields.experts(normalised=True)
    rope = fields.rope(fields.head_dim())
    windows = fields.uniform_windows()
    return fields.decoder([LayerKind(window, rope) for window in windows], experts=experts)


_MOE = "model.layers.{layer}.block_sparse_moe."
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    *ATTENTION,
    Rule("layers.mlp.router.w", _MOE + "gate.weight", "e d -> e d"),
    Rule("layers.mlp.gate.w", _MOE + "experts.{expert}.w1.weight", "f d -> f d"),
    Rule("layers.mlp.up.w", _MOE + "experts.{expert}.w3.weight", "f d -> f d"),
    Rule("layers.mlp.down.w", _MOE + "experts.{expert}.w2.weight", "d f -> d f"),
)
HF_IGNORED = ()
HF_RENAMED = FUSED_EXPERTS
