"""Writes parameters as a Hugging Face folder that appears whole or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.load import INDEX, SINGLE
from jaxft.hf.read import DTYPES
from jaxft.hf.rules import Rule, Tensor, expand

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_NAMED = {dtype.name: dtype for dtype in DTYPES.values()}


@contextlib.contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its name when the block ends well.

    A block that fails removes it; a process that is killed leaves it under its temporary name
    `.<name>.<random>`. Either way nothing appears at `output`, and what was there stays.

    Args:
      output: The folder to appear.
      overwrite: Replace a folder that is there; only one that holds a config.json is replaced.

    Raises:
      ModelError: If `output` is a file or a folder that may not be replaced, or the disk is full.
    """
    output = output.expanduser().absolute()
    _check_replaceable(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are their owner's alone
        _rename(partial, output)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(f"{output} could not be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_params(
    folder: Path,
    rules: Iterable[Rule],
    params: Mapping[str, jax.Array],
    *,
    dtypes: Mapping[str, str] | str,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters as safetensors in their names and layouts, one file or several shards.

    Host memory holds one tensor at a time. All of `params` must be addressable by this process.

    Args:
      folder: Where the files go; it exists.
      rules: The family's table, the one that loading uses.
      params: `{dotted path: array}`.
      dtypes: 'float32', 'float16', 'bfloat16' or 'float64' for all, or one for each of their names.
      max_shard_bytes: Largest shard; a tensor above it gets a shard of its own.

    Raises:
      ModelError: If the disk has too little room.
    """
    tensors = list(expand(rules, {path: array.shape for path, array in params.items()}))
    stored = {
        tensor.name: _NAMED[dtypes if isinstance(dtypes, str) else dtypes[tensor.name]]
        for tensor in tensors
    }
    shards = _split(tensors, stored, max_shard_bytes)
    total = sum(_size(tensor, stored) for tensor in tensors)
    _check_room(folder, total)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0], params, stored)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shard, params, stored)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: list[Tensor], stored: Mapping[str, np.dtype], limit: int) -> list[list[Tensor]]:
    """Returns the shards, in order of layers so that a reader of one layer opens few of them."""
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in sorted(tensors, key=lambda tensor: tensor.parts[0].index):
        size = _size(tensor, stored)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _write(
    file: Path,
    tensors: list[Tensor],
    params: Mapping[str, jax.Array],
    stored: Mapping[str, np.dtype],
) -> None:
    # Wide types first keep every tensor aligned to its own item size.
    tensors = sorted(tensors, key=lambda tensor: -stored[tensor.name].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + _size(tensor, stored)
        header[tensor.name] = {
            "dtype": _WORDS[stored[tensor.name]],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            ours = [_fetch(params[part.rule.ours], part.index) for part in tensor.parts]
            theirs = tensor.to_theirs(ours).astype(stored[tensor.name], copy=False)
            stream.write(theirs.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _fetch(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """Returns a parameter, or what `index` selects, put together from the devices that hold it."""
    if not index:
        return np.asarray(array)
    values = np.empty(array.shape[len(index) :], array.dtype)
    # Indexing the whole array would ask the compiler to reshard it.
    for shard in array.addressable_shards:
        held = [range(*s.indices(n)) for s, n in zip(shard.index, array.shape, strict=True)]
        inside = all(number in part for number, part in zip(index, held, strict=False))
        if shard.replica_id == 0 and inside:
            place = tuple(number - part.start for number, part in zip(index, held, strict=False))
            values[shard.index[len(index) :]] = shard.data[place]
    return values


def _size(tensor: Tensor, stored: Mapping[str, np.dtype]) -> int:
    return math.prod(tensor.shape) * stored[tensor.name].itemsize


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"The weights take {needed / 1e9:.1f} GB, but the disk of {folder} has "
            f"{free / 1e9:.1f} GB free. Make room, or export to another disk."
        )


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ModelError(f"{output} is a file; name a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ModelError(
            f"{output} exists and is not empty. Name another folder, or pass --overwrite."
        )
    if not (output / "config.json").is_file():
        raise ModelError(
            f"{output} is not replaced: it has no config.json, so it is not an exported model. "
            "Name another folder."
        )


def _rename(partial: Path, output: Path) -> None:
    """Puts `partial` in the place of `output`; what was there is gone only when it has worked."""
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
