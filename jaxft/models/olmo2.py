"""OLMo-2: norms after attention and feed-forward part, and over all queries and all keys."""

from typing import Any

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, POST_NORMS

Block = gated_block(pre=False, post=True, qk_norm="all")


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="silu", attention_bias=False)
    kind = LayerKind(rope=fields.rope(fields.head_dim()))
    return fields.decoder([kind] * fields.need("num_hidden_layers"))


_LAYER = "model.layers.{layer}."
HF_RULES = (
    *BODY,
    *POST_NORMS,
    *ATTENTION,
    *GATED_MLP,
    Rule("layers.attn.q_norm.scale", _LAYER + "self_attn.q_norm.weight", "(n h) -> n h"),
    Rule("layers.attn.k_norm.scale", _LAYER + "self_attn.k_norm.weight", "(k h) -> k h"),
)
HF_IGNORED = ()
