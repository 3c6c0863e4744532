"""Granite: Llama's block with multipliers of embeddings, scores, what parts add, and logits."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.llama import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="silu", attention_bias=False, mlp_bias=False)
    kind = LayerKind(rope=fields.rope(fields.head_dim()))
    return fields.decoder(
        [kind] * fields.need("num_hidden_layers"),
        attention_scale=fields.factor("attention_multiplier", 1.0),
        embed_scale=fields.factor("embedding_multiplier", 1.0),
        residual_scale=fields.factor("residual_multiplier", 1.0),
        logit_scale=1 / fields.factor("logits_scaling", 1.0),
    )
