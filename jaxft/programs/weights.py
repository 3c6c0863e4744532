"""Weights of a model, from files or a checkpoint to the devices that hold them."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxft.errors import ModelError, OutOfMemoryError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import array_bytes, room
from jaxft.hf.load import Encoded, load_params
from jaxft.hf.rules import expand
from jaxft.hf.save import Readable
from jaxft.models import quantised
from jaxft.models.adapters import Adaptation, is_beside, start_values
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel, Params
from jaxft.models.vocabulary import grow, rows_of_tokens, with_vocab_size
from jaxft.programs.digests import digest_of_base, refuse_another
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source


def refuse_what_does_not_fit(
    abstract: AbstractModel, shardings: Mapping[str, jax.sharding.Sharding], dtypes: str
) -> None:
    """Raises OutOfMemoryError, before they are read, for weights that no device here can hold."""
    held = sum(
        array_bytes(shardings[path].shard_shape(spec.shape), spec.dtype)
        for path, spec in abstract.params.items()
    )
    found = room(list(next(iter(shardings.values())).addressable_devices))
    if found.limit and held > found.limit:
        narrow = (
            f" As bfloat16 they take {format_bytes(held / 2)}: --dtypes=bfloat16."
            if dtypes != "bfloat16"
            else " Less with those of the layers in codes (--quantise=nf4); jaxft.load takes a "
            "placement that splits them over several devices."
        )
        raise OutOfMemoryError(
            f"The weights take {format_bytes(held)} as {dtypes}, and {found}.{narrow}"
        )


def load_weights(
    source: Source,
    architecture: Architecture,
    abstract: AbstractModel,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    tokenizer: Any = None,
    new_tokens: Collection[int] = (),
    seed: int = 0,
) -> Params:
    """Reads weights from safetensors or from a checkpoint, each device its own part.

    Where the architecture has adapters, those of the source are read beside the weights that they
    belong to; for a whole model they start.

    Tables that are smaller in the files than the architecture says grow by mean rows.

    Args:
      source: Where they are.
      architecture: What they are to fit.
      abstract: Its structure.
      shardings: Placement of each.
      tokenizer: Means are those of the rows of its tokens; of all rows if absent.
      new_tokens: Ids of tokens that were just added: they get mean rows, too, where the files have
        rows for them, which no training has touched.
      seed: Of adapters that start.

    Raises:
      ModelError: If they cannot be read, or hold values that are not finite.
      CheckpointError: If a checkpoint cannot be read, or an adapter's model has changed.
    """
    target = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path])
        for path, spec in abstract.params.items()
    }
    plain = {path: spec for path, spec in target.items() if not is_beside(path)}
    axes, adaptation = abstract.axes, architecture.adaptation
    if not source.is_adapter:
        params = _read_weights(source, architecture, plain, axes, tokenizer, new_tokens)
        if adaptation:
            params |= start_adapters(architecture, params, adaptation, target, seed)
    elif source.base is None:
        params = _read_checkpoint(source, target)
    else:
        params = read_base(source, architecture, plain, axes, tokenizer)
        kept = {path: spec for path, spec in target.items() if adaptation.is_kept(path)}
        params |= _read_adapter(source, kept) if kept else {}
        # Tables that PEFT's file has no rows for keep those of the base.
        params |= start_adapters(architecture, params, replace(adaptation, sites={}), target, seed)
    _refuse_not_finite(params, architecture, source)
    return params


def load_beside(
    source: Source,
    architecture: Architecture,
    abstract: AbstractModel,
    base: Params,
    sharding: jax.sharding.Sharding,
) -> Params:
    """Reads what an adapter of pairs alone holds, for a model whose weights are loaded already.

    Args:
      source: The adapter.
      architecture: The model with the adapter.
      abstract: Its structure.
      base: Weights of the model.
      sharding: Placement of what is read.

    Raises:
      ModelError: If it holds values that are not finite.
      CheckpointError: If it cannot be read, or the weights are others than its run had.
    """
    _check_digest(source, base)
    kept = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
        for path, spec in abstract.params.items()
        if is_beside(path)
    }
    leaves = _read_adapter(source, kept)
    bad = sorted(path for path, x in leaves.items() if not np.isfinite(np.asarray(x, "f4")).all())
    if bad:
        raise ModelError(
            f"{source.name} holds values that are not finite (NaN or infinite): "
            f"{', '.join(bad[:5])}. Take another copy, or an earlier checkpoint."
        )
    return leaves


def start_adapters(
    architecture: Architecture,
    params: Params,
    adaptation: Adaptation,
    target: Mapping[str, jax.ShapeDtypeStruct],
    seed: int,
) -> Params:
    """Returns the leaves of adapters that no file has.

    Args:
      architecture: Of the model.
      params: What there is.
      adaptation: What is learnt beside it.
      target: Shape, dtype and sharding of all there shall be.
      seed: Of the random values.
    """
    wanted = {path: spec for path, spec in target.items() if path not in params}
    if not wanted:
        return {}
    graphdef = architecture.plain.abstract(make_numerics("float32")).graphdef
    plain = {path: value for path, value in params.items() if not is_beside(path)}
    return start_values(graphdef, plain, adaptation, wanted, seed=seed)


def read_base(
    source: Source,
    architecture: Architecture,
    target: Mapping[str, jax.ShapeDtypeStruct],
    axes: Mapping[str, tuple[str, ...]],
    tokenizer: Any,
) -> Params:
    """Reads the weights that an adapter is made for.

    Raises:
      CheckpointError: If they are others than a run had.
    """
    note = source.note
    assert source.base is not None
    new_tokens = note.new_tokens if note is not None else ()
    params = _read_weights(source.base, architecture, target, axes, tokenizer, new_tokens)
    _check_digest(source, params)
    return params


def _check_digest(source: Source, params: Params) -> None:
    """Raises CheckpointError if weights are others than the run of an adapter had beside it."""
    note = source.note
    if note is None:
        return
    assert source.base is not None
    found = digest_of_base(
        source.base, note.adaptation, params, dtype=note.dtype, new_tokens=note.new_tokens
    )
    refuse_another(source, found)


def _read_adapter(source: Source, target: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads what a source holds of an adapter."""
    if source.checkpoints is not None:
        return _read_checkpoint(source, target)
    arrays = source.adapter.arrays
    return {
        path: jax.make_array_from_callback(
            spec.shape,
            spec.sharding,
            lambda index, path=path, dtype=spec.dtype: arrays[path][index].astype(dtype),
        )
        for path, spec in target.items()
        if path in arrays
    }


def _read_weights(
    source: Source,
    architecture: Architecture,
    target: Mapping[str, jax.ShapeDtypeStruct],
    axes: Mapping[str, tuple[str, ...]],
    tokenizer: Any,
    new_tokens: Collection[int],
) -> Params:
    encoded = _encoded(architecture, target)
    dense = {path: spec for path, spec in target.items() if not quantised.is_leaf(path)}
    if source.checkpoints is None:
        stored = source.architecture.config.vocab
        params = load_params(
            source.folder, architecture.naming, with_vocab_size(dense, axes, stored), encoded
        )
        known = rows_of_tokens(tokenizer, new_tokens)
        return grow(params, target, axes, known=known, new=new_tokens)
    if not encoded:
        return _read_checkpoint(source, dense)
    return _read_parts(source, dense, encoded)


def _read_parts(
    source: Source,
    dense: Mapping[str, jax.ShapeDtypeStruct],
    encoded: Mapping[str, Encoded],
) -> Params:
    """Reads a checkpoint weight by weight: the model is never there as a whole in another form."""
    assert source.checkpoints is not None
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    try:
        shapes = {path: found.shape for path, found in {**dense, **encoded}.items()}
        stored = checkpoints.open_params(shapes, source.step)
        params = {}
        for path, spec in dense.items():
            params[path] = _placed(stored[path], spec.sharding).astype(spec.dtype)
        for path, parameter in encoded.items():
            leaves = parameter.leaves
            shardings = tuple(leaf.sharding for leaf in leaves.values())
            encode = jax.jit(parameter.encode, out_shardings=shardings)
            found = encode(_placed(stored[path], shardings[0]))
            params |= dict(zip(leaves, found, strict=True))
        return params
    finally:
        checkpoints.close()


def _placed(stored: Readable, sharding: Any) -> Array:
    """Reads a parameter, each device its own part."""
    return jax.make_array_from_callback(stored.shape, sharding, stored.__getitem__)


def _encoded(
    architecture: Architecture, target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Encoded]:
    """Returns the weights that are held in codes, by the paths that files know them by."""
    found = {}
    for path, spec in target.items():
        site, _, leaf = path.rpartition(".")
        if leaf == "codes":
            encode = functools.partial(
                quantised.encode,
                kind=architecture.quantise,
                block=quantised.block_size(spec.shape[-1]),
            )
            scales = f"{site}.scales"
            found[f"{site}.w"] = Encoded({path: spec, scales: target[scales]}, encode)
    return found


def _read_checkpoint(source: Source, target: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    assert source.checkpoints is not None
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    try:
        return checkpoints.restore_params(target, source.step)
    finally:
        checkpoints.close()


def _refuse_not_finite(params: Params, architecture: Architecture, source: Source) -> None:
    """Raises ModelError with the tensors, by their names in files, that hold NaN or infinities."""
    found = _not_finite({path: x for path, x in params.items() if not is_beside(path)})
    # A number that is not finite makes the scale of its block so.
    bad = {quantised.weight_of(path): flags for path, flags in found.items() if flags.any()}
    if not bad:
        return
    shapes = {
        quantised.weight_of(path): params[path].shape
        for path in found
        if not path.endswith(".scales")
    }
    names = [
        tensor.name
        for tensor in expand(architecture.naming.rules, shapes)
        if any(
            part.rule.ours in bad and bad[part.rule.ours][part.index[:1]].any()
            for part in tensor.parts
        )
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    raise ModelError(
        f"{source.name} holds weights that are not finite (NaN or infinite), with which no loss "
        f"can be computed: {shown}. The file is damaged, or training diverged before it was "
        "written; take another copy, or an earlier checkpoint."
    )


def _not_finite(params: Params) -> dict[str, np.ndarray]:
    """Returns whether each layer of a parameter, or all of one without layers, has such values."""

    def find(params: Params) -> dict[str, Array]:
        return {
            path: ~jnp.isfinite(x).all(axis=tuple(range(path.startswith("layers."), x.ndim)))
            for path, x in params.items()
        }

    sharding = next(iter(params.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    flags = jax.jit(find, out_shardings=sharding)(params)
    return {path: np.asarray(value) for path, value in flags.items()}
