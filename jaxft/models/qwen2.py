"""Qwen2 and Qwen2.5: Llama's block with biases on queries, keys and values."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, ATTENTION_BIAS, BODY, GATED_MLP, PRE_NORMS

Block = gated_block(bias=True)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, sliding_window=4096, num_key_value_heads=32)
    fields.require(hidden_act="silu", use_mrope=False)
    return fields.decoder(layer_kinds(fields))


def layer_kinds(fields: Fields) -> list[LayerKind]:
    """Returns the kind of each layer: of a window, where one is in use, the upper ones have it."""
    rope = fields.rope(fields.head_dim())
    first, in_use = fields.get("max_window_layers", 28), fields.get("use_sliding_window", False)
    windows = fields.windows(lambda layer: layer >= first, in_use=in_use)
    return [LayerKind(window, rope) for window in windows]


HF_RULES = (*BODY, *PRE_NORMS, *ATTENTION, *ATTENTION_BIAS, *GATED_MLP)
HF_IGNORED = ()
