"""Gemma 4, text, dense and with experts.

Layers without a window have fewer and wider heads of keys, which may be their values as well. In
E2B and E4B each layer has inputs of its own beside the residual stream, and the last layers make no
keys and values: they read those of the last layer before them that has a window, or has none, as
they. Their feed-forward part may be twice as wide.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxft.hf.rules import Rule
from jaxft.models import activations
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.experts import Experts, geglu
from jaxft.models.fields import Fields
from jaxft.models.layers import (
    GatedMLP,
    LayerInputs,
    Linear,
    ResidualBlock,
    Routing,
    SelfAttention,
    make_norm,
)
from jaxft.models.module import Param
from jaxft.models.naming import ATTENTION, BODY, GATED_MLP, HEAD_NORMS, SANDWICH_NORMS
from jaxft.models.nonlinearity import gelu_tanh
from jaxft.models.per_layer import PerLayerPart
from jaxft.models.rope import rotate
from jaxft.sharding.rules import constrain

# Blocks: with a window, without one, and without one or a projection of values; and, with a window
# or without, those that read keys and values of layers before.
LOCAL, FULL, KEYS_ARE_VALUES = "sliding_attention", "full_attention", "keys_are_values"
READS_LOCAL, READS_FULL = "reads_sliding_attention", "reads_full_attention"


class ReadingAttention(nnx.Module):
    """Attention to keys and values of a layer before.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        d, n, h = config.embed, config.heads, config.head_dim
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.q = Linear((n, h), (d,), axes=("heads", "head_dim", "embed"), **kwargs)
        self.o = Linear((d,), (n, h), axes=("embed", "heads", "head_dim"), **kwargs)
        self.q_norm = make_norm(config, numerics, h)

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what is added to the residual stream, and the cache of the layer before."""
        assert inputs.rope is not None
        q = self.q_norm(self.q(constrain(x, "batch", "seq", "act_embed")))
        q = constrain(rotate(q, *inputs.rope), "batch", "seq", "act_heads", "act_head_dim")
        q = checkpoint_name(q, activations.QKV)
        out, cache = inputs.attention(q, None, None, cache, None)
        return checkpoint_name(self.o(out), activations.ATTENTION_OUT), cache


class DenseAndExperts(GatedMLP):
    """A dense part and experts that read the stream side by side, each between norms of its own."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        assert config.experts is not None
        width = config.experts.shared
        super().__init__(config, numerics, rngs, activation=gelu_tanh, width=width)
        self.routed = Experts(config, numerics, rngs, gating=geglu, scaled=True)
        self.router_norm, self.routed_norm, self.routed_post_norm, self.post_norm = (
            make_norm(config, numerics, config.embed) for _ in range(4)
        )

    def with_experts(
        self, read: Float[Array, "B T D"], stream: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Returns the sum of both, and the routing.

        Args:
          read: What the dense part reads.
          stream: The residual stream, of which router and experts have norms of their own.
          real: False on padding.
        """
        dense, _ = self(read, real)
        judged = self.router_norm(stream.astype(jnp.float32)) * stream.shape[-1] ** -0.5
        routed, routing = self.routed(self.routed_norm(stream), real, judged)
        return self.post_norm(dense) + self.routed_post_norm(routed), routing


class Block(ResidualBlock):
    """One layer, whose result is multiplied by a number of the file that no model learns.

    Where layers have inputs of their own, what is made of these is added last.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      name: Of the block.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs, *, name: str):
        config = config.of_block(name)
        if name in (READS_LOCAL, READS_FULL):
            attn = ReadingAttention(config, numerics, rngs)
        else:
            values = name != KEYS_ARE_VALUES
            norms = {"qk_norm": "head", "v_norm": True}
            attn = SelfAttention(config, numerics, rngs, values=values, **norms)
        if config.experts is None:
            mlp = GatedMLP(config, numerics, rngs, activation=gelu_tanh)
        else:
            mlp = DenseAndExperts(config, numerics, rngs)
        super().__init__(config, numerics, attn=attn, mlp=mlp, post=True)
        self.per_layer = PerLayerPart(config, numerics, rngs) if config.per_layer else None
        self.factor = Param(jnp.ones((), numerics.param_dtype), axes=())

    def __call__(self, x: Float[Array, "B T D"], inputs, cache):
        """Returns what `ResidualBlock` does, the stream multiplied."""
        x, cache, routing = super().__call__(x, inputs, cache)
        if self.per_layer is not None:
            assert inputs.per_layer is not None
            x = self._add(x, self.per_layer(x, inputs.per_layer))
        return x * jax.lax.stop_gradient(self.factor[...].astype(x.dtype)), cache, routing

    def feed_forward(self, read, stream, real):
        """Returns what the dense part makes of the stream, or it and experts."""
        if isinstance(self.mlp, DenseAndExperts):
            return self.mlp.with_experts(read, stream, real)
        return super().feed_forward(read, stream, real)


BLOCKS = {
    name: functools.partial(Block, name=name)
    for name in (LOCAL, FULL, KEYS_ARE_VALUES, READS_LOCAL, READS_FULL)
}


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json; raises ModelError with all that is missing or not understood."""
    per_layer = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
    fields = Fields(config, **ABSENT, **per_layer, sliding_window=512)
    if not fields.flag("enable_moe_block"):
        fields.unused("num_experts", "top_k_experts", "moe_intermediate_size")
        return gemma4_config(fields)
    experts = fields.experts(normalised=True, of_token="top_k_experts")
    shared = fields.size("intermediate_size")
    experts = dataclasses.replace(experts, shared=shared)
    return gemma4_config(fields, experts=experts, mlp=fields.size("moe_intermediate_size"))


# What absent fields mean, as configurations of Gemma 4 in transformers have it.
ABSENT = {
    "head_dim": 256,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
    },
    "tie_word_embeddings": True,
}


def gemma4_config(fields: Fields, **family: Any) -> DecoderConfig:
    """Reads what Gemma 4's text models share, and finishes; `family` as for `Fields.decoder`."""
    fields.require(hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    # Tokens of pictures see each other both ways; of text there is nothing to see.
    fields.require(use_bidirectional_attention="vision")
    return fields.decoder(
        _sharing(fields, _kinds(fields)),
        per_layer=_per_layer(fields),
        attention_scale=1.0,
        logit_cap=fields.get("final_logit_softcapping", 0.0),
        embed_scale=math.sqrt(fields.size("hidden_size")),
        **family,
    )


def _per_layer(fields: Fields) -> int:
    """Reads how many inputs of its own each layer has."""
    size = fields.count("hidden_size_per_layer_input", 0)
    rows, vocab = fields.get("vocab_size_per_layer_input"), fields.size("vocab_size")
    if size and rows != vocab:
        fields.problem(
            f"config.json: vocab_size_per_layer_input is {rows} and vocab_size {vocab}; expected "
            "the same: every token has a row in both tables."
        )
    return size


def _sharing(fields: Fields, kinds: list[LayerKind]) -> list[LayerKind]:
    """Reads which layers make no keys and values, and returns the kinds with what these read."""
    wide = fields.flag("use_double_wide_mlp")
    count = fields.count("num_kv_shared_layers", 0)
    if not count:
        return kinds
    making, reading = kinds[:-count], kinds[-count:]
    if missing := set(reading) - set(making):
        types = sorted(LOCAL if kind.window else FULL for kind in missing)
        fields.problem(
            f"config.json: num_kv_shared_layers is {count}: the last {count} of {len(kinds)} "
            "layers read keys and values of the last layer before them of the same type, and "
            f"before them is none of {' or '.join(types)}."
        )
    if wide and fields.flag("enable_moe_block"):
        fields.problem(
            "config.json: use_double_wide_mlp is True with num_kv_shared_layers and experts, of "
            "which no published model has all; only False is supported beside experts."
        )
    mlp = 2 * fields.size("intermediate_size") if wide else 0
    return making + [
        dataclasses.replace(
            kind, block=READS_LOCAL if kind.window else READS_FULL, reads=kind.block, mlp=mlp
        )
        for kind in reading
    ]


def _kinds(fields: Fields) -> list[LayerKind]:
    """Reads windows, rotary positions and heads of each layer."""
    layers = fields.size("num_hidden_layers")
    windows = fields.windows(lambda layer: (layer + 1) % 6 != 0 and layer + 1 < layers)
    if windows and windows[-1]:
        fields.problem(
            "config.json: layer_types ends with 'sliding_attention', in the place of which "
            "transformers takes 'full_attention' for this family. Write that."
        )
    size, one = fields.head_dim(), fields.flag("attention_k_eq_v")
    kv_heads, wide = _heads_without_window(fields, windows, may_differ=one)
    local, everywhere = fields.ropes(size, local=1e4, everywhere=1e6, wide=wide)
    block = KEYS_ARE_VALUES if one else FULL
    full = LayerKind(rope=everywhere, block=block, kv_heads=kv_heads, head_dim=wide)
    return [LayerKind(window, local, LOCAL) if window else full for window in windows]


def _heads_without_window(
    fields: Fields, windows: list[int], *, may_differ: bool
) -> tuple[int, int]:
    """Reads the heads of layers without a window: in published files fields of their own.

    Args:
      fields: Of config.json.
      windows: Of each layer.
      may_differ: Whether `num_global_key_value_heads` counts.

    Returns:
      How many of keys there are, and their size.
    """
    kv_heads = fields.size("num_key_value_heads", 4)
    own = fields.size("num_global_key_value_heads", kv_heads)
    count, size = own if may_differ else kv_heads, fields.size("global_head_dim", 512)
    # transformers writes the same by layer.
    by_layer = fields.get("per_layer_config")
    if by_layer is not None and not isinstance(by_layer, dict):
        fields.problem(
            f"config.json: per_layer_config is {by_layer!r}; expected an object with numbers of "
            "layers as keys."
        )
    elif by_layer is not None:
        names = {"num_key_value_heads": kv_heads, "head_dim": fields.head_dim()}
        distinct = {tuple({**names, **one}.items()) for one in by_layer.values()}
        full = [layer for layer, window in enumerate(windows) if not window]
        given = dict(next(iter(distinct), ()))
        is_known = len(distinct) == 1 and given.keys() == names.keys()
        if not is_known or sorted(map(int, by_layer)) != full:
            fields.problem(
                f"config.json: per_layer_config is {by_layer}; expected the layers without a "
                f"window ({', '.join(map(str, full))}), all with the same head_dim and "
                "num_key_value_heads."
            )
            return count, size
        count, size = given["num_key_value_heads"], given["head_dim"]
    heads = fields.size("num_attention_heads")
    if heads % count:
        fields.problem(
            f"config.json: num_attention_heads {heads} is not a multiple of the "
            f"{count} heads of keys in layers without a window."
        )
    return count, size


_LAYER = "model.layers.{layer}."
_ROUTER, _EXPERTS = _LAYER + "router.", _LAYER + "experts."
_NORM_1, _NORM_2 = (_LAYER + f"post_feedforward_layernorm_{n}.weight" for n in (1, 2))
_PER_LAYER = "model.per_layer_"
HF_RULES = (
    *BODY,
    Rule("per_layer.table.w", "model.embed_tokens_per_layer.weight", "v d -> v d"),
    Rule("per_layer.projection.w", _PER_LAYER + "model_projection.weight", "p d -> p d"),
    Rule("per_layer.norm.scale", _PER_LAYER + "projection_norm.weight", "p -> p"),
    *SANDWICH_NORMS,
    *ATTENTION,
    *HEAD_NORMS,
    *GATED_MLP,
    Rule("layers.per_layer.gate.w", _LAYER + "per_layer_input_gate.weight", "p d -> p d"),
    Rule("layers.per_layer.out.w", _LAYER + "per_layer_projection.weight", "d p -> d p"),
    Rule("layers.per_layer.post_norm.scale", _LAYER + "post_per_layer_input_norm.weight", "d -> d"),
    Rule("layers.factor", _LAYER + "layer_scalar", "1 ->"),
    Rule("layers.mlp.post_norm.scale", _NORM_1, "d -> d"),
    Rule("layers.mlp.routed_post_norm.scale", _NORM_2, "d -> d"),
    Rule("layers.mlp.routed_norm.scale", _LAYER + "pre_feedforward_layernorm_2.weight", "d -> d"),
    Rule("layers.mlp.router_norm.scale", _ROUTER + "scale", "d -> d"),
    Rule("layers.mlp.routed.router.w", _ROUTER + "proj.weight", "e d -> e d"),
    Rule("layers.mlp.routed.expert_scale", _ROUTER + "per_expert_scale", "e -> e"),
    Rule("layers.mlp.routed.gate.w", _EXPERTS + "gate_up_proj", "e (+ f) d -> e f d"),
    Rule("layers.mlp.routed.up.w", _EXPERTS + "gate_up_proj", "e (+ f) d -> e f d"),
    Rule("layers.mlp.routed.down.w", _EXPERTS + "down_proj", "e d f -> e d f"),
)
HF_IGNORED = ()
