"""Causal attention within segments, on the back end that a device has.

Every back end honours segments: a query sees the keys of its own segment that do not come later.
One that cannot is refused by name; there is no silent fall-back.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.activations import ATTENTION
from jaxft.models.config import DecoderConfig, Scoring
from jaxft.models.cudnn import MAX_SEGMENTS, cudnn_attention
from jaxft.models.ring import BLOCK, ring_attention
from jaxft.models.row_split import split_rows
from jaxft.models.tokamax import is_installed, tokamax_attention
from jaxft.sharding.rules import active_placement, constrain

Backend = Callable[[Array, Array, Array, Array, Scoring, Array | None], Array]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K U"],
    segments: Int[Array, "B T"],
    *,
    backend: str,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N U"]:
    """Attention of rows over themselves, softmax in float32.

    Where the active placement splits rows, positions are in the order of its `slots`.

    Args:
      q: Queries; N is a multiple of K, and head n reads key head n // (N / K).
      k: Keys.
      v: Values, whose heads may be narrower.
      segments: Number of the document that each position belongs to, 0 on padding.
      backend: A name in `BACKENDS`.
      scores: Scale, soft bound and window of the scores.
      sinks: A score for each head that enters the softmax beside those of the keys and has no
        value (Xiao et al., arXiv:2309.17453; learnt, as in gpt-oss).
    """
    run, narrower = BACKENDS[backend], k.shape[-1] - v.shape[-1]
    if not narrower or backend not in _OF_ONE_SIZE:
        return run(q, k, v, segments, scores, sinks)
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, narrower)))
    return run(q, k, wide, segments, scores, sinks)[..., : v.shape[-1]]


def causal_mask(
    query_slots: Int[Array | np.ndarray, " T"],
    key_slots: Int[Array | np.ndarray, " S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    window: int = 0,
) -> Bool[Array, "B 1 T S"]:
    """True where a query sees a key: same segment, not later, and within the window if any."""
    behind = jnp.asarray(query_slots)[:, None] - jnp.asarray(key_slots)[None, :]
    visible = behind >= 0
    if window:
        visible &= behind < window
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (visible[None] & same)[:, None]


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K U"],
    mask: Bool[Array, "B 1 T S"],
    *,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N U"]:
    """Attention under an explicit mask; memory grows with T x S."""
    (rows, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    products = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = attention_weights(products, mask, scores=scores, sinks=sinks)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
    return out.reshape(*q.shape[:3], -1)


def attention_weights(
    products: Float[Array, "B K G T S"],
    mask: Bool[Array, "B 1 T S"],
    *,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B K G T S"]:
    """Softmax over the keys that a mask shows; G queries share the keys of one of K heads.

    Args:
      products: float32, of queries and keys.
      mask: True where a query sees a key.
      scores: As for `attend`.
      sinks: As for `attend`.
    """
    products *= scores.scale
    if scores.cap:
        products = scores.cap * jnp.tanh(products / scores.cap)
    products = jnp.where(mask[:, :, None], products, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(products, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(1, *products.shape[1:3], 1, 1)
    largest = jnp.maximum(jnp.max(products, axis=-1, keepdims=True), sink)
    largest = jax.lax.stop_gradient(largest)
    exps = jnp.exp(products - largest)
    return exps / (jnp.sum(exps, axis=-1, keepdims=True) + jnp.exp(sink - largest))


def row_mask(segments: Int[Array, "B T"], *, window: int) -> Bool[Array, "B 1 T T"]:
    """`causal_mask` of rows over themselves, in the order in which the devices hold them."""
    placement, length = active_placement(), segments.shape[1]
    slots = np.arange(length) if placement is None else placement.slots(length)
    of_queries = constrain(segments, "batch", "seq")
    of_keys = constrain(segments, "batch", "key_seq")
    return causal_mask(slots, slots, of_queries, of_keys, window=window)


def row_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K U"],
    mask: Bool[Array, "B 1 T T"],
    *,
    scores: Scoring,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N U"]:
    """`masked_attention` of rows over themselves; of split rows a device gathers all keys."""
    placement = active_placement()
    if placement is None or not placement.split("seq"):
        return masked_attention(q, k, v, mask, scores=scores, sinks=sinks)
    split, k, v = split_rows(placement, q, k, v)

    def local(q: Array, k: Array, v: Array, mask: Array, sinks: Array | None) -> Array:
        k, v = split.gather(k), split.gather(v)
        return masked_attention(q, k, v, mask, scores=scores, sinks=sinks)

    of_mask = P(split.spec[0], None, split.spec[1], None)
    specs = (split.rows, split.rows, split.rows, of_mask, split.heads)
    return split.placement.shard_map(local, specs, split.rows)(q, k, v, mask, sinks)


def _xla(
    q: Array, k: Array, v: Array, segments: Array, scores: Scoring, sinks: Array | None
) -> Array:
    mask = row_mask(segments, window=scores.window)
    return checkpoint_name(row_attention(q, k, v, mask, scores=scores, sinks=sinks), ATTENTION)


def _splash(
    q: Array, k: Array, v: Array, segments: Array, scores: Scoring, sinks: Array | None
) -> Array:
    # What it imports is of use on TPUs alone.
    from jaxft.models.splash import splash_attention

    return splash_attention(q, k, v, segments, scores, sinks)


BACKENDS: dict[str, Backend] = {
    "xla": _xla,
    "cudnn": cudnn_attention,
    "tokamax": tokamax_attention,
    "splash": _splash,
    "ring": ring_attention,
}
# Kernels that take values of the size of keys alone.
_OF_ONE_SIZE = ("cudnn", "tokamax")


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
    parts: int = 1,
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
      parts: Devices that a strategy splits each row over.

    Raises:
      ConfigError: Where a named back end cannot be used; all reasons at once.
    """
    run = _Run(config, platform, length, compute_dtype, max_segments, compute_capability, parts)
    if asked != "auto":
        if reasons := _OBSTACLES[asked](run):
            advice = "Use auto or xla."
            problems = [
                f"--config.model.attention={asked} cannot be used: {r}. {advice}" for r in reasons
            ]
            raise ConfigError(problems)
        return Choice(asked, "as configured")
    fastest = {"tpu": ["splash"], "gpu": ["cudnn"]}.get(platform, [])
    candidates = [*fastest, *(["ring"] if parts > 1 else []), "xla"]
    refused = []
    for name in candidates:
        reasons = _OBSTACLES[name](run)
        if not reasons:
            break
        refused.append(f"{name} is not possible: {'; '.join(reasons)}")
    # No run on a GPU has shown yet that tokamax's kernels are right and fast there.
    if name == "xla" and run.platform == "gpu" and not _tokamax_obstacles(run):
        refused.append("tokamax holds no scores of whole rows, and may be asked for by its name")
    return Choice(name, "; ".join(refused) or f"fastest that fits on {platform}")


@dataclass(frozen=True, slots=True)
class _Run:
    """The facts that decide whether a back end can be used; see `choose_backend`."""

    config: DecoderConfig
    platform: str
    length: int
    compute_dtype: Any
    max_segments: int
    compute_capability: str
    parts: int


def _failed(*tests: tuple[bool, str]) -> list[str]:
    """Returns what is said of the tests that are not passed."""
    return [reason for passed, reason in tests if not passed]


def _xla_obstacles(run: _Run) -> list[str]:
    return []


def _cudnn_obstacles(run: _Run) -> list[str]:
    config = run.config
    windows = sorted({kind.window for kind in config.kinds if 0 < kind.window < run.length})
    return _failed(
        (run.platform == "gpu", f"it runs on NVIDIA GPUs and the device is a {run.platform}"),
        (
            run.platform != "gpu" or float(run.compute_capability or 0) >= 9.0,
            "packed rows need compute capability 9.0 (Hopper) and the device has "
            f"{run.compute_capability or 'an unknown one'}",
        ),
        (
            jnp.dtype(run.compute_dtype).itemsize == 2,
            "it computes in bfloat16, and compute is float32 (model.dtypes)",
        ),
        *(
            (size % 8 == 0 and size <= 256, f"head size {size} is not 8, 16 … 256")
            for size in config.head_dims
        ),
        (not config.attention_cap, "the model bounds its scores (attn_logit_softcapping)"),
        (not config.sinks, "the model has attention sinks"),
        (not windows, f"packed rows of {run.length} exceed a layer's window of {windows}"),
        (
            run.max_segments <= MAX_SEGMENTS,
            f"a row holds {run.max_segments} documents and the kernel takes {MAX_SEGMENTS}",
        ),
        (run.parts == 1, f"the strategy splits each row over {run.parts} devices"),
    )


def _tokamax_obstacles(run: _Run) -> list[str]:
    return _failed(
        (run.platform == "gpu", f"it runs on NVIDIA GPUs and the device is a {run.platform}"),
        (is_installed(), "tokamax is not installed (pip install 'jaxft[cuda]')"),
        (
            run.platform != "gpu" or float(run.compute_capability or 0) >= 8.0,
            "it needs compute capability 8.0 (Ampere) and the device has "
            f"{run.compute_capability or 'an unknown one'}",
        ),
        (
            jnp.dtype(run.compute_dtype).itemsize == 2,
            "it computes in bfloat16, and compute is float32 (model.dtypes)",
        ),
        (
            not run.config.attention_cap,
            "the model bounds its scores (attn_logit_softcapping), of which it has no gradient",
        ),
        (run.parts == 1, f"the strategy splits each row over {run.parts} devices"),
    )


def _splash_obstacles(run: _Run) -> list[str]:
    # Blocks of keys divide the row, those of queries what a device has of it.
    part = run.length // run.parts
    size = f"data.max_length {run.length}"
    if run.parts > 1:
        size += f", over {run.parts} devices {part},"
    return _failed(
        (run.platform == "tpu", f"it runs on TPUs and the device is a {run.platform}"),
        (part % 128 == 0, f"{size} is not a multiple of 128"),
        (
            all(x < 512 or x % 512 == 0 for x in (run.length, part)),
            f"{size} is over 512 and not a multiple of it",
        ),
        *(
            (size % 64 == 0, f"head size {size} is not a multiple of 64")
            for size in run.config.head_dims
        ),
    )


def _ring_obstacles(run: _Run) -> list[str]:
    chunk = run.length // (2 * run.parts)
    return _failed(
        (
            run.parts > 1,
            "no mesh axis of more than one device splits rows (as context does in strategies cp "
            "and fsdp_cp)",
        ),
        (
            chunk <= BLOCK or math.gcd(chunk, BLOCK) >= 128,
            f"data.max_length {run.length} over {2 * run.parts} chunks is {chunk}, over {BLOCK} "
            "and not a multiple of 128",
        ),
    )


_OBSTACLES: dict[str, Callable[[_Run], list[str]]] = {
    "xla": _xla_obstacles,
    "cudnn": _cudnn_obstacles,
    "tokamax": _tokamax_obstacles,
    "splash": _splash_obstacles,
    "ring": _ring_obstacles,
}


def check_backend(backend: str, config: DecoderConfig) -> None:
    """Compares a back end with XLA's attention on packed rows, on the device in use.

    Kernels that ignored segments, or read the wrong keys with grouped heads, have been released;
    this costs one small compilation for each kind of layer at the start of a run.

    Raises:
      ConfigError: If outputs or gradients differ by more than bfloat16 explains.
    """
    if backend in ("xla", "ring"):  # made of the same operations, no kernel of anyone's
        return
    length, dtype = 256, jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    sinks = jax.random.normal(keys[3], (config.heads,), dtype) if config.sinks else None
    slots = jnp.arange(length)
    segments = jnp.stack([1 + (slots >= 100), jnp.where(slots < 200, 1 + (slots >= 37), 0)])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def output_and_gradients(name: str, scores: Scoring, *arrays: Any):
        def total(q: Array, k: Array, v: Array, sinks: Array | None):
            out = attend(q, k, v, segments, backend=name, scores=scores, sinks=sinks)
            out = jnp.where(segments[:, :, None, None] > 0, out.astype(jnp.float32), 0.0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*arrays)
        return out, gradients

    # A window is tried at a size at which it hides something here.
    tried = {
        (layer.kv_heads, layer.head_dim, layer.value_dim, min(window, 64) * (backend != "cudnn"))
        for layer, window in zip(config.attending, config.windows, strict=True)
    }
    for kv_heads, head_dim, value_dim, window in sorted(tried):
        scores = dataclasses.replace(config.scores(config.kinds[0]), window=window)
        heads = ((config.heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
        shapes = [(2, length, *of_head) for of_head in heads]
        arrays = (*(jax.random.normal(*a, dtype) for a in zip(keys, shapes, strict=False)), sinks)
        ours = output_and_gradients(backend, scores, *arrays)
        exact = output_and_gradients(
            "xla", scores, *jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
            error = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)))
            scale = float(jnp.max(jnp.abs(b)))
            if not error <= 0.03 * scale:
                raise ConfigError(
                    f"--config.model.attention={backend} gives wrong results for packed rows on "
                    f"this device (largest difference {error:.3g} where values reach {scale:.3g}). "
                    "Use --config.model.attention=xla, or a newer jax or cuDNN."
                )
