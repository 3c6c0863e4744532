"""OLMo-3: OLMo-2's block with windows in three layers of four, which keep their positions."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.olmo2 import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, sliding_window=4096)
    # Of another base outside `rope_parameters` transformers 5 makes that of some layers alone.
    fields.require(hidden_act="silu", attention_bias=False, rope_theta=_THETA)
    local, everywhere = fields.ropes(fields.head_dim(), local=_THETA, everywhere=_THETA)
    windows = fields.windows(lambda layer: (layer + 1) % 4 != 0)
    return fields.decoder([LayerKind(w, local if w else everywhere) for w in windows])


_THETA = 500000.0
