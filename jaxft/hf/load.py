"""Reads a Hugging Face folder: its config, and its tensors into sharded arrays."""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.hub import lfs_hint
from jaxft.hf.kinds import explain_folder
from jaxft.hf.read import DTYPES, Entry, Mxfp4, Reader, Stored, Task
from jaxft.hf.rules import Part, Rule, Tensor, expand

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The most of a parameter that is kept on the host on its way to an accelerator.
_STAGED = 128 * 2**20
# Arrays that start at such an address become JAX's own on a CPU, without a copy.
_ALIGNMENT = 64

# A slice with start and stop for each axis.
type Box = tuple[slice, ...]
# Where the tensors of a parameter are stored, by index along its leading axes.
type Sources = dict[tuple[int, ...], tuple[Part, Stored]]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
      ModelError: If it is missing or broken, with what the folder holds in place of a model, or
        says that the weights are quantised; those in MXFP4 pass, because `load_params` unpacks
        them.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if not config.get("model_type") and (text := explain_folder(folder)):
        raise ModelError(text)
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; it is not a complete Hugging Face folder.")
    method = (config.get("quantization_config") or {}).get("quant_method", "unknown")
    if config.get("quantization_config") and method != "mxfp4":
        raise ModelError(
            f"{folder} holds weights quantised by {method!r} (quantization_config in config.json), "
            "which cannot be trained. Use the repository of the original weights."
        )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      ModelError: If the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{file.parent} has no {file.name}; it is not a complete Hugging Face folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.{lfs_hint(file)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a JSON {type(content).__name__}; expected an object.")
    return content


def tensor_dtypes(folder: Path) -> dict[str, str]:
    """Returns `{tensor name: dtype}` as stored, such as 'bfloat16', from the headers alone.

    A type that jaxft does not read keeps safetensors' own word, such as 'F8_E4M3'; the pair of
    tensors that MXFP4 makes of one counts as that one, in bfloat16.

    Raises:
      ModelError: If a file is missing, truncated or broken.
    """
    stored, problems = stored_tensors(folder)
    if problems:
        raise ModelError(problems)
    return {
        name: DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype
        for name, entry in stored.items()
        if entry is not None
    }


def load_params(
    folder: Path,
    rules: Iterable[Rule],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignore: tuple[str, ...] = (),
    copies: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict[str, jax.Array]:
    """Reads the parameters of a model into their shardings.

    Everything is checked from the headers before the first parameter is allocated. Then only what
    this host's devices need is read, once, however many of them need it. On CPUs the memory that
    is read into is the arrays' own. For accelerators the host holds three pieces of a parameter of
    at most 128 MiB each, and 8 MiB for each of four reading threads.

    Args:
      folder: Holds model.safetensors, or its shards with model.safetensors.index.json.
      rules: The family's table; rules of parameters that are not in `abstract` are passed over.
      abstract: `{dotted path: shape, dtype to cast to, and sharding}`; a sharding of None is the
        first device.
      ignore: Regular expressions searched in their names: tensors that may be there, unused.
      copies: `{name: other name}` of tensors that may be there if they equal the other one, such
        as the head of a model with tied embeddings.
      prefix: Start of their names that files may leave out, such as `transformer.`.

    Raises:
      ModelError: With every missing, unexpected or wrongly shaped tensor and every broken file.
    """
    shapes = {path: spec.shape for path, spec in abstract.items()}
    sources = _find(folder, rules, shapes, ignore, copies or {}, prefix)
    with Reader() as reader:
        return {
            path: _load(reader, spec, sources[path]) for path, spec in _with_shardings(abstract)
        }


def read_slices(
    folder: Path,
    rules: Iterable[Rule],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    indices: Mapping[str, Sequence[tuple[slice, ...]]],
    *,
    ignore: tuple[str, ...] = (),
    copies: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict[str, list[np.ndarray]]:
    """Reads slices of parameters into the host's memory, as `load_params` does for its devices.

    Args:
      folder: As for `load_params`, like the other arguments.
      rules: The family's table.
      abstract: `{dotted path: shape and dtype}` of whole parameters.
      indices: Which slices of each parameter; they are equal or disjoint.
      ignore: Tensors that may be there, unused.
      copies: Tensors that may be there twice.
      prefix: Start of names that files may leave out.
    """
    shapes = {path: spec.shape for path, spec in abstract.items()}
    sources = _find(folder, rules, shapes, ignore, copies or {}, prefix)
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
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignore: tuple[str, ...] = (),
    copies: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict[str, StoredParameter]:
    """Returns parameters that are read later, after the checks of `load_params`.

    Args:
      reader: Open for as long as they are used.
      folder: As for `load_params`, like the other arguments.
      rules: The family's table.
      shapes: Of all parameters.
      ignore: Tensors that may be there, unused.
      copies: Tensors that may be there twice.
      prefix: Start of names that files may leave out.
    """
    sources = _find(folder, rules, shapes, ignore, copies or {}, prefix)
    return {path: StoredParameter(reader, sources[path], shape) for path, shape in shapes.items()}


def _find(
    folder: Path,
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: tuple[str, ...],
    copies: Mapping[str, str],
    prefix: str,
) -> dict[str, Sources]:
    """Returns where each parameter is stored, or raises ModelError with all that does not fit."""
    tensors = list(expand(rules, shapes))
    stored, problems = stored_tensors(folder)
    stored = named_as(stored, [*(tensor.name for tensor in tensors), *copies], prefix)
    if stored or not problems:
        problems += mismatches(stored, tensors, ignore, copies)
    if not problems:
        problems = _differing(stored, copies)
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


def stored_tensors(folder: Path) -> tuple[dict[str, Stored | None], list[str]]:
    """Returns every tensor of a folder, None where its file cannot be read, and the problems.

    Raises:
      ModelError: If there are no weights in safetensors, with the conversion for pickled ones.
    """
    entries, problems = _scan(folder)
    return paired(entries), problems


def paired(entries: Mapping[str, Entry | None]) -> dict[str, Stored | None]:
    """Puts one tensor in the place of the two that MXFP4 makes of it."""
    stored: dict[str, Stored | None] = dict(entries)
    for name in entries:
        base = name.removesuffix("_blocks")
        blocks, scales = entries[name], entries.get(f"{base}_scales")
        if base != name and blocks is not None and scales is not None:
            del stored[name], stored[f"{base}_scales"]
            stored[base] = Mxfp4(blocks, scales)
    return stored


def named_as(
    stored: Mapping[str, Stored | None], expected: Iterable[str], prefix: str
) -> dict[str, Stored | None]:
    """Returns tensors under the names that are expected where files leave out their prefix."""
    known = set(expected)
    return {
        prefix + name if prefix + name in known - stored.keys() else name: entry
        for name, entry in stored.items()
    }


def _scan(folder: Path) -> tuple[dict[str, Entry | None], list[str]]:
    if (folder / SINGLE).is_file():
        return _scan_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ModelError(f"{folder / INDEX} has no 'weight_map' that names a file per tensor.")
    stored: dict[str, dict[str, Entry | None]] = {}
    problems, lost = [], []
    for shard in sorted(set(names.values())):
        if (folder / shard).is_file():
            stored[shard], broken = _scan_file(folder / shard)
            problems += broken
        else:
            stored[shard] = {}
            lost.append(shard)
    if len(lost) == 1:
        problems.insert(0, f"{lost[0]} is named by {INDEX} but is not there; download it.")
    elif lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        told = f"{len(lost)} files named by {INDEX} are not there: {', '.join(lost[:3])}{more}"
        problems.insert(0, f"{told}; download them.")
    absent = [name for name, shard in names.items() if stored[shard] and name not in stored[shard]]
    problems += [f"{name} is not in {names[name]}, where {INDEX} says it is." for name in absent]
    return {name: stored[shard].get(name) for name, shard in names.items()}, problems


def _scan_file(file: Path) -> tuple[dict[str, Entry | None], list[str]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        # A header that does not fit is not read: eight stray bytes may claim any length.
        header = stream.read(length) if len(prefix) == 8 and 8 + length <= size else b""
    try:
        content = json.loads(header)
        content.pop("__metadata__", None)
        entries: dict[str, Entry | None] = {
            name: Entry(
                file,
                item["dtype"],
                tuple(item["shape"]),
                8 + length + item["data_offsets"][0],
                8 + length + item["data_offsets"][1],
            )
            for name, item in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        hint = lfs_hint(file) or " It is truncated or not a safetensors file; download it again."
        return {}, [f"{file.name} has no readable header in its {size} bytes.{hint}"]
    end = max((entry.end for entry in entries.values() if entry), default=8 + length)
    if any(not 8 + length <= entry.start <= entry.end for entry in entries.values() if entry):
        return {}, [f"{file.name} has offsets outside of its data; download it again."]
    if size != end:
        word = "truncated" if size < end else "damaged"
        return entries, [
            f"{file.name} is {word}: it has {size} bytes, its header says {end}; download it again."
        ]
    return entries, []


def mismatches(
    stored: Mapping[str, Stored | None],
    tensors: list[Tensor],
    ignore: tuple[str, ...],
    copies: Mapping[str, str],
) -> list[str]:
    """Returns what keeps these tensors from being loaded, judged by names, shapes and types."""
    expected = {tensor.name: tensor for tensor in tensors}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    unexpected = [name for name in unexpected if not is_known(name, ignore, copies)]
    problems = [f"Missing: {group}." for group in group_names(missing)]
    problems += [f"Unexpected: {group}." for group in group_names(unexpected)]
    reasons: dict[str, list[str]] = {}
    for name, tensor in expected.items():
        if reason := unfit(stored.get(name), tensor):
            reasons.setdefault(reason, []).append(name)
    problems += [f"{group} {why}" for why, names in reasons.items() for group in group_names(names)]
    return problems


def is_known(name: str, ignore: tuple[str, ...], copies: Mapping[str, str]) -> bool:
    """Whether a tensor that no rule names may be in a file."""
    return name in copies or any(re.search(pattern, name) for pattern in ignore)


def unfit(stored: Stored | None, tensor: Tensor) -> str:
    """Returns why a stored tensor cannot be what a rule asks for, or an empty text."""
    if stored is None:
        return ""
    if problem := stored.problem():
        return problem
    if stored.shape != tensor.shape:
        return f"has shape {list(stored.shape)}; config.json asks for {list(tensor.shape)}."
    return ""


def _differing(stored: Mapping[str, Stored | None], copies: Mapping[str, str]) -> list[str]:
    return [
        f"{name} differs from {original}, but config.json says that they are one tensor; set "
        "'tie_word_embeddings' to false in config.json to use both."
        for name, original in copies.items()
        if name in stored and not _equal(stored[name], stored.get(original))
    ]


def _equal(copy: Stored | None, original: Stored | None) -> bool:
    """Compares values a part at a time, so that neither tensor is ever held as a whole."""
    if not isinstance(copy, Entry) or not isinstance(original, Entry):
        return False
    if copy.shape != original.shape or copy.dtype != original.dtype or copy.problem():
        return False
    rows = max(1, 2**22 // math.prod(copy.shape[1:]))
    # Bytes, because a value that is not a number does not equal itself.
    left, right = (entry.map().view(np.uint8) for entry in (copy, original))
    return all(
        np.array_equal(left[row : row + rows], right[row : row + rows])
        for row in range(0, copy.shape[0], rows)
    )


def group_names(names: Iterable[str]) -> list[str]:
    """Returns names that differ by the number of their layer as one, such as `layers.{0-31}.q`."""
    groups: dict[tuple[str, str], list[int]] = {}
    lines = []
    for name in names:
        if match := re.search(r"\.(\d+)\.", name):
            key = (name[: match.start(1)], name[match.end(1) :])
            groups.setdefault(key, []).append(int(match[1]))
        else:
            lines.append(name)
    for (before, after), numbers in groups.items():
        lines.append(f"{before}{_ranges(sorted(numbers))}{after}")
    return lines


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _no_weights(folder: Path) -> str:
    if text := explain_folder(folder):
        return text
    found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:5])
    return (
        f"{folder} has neither {SINGLE} nor {INDEX}"
        f"{f', only {found}' if found else ''}; it is not a complete Hugging Face folder."
    )
