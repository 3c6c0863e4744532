"""The tensors in the files of a Hugging Face folder, by their headers, and what does not fit."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxft.errors import ModelError
from jaxft.hf.decoded import Fp8Blocks, Mxfp4, Passed, Stored
from jaxft.hf.folder import fp8_block, read_json
from jaxft.hf.hub import lfs_hint
from jaxft.hf.kinds import explain_folder
from jaxft.hf.read import DTYPES, Entry
from jaxft.hf.rules import Naming, Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def tensor_dtypes(folder: Path) -> dict[str, str]:
    """Returns `{tensor name: dtype}` as stored, such as 'bfloat16', from the headers alone.

    A type that jaxft does not read keeps safetensors' own word, such as 'F8_E5M2'; the pair of
    tensors that MXFP4, or FP8 in blocks, makes of one counts as that one, in bfloat16.

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


def stored_tensors(folder: Path) -> tuple[dict[str, Stored | None], list[str]]:
    """Returns every tensor of a folder, None where its file cannot be read, and the problems.

    Raises:
      ModelError: If there are no weights in safetensors, with the conversion for pickled ones.
    """
    entries, problems = _scan(folder)
    return paired(entries, _block_of(folder)), problems


def _block_of(folder: Path) -> tuple[int, int] | None:
    file = folder / "config.json"
    return fp8_block(read_json(file)) if file.is_file() else None


def other_tensors(folder: Path, naming: Naming) -> dict[str, Passed]:
    """Returns the tensors of a folder that lie beside its model, by their headers.

    Those in FP8 are decoded where they are written, as the model's are.

    Raises:
      ModelError: If a file is missing, truncated or broken.
    """
    entries, problems = _scan(folder)
    if problems:
        raise ModelError(problems)
    return {
        name: entry
        for name, entry in in_blocks(entries, _block_of(folder)).items()
        if entry is not None and naming.is_other(name)
    }


def in_blocks(
    entries: Mapping[str, Entry | None], block: tuple[int, int] | None
) -> dict[str, Passed | None]:
    """Puts one tensor in the place of the two that FP8 in blocks makes of it; None for no FP8."""
    found: dict[str, Passed | None] = dict(entries)
    for name, codes in entries.items():
        factors = entries.get(f"{name}_scale_inv")
        if block is not None and codes is not None and factors is not None:
            del found[f"{name}_scale_inv"]
            found[name] = Fp8Blocks(codes, factors, block)
    return found


def paired(
    entries: Mapping[str, Entry | None], block: tuple[int, int] | None = None
) -> dict[str, Stored | None]:
    """Puts one tensor in the place of the two that MXFP4, or FP8 in blocks, makes of it.

    Args:
      entries: By name.
      block: Rows and columns of the blocks of FP8; None where there are none.
    """
    stored: dict[str, Stored | None] = {**in_blocks(entries, block)}
    for name in entries:
        base = name.removesuffix("_blocks")
        blocks, scales = entries[name], entries.get(f"{base}_scales")
        if base != name and blocks is not None and scales is not None:
            del stored[name], stored[f"{base}_scales"]
            stored[base] = Mxfp4(blocks, scales)
    return stored


def named_as(
    stored: Mapping[str, Stored | None], expected: Iterable[str], naming: Naming
) -> dict[str, Stored | None]:
    """Returns tensors under the names that are expected where files spell them otherwise."""
    known = set(expected) - stored.keys()
    return {
        name if naming.is_other(name) else naming.as_ours(name, known): entry
        for name, entry in stored.items()
    }


def _scan(folder: Path) -> tuple[dict[str, Entry | None], list[str]]:
    if (folder / SINGLE).is_file():
        return scan_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ModelError(f"{folder / INDEX} has no 'weight_map' that names a file per tensor.")
    stored: dict[str, dict[str, Entry | None]] = {}
    problems, lost = [], []
    for shard in sorted(set(names.values())):
        if (folder / shard).is_file():
            stored[shard], broken = scan_file(folder / shard)
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


def scan_file(file: Path) -> tuple[dict[str, Entry | None], list[str]]:
    """Returns the tensors of one safetensors file by its header, and what is wrong with it."""
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
    naming: Naming,
) -> list[str]:
    """Returns what keeps these tensors from being loaded, judged by names, shapes and types."""
    expected = {tensor.name: tensor for tensor in tensors}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    unexpected = [name for name in unexpected if not naming.is_known(name)]
    problems = [f"Missing: {group}." for group in group_names(missing)]
    problems += [f"Unexpected: {group}." for group in group_names(unexpected)]
    reasons: dict[str, list[str]] = {}
    for name, tensor in expected.items():
        if reason := unfit(stored.get(name), tensor):
            reasons.setdefault(reason, []).append(name)
    problems += [f"{group} {why}" for why, names in reasons.items() for group in group_names(names)]
    return problems


def unfit(stored: Stored | None, tensor: Tensor) -> str:
    """Returns why a stored tensor cannot be what a rule asks for, or an empty text."""
    if stored is None:
        return ""
    if problem := stored.problem():
        return problem
    if stored.shape != tensor.shape:
        return f"has shape {list(stored.shape)}; config.json asks for {list(tensor.shape)}."
    return ""


def differing(stored: Mapping[str, Stored | None], copies: Mapping[str, str]) -> list[str]:
    """Returns the problems of tensors that are to be copies of others and are not."""
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
