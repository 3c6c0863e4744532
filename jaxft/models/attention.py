"""Causal attention within segments, on the back end that a device has.

Every back end honours segments: a query sees the keys of its own segment that do not come later.
One that cannot is refused by name; there is no silent fall-back.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.config import DecoderConfig, Scores
from jaxft.sharding.rules import active_placement

Backend = Callable[[Array, Array, Array, Array, Scores, Array | None], Array]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    backend: str,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of rows over themselves, softmax in float32.

    Args:
      q: Queries; N is a multiple of K, and head n reads key head n // (N / K).
      k: Keys.
      v: Values.
      segments: Number of the document that each position belongs to, 0 on padding.
      backend: `xla`, `cudnn` or `splash`.
      scores: Scale, soft bound and window of the scores.
      sinks: A score for each head that enters the softmax beside those of the keys and has no
        value (Xiao et al., arXiv:2309.17453; learnt, as in gpt-oss).
    """
    return BACKENDS[backend](q, k, v, segments, scores, sinks)


def causal_mask(
    query_slots: Int[Array, " T"],
    key_slots: Int[Array, " S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    window: int = 0,
) -> Bool[Array, "B 1 T S"]:
    """True where a query sees a key: same segment, not later, and within the window if any."""
    behind = query_slots[:, None] - key_slots[None, :]
    visible = behind >= 0
    if window:
        visible &= behind < window
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (visible[None] & same)[:, None]


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B 1 T S"],
    *,
    scores: Scores,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention under an explicit mask; memory grows with T x S."""
    (rows, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    products *= scores.scale
    if scores.cap:
        products = scores.cap * jnp.tanh(products / scores.cap)
    products = jnp.where(mask[:, :, None], products, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = jax.nn.softmax(products, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        largest = jnp.maximum(jnp.max(products, axis=-1, keepdims=True), sink)
        largest = jax.lax.stop_gradient(largest)
        exps = jnp.exp(products - largest)
        weights = exps / (jnp.sum(exps, axis=-1, keepdims=True) + jnp.exp(sink - largest))
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(q.shape)


def _xla(
    q: Array, k: Array, v: Array, segments: Array, scores: Scores, sinks: Array | None
) -> Array:
    slots = jnp.arange(q.shape[1])
    mask = causal_mask(slots, slots, segments, segments, window=scores.window)
    return masked_attention(q, k, v, mask, scores=scores, sinks=sinks)


def _cudnn(
    q: Array, k: Array, v: Array, segments: Array, scores: Scores, sinks: Array | None
) -> Array:
    """Flash attention of cuDNN; packed rows reach it as offsets and lengths of segments."""
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


def _splash(
    q: Array, k: Array, v: Array, segments: Array, scores: Scores, sinks: Array | None
) -> Array:
    """The Pallas kernel of JAX for TPU, mapped over rows and sharded over rows and heads."""
    local = functools.partial(_splash_local, scores=scores)
    placement = active_placement()
    if placement is None:
        return local(q, k, v, segments, sinks)
    q_spec = placement.spec(("batch", "seq", "act_heads", "act_head_dim"), q.shape, "queries")
    k_spec = placement.spec(("batch", "seq", "act_kv_heads", "act_head_dim"), k.shape, "keys")
    if k_spec != q_spec:
        # Each device must hold the key heads that its query heads read: one for each of them, where
        # there are too few key heads to split them as the query heads are split.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(q_spec, q_spec, q_spec, P(q_spec[0], None), P(q_spec[2])),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, segments, sinks)


def _splash_local(
    q: Array, k: Array, v: Array, segments: Array, sinks: Array | None, *, scores: Scores
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, _ = q.shape
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
    shape = (length, length)
    if 0 < scores.window < length:
        mask = splash.LocalMask(shape, window_size=(scores.window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=scores.cap or None,
    )
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * scores.scale, k, v))
    ids = splash.SegmentIds(q=segments, kv=segments)
    if sinks is None:
        out = jax.vmap(kernel)(q, k, v, ids)
    else:
        out = jax.vmap(lambda *row: kernel(*row, sinks.astype(jnp.float32)))(q, k, v, ids)
    return cast(Array, out).transpose(0, 2, 1, 3)


BACKENDS: dict[str, Backend] = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}


@dataclass(frozen=True, slots=True)
class Choice:
    """The back end that a run uses, and why."""

    backend: str
    reason: str


def choose_backend(
    asked: str,
    config: DecoderConfig,
    *,
    platform: str,
    length: int,
    compute_dtype,
    max_segments: int,
    compute_capability: str = "",
) -> Choice:
    """Resolves `auto`, and refuses a back end that this run cannot use.

    Args:
      asked: `auto` or the name of a back end.
      config: Of the model.
      platform: `cpu`, `gpu` or `tpu`.
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
            preferred, config, platform, length, compute_dtype, max_segments, compute_capability
        )
        if not reasons:
            return Choice(preferred, f"fastest that fits on {platform}")
        return Choice("xla", f"{preferred} is not possible: {'; '.join(reasons)}")
    reasons = _obstacles(
        asked, config, platform, length, compute_dtype, max_segments, compute_capability
    )
    if reasons:
        raise ConfigError(
            [f"model.attention={asked} cannot be used: {r}. Use auto or xla." for r in reasons]
        )
    return Choice(asked, "as configured")


def _obstacles(
    backend: str,
    config: DecoderConfig,
    platform: str,
    length: int,
    compute_dtype,
    max_segments: int,
    compute_capability: str,
) -> list[str]:
    half = jnp.dtype(compute_dtype).itemsize == 2
    head_dim = config.head_dim
    windows = sorted({kind.window for kind in config.kinds if 0 < kind.window < length})
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
            (not config.attention_cap, "the model bounds its scores (attn_logit_softcapping)"),
            (not config.sinks, "the model has attention sinks"),
            (not windows, f"packed rows of {length} exceed a layer's window of {windows}"),
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
    this costs one small compilation for each kind of layer at the start of a run.

    Raises:
      ConfigError: If outputs or gradients differ by more than bfloat16 explains.
    """
    if backend == "xla":
        return
    length, dtype = 256, jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    shapes = [(2, length, n, config.head_dim) for n in heads]
    q, k, v = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=False))
    sinks = jax.random.normal(keys[3], (config.heads,), dtype) if config.sinks else None
    slots = jnp.arange(length)
    segments = jnp.stack([1 + (slots >= 100), jnp.where(slots < 200, 1 + (slots >= 37), 0)])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def output_and_gradients(name: str, scores: Scores, *arrays: Any):
        def total(q: Array, k: Array, v: Array, sinks: Array | None):
            out = attend(q, k, v, segments, backend=name, scores=scores, sinks=sinks)
            out = jnp.where(segments[:, :, None, None] > 0, out.astype(jnp.float32), 0.0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*arrays)
        return out, gradients

    # A window is tried at a size at which it hides something here.
    windows = {kind.window and min(kind.window, 64) for kind in config.kinds}
    for window in sorted(windows) if backend != "cudnn" else [0]:
        scores = dataclasses.replace(config.scores(config.kinds[0]), window=window)
        arrays = (q, k, v, sinks)
        ours = output_and_gradients(backend, scores, *arrays)
        exact = output_and_gradients(
            "xla", scores, *jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
            error = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)))
            scale = float(jnp.max(jnp.abs(b)))
            if not error <= 0.03 * scale:
                raise ConfigError(
                    f"model.attention={backend} gives wrong results for packed rows on this device "
                    f"(largest difference {error:.3g} where values reach {scale:.3g}). Use "
                    "model.attention=xla, or a newer jax or cuDNN."
                )
