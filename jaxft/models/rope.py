"""Rotary positions: the angles of each pair of dimensions, and the ways of stretching them.

Each stretching is a dataclass with `change`, which maps the frequencies of pairs (radians a
position), and `magnitude`, which multiplies cosine and sine.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv:2306.15595): frequencies over `factor`."""

    factor: float

    @property
    def magnitude(self) -> float:
        """Angles alone change."""
        return 1.0

    def change(self, frequencies: Float[Array, " half"], lengths: Array) -> Array:
        """Returns the changed frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's change of rotary frequencies, as its model card and reference code define it.

    Frequencies with wavelengths over `original_length / low_factor` are divided by `factor`, those
    under `original_length / high_factor` are kept, and between them it is interpolated.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    @property
    def magnitude(self) -> float:
        """Angles alone change."""
        return 1.0

    def change(self, frequencies: Float[Array, " half"], lengths: Array) -> Array:
        """Returns the changed frequencies."""
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = (turns - self.low_factor) / (self.high_factor - self.low_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return frequencies * keep + frequencies / self.factor * (1 - keep)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071).

    Pairs that turn more than `beta_fast` times within `original_length` are kept, those that turn
    less than `beta_slow` times are divided by `factor`, and between these pairs (`first` and
    `last`, indices that need not be whole) it is interpolated.
    """

    factor: float
    first: float
    last: float
    magnitude: float

    def change(self, frequencies: Float[Array, " half"], lengths: Array) -> Array:
        """Returns the changed frequencies."""
        pairs = jnp.arange(frequencies.shape[0], dtype=jnp.float32)
        stretch = jnp.clip((pairs - self.first) / (self.last - self.first), 0.0, 1.0)
        return frequencies * (1 - stretch) + frequencies / self.factor * stretch


def make_yarn(
    *,
    theta: float,
    dims: int,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_length: int,
    truncate: bool,
    magnitude: float | None,
) -> YarnScaling:
    """Finds the pairs between which YaRN interpolates (section 3.2 of the paper).

    Args:
      theta: Base of the frequencies.
      dims: Dimensions that are turned.
      factor: How much longer than `original_length` texts may be.
      beta_fast: Turns from which a frequency is kept.
      beta_slow: Turns up to which it is stretched in full.
      original_length: Positions that the model was first trained with.
      truncate: Round the pairs outwards to whole ones.
      magnitude: None for the paper's 0.1 ln(factor) + 1.
    """

    def pair(turns: float) -> float:
        return dims * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(beta_fast), pair(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return YarnScaling(factor, float(first), float(last), magnitude)


@dataclass(frozen=True, slots=True)
class LongScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): a divisor for each pair, found by search.

    Documents of more than `original_length` positions use `long`, shorter ones `short`. It is
    decided for each document, so that no text's result depends on what it is batched with.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    magnitude: float

    def change(self, frequencies: Float[Array, " half"], lengths: Int[Array, "B T"]) -> Array:
        """Returns the frequencies at each position, `[B, T, 1, half]`."""
        is_long = (lengths > self.original_length)[:, :, None, None]
        short, long = (
            (frequencies / jnp.asarray(divisors, jnp.float32))[None, None, None]
            for divisors in (self.short, self.long)
        )
        return jnp.where(is_long, long, short)


@dataclass(frozen=True, slots=True)
class Proportional:
    """The first pairs alone turn, as fast as they would if all did: the slowest stay as they are.

    As Gemma 4's code in transformers has it.

    Attributes:
      pairs: Number of those that turn.
    """

    pairs: int

    @property
    def magnitude(self) -> float:
        """Angles alone change."""
        return 1.0

    def change(self, frequencies: Float[Array, " half"], lengths: Array) -> Array:
        """Returns the changed frequencies."""
        return jnp.where(jnp.arange(frequencies.shape[0]) < self.pairs, frequencies, 0.0)


type Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling | Proportional


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of one kind of layer (Su et al., arXiv:2104.09864).

    Attributes:
      theta: Base of the frequencies: pair i turns by theta^(-2i / dims) radians a position.
      dims: The first dimensions of a head are turned, the others are not.
      scaling: Stretching of frequencies for longer texts.
    """

    theta: float
    dims: int
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries that grow with their position, so that attention over long texts stays sharp.

    As Llama 4's code has it: 1 + beta ln(1 + floor(position / length)).

    Attributes:
      beta: Growth with the logarithm of the position.
      length: Positions at the start of a text in which they do not.
    """

    beta: float
    length: int

    def at(self, positions: Int[Array, "B T"]) -> Float[Array, "B T 1 1"]:
        """Returns the factor of each query, float32."""
        spans = (positions // self.length).astype(jnp.float32)
        return (1.0 + self.beta * jnp.log1p(spans))[:, :, None, None]


def rotary_tables(
    rope: Rope, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of each position's angles in float32, to meet `[B, T, heads, half]`.

    Args:
      rope: How positions turn.
      positions: Of each token in its document.
      lengths: Of the document that each token belongs to.
    """
    frequencies = rope.theta ** (-jnp.arange(0, rope.dims, 2, dtype=jnp.float32) / rope.dims)
    magnitude = 1.0
    if rope.scaling is not None:
        frequencies = rope.scaling.change(frequencies, lengths)
        magnitude = rope.scaling.magnitude
    if frequencies.ndim == 1:
        frequencies = frequencies[None, None, None]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def unturned(cos: Array, sin: Array) -> tuple[Array, Array]:
    """Returns tables of these shapes that turn nothing, for layers beside some that turn."""
    return jnp.ones_like(cos), jnp.zeros_like(sin)


def rotate(
    x: Float[Array, "B T N H"], cos: Array, sin: Array, *, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Turns pairs of the first dimensions, as many as the tables have.

    Args:
      x: Queries or keys.
      cos: Of each pair's angle, as `rotary_tables` makes it.
      sin: Likewise.
      interleaved: Whether the pairs are neighbours (2i, 2i + 1), as in RoFormer, and not
        (i, i + half), as in most files of Hugging Face.
    """
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    turning, rest = x32[..., : 2 * half], x32[..., 2 * half :]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(turning.shape)]
    return jnp.concatenate([*turned, rest], axis=-1).astype(x.dtype)


def document_lengths(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Returns for each token the positions of its document, one more than the last of them."""
    rows = positions.shape[1] + 1

    def of_row(positions: Array, segments: Array) -> Array:
        return jax.ops.segment_max(positions, segments, rows)[segments] + 1

    return jax.vmap(of_row)(positions, segments)
