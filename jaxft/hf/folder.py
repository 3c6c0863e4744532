"""The small files of a Hugging Face folder, read once."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import ModelError
from jaxft.hf.hub import lfs_hint
from jaxft.hf.kinds import explain_folder
from jaxft.hf.tokenizer import has_tokenizer, load_tokenizer, stop_ids


@dataclass(frozen=True)
class ModelFolder:
    """A folder that describes a model, with or without its weights.

    Each file is read when it is asked for first, and never again.

    Attributes:
      path: The folder.
      other_tokenizer: Folder that holds the tokenizer, if it is another one.
    """

    path: Path
    other_tokenizer: Path | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json; raises ModelError as `read_config` does."""
        return read_config(self.path)

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """Content of generation_config.json; empty if there is none."""
        file = self.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer."""
        return self.other_tokenizer or self.path

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds the files of a tokenizer."""
        return has_tokenizer(self.tokenizer_path)

    def load_tokenizer(self) -> Any:
        """Returns the tokenizer, None if the folder has none.

        Raises:
          ModelError: If its files cannot be read.
        """
        return load_tokenizer(self.tokenizer_path) if self.has_tokenizer else None

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Returns the tokens that end an answer by the tokenizer and both config files, sorted."""
        return stop_ids(tokenizer, self.generation, self.config)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
      ModelError: If it is missing or broken, with what the folder holds in place of a model, or
        says that the weights are quantised; those in MXFP4 and in blocks of FP8 pass, because
        `load_params` decodes them.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if not config.get("model_type") and (text := explain_folder(folder)):
        raise ModelError(text)
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; it is not a complete Hugging Face folder.")
    method = quantisation(config).get("quant_method", "unknown")
    decoded = method == "mxfp4" or (method == "fp8" and fp8_block(config) is not None)
    if quantisation(config) and not decoded:
        raise ModelError(
            f"{folder} holds weights quantised by {method!r} (quantization_config in config.json), "
            "which cannot be trained; only MXFP4 and FP8 in blocks (fmt 'e4m3' with a "
            "weight_block_size of rows and columns) are decoded. Use the repository of the "
            "original weights."
        )
    return config


def quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what config.json says of how weights are quantised; empty if they are not."""
    return config.get("quantization_config") or {}


def fp8_block(config: dict[str, Any]) -> tuple[int, int] | None:
    """Returns rows and columns of the blocks of FP8 that have factors; None without such blocks."""
    found = quantisation(config)
    if found.get("quant_method") != "fp8" or found.get("fmt", "e4m3") != "e4m3":
        return None
    block = found.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    if not all(type(side) is int and side > 0 for side in block):
        return None
    return rows, columns


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
