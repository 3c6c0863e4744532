"""Llama: pre-norm decoder with grouped-query attention, rotary positions and SwiGLU."""

from collections.abc import Iterator
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxft.errors import ModelError
from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, LinearScaling, Llama3Scaling, Numerics
from jaxft.models.decoder import AttentionFn
from jaxft.models.layers import Linear, RMSNorm, SwiGLU, rotate
from jaxft.sharding.rules import constrain


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        d, n, k, h = config.embed, config.heads, config.kv_heads, config.head_dim
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.q = Linear((d,), (n, h), axes=("embed", "heads", "head_dim"), **kwargs)
        self.k = Linear((d,), (k, h), axes=("embed", "kv_heads", "head_dim"), **kwargs)
        self.v = Linear((d,), (k, h), axes=("embed", "kv_heads", "head_dim"), **kwargs)
        self.o = Linear((n, h), (d,), axes=("heads", "head_dim", "embed"), **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attention: AttentionFn, cache
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what is added to the residual stream, and the layer's cache."""
        q = constrain(rotate(self.q(x), *rope), "batch", "seq", "act_heads", "act_head_dim")
        k = constrain(rotate(self.k(x), *rope), "batch", "seq", "act_kv_heads", "act_head_dim")
        v = constrain(self.v(x), "batch", "seq", "act_kv_heads", "act_head_dim")
        out, cache = attention(q, k, v, cache)
        return self.o(out), cache


class Block(nnx.Module):
    """One layer: attention and feed-forward part, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        d, eps, dtype = config.embed, config.norm_epsilon, numerics.param_dtype
        self.attn_norm = RMSNorm(d, epsilon=eps, dtype=dtype)
        self.attn = Attention(config, numerics, rngs)
        self.mlp_norm = RMSNorm(d, epsilon=eps, dtype=dtype)
        self.mlp = SwiGLU(d, config.mlp, dtype=dtype, scale=config.init_scale, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rope: tuple[Array, Array], attention: AttentionFn, cache
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the residual stream after the layer, and the layer's cache."""
        out, cache = self.attn(self.attn_norm(x), rope, attention, cache)
        x = constrain(x + out, "batch", "seq", "act_embed")
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "seq", "act_embed"), cache


# Fields of config.json that must have this value: another would change the maths.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "rope_interleaved": False,
}
_READ = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "max_position_embeddings",
    "initializer_range",
}


def config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """Reads config.json.

    Raises:
      ModelError: For fields that are missing, or that would change the maths and are not
        understood; all at once.
    """
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    needed = (*required, "intermediate_size", "rms_norm_eps")
    problems = [f"config.json has no {name!r}." for name in needed if name not in config]
    problems += [
        f"config.json: {name} is {config[name]!r}; only {value!r} is supported."
        for name, value in _REQUIRED.items()
        if config.get(name, value) != value
    ]
    problems += [
        f"config.json: {name!r} ({config[name]!r}) is not understood for model_type 'llama' and "
        "might change the maths."
        for name in config
        if name not in _READ and name not in _REQUIRED and name not in HARMLESS
    ]
    rope = _rope(config, problems)
    if not problems:
        problems += _head_problems(config)
    if problems:
        raise ModelError(problems)
    heads = config["num_attention_heads"]
    return DecoderConfig(
        vocab=config["vocab_size"],
        embed=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp=config["intermediate_size"],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=rope[0],
        rope_scaling=rope[1],
        tied=config.get("tie_word_embeddings", False),
        max_length=config.get("max_position_embeddings", 2048),
        init_scale=config.get("initializer_range", 0.02),
    )


def _head_problems(config: dict[str, Any]) -> Iterator[str]:
    embed, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    if heads % kv_heads:
        yield (
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}."
        )
    if not head_dim and embed % heads:
        yield (
            f"config.json has no head_dim, and hidden_size {embed} is not a multiple of "
            f"num_attention_heads {heads}."
        )
    elif (head_dim or embed // heads) % 2:
        yield f"config.json: head size {head_dim or embed // heads} is odd and cannot be rotated."


def _rope(
    config: dict[str, Any], problems: list[str]
) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """Reads rotary settings in the older form (`rope_scaling`) or the newer (`rope_parameters`)."""
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = fields.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    if kind == "default":
        return theta, None
    scaling, names = _ROPE_SCALINGS.get(kind, (None, {}))
    if scaling is None or set(fields) != set(names):
        supported = "; ".join(f"{k} with {', '.join(n)}" for k, (_, n) in _ROPE_SCALINGS.items())
        problems.append(
            f"config.json: rope scaling {kind!r} with {sorted(fields)} is not supported for "
            f"model_type 'llama'; supported are default; {supported}."
        )
        return theta, None
    return theta, scaling(**{ours: fields[theirs] for theirs, ours in names.items()})


_ROPE_SCALINGS = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low_factor",
            "high_freq_factor": "high_factor",
            "original_max_position_embeddings": "original_length",
        },
    ),
}

# Fields that do not change what the model computes from given weights and tokens.
HARMLESS = frozenset(
    """
    _name_or_path architectures bos_token_id dtype eos_token_id is_llama_config model_type
    output_attentions output_hidden_states pad_token_id pretraining_tp return_dict tokenizer_class
    torch_dtype transformers_version unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()
)

HF_RULES = (
    Rule("embed.w", "model.embed_tokens.weight", "v d -> v d"),
    Rule("layers.attn_norm.scale", "model.layers.{layer}.input_layernorm.weight", "d -> d"),
    Rule("layers.attn.q.w", "model.layers.{layer}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    Rule("layers.attn.k.w", "model.layers.{layer}.self_attn.k_proj.weight", "(k h) d -> d k h"),
    Rule("layers.attn.v.w", "model.layers.{layer}.self_attn.v_proj.weight", "(k h) d -> d k h"),
    Rule("layers.attn.o.w", "model.layers.{layer}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    Rule("layers.mlp_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "d -> d"),
    Rule("layers.mlp.gate.w", "model.layers.{layer}.mlp.gate_proj.weight", "f d -> d f"),
    Rule("layers.mlp.up.w", "model.layers.{layer}.mlp.up_proj.weight", "f d -> d f"),
    Rule("layers.mlp.down.w", "model.layers.{layer}.mlp.down_proj.weight", "d f -> f d"),
    Rule("norm.scale", "model.norm.weight", "d -> d"),
    Rule("head.w", "lm_head.weight", "v d -> d v"),
)
# Tensors that some files carry although the model derives them.
HF_IGNORED = (r"\.rotary_emb\.inv_freq$",)
