"""Ministral 3, text: Mistral's block with YaRN, and queries that grow with their position."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.llama import HF_IGNORED, HF_RULES, Block
from jaxft.models.rope import QueryGrowth

__all__ = ["HF_IGNORED", "HF_RULES", "Block", "config_from_hf"]


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, head_dim=128, rope_parameters=_YARN)
    fields.require(hidden_act="silu")
    settings = {**fields.get("rope_scaling", fields.get("rope_parameters"))}
    settings.pop("max_position_embeddings", None)  # transformers does not read it here
    growth = _growth(fields, settings)
    theta = fields.get("rope_theta", 10000.0)
    rope = fields.rope(fields.head_dim(), theta=theta, parameters=settings)
    windows = fields.uniform_windows()
    return fields.decoder([LayerKind(window, rope, growth=growth) for window in windows])


def _growth(fields: Fields, settings: dict[str, Any]) -> QueryGrowth | None:
    """Takes out of rotary settings how queries grow."""
    beta = settings.pop("llama_4_scaling_beta", None)
    length = settings.get("original_max_position_embeddings")
    if not isinstance(beta, int | float) or beta < 0 or type(length) is not int or length < 1:
        fields.problem(
            f"config.json: rope_parameters has llama_4_scaling_beta {beta!r} and "
            f"original_max_position_embeddings {length!r}; expected a number of at least 0, and a "
            "positive whole one."
        )
        return None
    return QueryGrowth(float(beta), length) if beta else None


# What a file without rotary settings means.
_YARN = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
