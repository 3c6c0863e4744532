"""The gated delta rule over packed rows, in chunks, and the short convolution before it.

A head of gated DeltaNet (Yang et al., arXiv:2412.06464) has a state S `[Dk, Dv]`, a memory from
keys to values. Each token lets it fade, and corrects what it has for the token's key:

    S <- exp(g) S
    S <- S + k (beta (v - k^T S))^T
    out = q^T S

Within a chunk of tokens the corrections depend on each other by a triangular system, which is
solved at once (the UT transform of Yang et al., arXiv:2406.06484), so that all is products of
matrices and only the state goes from chunk to chunk. Every document begins with an empty state.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxft.sharding.rules import active_placement

SCOPE = "delta_rule"
"""Name that the operations of the rule have in compiled programs."""


class Chunking(NamedTuple):
    """The way in which a row is cut.

    Attributes:
      chunk: Tokens of a chunk.
      span: Number of chunks whose own work, for which no state is needed, is done at once.
    """

    chunk: int
    span: int


# On TPU what is made of a chunk stays in the fast memory beside the core if chunks are taken one by
# one: forward and backward over 4,096 tokens with 48 heads of 128, v5e then moves 1.9 GB and not
# 6.9, and the compiler counts 14 ms for chunks of 128, 18 for 64, 26 for 32 and 45 for 16, without
# its kernel for the inverse (benchmarks/delta.py).
_TPU = Chunking(128, 1)
# Two cores of a CPU worked 0.20 s on 1,024 tokens with 8 heads so, and 0.52 s on chunks one by one,
# beside other work. A GPU would start some hundred small kernels a chunk; that was not measured.
_OTHERS = Chunking(64, 16)


def chunking(platform: str) -> Chunking:
    """Returns what suits devices of a platform, `tpu`, `gpu` or `cpu`."""
    return _TPU if platform == "tpu" else _OTHERS


# Added to the square of a length before it divides, as in transformers.
_EPSILON = 1e-6
_EXACT = jax.lax.Precision.HIGHEST


def short_convolution(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "*C W"],
    segments: Int[Array, "B T"],
    state: Float[Array, "B W-1 *C"] | None = None,
) -> Float[Array, "B T *C"]:
    """Causal convolution of each channel, which sees zeros before its document, then SiLU.

    Args:
      x: Inputs, of any number of dimensions of channels.
      kernel: Weights; the last is that of the token itself.
      segments: Number of the document, 0 on padding, which ends a document.
      state: Inputs before the first token, if the row goes on with a document: see
        `convolution_state`. Zeros if absent.

    Returns:
      In the type of `x`; the sum is float32.
    """
    length, width = x.shape[1], kernel.shape[-1]
    before = _before(x, width, state)
    borders = jnp.pad(_borders(segments), ((0, 0), (width - 1, 0)))
    weights = kernel.astype(jnp.float32)[None, None]
    same, out = jnp.ones(segments.shape, bool), None
    for back in range(width):
        first = width - 1 - back
        part = before[:, first : first + length].astype(jnp.float32) * weights[..., first]
        part = jnp.where(_expand(same, part.ndim), part, 0)
        out = part if out is None else out + part
        same &= ~borders[:, first : first + length]
    assert out is not None
    return jax.nn.silu(out).astype(x.dtype)


def convolution_state(
    x: Float[Array, "B T *C"],
    real: Bool[Array, "B T"],
    *,
    width: int,
    state: Float[Array, "B P *C"] | None = None,
) -> Float[Array, "B P *C"]:
    """Returns the last `width - 1` inputs that are real, with which the convolution goes on.

    Args:
      x: Inputs of the convolution.
      real: False on padding, which is at the right alone.
      width: Of the kernel.
      state: Inputs before the first token; zeros if absent.
    """
    before = _before(x, width, state)
    places = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(width - 1)[None]
    return jnp.take_along_axis(before, _expand(places, x.ndim), axis=1)


@jax.named_scope(SCOPE)
def gated_delta_rule(
    q: Float[Array, "B T K Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T V Dv"],
    log_decay: Float[Array, "B T V"],
    beta: Float[Array, "B T V"],
    segments: Int[Array, "B T"],
    *,
    chunk: int = 0,
    span: int = 0,
    state: Float[Array, "B V Dk Dv"] | None = None,
) -> tuple[Float[Array, "B T V Dv"], Float[Array, "B V Dk Dv"]]:
    """Applies the rule to rows of documents.

    Products take the type of `v` and are summed in float32; decays, the inverse and the state are
    float32. The backward pass keeps what is given and the state before each span of chunks, float32
    `[B, V, Dk, Dv]`, and makes the rest again, span by span.

    Args:
      q: Queries, which are normalised here, and scaled by Dk^-1/2.
      k: Keys, which are normalised here.
      v: Values; V is a multiple of K, and head j reads key head j // (V / K).
      log_decay: Logarithm of what is left of the state after a token, 0 at most.
      beta: Share of the error that a token corrects, 0 to 1.
      segments: Number of the document, 0 on padding, which ends a document and changes no state.
      chunk: Tokens of a chunk, a power of two; 0 for what suits the devices.
      span: Number of chunks that are made ready at once, as far as it divides those of a row; 0 for
        what suits the devices.
      state: State before the first token, if the row goes on with a document.

    Returns:
      The outputs in the type of `v`, without meaning on padding; and the state after the last real
      token, float32.

    Raises:
      ValueError: If the chunk is not a power of two, or V not a multiple of K.
    """
    (rows, length, keys, size), (_, _, heads, width) = k.shape, v.shape
    suited = chunking(_platform())
    chunk, span = chunk or suited.chunk, span or suited.span
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk is {chunk}; expected a power of two.")
    if heads % keys:
        raise ValueError(f"{heads} heads of values are not a multiple of {keys} heads of keys.")
    chunk = min(chunk, 1 << (length - 1).bit_length())
    real = segments > 0
    beta, log_decay = (
        jnp.where(real[..., None], x.astype(jnp.float32), 0) for x in (beta, log_decay)
    )
    q = (normalised(q) * size**-0.5).astype(v.dtype)
    k = normalised(k).astype(v.dtype)
    groups = heads // keys
    v, log_decay, beta = (
        x.reshape(*x.shape[:2], keys, groups, *x.shape[3:]) for x in (v, log_decay, beta)
    )
    q, k, v = (jnp.moveaxis(_chunks(x, chunk), 2, -2) for x in (q, k, v))
    log_decay, beta = (jnp.moveaxis(_chunks(x, chunk), 2, -1) for x in (log_decay, beta))
    borders = _chunks(_borders(segments), chunk)
    start = jnp.zeros((rows, heads, size, width), jnp.float32) if state is None else state
    start = start.astype(jnp.float32).reshape(rows, keys, groups, size, width)
    span = math.gcd(span, len(q))
    spans = jax.tree.map(
        lambda x: x.reshape(-1, span, *x.shape[1:]), (q, k, v, log_decay, beta, borders)
    )
    last, out = jax.lax.scan(jax.checkpoint(_span, prevent_cse=False), start, spans)
    out = out.reshape(-1, *out.shape[2:])
    out = jnp.moveaxis(out, (0, -2), (1, 2)).reshape(rows, -1, heads, width)[:, :length]
    return out, last.reshape(rows, heads, size, width)


def delta_step(
    q: Float[Array, "B K Dk"],
    k: Float[Array, "B K Dk"],
    v: Float[Array, "B V Dv"],
    log_decay: Float[Array, "B V"],
    beta: Float[Array, "B V"],
    real: Bool[Array, " B"],
    state: Float[Array, "B V Dk Dv"],
) -> tuple[Float[Array, "B V Dv"], Float[Array, "B V Dk Dv"]]:
    """Applies `gated_delta_rule` to one token of each row, in float32.

    Args:
      q: As there, without T; so are `k`, `v`, `log_decay` and `beta`.
      k: Keys.
      v: Values.
      log_decay: Logarithms of decays.
      beta: Shares that are corrected.
      real: False where the row's token is padding, which leaves the state as it is.
      state: State before the token.

    Returns:
      The output in the type of `v`, and the state after the token, float32.
    """
    (rows, keys, size), (_, heads, width) = k.shape, v.shape
    groups = heads // keys
    q, k = normalised(q) * size**-0.5, normalised(k)
    beta, log_decay = (
        jnp.where(real[:, None], x.astype(jnp.float32), 0).reshape(rows, keys, groups, 1)
        for x in (beta, log_decay)
    )
    old = state.astype(jnp.float32).reshape(rows, keys, groups, size, width)
    old = old * jnp.exp(log_decay)[..., None]
    values = v.astype(jnp.float32).reshape(rows, keys, groups, width)
    found = jnp.einsum("bkd,bkgdv->bkgv", k, old, precision=_EXACT)
    new = old + k[:, :, None, :, None] * (beta * (values - found))[..., None, :]
    out = jnp.einsum("bkd,bkgdv->bkgv", q, new, precision=_EXACT)
    return out.reshape(v.shape).astype(v.dtype), new.reshape(state.shape)


def normalised(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """Returns the inverse of `1 + a`, where `a` is strictly lower triangular, float32.

    By substitution, which loses nothing where keys are alike: of the sum of the powers of `-a` no
    digit is left there. LAPACK does it on a CPU, cuBLAS on a GPU, and a kernel of libtpu on a TPU.
    """
    one = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    return jax.lax.linalg.triangular_solve(a, one, left_side=True, lower=True, unit_diagonal=True)


def _inverse_forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _inverse_backward(inverse: Array, pulled: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_product(_product(transposed, pulled), transposed), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _platform() -> str:
    """Returns the kind of devices that a program is made for."""
    placement = active_placement()
    return (jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]).platform


def _span(state: Array, chunks: tuple[Array, ...]) -> tuple[Array, Array]:
    """Returns the state after some chunks, and their outputs `[N, B, K, G, C, Dv]`."""
    return jax.lax.scan(_step, state, _local(*chunks))


def _local(
    q: Float[Array, "N B K C Dk"],
    k: Float[Array, "N B K C Dk"],
    v: Float[Array, "N B K G C Dv"],
    log_decay: Float[Array, "N B K G C"],
    beta: Float[Array, "N B K G C"],
    borders: Bool[Array, "N B C"],
) -> tuple[Array, ...]:
    """Returns for each of N chunks all that does not depend on the state that enters it.

    These are `_step`'s: the corrections for an empty state and what of them a state takes away, the
    queries of the state, the weights of the chunk's own corrections, the keys under which they are
    remembered, and how much of the state is left.
    """
    chunk, dtype = k.shape[-2], v.dtype
    documents = jnp.cumsum(borders, axis=-1, dtype=jnp.int32)
    same = documents[..., :, None] == documents[..., None, :]
    earlier, strictly = (np.tri(chunk, k=k, dtype=bool)[None, None] for k in (0, -1))
    within, strict = same & earlier, same & strictly
    # Decays are added up from the document's beginning, so that none of another is in the sums.
    sums = within.astype(jnp.float32)
    decays = jnp.einsum("nbij,nbkgj->nbkgi", sums, log_decay, precision=_EXACT)
    within, strict = (x[:, :, None, None] for x in (within, strict))
    gaps = jnp.where(within, decays[..., :, None] - decays[..., None, :], 0)
    left = jnp.where(within, jnp.exp(gaps), 0)
    alike = jnp.einsum("nbkid,nbkjd->nbkij", k, k, preferred_element_type=jnp.float32)
    system = jnp.where(strict, beta[..., None] * alike[:, :, :, None] * left, 0)
    inverse = unit_lower_inverse(system) * beta[..., None, :]
    # A state that enters reaches the first border; that which leaves is of the last document.
    reached = (documents == 0)[:, :, None, None]
    entered = jnp.where(reached, jnp.exp(decays), 0)
    of_last = (documents == documents[..., -1:])[:, :, None, None]
    to_end = jnp.where(of_last, jnp.exp(jnp.where(of_last, decays[..., -1:] - decays, 0)), 0)
    values = _summed("nbkgij,nbkgjd->nbkgid", inverse.astype(dtype), v)
    taken = _summed("nbkgij,nbkjd->nbkgid", (inverse * entered[..., None, :]).astype(dtype), k)
    scores = jnp.einsum("nbkid,nbkjd->nbkij", q, k, preferred_element_type=jnp.float32)
    weights = (scores[:, :, :, None] * left).astype(dtype)
    queries = (q[:, :, :, None] * entered[..., None]).astype(dtype)
    remembered = (k[:, :, :, None] * to_end[..., None]).astype(dtype)
    return values, taken, weights, queries, remembered, entered[..., -1]


def _step(state: Array, of_chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    """Returns the state after a chunk, and the chunk's outputs `[B, K, G, C, Dv]`."""
    values, taken, weights, queries, remembered, left = of_chunk
    dtype = values.dtype
    entering = state.astype(dtype)
    new = values - _summed("bkgid,bkgdv->bkgiv", taken, entering)
    out = jnp.einsum("bkgid,bkgdv->bkgiv", queries, entering, preferred_element_type=jnp.float32)
    out += jnp.einsum("bkgij,bkgjv->bkgiv", weights, new, preferred_element_type=jnp.float32)
    added = jnp.einsum("bkgid,bkgiv->bkgdv", remembered, new, preferred_element_type=jnp.float32)
    return state * left[..., None, None] + added, out.astype(dtype)


def _summed(formula: str, a: Array, b: Array) -> Array:
    """Multiplies with sums in float32, and returns the type of the factors."""
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32).astype(b.dtype)


def _borders(segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where a document begins; a state may reach the first token of a row."""
    begins = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(begins, ((0, 0), (1, 0)))


def _chunks(x: Array, chunk: int) -> Array:
    """Returns `[B, T, …]` as `[N, B, C, …]`, filled up with zeros at the right."""
    rows, length = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)


def _before(x: Array, width: int, state: Array | None) -> Array:
    """Puts the inputs before the first token in front of a row."""
    if state is None:
        return jnp.pad(x, ((0, 0), (width - 1, 0), *((0, 0),) * (x.ndim - 2)))
    return jnp.concatenate([state.astype(x.dtype), x], axis=1)


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))
