"""Command R7B and Command A: Command R's block, with windows and positions in three of four."""

from typing import Any

from jaxft.models.cohere import HF_IGNORED, HF_RULES, Block, cohere_config
from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, tie_word_embeddings=True, sliding_window=4096)
    # What files say of the model beside what transformers reads.
    fields.require(
        use_qk_norm=False,
        use_parallel_block=True,
        use_gated_activation=True,
        use_embedding_sharing=True,
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
    )
    fields.unused("use_parallel_embedding", "order_of_interleaved_layers", "layer_switch")
    fields.unused("_sliding_window_pattern")
    fields.need("sliding_window")
    period = fields.size("sliding_window_pattern", 4)
    windows = fields.windows(lambda layer: (layer + 1) % period != 0)
    rope = fields.rope(fields.head_dim())
    return cohere_config(fields, [LayerKind(w, rope if w else None) for w in windows])
