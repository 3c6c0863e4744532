"""Apertus: Qwen3's attention, and a feed-forward part whose activation has learnt parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import MLP, ResidualBlock, SelfAttention
from jaxft.models.module import Param
from jaxft.models.naming import ATTENTION, BODY, HEAD_NORMS


class XIELU(nnx.Module):
    """xIELU (Huang and Schlag, arXiv:2411.13010), in float32; `beta` and `eps` are never learnt."""

    def __init__(self, numerics: Numerics):
        dtype = numerics.param_dtype
        # softplus(alpha) is 0.8 on the positive side, and 0.8 - beta on the other.
        self.alpha_p, self.alpha_n = (
            Param(jnp.log(jnp.expm1(jnp.full(1, start))).astype(dtype), axes=("norm",))
            for start in (0.8, 0.3)
        )
        self.beta, self.eps = (Param(jnp.asarray(x, dtype), axes=()) for x in (0.5, -1e-6))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns x (alpha_p x + beta) where x is positive, else alpha_n (e^x - 1 - x) + beta x."""
        wide = x.astype(jnp.float32)
        beta, eps = (
            jax.lax.stop_gradient(p[...].astype(jnp.float32)) for p in (self.beta, self.eps)
        )
        alpha_p, alpha_n = (
            jax.nn.softplus(p[...].astype(jnp.float32))[0] for p in (self.alpha_p, self.alpha_n)
        )
        low = (jnp.expm1(jnp.minimum(wide, eps)) - wide) * (beta + alpha_n)
        out = jnp.where(wide > 0, alpha_p * jnp.square(wide), low) + beta * wide
        return out.astype(x.dtype)


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
