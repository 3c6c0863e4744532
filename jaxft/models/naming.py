"""Names and layouts of tensors that the Hugging Face files of several families share."""

from dataclasses import replace

from jaxft.hf.rules import Rule

_LAYER = "model.layers.{layer}."

BODY = (
    Rule("embed.w", "model.embed_tokens.weight", "v d -> v d"),
    Rule("norm.scale", "model.norm.weight", "d -> d"),
    Rule("head.w", "lm_head.weight", "v d -> v d"),
)
PRE_NORMS = (
    Rule("layers.attn_norm.scale", _LAYER + "input_layernorm.weight", "d -> d"),
    Rule("layers.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "d -> d"),
)
SANDWICH_NORMS = (
    Rule("layers.attn_norm.scale", _LAYER + "input_layernorm.weight", "d -> d"),
    Rule("layers.attn_post_norm.scale", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Rule("layers.mlp_norm.scale", _LAYER + "pre_feedforward_layernorm.weight", "d -> d"),
    Rule("layers.mlp_post_norm.scale", _LAYER + "post_feedforward_layernorm.weight", "d -> d"),
)
POST_NORMS = (
    Rule("layers.attn_post_norm.scale", _LAYER + "post_attention_layernorm.weight", "d -> d"),
    Rule("layers.mlp_post_norm.scale", _LAYER + "post_feedforward_layernorm.weight", "d -> d"),
)
ATTENTION = (
    Rule("layers.attn.q.w", _LAYER + "self_attn.q_proj.weight", "(n h) d -> n h d"),
    Rule("layers.attn.k.w", _LAYER + "self_attn.k_proj.weight", "(k h) d -> k h d"),
    Rule("layers.attn.v.w", _LAYER + "self_attn.v_proj.weight", "(k h) d -> k h d"),
    Rule("layers.attn.o.w", _LAYER + "self_attn.o_proj.weight", "d (n h) -> d n h"),
)
ATTENTION_BIAS = (
    Rule("layers.attn.q.b", _LAYER + "self_attn.q_proj.bias", "(n h) -> n h"),
    Rule("layers.attn.k.b", _LAYER + "self_attn.k_proj.bias", "(k h) -> k h"),
    Rule("layers.attn.v.b", _LAYER + "self_attn.v_proj.bias", "(k h) -> k h"),
)
HEAD_NORMS = (
    Rule("layers.attn.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "h -> h"),
    Rule("layers.attn.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "h -> h"),
)
GATED_MLP = (
    Rule("layers.mlp.gate.w", _LAYER + "mlp.gate_proj.weight", "f d -> f d"),
    Rule("layers.mlp.up.w", _LAYER + "mlp.up_proj.weight", "f d -> f d"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.down_proj.weight", "d f -> d f"),
)
FUSED_GATED_MLP = (
    Rule("layers.mlp.gate.w", _LAYER + "mlp.gate_up_proj.weight", "(+ f) d -> f d"),
    Rule("layers.mlp.up.w", _LAYER + "mlp.gate_up_proj.weight", "(+ f) d -> f d"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.down_proj.weight", "d f -> d f"),
)
LATENT_ATTENTION = (
    Rule("layers.attn.q.w", _LAYER + "self_attn.q_proj.weight", "(n h) d -> n h d"),
    Rule("layers.attn.q_down.w", _LAYER + "self_attn.q_a_proj.weight", "r d -> r d"),
    Rule("layers.attn.q_norm.scale", _LAYER + "self_attn.q_a_layernorm.weight", "r -> r"),
    Rule("layers.attn.q_up.w", _LAYER + "self_attn.q_b_proj.weight", "(n h) r -> n h r"),
    Rule("layers.attn.kv_down.w", _LAYER + "self_attn.kv_a_proj_with_mqa.weight", "r d -> r d"),
    Rule("layers.attn.kv_norm.scale", _LAYER + "self_attn.kv_a_layernorm.weight", "r -> r"),
    Rule("layers.attn.kv_up.w", _LAYER + "self_attn.kv_b_proj.weight", "(n h) r -> n h r"),
    Rule("layers.attn.o.w", _LAYER + "self_attn.o_proj.weight", "d (n u) -> d n u"),
)
_EXPERTS = _LAYER + "mlp.experts."
EXPERTS = (
    Rule("layers.mlp.router.w", _LAYER + "mlp.gate.weight", "e d -> e d"),
    Rule("layers.mlp.gate.w", _EXPERTS + "{expert}.gate_proj.weight", "f d -> f d"),
    Rule("layers.mlp.up.w", _EXPERTS + "{expert}.up_proj.weight", "f d -> f d"),
    Rule("layers.mlp.down.w", _EXPERTS + "{expert}.down_proj.weight", "d f -> d f"),
)
# What models of transformers 5 make of experts that files keep apart, and how they call the router.
FUSED_EXPERTS = (
    Rule("layers.mlp.router.w", _LAYER + "mlp.gate.weight", "e d -> e d"),
    Rule("layers.mlp.gate.w", _EXPERTS + "gate_up_proj", "e (+ f) d -> e f d"),
    Rule("layers.mlp.up.w", _EXPERTS + "gate_up_proj", "e (+ f) d -> e f d"),
    Rule("layers.mlp.down.w", _EXPERTS + "down_proj", "e d f -> e d f"),
)
# The same of experts beside one that every token goes through.
ROUTED_EXPERTS, FUSED_ROUTED_EXPERTS = (
    tuple(replace(rule, ours=rule.ours.replace(".mlp.", ".mlp.routed.")) for rule in rules)
    for rules in (EXPERTS, FUSED_EXPERTS)
)
