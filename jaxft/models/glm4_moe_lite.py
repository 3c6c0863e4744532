"""GLM-4.7-Flash: DeepSeek-V3's layers, whose files may say of each whether it has experts."""

from typing import Any

from jaxft.models.config import DecoderConfig
from jaxft.models.deepseek_v3 import (
    BLOCKS,
    DENSE,
    HF_BLOCK_RULES,
    HF_IGNORED,
    HF_RENAMED,
    HF_RULES,
    SPARSE,
    corrected_experts,
    latent_decoder,
    latent_fields,
)

__all__ = ["BLOCKS", "HF_BLOCK_RULES", "HF_IGNORED", "HF_RENAMED", "HF_RULES", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = latent_fields(config, v_head_dim=256, qk_nope_head_dim=192)
    fields.require(partial_rotary_factor=1.0)
    experts, layers = corrected_experts(fields, factor=1.8), fields.size("num_hidden_layers")
    types = fields.get("mlp_layer_types", [DENSE] + [SPARSE] * (layers - 1))
    dense = types.index(SPARSE) if SPARSE in types else len(types)
    if types != [DENSE] * dense + [SPARSE] * (layers - dense):
        fields.problem(
            f"config.json: mlp_layer_types is {types}; expected {layers} entries, 'dense' for the "
            "first layers and 'sparse' for all others."
        )
    fields.require(first_k_dense_replace=dense)
    return latent_decoder(fields, experts, dense=dense)
