"""Matrix products of 8-bit numbers, which chips make at twice the rate of bfloat16.

An operand is rounded to codes and float32 scales, one scale for all numbers that the product adds
up: those of a token, those of an output. So scales are factors of the result, and what is
multiplied is codes alone: `(s x) · (r w) = s r (x · w)`. A scale for fewer, such as a block of
inputs, would break the product into many; one for more, such as an array, would lose tokens of
small numbers beside those of large ones.

Rounding has the gradient of the identity (Bengio et al., arXiv:1308.3432). The gradient of inputs
is a product of 8-bit numbers too, with the same codes of the weight: scales of outputs, which vary
along what that product adds up, are made part of the outputs' gradient before it is rounded. The
gradient of the weight is a product in the type of computing, as it adds up the errors of as many
tokens as a device has (SwitchBack; Wortsman et al., arXiv:2304.13013).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.hardware.chips import Chip
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.sharding.scatter import Product

# Types of codes, by the name that `model.matmul` has for them. That of fp8 is e4m3 of Micikevicius
# et al., arXiv:2209.05433, for gradients of outputs, too: with a scale for each token these do not
# need the range of e5m2, which is a bit less precise (DeepSeek-V3, arXiv:2412.19437, section 3.3).
FORMATS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Numbers that are all below it become zero; the smallest scale is a normal number of float32.
_LEAST = 2.0**-100


class Scaled(NamedTuple):
    """An operand: `codes * scales` is what it stands for.

    Attributes:
      codes: 8-bit numbers, of its shape.
      scales: float32, of its dimensions without those that are added up.
    """

    codes: Any
    scales: Any


def scale(
    x: Float[Array, "..."], dtype: Any, over: tuple[int, ...], devices: tuple[str, ...] = ()
) -> Scaled:
    """Rounds an operand so that the largest magnitude of each sum is the largest code.

    What is not finite makes its scale so too, and with it the result.

    Args:
      x: The operand, in a `shard_map` a device's part.
      dtype: Of the codes.
      over: Dimensions that the product adds up.
      devices: Mesh axes that cut these dimensions.
    """
    largest = jnp.max(jnp.abs(x), axis=over, keepdims=True).astype(jnp.float32)
    if devices:
        largest = jax.lax.pmax(largest, devices)
    scales = jnp.maximum(largest, _LEAST) / largest_code(dtype)
    codes = x.astype(jnp.float32) * (1 / scales)
    if dtype == jnp.int8:
        codes = jnp.round(codes)
    return Scaled(codes.astype(dtype), scales.squeeze(over))


def largest_code(dtype: Any) -> float:
    """Returns the largest code of a type: 127 of int8, whose codes are as many on either side."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def type_of_sums(codes: Any, dtype: Any) -> Any:
    """Returns the type in which a product of codes comes out: `dtype`, or of int8 an exact one.

    int32 holds the sum of 133,000 products.
    """
    return jnp.int32 if codes == jnp.int8 else dtype


def rate(kind: str, chip: Chip) -> float:
    """Returns the operations a second of a chip's products of a kind; 0 where none are known."""
    return chip.peak(jnp.dtype(FORMATS[kind]).name)


def project_scaled(x: Array, w: Array, *, axes: tuple[str, ...], inputs: int, kind: str) -> Array:
    """Does what `sharding.reduce.project` does, by products of 8-bit numbers.

    Codes travel between devices in place of the weight. Results do not depend on how the operands
    are split, but for the rounding of sums.

    Args:
      x: `[B, T, *inputs]`.
      w: `[*outputs, *inputs]`, in the type of `x`.
      axes: Names of the dimensions of `w`.
      inputs: How many of them are inputs.
      kind: One of `FORMATS`.

    Returns:
      `[B, T, *outputs]` in the type of `x`.
    """
    parts = _Parts(plan_weight(axes, w.shape, x.shape[:2]), len(axes) - inputs, FORMATS[kind])
    plan, tokens_in, tokens_out = parts.plan, *map(parts.tokens, (parts.inputs, parts.outputs))
    of_weight = Scaled(plan.of_weight, parts.of_scales.of_weight)
    # The backward pass is traced later, when a surrounding choice of precision is over.
    precision = jax.config.jax_default_matmul_precision

    @jax.custom_vjp
    def product(x: Array, w: Array) -> Array:
        return forward(x, w)[0]

    def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Scaled]]:
        weight = plan.map(parts.round_weight, (plan.of_weight,), of_weight)(w)
        out = plan.map(parts.forward, (tokens_in, of_weight), tokens_out)(x, weight)
        return out, (x, weight)

    def backward(kept: tuple[Array, Scaled], dy: Array) -> tuple[Array, Array]:
        x, weight = kept
        dx = plan.map(parts.of_input, (tokens_out, of_weight), tokens_in)(dy, weight)
        with jax.default_matmul_precision(precision):
            dw = plan.map(parts.of_weight, (tokens_out, tokens_in), plan.of_gradient)(dy, x)
        return dx, dw

    product.defvjp(forward, backward)
    return product(x, w)


class _Parts:
    """A projection on one device, which has parts of its arrays.

    Attributes:
      plan: The way the weight and tokens meet.
      of_scales: The same of the weight's scales.
      outputs: Dimensions of the weight that are outputs.
      inputs: Dimensions of the weight that are inputs.
    """

    def __init__(self, plan: WeightPlan, outputs: int, dtype: Any):
        self.plan, self.dtype = plan, dtype
        self.of_scales = plan._replace(held=plan.held[:outputs], gathered=plan.gathered[:outputs])
        self.outputs = tuple(range(outputs))
        self.inputs = tuple(range(outputs, len(plan.held)))

    def tokens(self, dimensions: tuple[int, ...]) -> Any:
        """Placement of tokens with these dimensions of the weight."""
        return self.plan.of_tokens(*(self.plan.held[d] for d in dimensions))

    def held(self, dimensions: tuple[int, ...]) -> tuple[str, ...]:
        """Mesh axes that cut these dimensions of the weight where it is multiplied."""
        return sum((self.plan.held[d] for d in dimensions), ())

    def round_weight(self, w: Array) -> Scaled:
        """Returns codes and scales of a device's part of the weight."""
        cut = sum((self.plan.held[d] + self.plan.gathered[d] for d in self.inputs), ())
        return scale(w, self.dtype, self.inputs, cut)

    def forward(self, x: Array, weight: Scaled) -> Array:
        """Returns the outputs of a device's tokens."""
        codes, scales = self._gathered(weight)
        out = self._product(x, codes, self.inputs, x.dtype)
        return self._summed(out * scales[None, None], x.dtype, self.inputs)

    def of_input(self, dy: Array, weight: Scaled) -> Array:
        """Returns the gradient of the inputs of a device's tokens."""
        codes, scales = self._gathered(weight)
        gradient = dy.astype(jnp.float32) * scales[None, None]
        out = self._product(gradient, codes, self.outputs, dy.dtype)
        return self._summed(out, dy.dtype, self.outputs)

    def of_weight(self, dy: Array, x: Array) -> Array:
        """Returns a device's part of the gradient of the weight."""
        return self.plan.reduce(Product(dy, x))

    def _product(self, x: Array, codes: Array, dimensions: tuple[int, ...], sums: Any) -> Array:
        """Rounds tokens, contracts them with codes of the weight and scales the result, float32."""
        last = tuple(range(2, x.ndim))
        tokens = scale(x, codes.dtype, last, self.held(dimensions))
        out = jax.lax.dot_general(
            tokens.codes,
            codes,
            ((last, dimensions), ((), ())),
            precision=jax.lax.Precision.DEFAULT,
            preferred_element_type=type_of_sums(codes.dtype, sums),
        )
        return out.astype(jnp.float32) * jnp.expand_dims(tokens.scales, tuple(range(2, out.ndim)))

    def _gathered(self, weight: Scaled) -> Scaled:
        return Scaled(self.plan.gather(weight.codes), self.of_scales.gather(weight.scales))

    def _summed(self, out: Array, dtype: Any, dimensions: tuple[int, ...]) -> Array:
        """Adds up what devices made of their parts of these dimensions, in `dtype`."""
        out, devices = out.astype(dtype), self.held(dimensions)
        return jax.lax.psum(out, devices) if devices else out
