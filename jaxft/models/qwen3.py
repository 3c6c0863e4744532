"""Qwen3: Llama's block with a norm over each head of queries and keys."""

from typing import Any

from jaxft.models.config import DecoderConfig
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, HEAD_NORMS, PRE_NORMS
from jaxft.models.qwen2 import layer_kinds

Block = gated_block(qk_norm="head")


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, sliding_window=4096, num_key_value_heads=32, head_dim=128)
    fields.require(hidden_act="silu", attention_bias=False)
    return fields.decoder(layer_kinds(fields))


HF_RULES = (*BODY, *PRE_NORMS, *ATTENTION, *HEAD_NORMS, *GATED_MLP)
HF_IGNORED = ()
