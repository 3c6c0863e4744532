"""Hunyuan, dense: Llama's block with a norm over each head after queries and keys are turned."""

from typing import Any

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, PRE_NORMS
from jaxft.models.rope import Rope

Block = gated_block(qk_norm="turned")


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="silu", attention_bias=False, mlp_bias=False)
    # What files say of the model beside what transformers reads.
    fields.require(use_qk_norm=True, use_cla=False, use_rotary_pos_emb=True, norm_type="rms")
    fields.unused("attention_head_dim", "cla_share_factor", "eod_token_id", "org_vocab_size")
    return fields.decoder([LayerKind(rope=_rope(fields))] * fields.need("num_hidden_layers"))


def _rope(fields: Fields) -> Rope:
    """Reads rotary settings; files call them dynamic where a fixed `alpha` stretches the base."""
    own = fields.get("rope_scaling", fields.get("rope_parameters", {}))
    size, theta = fields.head_dim(), fields.get("rope_theta", 10000.0)
    kind = own.get("rope_type", own.get("type"))
    if kind != "dynamic" or not own.get("alpha"):
        return fields.rope(size, theta=theta, parameters=own)
    fields.need("head_dim")
    alpha = own["alpha"]
    if own.keys() - _DYNAMIC or not isinstance(alpha, int | float) or alpha < 0 or size < 4:
        fields.problem(
            f"config.json: rope scaling 'dynamic' has {own} for heads of {size}; expected a "
            f"positive alpha and at most {', '.join(sorted(_DYNAMIC))}."
        )
        return Rope(1e4, size)
    theta = own.get("rope_theta", theta) * alpha ** (size / (size - 2))
    return fields.rope(size, theta=theta, parameters={})


# All but the first have no effect beside it.
_DYNAMIC = {"alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim"}
_DYNAMIC |= {"rope_theta", "rope_type", "type"}
_LAYER = "model.layers.{layer}."
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    *ATTENTION,
    Rule("layers.attn.q_norm.scale", _LAYER + "self_attn.query_layernorm.weight", "h -> h"),
    Rule("layers.attn.k_norm.scale", _LAYER + "self_attn.key_layernorm.weight", "h -> h"),
    *GATED_MLP,
)
HF_IGNORED = ()
