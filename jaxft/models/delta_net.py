"""Layers that see what is before a token through a state: gated DeltaNet."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxft.models import activations
from jaxft.models.cache import Memory, Recurrent
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.delta import (
    convolution_state,
    delta_step,
    gated_delta_rule,
    short_convolution,
)
from jaxft.models.layers import LayerInputs, Linear, RMSNorm
from jaxft.models.module import Param
from jaxft.models.row_split import head_shares, parts_of_rows, whole_rows
from jaxft.sharding.rules import active_placement, constrain

_KEYS = ("act_kv_heads", "act_head_dim")
_VALUES = ("act_heads", "act_head_dim")


class GatedDeltaNet(nnx.Module):
    """Linear attention by a gated delta rule (Yang et al., arXiv:2412.06464).

    Heads of keys are on `kv_heads` and those of values on `heads`, so that strategies split them as
    they split attention's.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
      by_key_head: Whether one projection makes all of a key head: query, key, values and gates; and
        another what the rule corrects and how it fades.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        rngs: nnx.Rngs,
        *,
        by_key_head: bool = False,
    ):
        assert config.delta is not None
        sizes, d, dtype = config.delta, config.embed, numerics.param_dtype
        keys, values = (sizes.key_heads, sizes.key_dim), (sizes.value_heads, sizes.value_dim)
        of_keys, of_values = ("kv_heads", "head_dim"), ("heads", "head_dim")
        kwargs = {"dtype": dtype, "scale": config.init_scale, "rngs": rngs}
        self.sizes, self.by_key_head = sizes, by_key_head
        if by_key_head:
            groups = sizes.value_heads // sizes.key_heads
            made = (sizes.key_heads, 2 * (sizes.key_dim + groups * sizes.value_dim))
            rated = (sizes.key_heads, 2 * groups)
            self.qkvg = Linear(made, (d,), axes=(*of_keys, "embed"), **kwargs)
            self.rates = Linear(rated, (d,), axes=(*of_keys, "embed"), **kwargs)
        else:
            self.q = Linear(keys, (d,), axes=(*of_keys, "embed"), **kwargs)
            self.k = Linear(keys, (d,), axes=(*of_keys, "embed"), **kwargs)
            self.v = Linear(values, (d,), axes=(*of_values, "embed"), **kwargs)
            self.gate = Linear(values, (d,), axes=(*of_values, "embed"), **kwargs)
            self.beta = Linear(values[:1], (d,), axes=("heads", "embed"), **kwargs)
            self.decay = Linear(values[:1], (d,), axes=("heads", "embed"), **kwargs)
        self.q_taps, self.k_taps, self.v_taps = (
            Param(_uniform(rngs, (*shape, sizes.taps), dtype), axes=(*axes, "taps"))
            for shape, axes in ((keys, of_keys), (keys, of_keys), (values, of_values))
        )
        rates = jax.random.uniform(rngs.params(), values[:1], jnp.float32, 0.01, 16.0)
        self.log_rate = Param(jnp.log(rates).astype(dtype), axes=("heads",))
        self.decay_bias = Param(jnp.ones(values[:1], dtype), axes=("heads",))
        self.norm = RMSNorm(
            sizes.value_dim, epsilon=config.norm_epsilon, dtype=dtype, axes=("norm",)
        )
        self.o = Linear((d,), values, axes=("embed", *of_values), **kwargs)

    def __call__(
        self, x: Float[Array, "B T D"], inputs: LayerInputs, cache: Recurrent | None
    ) -> tuple[Float[Array, "B T D"], Recurrent | None]:
        """Returns what is added to the residual stream, and the layer's cache."""
        x = constrain(x, "batch", "seq", "act_embed")
        *made, gate, beta, decay = self._projected(x)
        *made, gate = (
            checkpoint_name(constrain(one, "batch", "seq", *axes), activations.QKV)
            for one, axes in zip((*made, gate), (_KEYS, _KEYS, _VALUES, _VALUES), strict=True)
        )
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        rate, bias = (
            p[...].astype(jnp.float32)[None, None] for p in (self.log_rate, self.decay_bias)
        )
        log_decay = -jnp.exp(rate) * jax.nn.softplus(decay.astype(jnp.float32) + bias)
        if inputs.memory is None or cache is None:
            out = self._whole(made, log_decay, beta, inputs)
        else:
            out, cache = self._going_on(made, log_decay, beta, inputs, inputs.memory, cache)
        out = checkpoint_name(out, activations.ATTENTION)
        gate = jax.nn.silu(gate.astype(jnp.float32))
        out = (self.norm(out).astype(jnp.float32) * gate).astype(x.dtype)
        out = constrain(out, "batch", "seq", *_VALUES)
        return checkpoint_name(self.o(out), activations.ATTENTION_OUT), cache

    def _projected(self, x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        """Returns queries, keys, values and their gates, and what betas and decays are made of."""
        if not self.by_key_head:
            made = self.q, self.k, self.v, self.gate, self.beta, self.decay
            return tuple(project(x) for project in made)
        d = self.sizes
        values = d.value_heads // d.key_heads * d.value_dim
        ends = (d.key_dim, 2 * d.key_dim, 2 * d.key_dim + values)
        q, k, v, gate = jnp.split(self.qkvg(x), ends, axis=-1)
        beta, decay = jnp.split(self.rates(x), 2, axis=-1)
        whole = (*x.shape[:2], d.value_heads)
        v, gate = (one.reshape(*whole, d.value_dim) for one in (v, gate))
        return q, k, v, gate, beta.reshape(whole), decay.reshape(whole)

    @property
    def _taps(self) -> list[Array]:
        """Weights of the convolutions of queries, keys and values."""
        return [p[...] for p in (self.q_taps, self.k_taps, self.v_taps)]

    def _whole(
        self, made: Sequence[Array], log_decay: Array, beta: Array, inputs: LayerInputs
    ) -> Array:
        """Returns outputs of rows that hold their documents from the start."""
        q, k, v = made
        taps = self._taps
        placement = active_placement()
        if placement and k.shape[2] % head_shares(placement, "act_kv_heads", k.shape[2]):
            # Too few key heads to share: there is one for each head of values.
            groups = v.shape[2] // k.shape[2]
            q, k = (jnp.repeat(x, groups, axis=2) for x in (q, k))
            taps[:2] = (jnp.repeat(x, groups, axis=0) for x in taps[:2])
        keys = _KEYS[0] if k.shape[2] == made[1].shape[2] else _VALUES[0]
        q, k = (whole_rows(x, keys) for x in (q, k))
        v, log_decay, beta = (whole_rows(x, _VALUES[0]) for x in (v, log_decay, beta))
        segments = whole_rows(inputs.segments)
        q, k, v = _convolved((q, k, v), taps, segments, (None,) * 3)
        out, _ = gated_delta_rule(q, k, v, log_decay, beta, segments)
        return parts_of_rows(out, *_VALUES)

    def _going_on(
        self,
        made: Sequence[Array],
        log_decay: Array,
        beta: Array,
        inputs: LayerInputs,
        memory: Memory,
        cache: Recurrent,
    ) -> tuple[Array, Recurrent]:
        """Returns outputs of texts whose beginning the cache holds, and the cache after them."""
        old = memory.read(cache)
        before = tuple(jnp.swapaxes(x, 1, 2) for x in old.inputs)
        q, k, v = _convolved(made, self._taps, inputs.segments, before)
        if v.shape[1] == 1:
            q, k, v, log_decay, beta = (x[:, 0] for x in (q, k, v, log_decay, beta))
            out, state = delta_step(q, k, v, log_decay, beta, memory.real[:, 0], old.state)
            out = out[:, None]
        else:
            out, state = gated_delta_rule(
                q, k, v, log_decay, beta, inputs.segments, state=old.state
            )
        width = self.sizes.taps
        kept = tuple(
            jnp.swapaxes(convolution_state(x, memory.real, width=width, state=last), 1, 2)
            for x, last in zip(made, before, strict=True)
        )
        return out, memory.write(cache, Recurrent(kept, state))


def _convolved(
    made: Sequence[Array], taps: Sequence[Array], segments: Array, before: Sequence[Array | None]
) -> Iterator[Array]:
    """Yields queries, keys and values after their convolutions, given the inputs before them."""
    for x, kernel, state in zip(made, taps, before, strict=True):
        yield short_convolution(x, kernel, segments, state)


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns weights of a convolution of single channels, as PyTorch draws them."""
    limit = shape[-1] ** -0.5
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit).astype(dtype)
