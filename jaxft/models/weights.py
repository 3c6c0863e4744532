"""Weights: what is stored of a matrix, and what is learnt beside it (low-rank adapters).

The leaves of a weight stand beside each other in the flat dict of parameters, below the path of the
module that owns them, its *site*: `w`, or what stands for it, and those of an adapter, which are
there only if the site has one. All are stacked over layers like the weight itself, so that a scan
over layers slices each of them and copies none.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.models import activations
from jaxft.models.module import Param, modules_in, optional
from jaxft.models.quantised import block_size, decode, encode
from jaxft.sharding.reduce import project, project_decoded
from jaxft.sharding.scaled import project_scaled


@dataclass(frozen=True, slots=True)
class Site:
    """A low-rank adapter of one weight (Hu et al., LoRA, arXiv:2106.09685).

    Attributes:
      rank: r, the width between its two matrices; 0 where the weight has none.
      alpha: Numerator of its scale.
      rslora: Whether the scale is alpha / sqrt(r) (arXiv:2312.03732) and not alpha / r.
      magnitude: Whether the norm of each output's row is learnt apart (DoRA, arXiv:2402.09353).
      dropout: Share of the adapter's inputs that are zero in a training step.
      start: Whether a fixed pair of matrices, those it began with, is subtracted.
    """

    rank: int
    alpha: float
    rslora: bool = False
    magnitude: bool = False
    dropout: float = 0.0
    start: bool = False

    @property
    def scale(self) -> float:
        """The factor of the product of both matrices."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Noise(NamedTuple):
    """The source of dropout in one layer.

    A mask is a function of the token's seed, the layer and the site alone: it is the same on any
    number of devices, in a pipeline, and when a layer runs again for its backward pass.

    Attributes:
      seeds: uint32 `[B, T]`, random for each token and step.
      layer: int32 scalar, number of the layer.
    """

    seeds: UInt32[Array, "B T"]
    layer: Int[Array, ""]


_NOISE = contextvars.ContextVar[Noise | None]("noise", default=None)


@contextlib.contextmanager
def dropout_from(noise: Noise | None) -> Iterator[None]:
    """Gives adapters their dropout while a layer is traced; without it they have none."""
    token = _NOISE.set(noise)
    try:
        yield
    finally:
        _NOISE.reset(token)


_COLUMNS = contextvars.ContextVar[Array | None]("columns", default=None)


@contextlib.contextmanager
def columns_of(rows: Bool[Array, "R C"] | None) -> Iterator[None]:
    """Gives each row of a batch some of the ranks of adapters while a model is traced.

    Several adapters of one model are one wide adapter, of which a row takes the ranks that are its
    own, or none. Without columns every row takes all.

    Args:
      rows: Which of the C ranks each row takes.
    """
    token = _COLUMNS.set(rows)
    try:
        yield
    finally:
        _COLUMNS.reset(token)


def refuse_columns() -> None:
    """Raises AssertionError where an adapter is about to be applied to all rows alike.

    Adapters of weights that are used in such a way are not put side by side: see
    `Weight.takes_columns`.
    """
    assert _COLUMNS.get() is None, "an adapter of some rows alone would be applied to all of them"


class Weight(nnx.Module):
    """A matrix between groups of named dimensions, `[*lead, *outputs, *inputs]`.

    Attributes:
      axes: Names of its dimensions, without that of stacked layers.
      inputs: Number of the last dimensions that are inputs.
      lead: Number of the first that are neither inputs nor outputs, such as that of experts.
      site: Adapter of the weight, or None.
      number: Hash of the site, on which dropout depends.
      added: Ids of the tokens whose rows are learnt apart, of a table.
      matmul: Format of products with the matrix, one of `sharding.scaled.FORMATS`; empty for their
        own type.
      takes_columns: Whether rows of a batch may have adapters of their own, as `apply` gives them.
    """

    takes_columns = True

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        axes: tuple[str, ...],
        inputs: int,
        dtype: Any,
        scale: float,
        rngs: nnx.Rngs,
        lead: int = 0,
    ):
        self.axes, self.inputs, self.lead = axes, inputs, lead
        value = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
        self.w: Any = optional(Param(value.astype(dtype), axes=axes))
        self.site: Site | None = None
        self.number = 0
        self.added: tuple[int, ...] = ()
        self.matmul = ""
        # Declared as data, so that parameters can take their place: first what stands for the
        # matrix where the model is quantised, then the leaves of an adapter.
        self.codes: Any = optional()
        self.scales: Any = optional()
        self.lora_a: Any = optional()
        self.lora_b: Any = optional()
        self.magnitude: Any = optional()
        self.rows: Any = optional()
        self.start_a: Any = optional()
        self.start_b: Any = optional()

    @property
    def input_axes(self) -> tuple[str, ...]:
        """Names of the dimensions that are contracted."""
        return self.axes[len(self.axes) - self.inputs :]

    @property
    def output_axes(self) -> tuple[str, ...]:
        """Names of the dimensions of what it makes."""
        return self.axes[self.lead : len(self.axes) - self.inputs]

    def value(self, dtype: Any) -> Array:
        """Returns the matrix as it is stored, without what is learnt beside it, in `dtype`."""
        if self.codes is None:
            return self.w[...].astype(dtype)
        return decode(self.codes[...], self.scales[...], dtype)

    def adapted(self, dtype: Any) -> Array:
        """Returns the matrix with its adapter as one, in `dtype`, for products of other inputs."""
        w = self.value(dtype)
        if self.site is None:
            return w
        refuse_columns()

        def low_rank(a: Param, b: Param) -> Array:
            return jnp.tensordot(b[...].astype(jnp.float32), a[...].astype(jnp.float32), 1)

        added = low_rank(self.lora_a, self.lora_b)
        if self.site.start:
            added = added - low_rank(self.start_a, self.start_b)
        whole = w.astype(jnp.float32) + self.site.scale * added
        if self.site.magnitude:
            whole = whole * jnp.expand_dims(self._factor(w), tuple(range(-self.inputs, 0)))
        return whole.astype(dtype)

    def quantise(self, kind: str) -> None:
        """Puts codes and scales in the place of the matrix; see `models/quantised.py`."""
        w, axes = self.w[...], self.w.get_metadata()["axes"]
        codes, scales = encode(w, kind, block=block_size(w.shape[-1]))
        self.w = optional()
        self.codes, self.scales = (optional(Param(x, axes=axes)) for x in (codes, scales))

    def table(self) -> Float[Array, "V D"]:
        """Returns the rows of a table, those that are learnt apart and an adapter's part included.

        What is learnt has a gradient; the rest of the table has one if it trains itself.
        """
        table = self.w[...]
        if self.site is not None:
            refuse_columns()
            low_rank = self.lora_b[...] @ self.lora_a[...]
            if self.site.start:
                low_rank = low_rank - self.start_b[...] @ self.start_a[...]
            low_rank = self.site.scale * low_rank
            table = (table.astype(jnp.float32) + low_rank).astype(table.dtype)
        if self.rows is not None:
            table = table.at[jnp.asarray(self.added)].set(self.rows[...].astype(table.dtype))
        return table

    def apply(self, x: Array) -> Array:
        """Contracts the last dimensions of `x` with the inputs, in `x`'s dtype.

        Args:
          x: `[B, T, *inputs]`.

        Returns:
          `[B, T, *outputs]`.
        """
        out = self._product(x)
        if self.site is None:
            return out
        dropped = _dropped(x, self.site.dropout, self.number)
        out = out + self._low_rank(dropped, self.lora_a, self.lora_b)
        if self.site.start:
            out = out - self._low_rank(x, self.start_a, self.start_b)
        if self.site.magnitude:
            out = out * self._factor(self.value(x.dtype)).astype(x.dtype)[None, None]
        return out

    def _factor(self, w: Array) -> Array:
        """Returns by what outputs are multiplied so that rows have their magnitudes, float32."""
        norm = jax.lax.stop_gradient(self._norm(w))
        # Of a row of zeros nothing is made, whatever its factor.
        return self.magnitude[...].astype(jnp.float32) / jnp.where(norm > 0, norm, 1.0)

    def _product(self, x: Array) -> Array:
        dimensions = {"axes": self.axes, "inputs": self.inputs}
        if self.matmul:
            out = project_scaled(x, self.value(x.dtype), **dimensions, kind=self.matmul)
            return checkpoint_name(out, activations.PRODUCT)
        if self.codes is None:
            return project(x, self.value(x.dtype), **dimensions)
        return project_decoded(
            x,
            (self.codes[...], self.scales[...]),
            functools.partial(decode, dtype=x.dtype),
            **dimensions,
        )

    def _low_rank(self, x: Array, a: Param, b: Param) -> Array:
        assert self.site is not None
        of_a, of_b = ("rank", *self.input_axes), (*self.output_axes, "rank")
        narrow = project(x, a[...].astype(x.dtype), axes=of_a, inputs=self.inputs)
        if (columns := _COLUMNS.get()) is not None:
            narrow = jnp.where(columns[:, None], narrow, 0)
        narrow = narrow * jnp.asarray(self.site.scale, x.dtype)
        return project(narrow, b[...].astype(x.dtype), axes=of_b, inputs=1)

    def _norm(self, w: Array) -> Array:
        """Returns the norm of each output's row of the weight with its adapter, `[*outputs]`.

        The pair that it began with is subtracted, as one of further ranks. From products of the
        low-rank parts, so that no matrix of the weight's size is made:
        |w + s b A|² = |w|² + 2 s b·(A w) + s² b·(A Aᵀ) b.
        """
        assert self.site is not None
        a, b = self.lora_a[...], self.lora_b[...]
        if self.site.start:
            a = jnp.concatenate([a, self.start_a[...].astype(a.dtype)])
            b = jnp.concatenate([b, -self.start_b[...].astype(b.dtype)], axis=-1)
        w32, a, b = (x.astype(jnp.float32) for x in (w, a, b))
        return row_norm(w32, a, b, scale=self.site.scale, inputs=self.inputs)


def weights_of_blocks(module: nnx.Module) -> Iterator[Weight]:
    """Yields what the layers of a model multiply with, but routers."""
    for path, part in modules_in(module):
        if isinstance(part, Weight) and path.startswith("layers.") and "router" not in part.axes:
            yield part


def row_norm(
    w: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    scale: float,
    inputs: int,
) -> Float[Array, "..."]:
    """Returns the norm of each output's row of `w + scale * b a`, `[*outputs]`, float32.

    Args:
      w: float32 `[*outputs, *inputs]`.
      a: float32 `[r, *inputs]`.
      b: float32 `[*outputs, r]`.
      scale: Factor of their product.
      inputs: How many dimensions are inputs.
    """
    of_w, of_a = tuple(range(w.ndim - inputs, w.ndim)), tuple(range(1, a.ndim))
    with jax.default_matmul_precision("highest"):
        across = jax.lax.dot_general(w, a, ((of_w, of_a), ((), ())))
        gram = jax.lax.dot_general(a, a, ((of_a, of_a), ((), ())))
        added = 2 * scale * across + scale**2 * (b @ gram)
    squared = jnp.sum(jnp.square(w), axis=of_w) + jnp.sum(added * b, axis=-1)
    return jnp.sqrt(jnp.maximum(squared, 0.0))


def _dropped(x: Array, rate: float, site: int) -> Array:
    """Zeroes a share of the inputs and scales the others, where a layer has noise."""
    noise = _NOISE.get()
    if noise is None or not rate:
        return x
    of_site = (noise.layer.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)) ^ jnp.uint32(site)
    seeds = _mixed(noise.seeds ^ _mixed(of_site))
    features = jnp.zeros((), jnp.uint32)
    for axis in range(2, x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape[2:], axis - 2)
        features = features * jnp.uint32(x.shape[axis]) + place
    bits = _mixed(seeds.reshape(*seeds.shape, *[1] * (x.ndim - 2)) ^ _mixed(features)[None, None])
    kept = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def _mixed(x: Array) -> Array:
    """Spreads every bit over the word: the finaliser of MurmurHash3 (Appleby), uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
