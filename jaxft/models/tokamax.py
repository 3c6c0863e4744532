"""Attention by tokamax's kernels for GPUs: windows, sinks and any number of documents in a row.

A query sees one run of keys, from the first of its document or window to its own: the kernels take
where it starts. Forward they skip what lies in front of it, and hold no scores; backward they read
the run as a mask, a byte for each pair of a row, whatever the number of heads. The extra
`jaxft[cuda]` brings tokamax.
"""

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxft.models.activations import ATTENTION
from jaxft.models.config import Scoring
from jaxft.models.row_split import split_rows
from jaxft.sharding.rules import active_placement

_OPS = "tokamax._src.ops.attention"


def is_installed() -> bool:
    """Whether tokamax can be imported."""
    return importlib.util.find_spec("tokamax") is not None


def tokamax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    scores: Scoring,
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Attention of whole rows over themselves, as `attention.attend` describes it.

    Each device runs the kernel on its rows and heads.
    """
    # Gradients of bounded scores are not in the kernels; `choose_backend` has refused them.
    assert not scores.cap
    placement = active_placement()
    if placement is None:
        return _rows(q, k, v, segments, sinks, scores=scores)
    split, k, v = split_rows(placement, q, k, v)
    specs = (split.rows, split.rows, split.rows, split.segments, split.heads)
    local = functools.partial(_rows, scores=scores)
    return split.placement.shard_map(local, specs, split.rows)(q, k, v, segments, sinks)


def first_keys(segments: Int[Array, "B T"], window: int) -> Int[Array, "B T"]:
    """Returns the place of the first key that each query sees, in its document and its window."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
    return jnp.maximum(first, slots + 1 - window) if window else first


def _rows(
    q: Array, k: Array, v: Array, segments: Array, sinks: Array | None, *, scores: Scoring
) -> Array:
    first = first_keys(segments, scores.window)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    return checkpoint_name(_attention(q, k, v, first, sinks, scores.scale), ATTENTION)


class _Kept(NamedTuple):
    """Largest score and sum of each softmax, float32 `[B, N, T]`."""

    largest: Array
    total: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, first: Array, sinks: Array | None, scale: float
) -> Array:
    return _forward(q, k, v, first, sinks, scale)[0]


def _forward(
    q: Array, k: Array, v: Array, first: Array, sinks: Array | None, scale: float
) -> tuple[Array, Any]:
    """A sink takes a share of the softmax that the kernel made without it."""
    out, (largest, total) = kernel()(
        q, k, v, logits_scale=scale, mask=_mask(first), return_residuals=True
    )
    if sinks is not None:
        sink = sinks[None, :, None]
        bound = jnp.maximum(largest, sink)
        others = total * jnp.exp(largest - bound)
        largest, total = bound, others + jnp.exp(sink - bound)
        share = jnp.moveaxis(others / total, 1, 2)[..., None]
        out = (out * share).astype(out.dtype)
    kept = _Kept(largest, total)
    return out, (q, k, v, first, sinks, out, kept)


def _backward(scale: float, residuals: Any, d_out: Array) -> tuple[Array | None, ...]:
    """The kernel's own gradients hold with a sink: they follow from its shares and the output."""
    q, k, v, first, sinks, out, kept = residuals
    operation = kernel()
    bound = operation.bind(q, k, v, logits_scale=scale, mask=_mask(first))
    named = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    grads = operation.vjp(tuple(kept), out, d_out, *bound.args, **named)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks[None, :, None] - kept.largest) / kept.total
        aligned = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        d_sinks = -jnp.sum(share * jnp.moveaxis(aligned, 1, 2), axis=(0, 2))
    return grads["q"], grads["k"], grads["v"], None, d_sinks


_attention.defvjp(_forward, _backward)


def kernel() -> Any:
    """Returns tokamax's operation: its Triton kernel, which all NVIDIA GPUs since Ampere run."""
    return importlib.import_module(f"{_OPS}.pallas_triton").PallasTritonFlashAttention()


def _mask(first: Int[Array, "B T"]) -> Any:
    base = importlib.import_module(f"{_OPS}.base")
    return base.Mask(k_start=first[:, None], is_causal=True)
