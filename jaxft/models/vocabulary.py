"""Rows of the embedding for tokens that were added to the tokenizer of a model."""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def rows_of_tokens(tokenizer: Any, new: Collection[int] = ()) -> set[int] | None:
    """Returns the rows that belong to tokens but new ones; None without a tokenizer."""
    return None if tokenizer is None else set(tokenizer.get_vocab().values()).difference(new)


def grow(
    params: Params,
    target: Abstract,
    axes: Axes,
    *,
    known: Collection[int] | None = None,
    new: Collection[int] = (),
) -> Params:
    """Appends rows to the tables that are smaller than `target` says; known ones stay as they are.

    Each new row is the mean of the known ones, so that a new token is at first neither likelier
    nor stranger than an average one; random rows would take probability from all others, rows of
    zeros from none.
    Source: Hewitt, 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html.

    Args:
      params: As they were stored.
      target: As they shall be.
      axes: Of each parameter.
      known: Rows that belong to tokens: the mean is theirs. All stored rows if absent.
      new: Rows that the table has already, such as padding, and that new tokens take.
    """
    grown = dict(params)
    for path, array in params.items():
        if "vocab" not in axes[path] or (array.shape == target[path].shape and not new):
            continue
        axis = axes[path].index("vocab")
        stored, rows = array.shape[axis], target[path].shape[axis]
        counted = np.zeros(stored, bool)
        counted[[i for i in (range(stored) if known is None else known) if i < stored]] = True
        replaced = np.arange(rows) >= stored
        replaced[list(new)] = True
        fill = jax.jit(functools.partial(_fill, axis=axis), out_shardings=target[path].sharding)
        grown[path] = fill(array, counted, replaced)
    return grown


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


def _fill(table: jax.Array, counted: Any, replaced: Any, *, axis: int) -> jax.Array:
    """Returns the table with the mean of its counted rows in every row to be replaced."""

    def along(mask: Any) -> jax.Array:
        return jnp.expand_dims(mask, [i for i in range(table.ndim) if i != axis])

    wide = table.astype(jnp.float32)
    mean = jnp.mean(wide, axis, keepdims=True, where=along(counted)).astype(table.dtype)
    more = [(0, 0)] * table.ndim
    more[axis] = (0, len(replaced) - table.shape[axis])
    return jnp.where(along(replaced), mean, jnp.pad(table, more))
