"""Llama 2 to 3.2, and the many models of its shape: pre-norm, rotary positions, SwiGLU."""

from typing import Any

from jaxft.models.config import DecoderConfig, LayerKind
from jaxft.models.fields import Fields
from jaxft.models.layers import gated_block
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, PRE_NORMS

Block = gated_block()


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False)
    kind = LayerKind(rope=fields.rope(fields.head_dim()))
    return fields.decoder([kind] * fields.need("num_hidden_layers"))


HF_RULES = (*BODY, *PRE_NORMS, *ATTENTION, *GATED_MLP)
# Tensors that some files carry although the model derives them.
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
