"""gpt-oss: attention sinks, windows in every other layer, YaRN, experts with clamped SwiGLU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.experts import Experts
from jaxft.models.fields import Fields
from jaxft.models.layers import ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, ATTENTION_BIAS, BODY, PRE_NORMS


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, bias=True, out_bias=True)
        gating = functools.partial(clamped_swiglu, limit=config.mlp_limit)
        mlp = Experts(config, numerics, rngs, bias=True, gating=gating)
        super().__init__(config, numerics, attn=attn, mlp=mlp)


def clamped_swiglu(gate: Array, up: Array, *, limit: float) -> Array:
    """SwiGLU with a steeper sigmoid, inputs clamped to `limit`, and 1 added to the linear part."""
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, head_dim=64, sliding_window=128, rope_theta=150000.0)
    fields.require(hidden_act="silu", attention_bias=True, swiglu_alpha=1.702)
    # The loader has judged how weights are quantised; the others repeat what other fields say.
    fields.unused("experts_per_token", "initial_context_length")
    experts = fields.experts(normalised=True)
    settings = fields.get("rope_parameters", fields.get("rope_scaling", _YARN))
    rope = fields.rope(fields.head_dim(), theta=fields.need("rope_theta"), parameters=settings)
    windows = fields.windows(lambda layer: layer % 2 == 0)
    return fields.decoder(
        [LayerKind(window, rope) for window in windows],
        experts=experts,
        sinks=True,
        mlp_limit=fields.get("swiglu_limit", 7.0),
    )


# What a file without rotary settings means.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LAYER = "model.layers.{layer}."
_GATE_UP = _LAYER + "mlp.experts.gate_up_proj"
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    *ATTENTION,
    *ATTENTION_BIAS,
    Rule("layers.attn.o.b", _LAYER + "self_attn.o_proj.bias", "d -> d"),
    Rule("layers.attn.sinks", _LAYER + "self_attn.sinks", "n -> n"),
    Rule("layers.mlp.router.w", _LAYER + "mlp.router.weight", "e d -> e d"),
    Rule("layers.mlp.router.b", _LAYER + "mlp.router.bias", "e -> e"),
    Rule("layers.mlp.gate.w", _GATE_UP, "e d (f +) -> e f d"),
    Rule("layers.mlp.up.w", _GATE_UP, "e d (f +) -> e f d"),
    Rule("layers.mlp.gate.b", _GATE_UP + "_bias", "e (f +) -> e f"),
    Rule("layers.mlp.up.b", _GATE_UP + "_bias", "e (f +) -> e f"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.experts.down_proj", "e f d -> e d f"),
    Rule("layers.mlp.down.b", _LAYER + "mlp.experts.down_proj_bias", "e d -> e d"),
)
HF_IGNORED = ()
