"""GPT-2: learnt positions, layer norms with biases, and projections stored `[in, out]`."""

from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.fields import Fields
from jaxft.models.layers import MLP, ResidualBlock, SelfAttention
from jaxft.models.nonlinearity import gelu_tanh


class Block(ResidualBlock):
    """One layer."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        attn = SelfAttention(config, numerics, rngs, bias=True, out_bias=True)
        mlp = MLP(config, numerics, rngs, activation=gelu_tanh, bias=True)
        super().__init__(config, numerics, attn=attn, mlp=mlp)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    fields = Fields(config)
    fields.require(
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    fields.unused("n_ctx", "n_special", "reorder_and_upcast_attn", "task_specific_params")
    fields.unused(*(name for name in config if name.startswith("summary_")))
    embed, heads, layers = (fields.size(name) for name in ("n_embd", "n_head", "n_layer"))
    if embed % heads:
        fields.problem(f"config.json: n_embd {embed} is not a multiple of n_head {heads}.")
    decoder = DecoderConfig(
        vocab=fields.size("vocab_size"),
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=fields.size("n_inner", 4 * embed),
        norm_epsilon=fields.need("layer_norm_epsilon"),
        tied=fields.get("tie_word_embeddings", True),
        max_length=fields.size("n_positions"),
        init_scale=fields.get("initializer_range", 0.02),
        kinds=(LayerKind(),),
        pattern=(0,) * layers,
        norm="layer",
        learned_positions=True,
    )
    fields.finish()
    return decoder


_LAYER = "transformer.h.{layer}."
_QKV, _QKV_BIAS = _LAYER + "attn.c_attn.weight", _LAYER + "attn.c_attn.bias"
HF_RULES = (
    Rule("embed.w", "transformer.wte.weight", "v d -> v d"),
    Rule("positions.w", "transformer.wpe.weight", "p d -> p d"),
    Rule("layers.attn_norm.scale", _LAYER + "ln_1.weight", "d -> d"),
    Rule("layers.attn_norm.b", _LAYER + "ln_1.bias", "d -> d"),
    Rule("layers.attn.q.w", _QKV, "d (+ n h) -> n h d"),
    Rule("layers.attn.k.w", _QKV, "d (+ k h) -> k h d"),
    Rule("layers.attn.v.w", _QKV, "d (+ k h) -> k h d"),
    Rule("layers.attn.q.b", _QKV_BIAS, "(+ n h) -> n h"),
    Rule("layers.attn.k.b", _QKV_BIAS, "(+ k h) -> k h"),
    Rule("layers.attn.v.b", _QKV_BIAS, "(+ k h) -> k h"),
    Rule("layers.attn.o.w", _LAYER + "attn.c_proj.weight", "(n h) d -> d n h"),
    Rule("layers.attn.o.b", _LAYER + "attn.c_proj.bias", "d -> d"),
    Rule("layers.mlp_norm.scale", _LAYER + "ln_2.weight", "d -> d"),
    Rule("layers.mlp_norm.b", _LAYER + "ln_2.bias", "d -> d"),
    Rule("layers.mlp.up.w", _LAYER + "mlp.c_fc.weight", "d f -> f d"),
    Rule("layers.mlp.up.b", _LAYER + "mlp.c_fc.bias", "f -> f"),
    Rule("layers.mlp.down.w", _LAYER + "mlp.c_proj.weight", "f d -> d f"),
    Rule("layers.mlp.down.b", _LAYER + "mlp.c_proj.bias", "d -> d"),
    Rule("norm.scale", "transformer.ln_f.weight", "d -> d"),
    Rule("norm.b", "transformer.ln_f.bias", "d -> d"),
    Rule("head.w", "lm_head.weight", "v d -> v d"),
)
# Published files leave it out: they were written from the model without its head.
HF_SPELLINGS = (("transformer.", ""),)
# The causal mask, which old files store.
HF_IGNORED = (r"\.attn\.(masked_)?bias$",)
