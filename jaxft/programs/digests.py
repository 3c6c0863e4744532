"""Digests of weights: whether the model of an adapter is the one that it was trained on.

That of a base is of the numbers in its files, rounded to the type in which a run held them: it does
not depend on the type in which they are held now, nor on codes, which devices round unlike.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from jaxft import distributed
from jaxft.errors import CheckpointError
from jaxft.models.adapters import Adaptation
from jaxft.models.config import make_numerics
from jaxft.models.module import Params
from jaxft.programs.merging import parts_of
from jaxft.programs.opened import open_weights
from jaxft.workdir.source import Source

# Numbers of a file that are worked on at a time.
_AT_A_TIME = 2**20


def digest_of(params: Params) -> str:
    """Returns a hash of all bits of some weights, the same for every placement.

    Each parameter's 32-bit words are multiplied by odd numbers of their places and added up modulo
    2**32: a sum that no order changes.
    """
    return _hash(jax.device_get(_checksums(params, {}, "float32")))


def digest_of_base(
    base: Source,
    adaptation: Adaptation,
    params: Params,
    *,
    dtype: str,
    new_tokens: Collection[int] = (),
) -> str:
    """Returns a hash of the weights that an adapter leaves as they are, as their files have them.

    Rows that the files do not have, or have as padding, do not count. It is made of the weights
    that are held, or of the files where these are in codes or in fewer bits.

    Args:
      base: Origin of the weights.
      adaptation: What is learnt beside them.
      params: They as they are held; what is learnt may be among them.
      dtype: `float32` or `bfloat16`, to which they are rounded.
      new_tokens: Ids of tokens for which the files have rows of padding.
    """
    fixed = _fixed(base, adaptation)
    held = {path: params[path] for path in fixed if path in params}
    exact = ("float32", dtype)
    if held.keys() < fixed.keys() or any(x.dtype.name not in exact for x in held.values()):
        return distributed.from_first(
            "digest of the base",
            lambda: digest_in_files(base, adaptation, dtype=dtype, new_tokens=new_tokens),
        )
    kept = {}
    for path, axes in fixed.items():
        if axes[0] == "vocab":
            rows = np.arange(held[path].shape[0])
            stored = base.architecture.config.vocab
            kept[path] = (rows < stored) & ~np.isin(rows, list(new_tokens))
    return _hash(jax.device_get(_checksums(held, kept, dtype)))


def digest_in_files(
    base: Source, adaptation: Adaptation, *, dtype: str, new_tokens: Collection[int] = ()
) -> str:
    """Does what `digest_of_base` does, a part of a tensor at a time."""
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    sums = {}
    with open_weights(base, base.architecture) as params:
        for path, axes in _fixed(base, adaptation).items():
            added = new_tokens if axes[0] == "vocab" else ()
            total = np.zeros(2, np.uint32)
            for chunk in _chunks(params[path], added):
                total += np.asarray(_checksum(*jax.device_put(chunk, host), dtype))
            sums[path] = total
    return _hash(sums)


def refuse_another(source: Source, digest: str) -> None:
    """Raises CheckpointError if the base of a run's adapter has not the weights that it had.

    Args:
      source: The run.
      digest: Of what its base is now, by the type and tokens of the run's note.
    """
    assert source.base is not None and source.note is not None
    if digest != source.note.digest:
        raise CheckpointError(
            f"The weights of {source.base.name} are not those that the adapter of {source.name} "
            "was trained on. Restore them, or name the right ones with --base, or to train on with "
            "--config.model.path."
        )


def check_base(source: Source) -> None:
    """Holds the files of a base to what a run has noted of it; other adapters note nothing.

    Raises:
      CheckpointError: As `refuse_another`.
    """
    note = source.note
    if source.base is not None and note is not None:
        digest = digest_in_files(
            source.base, note.adaptation, dtype=note.dtype, new_tokens=note.new_tokens
        )
        refuse_another(source, digest)


def _fixed(base: Source, adaptation: Adaptation) -> dict[str, tuple[str, ...]]:
    """Returns the axes of the parameters that an adapter leaves as they are."""
    axes = base.architecture.abstract(make_numerics("float32")).axes
    return {path: names for path, names in axes.items() if not adaptation.is_kept(path)}


def _chunks(
    parameter: Any, new_tokens: Collection[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.uint32]]:
    """Yields flat parts of one size, which of their numbers count, and the place of the first."""
    for index in parts_of(parameter.shape):
        values = np.asarray(parameter[index])
        width, first = values[0].size, index[0].start
        rows = ~np.isin(np.arange(first, first + len(values)), list(new_tokens))
        flat, counts = values.reshape(-1), np.repeat(rows, width)
        for start in range(0, flat.size, _AT_A_TIME):
            part = flat[start : start + _AT_A_TIME]
            more = (0, _AT_A_TIME - part.size)
            place = np.uint32((first * width + start) % 2**32)
            yield np.pad(part, more), np.pad(counts[start : start + part.size], more), place


def _hash(sums: Mapping[str, Any]) -> str:
    text = json.dumps({path: [int(x) for x in sums[path]] for path in sorted(sums)})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@jax.jit(static_argnums=2)
def _checksums(params: Params, kept: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    def of(path: str, x: Array) -> tuple[Array, Array]:
        rows = kept.get(path, np.ones(x.shape[:1], bool))
        counts = jnp.broadcast_to(jnp.expand_dims(rows, range(1, x.ndim)), x.shape)
        return _checksum(x, counts, np.uint32(0), dtype)

    return {path: of(path, x) for path, x in params.items()}


@jax.jit(static_argnums=3)
def _checksum(
    x: Array, counts: Bool[Array, "..."], first: UInt32[Array, ""], dtype: str
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Returns two sums over numbers that count, by their places from `first` on, rows first."""
    wide = x.astype(jnp.float32)
    if dtype == "bfloat16":
        # Not a cast there and back, which XLA takes for none.
        wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    words = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dimension, size in enumerate(x.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
        place = place * jnp.uint32(size) + along
    place = place + first
    sums = (words * (2 * place + 1), words ^ place)
    one, other = (jnp.sum(jnp.where(counts, y, 0), dtype=jnp.uint32) for y in sums)
    return one, other
