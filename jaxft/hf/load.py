"""Reads the tensors of a Hugging Face folder into sharded arrays."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.read import DTYPES, Reader, Stored, Task
from jaxft.hf.rules import Naming, Part, expand
from jaxft.hf.stored import differing, mismatches, named_as, stored_tensors

# The most of a parameter that is kept on the host on its way to an accelerator.
_STAGED = 128 * 2**20
# Arrays that start at such an address become JAX's own on a CPU, without a copy.
_ALIGNMENT = 64

# A slice with start and stop for each axis.
type Box = tuple[slice, ...]
# Where the tensors of a parameter are stored, by index along its leading axes.
type Sources = dict[tuple[int, ...], tuple[Part, Stored]]


def load_params(
    folder: Path,
    naming: Naming,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Reads the parameters of a model into their shardings.

    Everything is checked from the headers before the first parameter is allocated. Then only what
    this host's devices need is read, once, however many of them need it. On CPUs the memory that
    is read into is the arrays' own. For accelerators the host holds three pieces of a parameter of
    at most 128 MiB each, and 8 MiB for each of four reading threads.

    Args:
      folder: Holds model.safetensors, or its shards with model.safetensors.index.json.
      naming: The model's.
      abstract: `{dotted path: shape, dtype to cast to, and sharding}`; a sharding of None is the
        first device.

    Raises:
      ModelError: With every missing, unexpected or wrongly shaped tensor and every broken file.
    """
    shapes = {path: spec.shape for path, spec in abstract.items()}
    sources = _find(folder, naming, shapes)
    with Reader() as reader:
        return {
            path: _load(reader, spec, sources[path]) for path, spec in _with_shardings(abstract)
        }


def read_slices(
    folder: Path,
    naming: Naming,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    indices: Mapping[str, Sequence[tuple[slice, ...]]],
) -> dict[str, list[np.ndarray]]:
    """Reads slices of parameters into the host's memory, as `load_params` does for its devices.

    Args:
      folder: As for `load_params`.
      naming: The model's.
      abstract: `{dotted path: shape and dtype}` of whole parameters.
      indices: Which slices of each parameter; they are equal or disjoint.
    """
    shapes = {path: spec.shape for path, spec in abstract.items()}
    sources = _find(folder, naming, shapes)
    with Reader() as reader:
        return {
            path: _read_boxes(
                reader,
                [_box(index, abstract[path].shape) for index in wanted],
                abstract[path].dtype,
                sources[path],
            )
            for path, wanted in indices.items()
        }


class StoredParameter:
    """A parameter in Hugging Face files, of which only what is indexed is read, in its own type."""

    def __init__(self, reader: Reader, sources: Sources, shape: tuple[int, ...]):
        self.shape = shape
        self._reader = reader
        self._sources = sources

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        box = _box(index, self.shape)
        leading = len(next(iter(self._sources)))
        _, first = self._sources[tuple(part.start for part in box[:leading])]
        values = np.empty(_shape(box), DTYPES[first.dtype])
        self._reader.run(_tasks(self._sources, box, values))
        return values


def open_params(
    reader: Reader,
    folder: Path,
    naming: Naming,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, StoredParameter]:
    """Returns parameters that are read later, after the checks of `load_params`.

    Args:
      reader: Open for as long as they are used.
      folder: As for `load_params`.
      naming: The model's.
      shapes: Of all parameters.
    """
    sources = _find(folder, naming, shapes)
    return {path: StoredParameter(reader, sources[path], shape) for path, shape in shapes.items()}


def _find(
    folder: Path, naming: Naming, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Sources]:
    """Returns where each parameter is stored, or raises ModelError with all that does not fit."""
    tensors = list(expand(naming.rules, shapes))
    stored, problems = stored_tensors(folder)
    stored = named_as(stored, [*(tensor.name for tensor in tensors), *naming.copies], naming.prefix)
    if stored or not problems:
        problems += mismatches(stored, tensors, naming)
    if not problems:
        problems = differing(stored, naming.copies)
    if problems:
        raise ModelError([f"{folder} does not fit this model:", *problems])
    sources: dict[str, Sources] = {path: {} for path in shapes}
    for tensor in tensors:
        entry = stored[tensor.name]
        assert entry is not None  # unreadable files are among the problems above
        for part in tensor.parts:
            sources[part.rule.ours][part.index] = (part, entry)
    return sources


def _with_shardings(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for path, spec in abstract.items():
        sharding = first if spec.sharding is None else spec.sharding
        yield path, jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def _load(reader: Reader, spec: jax.ShapeDtypeStruct, sources: Sources) -> jax.Array:
    devices_of: dict[Box, list[Any]] = {}
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        devices_of.setdefault(_box(index or (), spec.shape), []).append(device)
    boxes = list(devices_of)
    owners = list(devices_of.values())
    if _have_host_memory(spec.sharding.addressable_devices):
        # Nobody writes into these again: JAX takes them over without a copy.
        values = _read_boxes(reader, boxes, spec.dtype, sources)
        arrays = [
            jax.device_put(value, device)
            for value, devices in zip(values, owners, strict=True)
            for device in devices
        ]
    else:
        arrays = _stage(reader, boxes, owners, spec.dtype, sources)
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)


def _have_host_memory(devices: Iterable[Any]) -> bool:
    return all(device.platform == "cpu" for device in devices)


def _read_boxes(
    reader: Reader, boxes: Sequence[Box], dtype: Any, sources: Sources
) -> list[np.ndarray]:
    """Returns each box of a parameter in memory of its own."""
    values = [_empty(_shape(box), np.dtype(dtype)) for box in boxes]
    straight: list[Iterator[Task]] = []
    for piece, takers in _pieces(boxes, np.dtype(dtype).itemsize):
        if len(takers) == 1:
            [(number, here, _)] = takers
            straight.append(_tasks(sources, piece, values[number][here]))
            continue
        staged = np.empty(_shape(piece), dtype)
        reader.run(_tasks(sources, piece, staged))
        for number, here, there in takers:
            values[number][here] = staged[there]
    reader.run(itertools.chain.from_iterable(straight))
    return values


def _stage(
    reader: Reader,
    boxes: Sequence[Box],
    devices_of: Sequence[Sequence[Any]],
    dtype: Any,
    sources: Sources,
) -> list[jax.Array]:
    """Returns an array for each device of each box, made from pieces that pass through the host.

    The next piece is read while the last one is on its way.
    """
    arrays: list[list[jax.Array]] = [[] for _ in boxes]
    for piece, takers in _pieces(boxes, np.dtype(dtype).itemsize):
        staged = np.empty(_shape(piece), dtype)
        reader.run(_tasks(sources, piece, staged))
        jax.block_until_ready(arrays)
        for number, here, there in takers:
            values = np.ascontiguousarray(staged[there])
            shape = _shape(boxes[number])
            if values.shape == shape:
                arrays[number] = [jax.device_put(values, d) for d in devices_of[number]]
                continue
            if not arrays[number]:
                arrays[number] = [jnp.zeros(shape, dtype, device=d) for d in devices_of[number]]
            start = tuple(np.int32(part.start) for part in here)
            arrays[number] = [
                _update(array, jax.device_put(values, device), start)
                for array, device in zip(arrays[number], devices_of[number], strict=True)
            ]
    return [array for copies in arrays for array in copies]


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, values: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, values, start)


def _tasks(sources: Sources, box: Box, out: np.ndarray) -> Iterator[Task]:
    """Yields what reads a box of a parameter into `out`, cast."""
    leading = len(next(iter(sources)))
    numbers = [range(part.start, part.stop) for part in box[:leading]]
    for place in itertools.product(*map(enumerate, numbers)):
        part, stored = sources[tuple(number for _, number in place)]
        target = out[(*(position for position, _ in place), ...)]
        yield from stored.tasks(part, box[leading:], target)


def _pieces(
    boxes: Sequence[Box], itemsize: int
) -> Iterator[tuple[Box, list[tuple[int, Box, Box]]]]:
    """Yields pieces of at most `_STAGED` bytes that cover the boxes, and who takes what of each.

    Boxes that are side by side share their pieces, so that what lies together is read together. A
    taker is the number of a box, the part of that box, and the part of the piece that fills it.
    """
    for whole in _unite(boxes):
        for piece in _cut(whole, _STAGED // itemsize):
            takers = []
            for number, box in enumerate(boxes):
                common = [
                    range(max(a.start, b.start), min(a.stop, b.stop))
                    for a, b in zip(box, piece, strict=True)
                ]
                if all(common) or not box:
                    takers.append((number, _relative(common, box), _relative(common, piece)))
            yield piece, takers


def _unite(boxes: Iterable[Box]) -> list[Box]:
    """Returns boxes that cover the same, where neighbours along an axis have become one."""
    united = list(dict.fromkeys(boxes))
    for axis in range(len(united[0])):
        rows: dict[Box, list[slice]] = {}
        for box in sorted(united, key=lambda box: box[axis].start):
            parts = rows.setdefault((*box[:axis], *box[axis + 1 :]), [])
            if parts and parts[-1].stop == box[axis].start:
                parts[-1] = slice(parts[-1].start, box[axis].stop)
            else:
                parts.append(box[axis])
        united = [
            (*rest[:axis], part, *rest[axis:]) for rest, parts in rows.items() for part in parts
        ]
    return united


def _cut(box: Box, limit: int) -> Iterator[Box]:
    """Yields parts of a box of at most `limit` elements, near equal, cut along its first axes."""
    if math.prod(_shape(box)) <= limit or not box:
        yield box
        return
    first, rest = box[0], box[1:]
    rows = max(1, limit // math.prod(_shape(rest)))
    count = -(-(first.stop - first.start) // rows)
    edges = np.linspace(first.start, first.stop, count + 1).astype(int).tolist()
    for start, stop in itertools.pairwise(edges):
        inner = _cut(rest, limit) if stop - start == 1 else [rest]
        yield from ((slice(start, stop), *part) for part in inner)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def _relative(ranges: list[range], box: Box) -> Box:
    return tuple(
        slice(r.start - part.start, r.stop - part.start)
        for r, part in zip(ranges, box, strict=True)
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns memory that a JAX array on a CPU can be without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
