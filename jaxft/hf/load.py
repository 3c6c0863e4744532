"""Reads the tensors of a Hugging Face folder into sharded arrays."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.decoded import Stored
from jaxft.hf.read import DTYPES, Reader, Task
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


@dataclass(frozen=True)
class Encoded:
    """A parameter that is held in another form than files have it.

    Attributes:
      leaves: `{dotted path: shape, dtype and sharding}` of the arrays that stand for it. Their
        dimensions are its own, the last one in coarser steps or not, and all are split alike; the
        first has its shape.
      encode: Maps any part of it that is whole along the last dimension, or one of the parts that
        this is split into, to that part of each leaf, in their order.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    encode: Callable[[jax.Array], tuple[jax.Array, ...]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return next(iter(self.leaves.values())).shape


def load_params(
    folder: Path,
    naming: Naming,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    encoded: Mapping[str, Encoded] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """Reads the parameters of a model into their shardings.

    Everything is checked from the headers before the first parameter is allocated. Then only what
    this host's devices need is read, once, however many of them need it. On CPUs the memory that
    is read into is the arrays' own. For accelerators the host holds three pieces of a parameter of
    at most 128 MiB each, and 8 MiB for each of four reading threads. What is encoded passes through
    such pieces on every kind of device, and is never there as a whole before.

    Args:
      folder: Holds model.safetensors, or its shards with model.safetensors.index.json.
      naming: The model's.
      abstract: `{dotted path: shape, dtype to cast to, and sharding}`; a sharding of None is the
        first device.
      encoded: Further parameters by path, which are encoded piece by piece.

    Raises:
      ModelError: With every missing, unexpected or wrongly shaped tensor and every broken file.
    """
    shapes = {path: spec.shape for path, spec in {**abstract, **encoded}.items()}
    sources = _find(folder, naming, shapes)
    with Reader() as reader:
        params = {
            path: _load(reader, spec, sources[path]) for path, spec in _with_shardings(abstract)
        }
        for path, parameter in encoded.items():
            params |= _load_encoded(reader, parameter, sources[path])
    return params


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
    stored, problems = stored_tensors(folder)
    tensors = list(expand(naming.rules_for(stored), shapes))
    stored = named_as(stored, [*(tensor.name for tensor in tensors), *naming.copies], naming)
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


def _boxes_of(spec: jax.ShapeDtypeStruct) -> tuple[list[Box], list[list[Any]]]:
    """Returns the parts of an array that devices of this process hold, and the devices of each."""
    devices_of: dict[Box, list[Any]] = {}
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        devices_of.setdefault(_box(index or (), spec.shape), []).append(device)
    return list(devices_of), list(devices_of.values())


def _load(reader: Reader, spec: jax.ShapeDtypeStruct, sources: Sources) -> jax.Array:
    boxes, owners = _boxes_of(spec)
    if _have_host_memory(spec.sharding.addressable_devices):
        # Nobody writes into these again: JAX takes them over without a copy.
        values = _read_boxes(reader, boxes, spec.dtype, sources)
        arrays = [
            jax.device_put(value, device)
            for value, devices in zip(values, owners, strict=True)
            for device in devices
        ]
    else:
        [arrays] = _stage(reader, boxes, owners, spec.dtype, sources)
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)


def _load_encoded(reader: Reader, parameter: Encoded, sources: Sources) -> dict[str, jax.Array]:
    leaves = dict(_with_shardings(parameter.leaves))
    boxes, owners = _boxes_of(next(iter(leaves.values())))
    dtypes = {DTYPES[stored.dtype] for _, stored in sources.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    encode = jax.jit(parameter.encode)
    found = _stage(reader, boxes, owners, dtype, sources, encode)
    return {
        path: jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)
        for (path, spec), arrays in zip(leaves.items(), found, strict=True)
    }


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


def _as_it_is(x: Any) -> tuple[Any, ...]:
    return (x,)


def _stage(
    reader: Reader,
    boxes: Sequence[Box],
    devices_of: Sequence[Sequence[Any]],
    dtype: Any,
    sources: Sources,
    encode: Callable[[Any], tuple[Any, ...]] = _as_it_is,
) -> list[list[jax.Array]]:
    """Returns arrays for each device of each box, made from pieces that pass through the host.

    The next piece is read while the last one is on its way. Pieces are encoded on one device, so
    that the encoding is compiled once.

    Returns:
      For each array that `encode` makes of a piece, one for each device.
    """
    arrays: list[list[tuple[jax.Array, ...]]] = [[] for _ in boxes]
    for piece, takers in _pieces(boxes, np.dtype(dtype).itemsize):
        staged = np.empty(_shape(piece), dtype)
        reader.run(_tasks(sources, piece, staged))
        jax.block_until_ready(arrays)
        for number, here, there in takers:
            values = encode(np.ascontiguousarray(staged[there]))
            devices = devices_of[number]
            if _shape(here) == _shape(boxes[number]):
                arrays[number] = [jax.device_put(values, device) for device in devices]
                continue
            if not arrays[number]:
                shapes = _whole_shapes(values, _shape(here), _shape(boxes[number]))
                arrays[number] = [
                    tuple(
                        jnp.zeros(shape, value.dtype, device=device)
                        for shape, value in zip(shapes, values, strict=True)
                    )
                    for device in devices
                ]
            start = tuple(np.int32(part.start) for part in here)
            arrays[number] = [
                _update(array, jax.device_put(values, device), start)
                for array, device in zip(arrays[number], devices, strict=True)
            ]
    return [list(leaf) for leaf in zip(*itertools.chain.from_iterable(arrays), strict=True)]


def _whole_shapes(
    values: tuple[Any, ...], part: tuple[int, ...], whole: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Returns the shapes of arrays of which `values` are a part of the shape `part`."""
    assert all(value.shape == part for value in values) or part[-1] == whole[-1]
    return [(*whole[:-1], value.shape[-1] * whole[-1] // part[-1]) for value in values]


@functools.partial(jax.jit, donate_argnums=0)
def _update(
    arrays: tuple[jax.Array, ...], values: tuple[jax.Array, ...], start: tuple[Any, ...]
) -> tuple[jax.Array, ...]:
    return tuple(
        jax.lax.dynamic_update_slice(array, value, start)
        for array, value in zip(arrays, values, strict=True)
    )


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
