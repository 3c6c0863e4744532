"""Attention by cuDNN's flash kernel, for NVIDIA GPUs, over packed rows."""

from typing import cast

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from jaxft.models.activations import ATTENTION
from jaxft.models.config import Scoring

# cuDNN takes a static bound on the documents in a row; `choose_backend` refuses data with more.
MAX_SEGMENTS = 64


def cudnn_attention(
    q: Array, k: Array, v: Array, segments: Array, scores: Scoring, sinks: Array | None
) -> Array:
    """Attention of rows over themselves, as `attention.attend` describes it.

    Packed rows reach the kernel as offsets and lengths of segments.
    """
    # A window as long as the row is none, and `choose_backend` has refused all else.
    assert not scores.cap and sinks is None
    assert not 0 < scores.window < q.shape[1]
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    offsets, lengths = segment_offsets(segments)
    out = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scores.scale,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    # The kernel leaves positions outside every segment as they happen to be.
    return checkpoint_name(
        jnp.where((segments > 0)[:, :, None, None], cast(Array, out), 0), ATTENTION
    )


def segment_offsets(
    segments: Int[Array, "B T"],
) -> tuple[Int[Array, "B M1"], Int[Array, "B M"]]:
    """Start and length of each segment, `-1` where a row has fewer than `MAX_SEGMENTS`.

    Segments are numbered from 1 without gaps and lie side by side, padding (0) after them.

    Returns:
      Offsets `[B, M + 1]` and lengths `[B, M]`, int32. cuDNN's binding lists the entries of all
      rows that are not -1 one after the other, so a row has as many offsets as lengths; the last
      column, which the binding asks for, is -1.
    """
    numbers = jnp.arange(1, MAX_SEGMENTS + 1, dtype=segments.dtype)
    lengths = jnp.sum(segments[:, None, :] == numbers[None, :, None], axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=-1, dtype=jnp.int32) - lengths
    starts = jnp.where(lengths > 0, starts, -1)
    return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), jnp.where(
        lengths > 0, lengths, -1
    )
