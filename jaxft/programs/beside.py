"""Tensors beside the model that is trained: towers for images, and what nothing here reads.

They are never loaded. A run notes whose they are and a hash of them; an export takes them from
there, byte for byte but for those in FP8, which are decoded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.errors import JaxftError, ModelError
from jaxft.files import stamps, write_json
from jaxft.hf.decoded import Passed
from jaxft.hf.folder import read_json
from jaxft.hf.hub import found_anywhere, resolve
from jaxft.hf.stored import other_tensors
from jaxft.models.families import Architecture
from jaxft.workdir.source import Source

NOTE = "other_tensors.json"
# What processors of images read; a chat template in JSON is theirs, too.
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def note_others(source: Source, architecture: Architecture, folder: Path) -> None:
    """Notes in a run's folder of its model what lies beside the model that it starts with.

    Args:
      source: The model that the run starts with.
      architecture: Of the model; nothing is noted unless it is a part of a whole.
      folder: Where the note goes; `find_others` reads it.
    """
    origin = source if source.base is None else source.base
    if not architecture.naming.others:
        return
    if origin.checkpoints is not None:
        if (origin.folder / NOTE).is_file():
            (folder / NOTE).write_bytes((origin.folder / NOTE).read_bytes())
    elif any(origin.folder.glob("*.safetensors")):
        found = other_tensors(origin.folder, architecture.naming)
        note = {
            "path": found_anywhere(origin.path or str(origin.folder)),
            "revision": origin.revision,
            "tensors": len(found),
            "digest": digest_of(found),
        }
        write_json(folder / NOTE, note)


def find_others(source: Source, architecture: Architecture) -> dict[str, Passed]:
    """Returns the tensors that belong beside a model, where they lie now.

    Args:
      source: What is exported; `beside` names where they are, if not where they were.
      architecture: Of the model.

    Raises:
      ModelError: If they are gone, or are not those that a run started beside.
    """
    origin = source if source.base is None else source.base
    if not architecture.naming.others:
        return {}
    if origin.checkpoints is None:
        return other_tensors(origin.folder, architecture.naming)
    is_part = architecture.naming.alone is not None
    what = (
        "the text of a multimodal model"
        if is_part
        else "a model whose files hold more than is read"
    )
    if not (origin.folder / NOTE).is_file():
        if not source.beside:
            if not is_part:  # it has had no weights but its own
                return {}
            raise ModelError(
                f"{source.name} is {what}, and does not say where the rest "
                "of it is. Name a folder or repository that holds the whole with --base."
            )
        return other_tensors(resolve(source.beside), architecture.naming)
    note = read_json(origin.folder / NOTE)
    if not note["tensors"]:
        return {}
    path = source.beside or note["path"]
    try:
        folder = resolve(path, revision="" if source.beside else note["revision"])
        found = other_tensors(folder, architecture.naming)
    except JaxftError as error:
        raise ModelError(
            f"{source.name} is {what}, whose {note['tensors']} other "
            f"tensors are those of {path}, which cannot be read: {error} If they are elsewhere "
            "now, name that folder or repository with --base."
        ) from error
    if len(found) != note["tensors"] or digest_of(found) != note["digest"]:
        raise ModelError(
            f"{path} holds {len(found)} tensors beside its model that are not the "
            f"{note['tensors']} beside which {source.name} was trained. Restore them, or name a "
            "folder or repository that has them with --base."
        )
    return found


def digest_of(entries: Mapping[str, Passed]) -> str:
    """Returns a hash of names, types, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        found.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode())
        for part in entry.parts():
            found.update(part.data)
    return found.hexdigest()[:32]


def differing(entries: Mapping[str, Passed], written: Mapping[str, Passed]) -> list[str]:
    """Returns the names of tensors that are not in both, or not byte for byte the same."""
    found, expected = (
        {name: digest_of({name: entry}) for name, entry in side.items()}
        for side in (entries, written)
    )
    return sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))


def identity_of(entries: Mapping[str, Passed]) -> list[Any]:
    """Returns what changes if the files that tensors lie in do."""
    return stamps(sorted({entry.file for entry in entries.values()}))


def copy_files(source: Path, target: Path) -> None:
    """Copies what processors of images read, from one folder to another."""
    for name in FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
