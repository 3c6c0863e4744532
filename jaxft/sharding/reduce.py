"""Uses of weights whose gradients are summed over devices straight into their shards.

A weight's gradient is a sum over tokens, of which each device has some. Left to itself the compiler
sums it whole on every device and then cuts it: an all-reduce and a slice, twice the bytes of a
reduce-scatter. Here the sum is spelt out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxft.errors import ConfigError
from jaxft.sharding.axes import ACTIVATION_OF
from jaxft.sharding.cores import on_one_cpu
from jaxft.sharding.cores import product as product_by_cores
from jaxft.sharding.rules import Placement, active_placement, as_names
from jaxft.sharding.scatter import Product, computed, reduce_scatter


class WeightPlan(NamedTuple):
    """The meeting of a weight with tokens that are split over devices, for each of its dimensions.

    Attributes:
      placement: Gives the mesh; None where nothing is split.
      tokens: Mesh axes that split rows, and those that split positions.
      held: Mesh axes that cut a dimension for the product, as they cut the activation's.
      gathered: Mesh axes that cut the weight's dimension further, so that it has to be gathered.
      scattered: Mesh axes that cut the gradient's dimension further.
    """

    placement: Placement | None
    tokens: tuple[tuple[str, ...], tuple[str, ...]]
    held: tuple[tuple[str, ...], ...]
    gathered: tuple[tuple[str, ...], ...]
    scattered: tuple[tuple[str, ...], ...]

    @property
    def of_weight(self) -> P:
        """Placement of the weight where it enters a `shard_map`."""
        return _spec(self.held, self.gathered)

    @property
    def of_held(self) -> P:
        """Placement of what a device needs of the weight."""
        return P(*self.held)

    @property
    def of_gradient(self) -> P:
        """Placement of what `reduce` returns."""
        return _spec(self.held, self.scattered)

    @property
    def of_rows(self) -> P:
        """Placement of an array of rows, `[B]`."""
        return P(self.tokens[0])

    def of_tokens(self, *dimensions: tuple[str, ...]) -> P:
        """Placement of an array of tokens, `[B, T, *dimensions]`."""
        return P(*self.tokens, *dimensions)

    def gather(self, w: Array) -> Array:
        """Returns what a device needs of the weight, in a `shard_map`."""
        for dimension, names in enumerate(self.gathered):
            if names:
                w = jax.lax.all_gather(w, names, axis=dimension, tiled=True)
        return w

    def reduce(self, gradient: Array | Product) -> Array:
        """Sums over the devices that hold other tokens, in a `shard_map`; each keeps a part."""
        gradient = self.scatter(gradient)
        scattered = {name for names in self.scattered for name in names}
        rest = tuple(name for names in self.tokens for name in names if name not in scattered)
        return jax.lax.psum(gradient, rest) if rest else gradient

    def scatter(self, gradient: Array | Product) -> Array:
        """Does what `reduce` does, but over the devices alone that keep different parts."""
        for dimension, names in enumerate(self.scattered):
            for name in names:
                assert self.placement is not None
                gradient = reduce_scatter(gradient, name, dimension, self.placement)
        return computed(gradient)

    def map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """Returns a function of whole arrays that runs on each device's part of them."""
        if self.placement is None:
            return function
        return self.placement.shard_map(function, in_specs, out_specs)


def plan_weight(
    axes: tuple[str, ...], shape: tuple[int, ...], tokens: tuple[int, ...]
) -> WeightPlan:
    """Plans the use of a weight under the active placement.

    Args:
      axes: Names of the weight's dimensions.
      shape: Their sizes.
      tokens: `[B, T]`.

    Raises:
      ConfigError: If the rules of weights and activations do not go together.
    """
    placement = active_placement()
    if placement is None:
        whole = ((),) * len(axes)
        return WeightPlan(None, ((), ()), whole, whole, whole)
    rows, positions = placement.spec(("batch", "seq"), tokens, "an activation")
    over = (as_names(rows), as_names(positions))
    activations = tuple(ACTIVATION_OF.get(axis, axis) for axis in axes)
    cuts = [
        tuple(as_names(entry) for entry in placement.spec(names, shape, "a weight", rules=rules))
        for names, rules in (
            (activations, None),
            (axes, None),
            (axes, placement.gradient_rules),
        )
    ]
    held = tuple(cuts[0])
    _check_cuts(placement, axes, over, cuts)
    gathered = tuple(_beyond(*pair) for pair in zip(cuts[1], held, strict=True))
    among = {*over[0], *over[1]}
    scattered = tuple(
        more if among.issuperset(more := _beyond(*pair)) else ()
        for pair in zip(cuts[2], held, strict=True)
    )
    return WeightPlan(placement, over, held, gathered, scattered)


def _check_cuts(
    placement: Placement,
    axes: tuple[str, ...],
    tokens: tuple[tuple[str, ...], tuple[str, ...]],
    cuts: Sequence[Sequence[tuple[str, ...]]],
) -> None:
    """Raises ConfigError for rules under which a weight and its activations cannot meet."""
    problems = []
    for axis, held, *others in zip(axes, *cuts, strict=True):
        activation = ACTIVATION_OF.get(axis, axis)
        twice = {*tokens[0], *tokens[1]}.intersection(held)
        # Experts are the dimension along which tokens travel.
        if twice and axis != "experts":
            problems.append(
                f"strategy {placement.name!r} splits {activation!r} over {sorted(twice)}, which "
                "split rows or positions; a mesh axis serves one dimension of an array."
            )
        problems += [
            f"strategy {placement.name!r} splits {axis!r} over {names} and {activation!r} over "
            f"{held}; name the mesh axes that both have first."
            for names in others
            if set(names).intersection(held) and names[: len(held)] != held
        ]
    if problems:
        raise ConfigError(problems)


def _beyond(wanted: tuple[str, ...], held: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the mesh axes that cut a dimension further than it is cut."""
    return wanted[len(held) :] if wanted[: len(held)] == held else ()


def _spec(*cuts: Sequence[tuple[str, ...]]) -> P:
    return P(*(sum(parts, ()) for parts in zip(*cuts, strict=True)))


def project(x: Array, w: Array, *, axes: tuple[str, ...], inputs: int) -> Array:
    """Contracts the last dimensions of `x` with the last of a weight.

    Args:
      x: `[B, T, *inputs]`.
      w: `[*outputs, *inputs]`, in the type of `x`.
      axes: Names of the dimensions of `w`.
      inputs: How many of them are inputs.

    Returns:
      `[B, T, *outputs]` in the type of `x`.
    """
    plan = plan_weight(axes, w.shape, x.shape[:2])
    # One sum over all axes, where the compiler would make one for each.
    several = len({*plan.tokens[0], *plan.tokens[1]}) > 1
    if not (any(plan.scattered) or several):
        return _product(x, w, inputs)
    outputs = len(axes) - inputs
    # The backward pass is traced later, when a surrounding choice of precision is over.
    precision = jax.config.jax_default_matmul_precision

    @jax.custom_vjp
    def product(x: Array, w: Array) -> Array:
        return _product(x, w, inputs)

    def of_weight(dy: Array, x: Array) -> Array:
        return plan.reduce(Product(dy, x))

    def backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        x, w = kept
        contracted = tuple(range(2, dy.ndim)), tuple(range(outputs))
        of_dy, of_x = (plan.of_tokens(*cut) for cut in (plan.held[:outputs], plan.held[outputs:]))
        with jax.default_matmul_precision(precision):
            dx = jax.lax.dot_general(dy, w, (contracted, ((), ())))
            return dx, plan.map(of_weight, (of_dy, of_x), plan.of_gradient)(dy, x)

    product.defvjp(lambda x, w: (_product(x, w, inputs), (x, w)), backward)
    return product(x, w)


def project_decoded(
    x: Array,
    stored: tuple[Array, ...],
    decode: Callable[..., Array],
    *,
    axes: tuple[str, ...],
    inputs: int,
) -> Array:
    """Does what `project` does, with a weight that is stored in codes and has no gradient.

    What is stored travels between devices, and it alone is kept for the backward pass, which
    decodes it again whatever a layer keeps.

    Args:
      x: `[B, T, *inputs]`.
      stored: Arrays that stand for the weight, with its dimensions in its order, each split like
        it; the first has its shape.
      decode: Makes the weight, or a part of it from the same part of each, in the type of `x`.
      axes: Names of the dimensions of the weight.
      inputs: How many of them are inputs.
    """
    plan = plan_weight(axes, stored[0].shape, x.shape[:2])
    precision = jax.config.jax_default_matmul_precision

    def value(stored: tuple[Array, ...]) -> Array:
        def local(*parts: Array) -> Array:
            return decode(*map(plan.gather, parts))

        return plan.map(local, (plan.of_weight,) * len(stored), plan.of_held)(*stored)

    @jax.custom_vjp
    def product(x: Array, stored: tuple[Array, ...]) -> Array:
        return _product(x, value(stored), inputs)

    def backward(stored: tuple[Array, ...], dy: Array) -> tuple[Array, None]:
        contracted = tuple(range(2, dy.ndim)), tuple(range(len(axes) - inputs))
        with jax.default_matmul_precision(precision):
            return jax.lax.dot_general(dy, value(stored), (contracted, ((), ()))), None

    product.defvjp(lambda x, stored: (product(x, stored), stored), backward)
    return product(x, stored)


def _product(x: Array, w: Array, inputs: int) -> Array:
    outputs = w.shape[: w.ndim - inputs]
    placement = active_placement()
    if placement is None or placement.mesh.size == 1:
        # As two dimensions, which XLA on CPU multiplies as they lie: it would transpose three.
        w = w.reshape(math.prod(outputs), -1)
        x = x.reshape(*x.shape[:2], -1)
        if x.shape[1] == 1 and on_one_cpu():
            return product_by_cores(x[:, 0], w).reshape(*x.shape[:2], *outputs)
        out = jax.lax.dot_general(x, w, (((2,), (1,)), ((), ())))
        return out.reshape(*out.shape[:2], *outputs)
    contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(w.ndim - inputs, w.ndim))
    return jax.lax.dot_general(x, w, (contracted, ((), ())))


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, axes: tuple[str, ...], dtype: Any
) -> Float[Array, "B T D"]:
    """Returns a row of the table for each token, in `dtype`.

    Where D is cut over devices that hold other tokens, each looks its columns up for the tokens of
    all of them, and an all-to-all brings every token its row together: tokens and rows travel, not
    the table. The gradient of a row, a sum over its tokens, is added up in the table's own type.
    """
    plan = plan_weight(axes, table.shape, tokens.shape)
    columns, cut = plan.gathered[1], plan.held[0] + plan.gathered[0]
    among = {*plan.tokens[0], *plan.tokens[1]}
    # Columns may lie with devices that have other tokens, rows only with those that have the same.
    shared = not plan.held[1] and among.issuperset(columns) and among.isdisjoint(cut)
    if plan.placement is None or not shared:
        return table[tokens].astype(dtype)
    rows = table.shape[0] // math.prod(plan.placement.mesh.shape[name] for name in cut)

    def places(tokens: Array) -> Array:
        """Returns each token's row in a device's part; rows of others are out of range."""
        if columns:
            tokens = jax.lax.all_gather(tokens, columns)
        return tokens - rows * jax.lax.axis_index(cut) if cut else tokens

    def forward(table: Array, tokens: Array) -> Array:
        found = table.at[places(tokens)].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        found = found.astype(dtype)
        if cut:
            found = jax.lax.psum(found, cut)
        if not columns:
            return found
        return jax.lax.all_to_all(found, columns, 0, found.ndim - 1, tiled=True)[0]

    def backward(table: Array, tokens: Array, d_rows: Array) -> Array:
        if columns:
            d_rows = jax.lax.all_to_all(d_rows[None], columns, d_rows.ndim, 0, tiled=True)
        gradient = jnp.zeros_like(table).at[places(tokens)]
        gradient = gradient.add(
            d_rows.astype(table.dtype), mode="drop", wrap_negative_indices=False
        )
        # The devices of `columns` have added each other's tokens up already.
        return plan_columns.reduce(gradient)

    tokens_left = tuple(tuple(n for n in names if n not in columns) for names in plan.tokens)
    plan_columns = plan._replace(
        tokens=tokens_left,
        scattered=((), tuple(n for n in plan.scattered[1] if n not in columns)),
    )
    of_table, of_rows = P(cut, columns), plan.of_tokens(())

    @jax.custom_vjp
    def looked_up(table: Array, tokens: Array) -> Array:
        return plan.map(forward, (of_table, plan.of_tokens()), of_rows)(table, tokens)

    def transpose(kept: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
        specs = (of_table, plan.of_tokens(), of_rows)
        of_gradient = P(cut, columns + plan_columns.scattered[1])
        return plan.map(backward, specs, of_gradient)(*kept, d_rows), None

    looked_up.defvjp(lambda *kept: (looked_up(*kept), kept), transpose)
    return looked_up(table, tokens)
