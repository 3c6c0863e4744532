"""Gemma 4 12B, text: Gemma 4 without experts, inside of a model that has no towers."""

from typing import Any

from jaxft.models import gemma4
from jaxft.models.config import DecoderConfig
from jaxft.models.fields import Fields

BLOCKS, HF_RULES, HF_IGNORED = gemma4.BLOCKS, gemma4.HF_RULES, gemma4.HF_IGNORED


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, **gemma4.ABSENT, sliding_window=1024)
    # Fields of Gemma 4 that files carry; transformers reads none of them for this type.
    fields.require(enable_moe_block=False, hidden_size_per_layer_input=0)
    return gemma4.gemma4_config(fields)
