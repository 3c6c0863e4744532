"""Weights stored as codes of four or eight bits and a scale for each block of them.

A block is some neighbours along the last dimension of a weight, which is an input of the product,
so that codes and scales have the dimensions of the weight: they are stacked, split over devices and
gathered by the same axis names. A weight is decoded where it is used, in the compiled step.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

# Codes of 4 bits are arrays of that type, which jax keeps two to a byte on CPU, GPU and TPU: no
# dimension is packed by hand, so that each can be split over devices.
DTYPES: dict[str, Any] = {
    "nf4": jnp.uint4,
    "int8": jnp.int8,
    "int4": jnp.int4,
    "fp8": jnp.float8_e4m3fn,
}
SCALES_DTYPE = jnp.bfloat16
# NormalFloat of 4 bits (Dettmers et al., arXiv:2305.14314, appendix E), in the order of its codes.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_BLOCK = 64
# Parts that blocks do not straddle when a dimension is split over as many devices.
_PARTS = 8


def is_leaf(path: str) -> bool:
    """Whether a parameter stands for a weight together with another one."""
    return path.rpartition(".")[2] in ("codes", "scales")


def parameter_count(params: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Returns the number of parameters of a model; scales of codes are none."""
    return sum(
        math.prod(spec.shape) for path, spec in params.items() if not path.endswith(".scales")
    )


def weight_of(path: str) -> str:
    """Returns the path of the weight that a leaf stands for; of any other parameter its own."""
    return f"{path.rpartition('.')[0]}.w" if is_leaf(path) else path


def block_size(size: int) -> int:
    """Returns how many neighbours along a dimension of this size share a scale: 64, or fewer.

    It is the largest number up to 64 whose blocks fill the dimension and also each of its parts
    when it is split over 2, 4 or 8 devices, as far as such parts have 64 elements: 60 of 2880.
    """
    parts = max(p for p in (1, 2, 4, _PARTS) if p == 1 or (size % p == 0 and size >= p * _BLOCK))
    part = size // parts
    return max(block for block in range(1, min(part, _BLOCK) + 1) if part % block == 0)


def abstract(
    shape: tuple[int, ...], axes: tuple[str, ...], kind: str
) -> dict[str, tuple[tuple[int, ...], Any, tuple[str, ...]]]:
    """Returns shape, dtype and names of the dimensions of each leaf that stands for a weight.

    Args:
      shape: `[*outputs, *inputs]`, of one or of many.
      axes: Names of its dimensions.
      kind: One of `DTYPES`.
    """
    blocks = shape[-1] // block_size(shape[-1])
    return {
        "codes": (shape, DTYPES[kind], axes),
        "scales": ((*shape[:-1], blocks), SCALES_DTYPE, axes),
    }


def encode(
    w: Float[Array, "*outputs inputs"], kind: str, *, block: int
) -> tuple[Num[Array, "*outputs inputs"], Float[Array, "*outputs blocks"]]:
    """Returns codes and scales of a weight, or of any part of it that has whole blocks.

    Each number gets the code whose value is the nearest, with the scale as it is stored. Scales
    bring the largest magnitude of a block to the last code; of `int4`, which has one more negative
    code than positive ones, to that code, so that the scale has the opposite sign of that number.

    Args:
      w: The weight, or the part.
      kind: One of `DTYPES`.
      block: `block_size` of the last dimension of the whole weight.
    """
    shape = w.shape
    blocks = w.astype(jnp.float32).reshape(*shape[:-1], -1, block)
    scales = _scales(blocks, kind).astype(SCALES_DTYPE)
    divisor = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    return _codes(blocks / divisor[..., None], kind).reshape(shape), scales


def _scales(blocks: Array, kind: str) -> Array:
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    if kind == "nf4":
        return largest
    if kind == "int4":
        top = jnp.max(blocks, axis=-1)
        return jnp.where(top == largest, largest, -largest) / -8
    return largest / (127 if kind == "int8" else float(jnp.finfo(DTYPES[kind]).max))


def _codes(x: Array, kind: str) -> Array:
    dtype = DTYPES[kind]
    if kind == "nf4":
        levels = np.asarray(NF4, np.float32)
        middles = (levels[:-1] + levels[1:]) / 2
        code = sum((x > middle).astype(jnp.int32) for middle in middles)
        return jnp.asarray(code).astype(dtype)
    # The scale is rounded to its own type, so that the largest may come to lie beyond the last.
    if kind == "fp8":
        limit = float(jnp.finfo(dtype).max)
        return jnp.clip(x, -limit, limit).astype(dtype)
    low = -8 if kind == "int4" else -127
    return jnp.clip(jnp.round(x), low, jnp.iinfo(dtype).max).astype(dtype)


def decode(
    codes: Num[Array, "*outputs inputs"], scales: Float[Array, "*outputs blocks"], dtype: Any
) -> Float[Array, "*outputs inputs"]:
    """Returns the weight in `dtype`: products in float32, rounded once.

    The type of the codes tells their kind.
    """
    values = _nf4(codes) if codes.dtype == DTYPES["nf4"] else codes.astype(jnp.float32)
    return (values * _spread(scales, codes.shape[-1])).astype(dtype)


def _nf4(codes: Array) -> Array:
    """Returns each code's level, picked by one bit after the other: four of fifteen selections.

    A table that is indexed becomes a chain of more selections on TPU.
    """
    codes, levels = codes.astype(jnp.int32), [jnp.float32(level) for level in NF4]
    for bit in range(4):
        odd = (codes & (1 << bit)) != 0
        levels = [jnp.where(odd, b, a) for a, b in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _spread(scales: Array, size: int) -> Array:
    """Repeats each scale for its block, in float32.

    On TPU neighbours of the last dimension lie in lanes of registers. There a product with ones
    and zeros is cheaper, and exact; repeating would bring the codes to another layout first.
    """
    blocks = scales.shape[-1]

    def by_product(scales: Array) -> Array:
        block_of = jnp.arange(size)[None] // (size // blocks)
        ones = (block_of == jnp.arange(blocks)[:, None]).astype(scales.dtype)
        return jnp.matmul(scales, ones, preferred_element_type=jnp.float32)

    def repeated(scales: Array) -> Array:
        return jnp.repeat(scales.astype(jnp.float32), size // blocks, axis=-1)

    return jax.lax.platform_dependent(scales, tpu=by_product, default=repeated)
