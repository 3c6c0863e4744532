"""SmolLM3: Llama's block, and every few layers one that does not turn queries and keys."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.llama import HF_IGNORED, HF_RULES, Block

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, num_key_value_heads=4, tie_word_embeddings=True)
    fields.require(hidden_act="silu", attention_bias=False, mlp_bias=False)
    fields.unused("max_window_layers")
    rope = fields.rope(fields.head_dim(), theta=2e6)
    turned = _turned(fields)
    windows = fields.windows(
        lambda layer: not turned[layer], in_use=fields.get("use_sliding_window", False)
    )
    kinds = zip(windows, turned, strict=False)
    return fields.decoder([LayerKind(window, rope if turns else None) for window, turns in kinds])


def _turned(fields: Fields) -> list[bool]:
    """Returns for each layer whether it turns queries and keys by their positions."""
    layers, every = fields.size("num_hidden_layers"), fields.size("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers", [(layer + 1) % every for layer in range(layers)])
    if len(turned) < layers:
        fields.problem(
            f"config.json: no_rope_layers has {len(turned)} entries; expected {layers}, one for "
            "each layer: 1 where queries and keys are turned, else 0."
        )
        turned = [1] * layers
    return [bool(turns) for turns in turned[:layers]]
