"""EXAONE 4: norms after each part and over heads; layers without a window know no positions."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, HEAD_NORMS, POST_NORMS

Block = gated_block(pre=False, post=True, qk_norm="head")


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="silu")
    pattern, types = fields.get("sliding_window_pattern", 4), fields.get("layer_types")
    period = pattern if type(pattern) is int and pattern > 0 else 1
    if types is None and "sliding_window" in fields and period != pattern:
        fields.problem(
            f"config.json: sliding_window_pattern is {pattern!r} and there are no layer_types; "
            "expected one of them to say which layers have the window, the first by a period."
        )
    windows = fields.windows(lambda layer: (layer + 1) % period != 0)
    rope = fields.rope(fields.head_dim())
    everywhere = None if "sliding_window" in fields else rope
    return fields.decoder([LayerKind(w, rope if w else everywhere) for w in windows])


HF_RULES = (*BODY, *POST_NORMS, *ATTENTION, *HEAD_NORMS, *GATED_MLP)
HF_IGNORED = ()
