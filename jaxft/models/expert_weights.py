"""Weights of experts as tokens meet them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.models.quantised import decode
from jaxft.sharding.scaled import FORMATS, scale, type_of_sums


class Product(NamedTuple):
    """A product of tokens with a matrix of each expert, linear in both.

    Attributes:
      multiply: Contracts tokens `[…, in]` with matrices `[E, out, in]`, given a context and
        `sums=`, the type of the result.
      spread: Gives each token the numbers `[E, out]` of its expert, given a context.
    """

    multiply: Callable[..., Array]
    spread: Callable[..., Array]


@jax.tree_util.register_pytree_with_keys_class
class Projection:
    """One projection of all experts in the compute dtype.

    Attributes:
      axes: Names of the weight's dimensions, `(experts, outputs, inputs)`.
      w: `[E, out, in]`; None where it is in codes.
      codes: `[E, out, in]`, or None; see `models/quantised.py`.
      scales: `[E, out, blocks]`, or None.
      b: Bias `[E, out]`, or None.
      lora_a: Adapter's `[E, r, in]`, or None.
      lora_b: Adapter's `[E, out, r]`, scaled.
      start_a: Pair that is subtracted, `[E, r, in]`, or None.
      start_b: The other one, `[E, out, r]`, scaled.
      matmul: Format of products with `w`, one of `sharding.scaled.FORMATS`; empty for its type.
      cuts: Mesh axes that cut the outputs and the inputs of what a device multiplies with.
    """

    _LEAVES = ("w", "codes", "scales", "b", "lora_a", "lora_b", "start_a", "start_b")

    def __init__(self, axes: tuple[str, ...], matmul: str = "", **arrays: Any):
        self.axes, self.matmul = axes, matmul
        self.cuts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        for leaf in self._LEAVES:
            setattr(self, leaf, arrays.get(leaf))

    w: Any
    codes: Any
    scales: Any
    b: Any
    lora_a: Any
    lora_b: Any
    start_a: Any
    start_b: Any

    def axes_of(self, leaf: str) -> tuple[str, ...]:
        """Names of the dimensions of a leaf."""
        experts, outputs, inputs = self.axes
        narrow = (experts, "rank", inputs) if leaf.endswith("_a") else (experts, outputs, "rank")
        wide = dict.fromkeys(("w", "codes", "scales"), self.axes)
        return {**wide, "b": (experts, outputs)}.get(leaf, narrow)

    @property
    def matrix(self) -> Any:
        """The leaf that has the shape of the weight."""
        return self.codes if self.w is None else self.w

    def leaves(self) -> dict[str, Any]:
        """The leaves that are there, by name."""
        return {leaf: x for leaf in self._LEAVES if (x := getattr(self, leaf)) is not None}

    def applied(self, product: Product, x: Any, *context: Array) -> Array:
        """Returns products with the weight and its adapter, without the bias.

        Args:
          product: Of tokens with a matrix of each expert.
          x: Tokens, as `product` takes them.
          context: What else it takes.
        """
        multiply = product.multiply
        if self.w is None:
            out = _product_decoded(multiply, x, self.codes, self.scales, *context)
        elif self.matmul:
            out = _product_scaled(product, x, self.w, self.matmul, self.cuts, *context)
        else:
            out = multiply(x, self.w, *context)
        if self.lora_a is not None:
            narrow = multiply(x, self.lora_a, *context)
            out = out + multiply(narrow, self.lora_b, *context)
        if self.start_a is not None:
            narrow = multiply(x, self.start_a, *context)
            out = out - multiply(narrow, self.start_b, *context)
        return out

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Returns the leaves with their names, as jax asks of a pytree."""
        leaves = self.leaves()
        keyed = tuple((jax.tree_util.GetAttrKey(name), x) for name, x in leaves.items())
        return keyed, (self.axes, self.matmul, tuple(leaves))

    @classmethod
    def tree_unflatten(cls, form: tuple, leaves: Any) -> "Projection":
        """Returns the projection that was flattened, with other leaves."""
        axes, matmul, names = form
        return cls(axes, matmul, **dict(zip(names, leaves, strict=True)))


def _product_decoded(
    product: Callable[..., Array], x: Array, codes: Array, scales: Array, *context: Array
) -> Array:
    """Multiplies with a weight that is decoded here, and again for the backward pass.

    The weight has no gradient, and what is decoded is not kept, whatever a layer keeps.
    """
    like, precision = jax.typeof(x), jax.config.jax_default_matmul_precision

    @jax.custom_vjp
    def decoded(x: Array, codes: Array, scales: Array, *context: Array) -> Array:
        return product(x, decode(codes, scales, x.dtype), *context)

    def backward(kept: tuple[Array, ...], dy: Array) -> tuple[Any, ...]:
        codes, scales, *context = kept
        w = decode(codes, scales, like.dtype)
        with jax.default_matmul_precision(precision):
            # Linear in `x`, which the compiler sees is not needed.
            zeros = jnp.zeros(like.shape, like.dtype)
            [dx] = jax.vjp(lambda x: product(x, w, *context), zeros)[1](dy)
        return (dx, None, None, *(None for _ in context))

    decoded.defvjp(lambda x, *rest: (decoded(x, *rest), rest), backward)
    return decoded(x, codes, scales, *context)


def _product_scaled(
    product: Product,
    x: Array,
    w: Array,
    kind: str,
    cuts: tuple[tuple[str, ...], tuple[str, ...]],
    *context: Array,
) -> Array:
    """Multiplies by products of 8-bit numbers, as `sharding/scaled.py` says.

    The weight is rounded here, and again for the backward pass, so that what was gathered of it
    need not be kept.
    """
    (outputs, inputs), dtype = cuts, x.dtype
    precision = jax.config.jax_default_matmul_precision

    def multiply(x: Array, codes: Array, cut: tuple[str, ...], *context: Array) -> Array:
        tokens = scale(x, codes.dtype, (x.ndim - 1,), cut)
        with jax.default_matmul_precision("default"):
            sums = type_of_sums(codes.dtype, dtype)
            out = product.multiply(tokens.codes, codes, *context, sums=sums)
        return out.astype(jnp.float32) * tokens.scales[..., None]

    @jax.custom_vjp
    def scaled(x: Array, w: Array, *context: Array) -> Array:
        weight = scale(w, FORMATS[kind], (2,), inputs)
        out = multiply(x, weight.codes, inputs, *context)
        return (out * product.spread(weight.scales, *context)).astype(dtype)

    def backward(kept: tuple[Array, ...], dy: Array) -> tuple[Any, ...]:
        x, w, *context = kept
        weight = scale(w, FORMATS[kind], (2,), inputs)
        gradient = dy.astype(jnp.float32) * product.spread(weight.scales, *context)
        codes = jnp.swapaxes(weight.codes, 1, 2)
        dx = multiply(gradient, codes, outputs, *context)
        with jax.default_matmul_precision(precision):
            [dw] = jax.vjp(lambda w: product.multiply(x, w, *context), w)[1](dy)
        return (dx.astype(dtype), dw, *(None for _ in context))

    scaled.defvjp(lambda *arrays: (scaled(*arrays), arrays), backward)
    return scaled(x, w, *context)


class ExpertWeights(NamedTuple):
    """The three projections of a gated feed-forward part, of all experts.

    Attributes:
      gate: Projection from D to F.
      up: Second projection from D to F.
      down: Projection from F to D.
    """

    gate: Projection
    up: Projection
    down: Projection
