"""The parts that decoder families are composed of: projections, norms, attention, feed-forward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxft.models import activations
from jaxft.models.cache import Memory
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.module import Param
from jaxft.models.rope import rotate
from jaxft.models.weights import Weight
from jaxft.sharding.reduce import look_up
from jaxft.sharding.rules import constrain

# Maps q, k, v, a layer's cache and its sinks to the output and the cache with k and v added.
# Without k and v those in the cache are read, which is that of a layer before.
AttentionFn = Callable[[Array, Array | None, Array | None, Any, Array | None], tuple[Array, Any]]


class LayerInputs(NamedTuple):
    """Inputs of a layer beside the residual stream.

    Attributes:
      rope: Cosine and sine for the layer's kind, `[B, T, 1, half]`, or None.
      growth: Factor of each query, float32 `[B, T, 1, 1]`, or None.
      attention: Attention of the layer's kind.
      real: False on padding, `[B, T]`.
      segments: Number of the document, 0 on padding, `[B, T]`.
      memory: The way to what a recurrent layer kept of the beginning of documents; None where rows
        hold them from their start.
      per_layer: Inputs that the layer has of its own, or None.
    """

    rope: tuple[Array, Array] | None
    growth: Float[Array, "B T 1 1"] | None
    attention: AttentionFn
    real: Bool[Array, "B T"]
    segments: Int[Array, "B T"]
    memory: Memory | None = None
    per_layer: Float[Array, "B T P"] | None = None


class Routing(NamedTuple):
    """Sums over the real tokens of a batch of what a router did, float32; `[L, …]` over a model.

    Attributes:
      counts: `[E]`, tokens that were sent to each expert.
      probabilities: `[E]`, the router's softmax.
      tokens: Scalar.
      dropped: Scalar, places in full experts that were asked for in vain.
    """

    counts: Any
    probabilities: Any
    tokens: Any
    dropped: Any


class Linear(Weight):
    """A projection between groups of named dimensions, such as D to (N, H).

    The weight is `[*outputs, *inputs]`, the order of Hugging Face files: importing copies it as it
    stands, and heads and head size are axes of their own.
    """

    def __init__(
        self,
        outputs: tuple[int, ...],
        inputs: tuple[int, ...],
        *,
        axes: tuple[str, ...],
        dtype,
        scale: float,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        shape = (*outputs, *inputs)
        super().__init__(shape, axes=axes, inputs=len(inputs), dtype=dtype, scale=scale, rngs=rngs)
        self.b = Param(jnp.zeros(outputs, dtype), axes=axes[: len(outputs)]) if bias else None

    def __call__(self, x: Array) -> Array:
        """Contracts the last dimensions of `x` with the last of the weight, in `x`'s dtype."""
        out = self.apply(x)
        return out if self.b is None else out + _broadcast(self.b[...].astype(x.dtype), out.ndim)


class Embedding(Weight):
    """A vector for each token or position, `[rows, D]`."""

    takes_columns = False

    def __init__(
        self, rows: int, embed: int, *, dtype, scale: float, rngs: nnx.Rngs, axis: str = "vocab"
    ):
        shape, axes = (rows, embed), (axis, "embed")
        super().__init__(shape, axes=axes, inputs=1, dtype=dtype, scale=scale, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Looks rows up, in `dtype`."""
        found = look_up(self.w[...], tokens, axes=self.axes, dtype=dtype)
        if self.rows is None:
            return found
        is_row = tokens[..., None] == jnp.asarray(self.added)[None, None]
        learnt = jnp.einsum("btn,nd->btd", is_row.astype(dtype), self.rows[...].astype(dtype))
        return jnp.where(jnp.any(is_row, axis=-1, keepdims=True), learnt, found)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (Zhang and Sennrich, arXiv:1910.07467).

    Args:
      shape: Of the weight; the norm is over as many last dimensions.
      epsilon: Added to the mean square.
      dtype: Of the weight.
      axes: Names of its dimensions.
      offset: Whether the weight is added to 1.
      bare: Whether there is none.
    """

    def __init__(
        self,
        *shape: int,
        epsilon: float,
        dtype,
        axes: tuple[str, ...] = ("norm",),
        offset: bool = False,
        bare: bool = False,
    ):
        self.epsilon, self.offset, self.over = epsilon, offset, len(shape)
        start = jnp.zeros if offset else jnp.ones
        self.scale = None if bare else Param(start(shape, dtype), axes=axes)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises; the result has the type of `x`."""
        x32 = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - self.over, x.ndim))
        mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.scale is None:
            return normed.astype(x.dtype)
        scale = self.scale[...].astype(jnp.float32)
        scale = 1.0 + scale if self.offset else scale
        return (normed * _broadcast(scale, x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation by mean and variance in float32 (Ba et al., arXiv:1607.06450).

    Args:
      shape: Of the weight; the norm is over the last dimension alone.
      epsilon: Added to the variance.
      dtype: Of the weight.
      axes: Names of its dimensions.
      bias: Whether a vector is added.
    """

    def __init__(
        self,
        *shape: int,
        epsilon: float,
        dtype,
        axes: tuple[str, ...] = ("norm",),
        bias: bool = True,
    ):
        self.epsilon = epsilon
        self.scale = Param(jnp.ones(shape, dtype), axes=axes)
        self.b = Param(jnp.zeros(shape, dtype), axes=axes) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last dimension; the result has the type of `x`."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        normed = normed * _broadcast(self.scale[...].astype(jnp.float32), x.ndim)
        if self.b is not None:
            normed = normed + _broadcast(self.b[...].astype(jnp.float32), x.ndim)
        return normed.astype(x.dtype)


def make_norm(config: DecoderConfig, numerics: Numerics, size: int) -> RMSNorm | LayerNorm:
    """Returns a norm of the model's kind over the last dimension."""
    kwargs = {"epsilon": config.norm_epsilon, "dtype": numerics.param_dtype}
    if config.norm.startswith("layer"):
        return LayerNorm(size, bias=config.norm == "layer", **kwargs)
    kind = {"offset": config.norm == "rms_offset", "bare": config.norm == "rms_bare"}
    return RMSNorm(size, **kind, **kwargs)


class SelfAttention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245).

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      bias: Whether q, k and v have one.
      out_bias: Whether the output projection has one.
      qk_norm: `head` for a norm over each head of queries and keys, `turned` for one after they are
        turned, `own` for one with a weight of each head, `all` for one over all heads at once.
      interleaved: Whether neighbours are the pairs of dimensions that are turned.
      gated: Whether the output is multiplied by the sigmoid of a gate, which the projection of
        queries makes too: H numbers behind those of each head.
      v_norm: Whether each head of values goes through a norm without a weight.
      values: Whether they have a projection of their own; else they are keys before norm and turn.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm: str = "",
        interleaved: bool = False,
        gated: bool = False,
        v_norm: bool = False,
        values: bool = True,
    ):
        d, n, k, h = config.embed, config.heads, config.kv_heads, config.head_dim
        self.gated = gated
        dtype = numerics.param_dtype
        kwargs = {"dtype": dtype, "scale": config.init_scale, "rngs": rngs}
        to_q, to_kv = (("heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed"))
        self.q = Linear((n, 2 * h if gated else h), (d,), axes=to_q, bias=bias, **kwargs)
        self.k = Linear((k, h), (d,), axes=to_kv, bias=bias, **kwargs)
        self.v = Linear((k, h), (d,), axes=to_kv, bias=bias, **kwargs) if values else None
        self.o = Linear((d,), (n, h), axes=("embed", "heads", "head_dim"), bias=out_bias, **kwargs)
        self.q_norm, self.k_norm = (
            _qk_norm(config, numerics, qk_norm, count, axis)
            for count, axis in ((n, "heads"), (k, "kv_heads"))
        )
        bare = {"epsilon": config.norm_epsilon, "dtype": dtype, "bare": True}
        self.v_norm = RMSNorm(h, **bare) if v_norm else None
        self.norms_turned, self.interleaved = qk_norm == "turned", interleaved
        self.sinks = Param(jnp.zeros(n, dtype), axes=("heads",)) if config.sinks else None

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs, cache
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what is added to the residual stream, and the layer's cache."""
        x = constrain(x, "batch", "seq", "act_embed")
        q, k = self.q(x), self.k(x)
        v = _maybe(self.v_norm, k if self.v is None else self.v(x))
        gate = None
        if self.gated:
            q, gate = jnp.split(q, 2, axis=-1)
            gate = checkpoint_name(gate, activations.QKV)
        if not self.norms_turned:
            q, k = _maybe(self.q_norm, q), _maybe(self.k_norm, k)
        if inputs.rope is not None:
            q, k = (rotate(x, *inputs.rope, interleaved=self.interleaved) for x in (q, k))
        if self.norms_turned:
            q, k = _maybe(self.q_norm, q), _maybe(self.k_norm, k)
        if inputs.growth is not None:
            q = (q * inputs.growth).astype(q.dtype)
        q = constrain(q, "batch", "seq", "act_heads", "act_head_dim")
        k = constrain(k, "batch", "seq", "act_kv_heads", "act_head_dim")
        v = constrain(v, "batch", "seq", "act_kv_heads", "act_head_dim")
        sinks = None if self.sinks is None else self.sinks[...]
        q, k, v = (checkpoint_name(x, activations.QKV) for x in (q, k, v))
        out, cache = inputs.attention(q, k, v, cache, sinks)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(out.dtype)
        return checkpoint_name(self.o(out), activations.ATTENTION_OUT), cache


def _qk_norm(
    config: DecoderConfig, numerics: Numerics, kind: str, heads: int, axis: str
) -> RMSNorm | LayerNorm | None:
    if kind in ("head", "turned"):
        return make_norm(config, numerics, config.head_dim)
    shape, axes = (heads, config.head_dim), (axis, "head_dim")
    kwargs: Any = {"epsilon": config.norm_epsilon, "dtype": numerics.param_dtype, "axes": axes}
    if kind == "own":
        return LayerNorm(*shape, bias=False, **kwargs)
    return RMSNorm(*shape, **kwargs) if kind == "all" else None


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202); SwiGLU by default.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      activation: Of the gate.
      width: Hidden width, where it is not the model's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        activation: Callable[[Array], Array] = jax.nn.silu,
        width: int = 0,
    ):
        self.activation = activation
        d, f = config.embed, width or config.mlp
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.gate = Linear((f,), (d,), axes=("mlp", "embed"), **kwargs)
        self.up = Linear((f,), (d,), axes=("mlp", "embed"), **kwargs)
        self.down = Linear((d,), (f,), axes=("embed", "mlp"), **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], None]:
        """Returns what is added to the residual stream; there is no routing."""
        x = constrain(x, "batch", "seq", "act_embed")
        gate, up = (checkpoint_name(w(x), activations.MLP) for w in (self.gate, self.up))
        hidden = constrain(self.activation(gate) * up, "batch", "seq", "act_mlp")
        return self.down(hidden), None


class MLP(nnx.Module):
    """`down(activation(up(x)))`.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      activation: Function, or a module where it has parameters of its own.
      bias: Whether both products have one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        activation: Callable[[Array], Array],
        bias: bool = False,
    ):
        self.activation = activation
        d, f = config.embed, config.mlp
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.up = Linear((f,), (d,), axes=("mlp", "embed"), bias=bias, **kwargs)
        self.down = Linear((d,), (f,), axes=("embed", "mlp"), bias=bias, **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], None]:
        """Returns what is added to the residual stream; there is no routing."""
        x = constrain(x, "batch", "seq", "act_embed")
        up = checkpoint_name(self.up(x), activations.MLP)
        hidden = constrain(self.activation(up), "batch", "seq", "act_mlp")
        return self.down(hidden), None


class ResidualBlock(nnx.Module):
    """One layer: attention, then the feed-forward part, each added to the residual stream.

    Where the model's parts are parallel both read the stream as it enters the layer, through one
    norm.

    Args:
      config: Sizes.
      numerics: Types.
      attn: Attention part.
      mlp: Feed-forward part, dense or of experts.
      pre: Whether each part reads its input through a norm.
      post: Whether each part's output goes through a norm before it is added.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        *,
        attn: nnx.Module,
        mlp: nnx.Module,
        pre: bool = True,
        post: bool = False,
    ):
        def norm(wanted: bool) -> RMSNorm | LayerNorm | None:
            return make_norm(config, numerics, config.embed) if wanted else None

        self.parallel, self.scale = config.parallel, config.residual_scale
        self.attn_norm, self.attn_post_norm = norm(pre), norm(post)
        self.mlp_norm, self.mlp_post_norm = norm(pre and not self.parallel), norm(post)
        self.attn, self.mlp = attn, mlp

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs, cache
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """Returns the residual stream after the layer, the layer's cache and its routing."""
        read = _maybe(self.attn_norm, x)
        out, cache = self.attn(read, inputs, cache)
        after = self._add(x, _maybe(self.attn_post_norm, out))
        read = read if self.parallel else _maybe(self.mlp_norm, after)
        out, routing = self.feed_forward(read, after, inputs.real)
        out = checkpoint_name(out, activations.MLP_OUT)
        return self._add(after, _maybe(self.mlp_post_norm, out)), cache, routing

    def feed_forward(
        self, read: Float[Array, "B T D"], stream: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns what the feed-forward part makes of the stream, which it reads through a norm."""
        return self.mlp(read, real)

    def _add(self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the stream with what a part adds to it."""
        if self.scale != 1:
            out = (out.astype(jnp.float32) * self.scale).astype(out.dtype)
        return constrain(x + out, "batch", "stream_seq", "act_embed")


def gated_block(
    *, pre: bool = True, post: bool = False, **attention: Any
) -> Callable[[DecoderConfig, Numerics, nnx.Rngs], ResidualBlock]:
    """Returns the builder of a layer of self-attention and a gated feed-forward part (SwiGLU).

    Args:
      pre: As of `ResidualBlock`.
      post: Likewise.
      **attention: Arguments of `SelfAttention`.
    """

    def build(config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs) -> ResidualBlock:
        attn = SelfAttention(config, numerics, rngs, **attention)
        mlp = GatedMLP(config, numerics, rngs)
        return ResidualBlock(config, numerics, attn=attn, mlp=mlp, pre=pre, post=post)

    return build


def _maybe(norm: Any, x: Array) -> Array:
    return x if norm is None else norm(x)


def _broadcast(x: Array, ndim: int) -> Array:
    """Adds leading dimensions."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))
