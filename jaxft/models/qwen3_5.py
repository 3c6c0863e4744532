"""Qwen3.5 and Qwen3.6, the text models: gated DeltaNet in three of four layers, else attention."""

from typing import Any

from flax import nnx

from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, DeltaConfig, LayerKind, Numerics
from jaxft.models.decoder import Block as Builder
from jaxft.models.delta_net import GatedDeltaNet
from jaxft.models.fields import Fields
from jaxft.models.layers import GatedMLP, ResidualBlock, SelfAttention
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, HEAD_NORMS, PRE_NORMS

LINEAR, FULL = "linear_attention", "full_attention"


def hybrid_blocks(mlp: Builder, **delta: Any) -> dict[str, Builder]:
    """Returns the blocks of layers with a state and with attention.

    Args:
      mlp: Builds the feed-forward part.
      **delta: Keywords of `GatedDeltaNet`.
    """

    def linear(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Module:
        attn = GatedDeltaNet(config, numerics, rngs, **delta)
        return ResidualBlock(config, numerics, attn=attn, mlp=mlp(config, numerics, rngs))

    def full(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> nnx.Module:
        attn = SelfAttention(config, numerics, rngs, qk_norm="head", gated=True)
        return ResidualBlock(config, numerics, attn=attn, mlp=mlp(config, numerics, rngs))

    return {LINEAR: linear, FULL: full}


BLOCKS = hybrid_blocks(GatedMLP)


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    return hybrid(Fields(config, head_dim=256, num_key_value_heads=4))


def hybrid(fields: Fields, **family: Any) -> DecoderConfig:
    """Reads what families with layers of both blocks share; `family` as for `Fields.decoder`."""
    fields.require(
        hidden_act="silu", attention_bias=False, attn_output_gate=True, mlp_only_layers=[]
    )
    # The type of the state, which is float32 here as well, and parts for guessing several tokens.
    fields.require(mamba_ssm_dtype="float32")
    fields.unused("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    kinds, sizes = hybrid_kinds(fields), delta_sizes(fields)
    return fields.decoder(kinds, norm="rms_offset", delta=sizes, **family)


def delta_sizes(fields: Fields) -> DeltaConfig:
    """Reads the sizes of layers with a state."""
    sizes = DeltaConfig(
        key_heads=fields.size("linear_num_key_heads", 16),
        value_heads=fields.size("linear_num_value_heads", 32),
        key_dim=fields.size("linear_key_head_dim", 128),
        value_dim=fields.size("linear_value_head_dim", 128),
        taps=fields.size("linear_conv_kernel_dim", 4),
    )
    if sizes.value_heads % sizes.key_heads:
        fields.problem(
            f"config.json: linear_num_value_heads {sizes.value_heads} is not a multiple of "
            f"linear_num_key_heads {sizes.key_heads}."
        )
    return sizes


def hybrid_kinds(fields: Fields) -> list[LayerKind]:
    """Reads which layers have a state and which attention, and the rotation of the latter."""
    every = fields.size("full_attention_interval", 4)
    types = fields.layer_types(LINEAR, FULL, first=lambda layer: (layer + 1) % every != 0)
    rope = fields.rope(fields.head_dim(), partial=True, share=0.25, sections=True)
    full = LayerKind(rope=rope, block=FULL)
    return [full if kind == FULL else LayerKind(block=LINEAR, recurrent=True) for kind in types]


_DELTA = "model.layers.{layer}.linear_attn."
DELTA_NET = (
    Rule("layers.attn.q_taps", _DELTA + "conv1d.weight", "(+ k h) 1 w -> k h w"),
    Rule("layers.attn.k_taps", _DELTA + "conv1d.weight", "(+ k h) 1 w -> k h w"),
    Rule("layers.attn.v_taps", _DELTA + "conv1d.weight", "(+ n h) 1 w -> n h w"),
    Rule("layers.attn.log_rate", _DELTA + "A_log", "n -> n"),
    Rule("layers.attn.decay_bias", _DELTA + "dt_bias", "n -> n"),
    Rule("layers.attn.norm.scale", _DELTA + "norm.weight", "h -> h"),
    Rule("layers.attn.o.w", _DELTA + "out_proj.weight", "d (n h) -> d n h"),
)
HF_RULES = (*BODY, *PRE_NORMS, *GATED_MLP)
# Of the layers of each block. A head of queries and its gate are one head of twice the size.
HF_BLOCK_RULES = {
    LINEAR: (
        Rule("layers.attn.q.w", _DELTA + "in_proj_qkv.weight", "(+ k h) d -> k h d"),
        Rule("layers.attn.k.w", _DELTA + "in_proj_qkv.weight", "(+ k h) d -> k h d"),
        Rule("layers.attn.v.w", _DELTA + "in_proj_qkv.weight", "(+ n h) d -> n h d"),
        Rule("layers.attn.gate.w", _DELTA + "in_proj_z.weight", "(n h) d -> n h d"),
        Rule("layers.attn.beta.w", _DELTA + "in_proj_b.weight", "n d -> n d"),
        Rule("layers.attn.decay.w", _DELTA + "in_proj_a.weight", "n d -> n d"),
        *DELTA_NET,
    ),
    FULL: (*ATTENTION, *HEAD_NORMS),
}
HF_IGNORED = ()
# Layers that guess further tokens.
HF_OTHERS = ("mtp.",)
