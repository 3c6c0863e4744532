"""Rows of the embedding for tokens that were added to the tokenizer of a model."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.errors import ModelError
from jaxft.models.families import Architecture
from jaxft.models.module import Params

# Larger tables still split evenly over the devices of any usual mesh.
ROWS_MULTIPLE = 64

type Abstract = Mapping[str, jax.ShapeDtypeStruct]
type Axes = Mapping[str, tuple[str, ...]]


def tokens_beyond(tokenizer: Any, rows: int) -> dict[str, int]:
    """Returns `{added token: id}` of those for which an embedding of so many rows has none.

    Raises:
      ModelError: If a token of the base vocabulary has no row: the tokenizer is another model's.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    base = beyond.keys() - tokenizer.get_added_vocab().keys()
    if base:
        largest = max(beyond[token] for token in base)
        raise ModelError(
            f"The tokenizer has ids up to {largest}, but the model's embedding has {rows} rows. "
            "Name the tokenizer that belongs to the model with --config.model.tokenizer=FOLDER."
        )
    return beyond


def with_rows_for(architecture: Architecture, tokenizer: Any) -> Architecture:
    """Returns the architecture with a row for each id that the tokenizer gives.

    It is the same one if there are enough rows already, or no tokenizer.

    Raises:
      ModelError: If the tokenizer is another model's.
    """
    beyond = tokens_beyond(tokenizer, architecture.config.vocab) if tokenizer is not None else {}
    if not beyond:
        return architecture
    rows = -(-(max(beyond.values()) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    config = dataclasses.replace(architecture.config, vocab=rows)
    return dataclasses.replace(architecture, config=config)


def with_vocab_size(target: Abstract, axes: Axes, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns abstract parameters whose tables have so many rows; their sharding is kept.

    A table whose rows do not split evenly over the devices is not split along them.
    """
    return {path: _resize(spec, axes[path], rows) for path, spec in target.items()}


def grow(params: Params, target: Abstract, axes: Axes) -> Params:
    """Appends rows to the tables that are smaller than `target` says; the old ones stay as is.

    Each new row is the mean of the old ones, so that a new token is at first neither likelier nor
    stranger than an average one; random rows would take probability from all others.
    Source: Hewitt, 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    return {
        path: array
        if array.shape == target[path].shape
        else _grower(axes[path].index("vocab"), target[path])(array)
        for path, array in params.items()
    }


def _resize(spec: jax.ShapeDtypeStruct, axes: tuple[str, ...], rows: int) -> jax.ShapeDtypeStruct:
    if "vocab" not in axes:
        return spec
    axis = axes.index("vocab")
    shape = (*spec.shape[:axis], rows, *spec.shape[axis + 1 :])
    sharding = spec.sharding
    if isinstance(sharding, NamedSharding):
        sharding = _if_divisible(sharding, axis, rows, len(shape))
    return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding)


def _if_divisible(sharding: NamedSharding, axis: int, size: int, rank: int) -> NamedSharding:
    """Returns a sharding that splits `axis` only if its size allows it."""
    entries = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    names = entries[axis] or ()
    names = (names,) if isinstance(names, str) else names
    if size % math.prod(sharding.mesh.shape[name] for name in names):
        entries[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def _grower(axis: int, target: jax.ShapeDtypeStruct) -> Any:
    extend = functools.partial(_extend, axis=axis, rows=target.shape[axis])
    return jax.jit(extend, out_shardings=target.sharding)


def _extend(table: jax.Array, *, axis: int, rows: int) -> jax.Array:
    mean = jnp.mean(table.astype(jnp.float32), axis, keepdims=True).astype(table.dtype)
    new = jnp.repeat(mean, rows - table.shape[axis], axis)
    return jnp.concatenate([table, new], axis)
