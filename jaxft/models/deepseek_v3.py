"""DeepSeek-V3 and R1, Moonlight: attention to latents, and experts chosen by corrected scores."""

import dataclasses
import math
from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, ExpertsConfig, LatentConfig, LayerKind, Numerics
from jaxft.models.decoder import Block as Builder
from jaxft.models.experts import ExpertsAndShared
from jaxft.models.fields import Fields
from jaxft.models.latent import LatentAttention
from jaxft.models.layers import GatedMLP, ResidualBlock
from jaxft.models.naming import (
    BODY,
    FUSED_ROUTED_EXPERTS,
    GATED_MLP,
    LATENT_ATTENTION,
    PRE_NORMS,
    ROUTED_EXPERTS,
)
from jaxft.models.rope import Rope

DENSE, SPARSE = "dense", "sparse"


def blocks_of(attention: Builder) -> dict[str, Builder]:
    """Returns the blocks of layers without and with experts, given what builds attention."""

    def dense(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Module:
        attn = attention(config, numerics, rngs)
        mlp = GatedMLP(config, numerics, rngs, width=config.dense_mlp)
        return ResidualBlock(config, numerics, attn=attn, mlp=mlp)

    def sparse(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Module:
        attn = attention(config, numerics, rngs)
        mlp = ExpertsAndShared(config, numerics, rngs, gated=False)
        return ResidualBlock(config, numerics, attn=attn, mlp=mlp)

    return {DENSE: dense, SPARSE: sparse}


BLOCKS = blocks_of(LatentAttention)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = latent_fields(config, n_group=8, topk_group=4, norm_topk_prob=True)
    experts = corrected_experts(fields)
    return latent_decoder(fields, experts, dense=fields.count("first_k_dense_replace", 3))


def latent_fields(config: dict[str, Any], **absent: Any) -> Fields:
    """Returns the fields of a config.json whose `head_dim`, if any, is what is turned of a head."""
    return Fields(config, head_dim=config.get("qk_rope_head_dim"), **absent)


def corrected_experts(fields: Fields, *, factor: float = 2.5) -> ExpertsConfig:
    """Reads experts that are chosen by the sigmoid of their logits and a correction.

    Args:
      fields: Of config.json.
      factor: Of their weights, where no field says so.
    """
    fields.require(scoring_func="sigmoid", topk_method="noaux_tc")
    experts = dataclasses.replace(
        routed_experts(fields, normalised=fields.get("norm_topk_prob", True), factor=factor),
        scoring="sigmoid",
        corrected=True,
        ranking=2,
    )
    return in_groups(fields, experts)


def routed_experts(fields: Fields, *, normalised: bool, factor: float) -> ExpertsConfig:
    """Reads experts beside one that every token goes through; `factor` where there is none."""
    return dataclasses.replace(
        fields.experts(normalised=normalised),
        shared=fields.size("n_shared_experts") * fields.size("moe_intermediate_size"),
        scale=fields.factor("routed_scaling_factor", factor),
    )


def in_groups(fields: Fields, experts: ExpertsConfig) -> ExpertsConfig:
    """Reads the groups of experts of which a token chooses some first."""
    groups, chosen = fields.size("n_group", 1), fields.size("topk_group", 1)
    size = experts.count // groups
    if experts.count % groups or chosen > groups or experts.chosen > chosen * size:
        fields.problem(
            f"config.json: {experts.count} experts in n_group {groups} groups, of which topk_group "
            f"{chosen} are chosen first and then num_experts_per_tok {experts.chosen} experts: "
            "expected groups of one size, and as many experts in the chosen ones."
        )
        return experts
    if groups > 1 and size < experts.ranking:
        fields.problem(
            f"config.json: groups of {size} experts (n_group {groups}) are ranked by the "
            f"{experts.ranking} best of each; expected as many."
        )
    return dataclasses.replace(experts, groups=groups, chosen_groups=chosen)


def latent_decoder(fields: Fields, experts: ExpertsConfig, *, dense: int) -> DecoderConfig:
    """Reads what families with attention to latents share; arguments as of `sparse_decoder`."""
    heads = fields.size("num_attention_heads")
    sizes = LatentConfig(
        query_rank=fields.size("q_lora_rank") if "q_lora_rank" in fields else 0,
        rank=fields.size("kv_lora_rank", 512),
        plain_dim=fields.size("qk_nope_head_dim", 128),
        turned_dim=fields.size("qk_rope_head_dim", 64),
        value_dim=fields.size("v_head_dim", 128),
        interleaved=fields.get("rope_interleave", True),
    )
    size = sizes.plain_dim + sizes.turned_dim
    fields.require(
        attention_bias=False,
        num_key_value_heads=heads,
        head_dim=sizes.turned_dim,
        qk_head_dim=size,
    )
    if sizes.value_dim > size:
        fields.problem(
            f"config.json: v_head_dim {sizes.value_dim} exceeds qk_nope_head_dim "
            f"{sizes.plain_dim} + qk_rope_head_dim {sizes.turned_dim}; expected at most as much."
        )
    return sparse_decoder(
        fields,
        experts,
        fields.rope(sizes.turned_dim),
        dense=dense,
        head_dim=size,
        kv_heads=heads,
        attention_scale=_scale(fields) / math.sqrt(size),
        latent=sizes,
    )


def sparse_decoder(
    fields: Fields, experts: ExpertsConfig, rope: Rope, *, dense: int, **family: Any
) -> DecoderConfig:
    """Reads what families share whose first layers are without experts.

    Args:
      fields: Of config.json.
      experts: Of the other layers.
      rope: Of all layers.
      dense: How many are without.
      **family: As for `Fields.decoder`.
    """
    layers = fields.size("num_hidden_layers")
    fields.require(hidden_act="silu", moe_layer_freq=1)
    # How training of the original spread experts, and judged their balance.
    fields.unused("ep_size", "aux_loss_alpha", "seq_aux", "auto_map")
    if dense >= layers:
        fields.problem(
            f"config.json: {dense} of {layers} layers are without experts; expected some with."
        )
    blocks = [DENSE] * dense + [SPARSE] * max(layers - dense, 0)
    return fields.decoder(
        [LayerKind(rope=rope, block=block) for block in blocks],
        mlp=fields.size("moe_intermediate_size"),
        experts=experts,
        dense_mlp=fields.size("intermediate_size") if dense else 0,
        guessing=fields.guessing(),
        **family,
    )


def _scale(fields: Fields) -> float:
    """Returns what YaRN for longer texts multiplies scores by (`mscale_all_dim`)."""
    own = fields.get("rope_parameters", fields.get("rope_scaling", {}))
    wide, kind = own.get("mscale_all_dim"), own.get("rope_type", own.get("type", "default"))
    factor = own.get("factor", 1.0)
    if not wide or kind == "default" or factor <= 1:
        return 1.0
    return (0.1 * wide * math.log(factor) + 1.0) ** 2


_MLP = "model.layers.{layer}.mlp."
HF_RULES = (*BODY, *PRE_NORMS, *LATENT_ATTENTION)
EXPERTS = (
    *ROUTED_EXPERTS,
    Rule("layers.mlp.routed.correction", _MLP + "gate.e_score_correction_bias", "e -> e"),
    Rule("layers.mlp.shared.gate.w", _MLP + "shared_experts.gate_proj.weight", "f d -> f d"),
    Rule("layers.mlp.shared.up.w", _MLP + "shared_experts.up_proj.weight", "f d -> f d"),
    Rule("layers.mlp.shared.down.w", _MLP + "shared_experts.down_proj.weight", "d f -> d f"),
)
HF_BLOCK_RULES = {DENSE: GATED_MLP, SPARSE: EXPERTS}
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
HF_RENAMED = FUSED_ROUTED_EXPERTS
