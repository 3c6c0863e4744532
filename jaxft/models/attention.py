"""Causal attention within segments, on the back end that a device has.

Every back end honours segments: a query sees the keys of its own segment that do not come later.
One that cannot is refused by name; there is no silent fall-back.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.config import DecoderConfig
from jaxft.sharding.rules import active_placement

Backend = Callable[[Array, Array, Array, Array], Array]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    backend: str,
) -> Float[Array, "B T N H"]:
    """Attention of rows over themselves, scores scaled by 1/sqrt(H), softmax in float32.

    Args:
      q: Queries; N is a multiple of K, and head n reads key head n // (N / K).
      k: Keys.
      v: Values.
      segments: Number of the document that each position belongs to, 0 on padding.
      backend: `xla`, `cudnn` or `splash`.
    """
    return BACKENDS[backend](q, k, v, segments)


def causal_mask(
    query_slots: Int[Array, " T"],
    key_slots: Int[Array, " S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Bool[Array, "B 1 T S"]:
    """True where a query sees a key: same segment, and the key's slot is not later."""
    causal = query_slots[:, None] >= key_slots[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (causal[None] & same)[:, None]


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
) -> Float[Array, "B T N H"]:
    """Attention under an explicit mask; memory grows with T x S."""
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
    return cast(Array, out)  # the residual, of which it can also return a tuple, is not asked for


def _xla(q: Array, k: Array, v: Array, segments: Array) -> Array:
    slots = jnp.arange(q.shape[1])
    return masked_attention(q, k, v, causal_mask(slots, slots, segments, segments))


def _cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """Flash attention of cuDNN; packed rows reach it as offsets and lengths of segments."""
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
        scale=q.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    # The kernel leaves positions outside every segment as they happen to be.
    return jnp.where((segments > 0)[:, :, None, None], cast(Array, out), 0)


# cuDNN takes a static bound on the documents in a row; `choose_backend` refuses data with more.
MAX_SEGMENTS = 64


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


def _splash(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The Pallas kernel of JAX for TPU, mapped over rows and sharded over rows and heads."""
    placement = active_placement()
    if placement is None:
        return _splash_local(q, k, v, segments)
    q_spec = placement.spec(("batch", "seq", "act_heads", "act_head_dim"), q.shape, "queries")
    k_spec = placement.spec(("batch", "seq", "act_kv_heads", "act_head_dim"), k.shape, "keys")
    if k_spec != q_spec:
        # Each device must hold the key heads that its query heads read: one for each of them, where
        # there are too few key heads to split them as the query heads are split.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return jax.shard_map(
        _splash_local,
        mesh=placement.mesh,
        in_specs=(q_spec, q_spec, q_spec, P(q_spec[0], None)),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, segments)


def _splash_local(q: Array, k: Array, v: Array, segments: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, head_dim = q.shape
    block = min(512, length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * head_dim**-0.5, k, v))
    ids = splash.SegmentIds(q=segments, kv=segments)
    return cast(Array, jax.vmap(kernel)(q, k, v, ids)).transpose(0, 2, 1, 3)


BACKENDS: dict[str, Backend] = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}


@dataclass(frozen=True, slots=True)
class Choice:
    """The back end that a run uses, and why."""

    backend: str
    reason: str


def choose_backend(
    asked: str,
    *,
    platform: str,
    head_dim: int,
    length: int,
    compute_dtype,
    max_segments: int,
    compute_capability: str = "",
) -> Choice:
    """Resolves `auto`, and refuses a back end that this run cannot use.

    Args:
      asked: `auto` or the name of a back end.
      platform: `cpu`, `gpu` or `tpu`.
      head_dim: Size of a head.
      length: Positions in a row.
      compute_dtype: Type of queries, keys and values.
      max_segments: Most documents in one row.
      compute_capability: Of an NVIDIA GPU, such as `9.0`.

    Raises:
      ConfigError: Where a named back end cannot be used; all reasons at once.
    """
    if asked == "auto":
        preferred = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
        reasons = _obstacles(
            preferred, platform, head_dim, length, compute_dtype, max_segments, compute_capability
        )
        if not reasons:
            return Choice(preferred, f"fastest that fits on {platform}")
        return Choice("xla", f"{preferred} is not possible: {'; '.join(reasons)}")
    reasons = _obstacles(
        asked, platform, head_dim, length, compute_dtype, max_segments, compute_capability
    )
    if reasons:
        raise ConfigError(
            [f"model.attention={asked} cannot be used: {r}. Use auto or xla." for r in reasons]
        )
    return Choice(asked, "as configured")


def _obstacles(
    backend: str,
    platform: str,
    head_dim: int,
    length: int,
    compute_dtype,
    max_segments: int,
    compute_capability: str,
) -> list[str]:
    half = jnp.dtype(compute_dtype).itemsize == 2
    tests = {
        "xla": [],
        "cudnn": [
            (platform == "gpu", f"it runs on NVIDIA GPUs and the device is a {platform}"),
            (
                platform != "gpu" or float(compute_capability or 0) >= 9.0,
                "packed rows need compute capability 9.0 (Hopper) and the device has "
                f"{compute_capability or 'an unknown one'}",
            ),
            (half, "it computes in bfloat16, and compute is float32 (model.dtypes)"),
            (head_dim % 8 == 0 and head_dim <= 256, f"head size {head_dim} is not 8, 16 … 256"),
            (
                max_segments <= MAX_SEGMENTS,
                f"a row holds {max_segments} documents and the kernel takes {MAX_SEGMENTS}",
            ),
        ],
        "splash": [
            (platform == "tpu", f"it runs on TPUs and the device is a {platform}"),
            (length % 128 == 0, f"data.max_length {length} is not a multiple of 128"),
            (
                length < 512 or length % 512 == 0,
                f"data.max_length {length} is over 512 and not a multiple of it",
            ),
            (head_dim % 64 == 0, f"head size {head_dim} is not a multiple of 64"),
        ],
    }
    return [reason for passed, reason in tests[backend] if not passed]


def check_backend(backend: str, config: DecoderConfig) -> None:
    """Compares a back end with XLA's attention on packed rows, on the device in use.

    Kernels that ignored segments, or read the wrong keys with grouped heads, have been released;
    this costs one small compilation at the start of a run.

    Raises:
      ConfigError: If outputs or gradients differ by more than bfloat16 explains.
    """
    if backend == "xla":
        return
    length, dtype = 256, jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    shapes = [(2, length, n, config.head_dim) for n in heads]
    q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))
    slots = jnp.arange(length)
    segments = jnp.stack([1 + (slots >= 100), jnp.where(slots < 200, 1 + (slots >= 37), 0)])

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(name: str, q: Array, k: Array, v: Array):
        def total(q: Array, k: Array, v: Array):
            out = attend(q, k, v, segments, backend=name).astype(jnp.float32)
            out = jnp.where(segments[:, :, None, None] > 0, out, 0.0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    ours = output_and_gradients(backend, q, k, v)
    exact = output_and_gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        error = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)))
        scale = float(jnp.max(jnp.abs(b)))
        if not error <= 0.03 * scale:
            raise ConfigError(
                f"model.attention={backend} gives wrong results for packed rows on this device "
                f"(largest difference {error:.3g} where values reach {scale:.3g}). Use "
                "model.attention=xla, or a newer jax or cuDNN."
            )
