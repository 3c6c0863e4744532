"""Qwen3.5-MoE and Qwen3.6-MoE, the text models: Qwen3.5 with experts and a shared one."""

import dataclasses
from typing import Any

from jaxft.hf.rules import Rule
from jaxft.models import qwen3_5
from jaxft.models.config import DecoderConfig
from jaxft.models.experts import ExpertsAndShared
from jaxft.models.fields import Fields
from jaxft.models.naming import BODY, FUSED_ROUTED_EXPERTS, PRE_NORMS, ROUTED_EXPERTS

BLOCKS = qwen3_5.hybrid_blocks(ExpertsAndShared)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    # The hidden width is that of layers without experts, of which there are none.
    fields = Fields(config, head_dim=256, num_key_value_heads=2, intermediate_size=12288)
    return with_experts(fields, normalised=True)


def with_experts(fields: Fields, *, normalised: bool) -> DecoderConfig:
    """Reads what families of both blocks with experts share."""
    experts = dataclasses.replace(
        fields.experts(normalised=normalised),
        shared=fields.size("shared_expert_intermediate_size", 512),
    )
    fields.require(decoder_sparse_step=1)
    width = fields.size("moe_intermediate_size", 512)
    return qwen3_5.hybrid(fields, experts=experts, mlp=width)


_MLP = "model.layers.{layer}.mlp."
HF_RULES = (
    *BODY,
    *PRE_NORMS,
    *ROUTED_EXPERTS,
    Rule("layers.mlp.shared.gate.w", _MLP + "shared_expert.gate_proj.weight", "f d -> f d"),
    Rule("layers.mlp.shared.up.w", _MLP + "shared_expert.up_proj.weight", "f d -> f d"),
    Rule("layers.mlp.shared.down.w", _MLP + "shared_expert.down_proj.weight", "d f -> d f"),
    Rule("layers.mlp.shared_gate.w", _MLP + "shared_expert_gate.weight", "e d -> e d"),
)
HF_BLOCK_RULES = qwen3_5.HF_BLOCK_RULES
HF_IGNORED, HF_OTHERS = qwen3_5.HF_IGNORED, qwen3_5.HF_OTHERS
HF_RENAMED = FUSED_ROUTED_EXPERTS
# Of this family PEFT makes one tensor of experts that are kept apart for models, not for adapters.
HF_ADAPTED = tuple(rule for rule in HF_RENAMED if "router" not in rule.ours)
