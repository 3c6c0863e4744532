"""Folders that are built once under a name that says all that they depend on."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxft.errors import DataError

DEFAULT_FOLDER = "~/.cache/jaxft/data"


def make_key(ingredients: dict[str, Any]) -> str:
    """Returns a name that changes whenever any ingredient does."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_or_build(folder: Path, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Returns the folder of a key and whether it was there already.

    A folder appears under its name only when it is complete, so a killed process leaves nothing
    that a later one could take for whole, and of two processes that build the same one wins.

    Args:
      folder: Where the cache lies.
      key: From `make_key`, after a word saying what it is.
      build: Fills the folder it is given.

    Raises:
      DataError: If the disk is full or the folder cannot be written.
    """
    target = folder / key
    with explained(folder):
        if target.is_dir():
            return target, True
    with publishing(folder, key) as building:
        build(building)
    return target, False


@contextlib.contextmanager
def publishing(folder: Path, key: str, what: str = "tokenised rows") -> Iterator[Path]:
    """Gives a block an empty folder to fill, which then appears under its name.

    Args:
      folder: Where the cache lies.
      key: As for `find_or_build`.
      what: What is kept there, for errors.

    Raises:
      DataError: If the disk is full or the folder cannot be written.
    """
    building = folder / f".{key}.{uuid.uuid4().hex}"
    try:
        with explained(folder, what):
            building.mkdir(parents=True)
            yield building
            _publish(building, folder / key)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def explained(folder: Path, what: str = "tokenised rows") -> Iterator[None]:
    """Turns what the system says of the cache into a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"The disk is full: {what} did not fit into {str(folder)!r}. Free some "
                "space, or set --config.data.cache to a folder elsewhere."
            ) from error
        raise DataError(
            f"{what[0].upper()}{what[1:]} cannot be written to {str(folder)!r}: {error}. Set "
            "--config.data.cache to a folder that you may write to."
        ) from error


def _publish(building: Path, target: Path) -> None:
    try:
        os.rename(building, target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same content
            raise


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides which ids a text gets."""
    parts = [type(tokenizer).__name__, sorted(tokenizer.special_tokens_map.items(), key=str)]
    if tokenizer.is_fast:
        # What stands before it is what the last call asked for: truncation and padding.
        parts.append(tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2])
    else:
        parts += [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
