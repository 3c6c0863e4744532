"""nanochat: norms without weights, also of token vectors, squared ReLU, pairs turned back."""

import dataclasses
from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import MLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY
from jaxft.models.nonlinearity import squared_relu
from jaxft.models.rope import LinearScaling


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, qk_norm="turned")
        mlp = MLP(config, numerics, rngs, activation=squared_relu)
        super().__init__(config, numerics, attn=attn, mlp=mlp)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config, final_logit_softcapping=15.0)
    fields.require(hidden_act="relu2", attention_bias=False)
    rope = fields.rope(fields.head_dim())
    if rope.scaling is not None:
        fields.problem("config.json: rope scaling of nanochat is not supported; remove it.")
    # Its pairs turn the other way: positions count backwards.
    kind = LayerKind(rope=dataclasses.replace(rope, scaling=LinearScaling(-1.0)))
    return fields.decoder(
        [kind] * fields.need("num_hidden_layers"),
        norm="rms_bare",
        embed_norm=True,
        logit_cap=fields.get("final_logit_softcapping", 0.0),
    )


_LAYER = "model.layers.{layer}."
HF_RULES = (
    *BODY,
    *ATTENTION,
    Rule("layers.mlp.up.w", _LAYER + "mlp.fc1.weight", "f d -> f d"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.fc2.weight", "d f -> d f"),
)
HF_IGNORED = ()
