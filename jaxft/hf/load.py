"""Reads a Hugging Face folder: its config, and the slices of its safetensors that devices need."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.hub import conversion_hint
from jaxft.hf.rules import Rule, Tensor, expand

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: bytes `start` to `end` of a file; `dtype` is safetensors' word."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
      ModelError: If it is missing or broken, or says that the weights are quantised.
    """
    config = read_json(folder / "config.json")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
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
        raise ModelError(f"{file} cannot be read: {error}.{_lfs_hint(file)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a JSON {type(content).__name__}; expected an object.")
    return content


def tensor_dtypes(folder: Path) -> dict[str, str]:
    """Returns `{tensor name: dtype}` as stored, such as 'bfloat16', from the headers alone.

    A type that jaxft does not read keeps safetensors' own word, such as 'F8_E4M3'.

    Raises:
      ModelError: If a file is missing, truncated or broken.
    """
    entries, problems = _scan(folder)
    if problems:
        raise ModelError(problems)
    return {
        name: DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype
        for name, entry in entries.items()
        if entry is not None
    }


def load_params(
    folder: Path,
    rules: Iterable[Rule],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    ignore: tuple[str, ...] = (),
    copies: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Reads the parameters of a model into their shardings.

    Everything is checked from the headers before the first parameter is allocated. Then only the
    slices that this host's devices need are read, each once; host memory holds one such slice of
    one parameter at a time.

    Args:
      folder: Holds model.safetensors, or its shards with model.safetensors.index.json.
      rules: The family's table; rules of parameters that are not in `abstract` are passed over.
      abstract: `{dotted path: shape, dtype to cast to, and sharding}`; a sharding of None is the
        default device.
      ignore: Regular expressions searched in their names: tensors that may be there, unused.
      copies: `{name: other name}` of tensors that may be there if they equal the other one, such
        as the head of a model with tied embeddings.

    Raises:
      ModelError: With every missing, unexpected or wrongly shaped tensor and every broken file.
    """
    tensors = list(expand(rules, {path: spec.shape for path, spec in abstract.items()}))
    entries, problems = _scan(folder)
    problems += _mismatches(entries, tensors, ignore, copies or {})
    if problems:
        raise ModelError([f"{folder} does not fit this model:", *problems])
    sources: dict[str, list[tuple[Tensor, Entry]]] = {path: [] for path in abstract}
    for tensor in tensors:
        entry = entries[tensor.name]
        assert entry is not None  # unreadable files are among the problems above
        sources[tensor.rule.ours].append((tensor, entry))
    return {path: _load_param(spec, sources[path]) for path, spec in abstract.items()}


def _load_param(spec: jax.ShapeDtypeStruct, sources: list[tuple[Tensor, Entry]]) -> jax.Array:
    if spec.sharding is None:
        return jax.device_put(_read(spec, sources, (slice(None),) * len(spec.shape)))
    devices_of = defaultdict(list)
    for device, index in spec.sharding.addressable_devices_indices_map(spec.shape).items():
        devices_of[index].append(device)
    arrays = []
    for index, devices in devices_of.items():
        values = _read(spec, sources, index)
        # Waiting for each slice to arrive keeps the host from holding the next one beside it.
        arrays += jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, arrays)


def _read(
    spec: jax.ShapeDtypeStruct,
    sources: list[tuple[Tensor, Entry]],
    index: tuple[slice, ...],
) -> np.ndarray:
    """Returns our parameter at `index`, cast; the file maps are gone when it returns."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    values = np.empty([len(part) for part in ranges], spec.dtype)
    if sources[0][0].layer is None:
        values[...] = _view(*sources[0])[index]
        return values
    for place, layer in enumerate(ranges[0]):
        values[place] = _view(*sources[layer])[index[1:]]
    return values


def _view(tensor: Tensor, entry: Entry) -> np.ndarray:
    return tensor.rule.to_ours(_map(entry), tensor.shape)


def _map(entry: Entry) -> np.ndarray:
    """Returns a tensor of theirs backed by its file: bytes are read where it is indexed."""
    return np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.start, entry.shape)


def _scan(folder: Path) -> tuple[dict[str, Entry | None], list[str]]:
    """Returns every tensor of a folder, None where its file cannot be read, and the problems."""
    if (folder / SINGLE).is_file():
        return _scan_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{folder / INDEX} has no 'weight_map' that names a file per tensor.")
    stored: dict[str, dict[str, Entry | None]] = {}
    problems = []
    for shard in sorted(set(names.values())):
        if (folder / shard).is_file():
            stored[shard], broken = _scan_file(folder / shard)
            problems += broken
        else:
            stored[shard] = {}
            problems.append(f"{shard} is named by {INDEX} but is not there; download it.")
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
        hint = _lfs_hint(file) or " It is truncated or not a safetensors file; download it again."
        return {}, [f"{file.name} has no readable header in its {size} bytes.{hint}"]
    end = max((entry.end for entry in entries.values() if entry), default=8 + length)
    if size != end:
        word = "truncated" if size < end else "damaged"
        return entries, [
            f"{file.name} is {word}: it has {size} bytes, its header says {end}; download it again."
        ]
    return entries, []


def _mismatches(
    entries: Mapping[str, Entry | None],
    tensors: list[Tensor],
    ignore: tuple[str, ...],
    copies: Mapping[str, str],
) -> list[str]:
    """Returns what keeps these tensors from being loaded, judged by headers and copies."""
    if not entries:
        return []
    expected = {tensor.name: tensor for tensor in tensors}
    missing = [name for name in expected if name not in entries]
    unexpected = [
        name
        for name in entries
        if name not in expected
        and name not in copies
        and not any(re.search(pattern, name) for pattern in ignore)
    ]
    problems = [f"Missing: {group}." for group in _group(missing)]
    problems += [f"Unexpected: {group}." for group in _group(unexpected)]
    reasons: dict[str, list[str]] = {}
    for name, tensor in expected.items():
        if reason := _unfit(entries.get(name), tensor):
            reasons.setdefault(reason, []).append(name)
    problems += [f"{group} {why}" for why, names in reasons.items() for group in _group(names)]
    if not problems:
        problems += [
            f"{name} differs from {original}, but config.json says that they are one tensor; set "
            "'tie_word_embeddings' to false in config.json to use both."
            for name, original in copies.items()
            if name in entries and not _equal(entries[name], entries.get(original))
        ]
    return problems


def _unfit(entry: Entry | None, tensor: Tensor) -> str:
    if entry is None:
        return ""
    expected = tensor.rule.shape_theirs(tensor.shape)
    if entry.dtype not in DTYPES:
        return f"is stored as {entry.dtype}; expected one of {', '.join(DTYPES)}."
    if entry.shape != expected:
        return f"has shape {list(entry.shape)}; config.json asks for {list(expected)}."
    if entry.end - entry.start != math.prod(expected) * DTYPES[entry.dtype].itemsize:
        return f"takes {entry.end - entry.start} bytes, which is not its shape's size."
    return ""


def _equal(copy: Entry | None, original: Entry | None) -> bool:
    """Compares values a part at a time, so that neither tensor is ever held as a whole."""
    if copy is None or original is None or copy.shape != original.shape:
        return False
    rows = max(1, 2**22 // math.prod(copy.shape[1:]))
    left, right = _map(copy), _map(original)
    return all(
        np.array_equal(left[row : row + rows], right[row : row + rows])
        for row in range(0, copy.shape[0], rows)
    )


def _group(names: Iterable[str]) -> list[str]:
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
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return conversion_hint(str(folder))
    found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:5])
    return (
        f"{folder} has neither {SINGLE} nor {INDEX}"
        f"{f', only {found}' if found else ''}; it is not a complete Hugging Face folder."
    )


def _lfs_hint(file: Path) -> str:
    """Returns what to do where a clone without Git LFS left a pointer, or an empty string."""
    with file.open("rb") as stream:
        pointer = stream.read(40).startswith(b"version https://git-lfs")
    return " It is a pointer of Git LFS: run `git lfs pull` in the folder." if pointer else ""
