"""Weights that stay in their files until a part of them is asked for."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxft.hf.hub import found_anywhere
from jaxft.hf.load import open_params
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.read import Reader
from jaxft.hf.save import Readable
from jaxft.models.adapter_files import adapter_of
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.vocabulary import grow, rows_of_tokens, tokens_beyond, with_vocab_size
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source


@contextlib.contextmanager
def open_weights(
    source: Source,
    architecture: Architecture,
    *,
    tokenizer: Any = None,
    new_tokens: Collection[int] = (),
) -> Iterator[Mapping[str, Readable]]:
    """Yields the parameters of a model without what is learnt beside it, in the types of files.

    Tables that are smaller in the files than the architecture says are read, and grow.

    Args:
      source: A model, or a run that holds one.
      architecture: Of the model.
      tokenizer: As for `load_weights`.
      new_tokens: As for `load_weights`.
    """
    abstract = architecture.plain.abstract(make_numerics("float32"))
    target = abstract.params
    if source.checkpoints is not None:
        checkpoints = Checkpoints(source.checkpoints, read_only=True)
        try:
            shapes = {path: spec.shape for path, spec in target.items()}
            yield checkpoints.open_params(shapes, source.step)
        finally:
            checkpoints.close()
        return
    stored = with_vocab_size(target, abstract.axes, source.architecture.config.vocab)
    shapes = {path: spec.shape for path, spec in stored.items()}
    with Reader() as reader:
        params: dict[str, Readable] = dict(
            open_params(reader, source.folder, architecture.naming, shapes)
        )
        changed = [
            path
            for path, axes in abstract.axes.items()
            if "vocab" in axes and (shapes[path] != target[path].shape or new_tokens)
        ]
        host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        tables = {path: jax.device_put(whole(params[path]), host) for path in changed}
        wanted = {
            path: jax.ShapeDtypeStruct(target[path].shape, table.dtype, sharding=host)
            for path, table in tables.items()
        }
        known = rows_of_tokens(tokenizer, new_tokens)
        grown = grow(tables, wanted, abstract.axes, known=known, new=new_tokens)
        yield params | {path: np.asarray(table) for path, table in grown.items()}


@contextlib.contextmanager
def open_base(source: Source, architecture: Architecture, tokenizer: Any) -> Iterator[Any]:
    """Yields the parameters that an adapter is made for, as `open_weights` does."""
    note = source.note
    new_tokens = note.new_tokens if note is not None else ()
    origin = source if source.base is None else source.base
    with open_weights(origin, architecture, tokenizer=tokenizer, new_tokens=new_tokens) as params:
        yield params


def read_adapter(source: Source, architecture: Architecture) -> Adapter:
    """Reads the adapter of a source into the host's memory."""
    if source.is_peft:
        return replace(source.adapter, **_base_of(source))
    assert source.checkpoints is not None
    adaptation = architecture.adaptation
    beside = replace(adaptation, whole=False)
    abstract = architecture.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in abstract.items() if beside.is_kept(path)}
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    try:
        opened = checkpoints.open_params(shapes, source.step)
        arrays = {path: whole(stored).astype(np.float32) for path, stored in opened.items()}
    finally:
        checkpoints.close()
    return adapter_of(adaptation, arrays, **_base_of(source))


def with_added_rows(
    adapter: Adapter, source: Source, architecture: Architecture, tokenizer: Any
) -> Adapter:
    """Returns an adapter that also holds what jaxft puts into the base's rows of added tokens.

    They are means of the other rows, unless they are trained, and no other program makes them so.
    """
    assert source.base is not None
    note, rows = source.note, source.base.architecture.config.vocab
    beyond = tokens_beyond(tokenizer, rows).values() if tokenizer is not None else ()
    tokens = sorted({*beyond, *(note.new_tokens if note is not None else ())})
    if adapter.tokens or not tokens:
        return adapter
    arrays, axes = dict(adapter.arrays), architecture.plain.abstract(make_numerics("float32")).axes
    tables = [path for path in axes if axes[path] == ("vocab", "embed") and path not in arrays]
    with open_base(source, architecture, tokenizer) as params:
        for path in tables:
            table = whole(params[path]).astype(np.float32)
            arrays[f"{path.removesuffix('.w')}.rows"] = table[tokens]
    return replace(adapter, arrays=arrays, tokens=tuple(tokens))


def whole(parameter: Readable) -> np.ndarray:
    """Reads all of a parameter."""
    return np.asarray(parameter[tuple(slice(0, size) for size in parameter.shape)])


def _base_of(source: Source) -> dict[str, str]:
    """Returns name and revision of the model that an adapter is made for, as it was found."""
    if source.base is None:
        return {"base": "", "revision": ""}
    return {"base": found_anywhere(source.base.path), "revision": source.base.revision}
