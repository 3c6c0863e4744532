"""Writes parameters as a Hugging Face folder that appears whole or not at all."""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np

from jaxft.errors import ModelError
from jaxft.files import as_json
from jaxft.formatting import format_storage
from jaxft.hf.decoded import Passed
from jaxft.hf.read import DTYPES
from jaxft.hf.rules import Naming, Tensor, expand
from jaxft.hf.stored import INDEX, SINGLE

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_NAMED = {dtype.name: dtype for dtype in DTYPES.values()}
# What an unfinished folder is being made of; it goes before the folder appears.
_STAMP = "unfinished.json"
# Tensors are written in rows of about so many elements, where their layout allows it.
_ELEMENTS = 2**24


# Type and shape of a tensor that is to be written.
type Spec = tuple[np.dtype, tuple[int, ...]]


class _NoRoomError(ModelError):
    """The disk is too small; what is written stays."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    """A tensor that is to be written.

    Attributes:
      name: Name in the file.
      word: Type in the words of safetensors.
      shape: Shape in the file.
      size: Number of bytes.
      number: Numbers of its layer and expert.
      values: Yields what it consists of, from its first byte to its last.
    """

    name: str
    word: str
    shape: tuple[int, ...]
    size: int
    number: tuple[int, ...]
    values: Callable[[], Iterator[np.ndarray]]

    @property
    def width(self) -> int:
        """Number of bytes of a value."""
        return self.size // max(1, math.prod(self.shape))


class Readable(Protocol):
    """A parameter that can be read in parts: a NumPy array, or one that is still in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Returns what a slice for each axis selects."""
        ...


@contextlib.contextmanager
def atomic_folder(
    output: Path, overwrite: bool = False, *, content: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its name when the block ends well.

    An error removes it. A process that is killed, interrupted or out of disk leaves it as
    `.<name>.unfinished`, and the next one that names the same content goes on with the files that
    are there; any other starts anew. Nothing appears at `output` before the end, and what was there
    stays until then.

    Args:
      output: The folder to appear.
      overwrite: Replace a folder that is there; only one that holds a config.json, or that of an
        adapter, is replaced.
      content: What is written, as JSON can hold it; None never goes on with an older folder.

    Raises:
      ModelError: If `output` is a file or a folder that may not be replaced, if another process is
        writing it, or the disk is full.
    """
    output = output.expanduser().resolve()  # a link stays; what it names is replaced
    _check_replaceable(output, overwrite)
    partial = output.parent / f".{output.name}.unfinished"
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{partial} cannot be made: {error.strerror}.") from error
    with _locked(partial, output):
        try:
            _prepare(partial, content)
            yield partial
            # What has appeared in the meantime is not ours to replace.
            _check_replaceable(output, overwrite)
            (partial / _STAMP).unlink()
            _rename(partial, output)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ModelError(
                    f"{output} could not be written: {error.strerror}. Make room; the same command "
                    "then goes on with the files that are complete."
                ) from error
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except _NoRoomError:
            raise
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Holds a lock that ends with the process; two that write the same folder would mix."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ModelError(
            f"Another process of this machine is writing {output}; wait for it ({error.strerror})."
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


def _prepare(partial: Path, content: Mapping[str, Any] | None) -> None:
    """Empties the folder unless it holds a part of the same content."""
    stamp = partial / _STAMP
    text = json.dumps(content, indent=1, sort_keys=True)
    try:
        same = content is not None and stamp.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        same = False
    if same:
        return
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stamp.write_text(text, encoding="utf-8")


def save_params(
    folder: Path,
    naming: Naming,
    params: Mapping[str, Readable],
    *,
    dtypes: Mapping[str, str] | str,
    others: Mapping[str, Passed] = MappingProxyType({}),
    max_shard_bytes: int = 5_000_000_000,
) -> int:
    """Writes parameters as safetensors in their names and layouts, one file or several shards.

    A file appears under its name when it is complete; one that is there with the same tensors is
    kept, whatever their values. Host memory holds some rows of one tensor at a time, or all of it
    where its first axis is a group of ours, such as heads. JAX arrays come to the host as a whole.

    Args:
      folder: Where the files go; it exists.
      naming: The one that loading uses. Its copies are written if `dtypes` names them, and names
        are spelt as `dtypes` spells them.
      params: `{dotted path: parameter}`.
      dtypes: 'float32', 'float16', 'bfloat16' or 'float64' for all, or one for each of their names,
        which then are the names that are written.
      others: Tensors that are written as they lie in other files, those in FP8 decoded.
      max_shard_bytes: Largest shard; a tensor above it gets a shard of its own.

    Returns:
      The number of files of weights that were there already.

    Raises:
      ModelError: If the disk has too little room.
    """
    params = {p: np.asarray(v) if isinstance(v, jax.Array) else v for p, v in params.items()}
    rules = naming.rules if isinstance(dtypes, str) else naming.rules_for(dtypes)
    tensors = list(expand(rules, {path: param.shape for path, param in params.items()}))
    if not isinstance(dtypes, str):
        tensors = _named_as(tensors, dtypes, naming)
    items = [
        _of_params(t, params, _NAMED[dtypes if isinstance(dtypes, str) else dtypes[t.name]])
        for t in tensors
    ]
    items += [_as_it_is(name, entry) for name, entry in others.items()]
    shards = _split(items, max_shard_bytes)
    files = _file_names(len(shards))
    for file in [*folder.glob("*.unfinished"), *folder.glob("*.safetensors"), folder / INDEX]:
        if file.name not in files and not file.is_symlink():
            file.unlink(missing_ok=True)
    missing = [
        number
        for number, shard in enumerate(shards)
        if not _is_complete(folder / files[number], shard)
    ]
    _check_room(folder, sum(item.size for number in missing for item in shards[number]))
    for number in missing:
        shard = shards[number]
        values = itertools.chain.from_iterable(item.values() for item in shard)
        _write(folder / files[number], _header(shard), values)
    if len(shards) > 1:
        weight_map = {
            item.name: file for file, shard in zip(files, shards, strict=True) for item in shard
        }
        metadata = {"total_size": sum(item.size for item in items)}
        text = as_json({"metadata": metadata, "weight_map": weight_map})
        (folder / INDEX).write_text(text, encoding="utf-8")
    return len(files) - len(missing)


def _named_as(tensors: list[Tensor], names: Iterable[str], naming: Naming) -> list[Tensor]:
    """Returns tensors under the names that a file had, with those it had twice."""
    known = set(names)
    by_name = {tensor.name: tensor for tensor in tensors}
    again = {
        name: other
        for name, other in naming.copies.items()
        if naming.as_written(name, known) in known
    }
    return [
        dataclasses.replace(by_name[other], name=naming.as_written(name, known))
        for name, other in {**{name: name for name in by_name}, **again}.items()
    ]


def _of_params(tensor: Tensor, params: Mapping[str, Readable], dtype: np.dtype) -> _Item:
    def values() -> Iterator[np.ndarray]:
        for rows in _rows(tensor, params):
            yield _cast(rows, dtype, tensor.name)

    number = tensor.parts[0].rule.numbers(tensor.parts[0].index)
    size = math.prod(tensor.shape) * dtype.itemsize
    return _Item(tensor.name, _WORDS[dtype], tensor.shape, size, number, values)


def _as_it_is(name: str, entry: Passed) -> _Item:
    return _Item(name, entry.dtype, entry.shape, entry.written, (), entry.parts)


def _split(items: list[_Item], limit: int) -> list[list[_Item]]:
    """Returns the shards, in order of layers so that a reader of one layer opens few of them."""
    shards: list[list[_Item]] = [[]]
    room = limit
    for item in sorted(items, key=lambda item: item.number):
        if item.size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item.size
    # Wide types first keep every tensor aligned to its own item size.
    return [sorted(shard, key=lambda item: -item.width) for shard in shards]


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _is_complete(file: Path, items: list[_Item]) -> bool:
    if not file.is_file():
        return False
    header = _header(items)
    with file.open("rb") as stream:
        same = stream.read(len(header)) == header
    return same and file.stat().st_size == len(header) + sum(item.size for item in items)


def _header(items: Iterable[_Item]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in items:
        end = start + item.size
        offsets = {"data_offsets": [start, end]}
        header[item.name] = {"dtype": item.word, "shape": item.shape, **offsets}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, specs: Mapping[str, Spec], values: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file, which appears when it is complete.

    Args:
      file: Its name ends with a suffix, in whose place `.unfinished` stands until the end.
      specs: `{tensor name: (dtype, shape)}`; wide types first keep every tensor aligned.
      values: Of the tensors in this order, whole or some rows at a time, in these types.
    """
    items = [
        _Item(name, _WORDS[dtype], shape, math.prod(shape) * dtype.itemsize, (), lambda: iter(()))
        for name, (dtype, shape) in specs.items()
    ]
    _write(file, _header(items), values)


def _write(file: Path, header: bytes, values: Iterable[np.ndarray]) -> None:
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        stream.write(header)
        for some in values:
            stream.write(np.ascontiguousarray(some).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(file)


def _cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns values in another type; float16 has no room for what exceeds 65504."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype == np.float16 and values.dtype != dtype:
        lost = np.isinf(cast) & ~np.isinf(values)
        if lost.any():
            largest = float(np.max(np.abs(values[lost].astype(np.float32))))
            raise ModelError(
                f"{name} has values up to {largest:g}, which float16 cannot hold. Use bfloat16."
            )
    return cast


def _rows(tensor: Tensor, params: Mapping[str, Readable]) -> Iterator[np.ndarray]:
    """Yields a tensor of theirs from its first row to its last, some rows at a time."""
    axes = [part.rule.rows for part in tensor.parts]
    count = math.prod(tensor.shape[:1])
    step = max(1, _ELEMENTS * count // max(1, math.prod(tensor.shape)))
    if None in axes:
        step = count
    for start in range(0, count, step):
        taken = slice(start, min(start + step, count))
        arrays = []
        for part, axis in zip(tensor.parts, axes, strict=True):
            leading = tuple(slice(number, number + 1) for number in part.index)
            inner = [slice(None)] * len(part.shape)
            if axis is not None:
                inner[axis] = taken
            values = np.asarray(params[part.rule.ours][(*leading, *inner)])
            arrays.append(values.reshape(values.shape[len(leading) :]))
        shape = (taken.stop - taken.start, *tensor.shape[1:])[: len(tensor.shape)]
        yield dataclasses.replace(tensor, shape=shape).to_theirs(arrays)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _NoRoomError(
            f"The weights take {format_storage(needed)} more, but the disk of {folder} has "
            f"{format_storage(free)} free. Make room, or export to another disk."
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
    if not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
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
    try:
        partial.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
