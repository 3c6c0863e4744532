"""The note that a run keeps of its adapter: where it lies, and on which model."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError
from jaxft.files import write_json
from jaxft.models.adapters import Adaptation
from jaxft.models.weights import Site

FILE = "adapter.json"


@dataclass(frozen=True, slots=True)
class AdapterNote:
    """An adapter without its values.

    Attributes:
      adaptation: Sites of the adapter, and the further parts that are learnt.
      base: Path or repository id of the model that it is made for.
      revision: Branch, tag or commit of a repository id.
      digest: Hash of that model's weights, from `programs.digests`.
      dtype: Type to which they are rounded for it: that in which the run held them.
      new_tokens: Ids of added tokens whose rows the model's files have as padding.
    """

    adaptation: Adaptation
    base: str
    revision: str
    digest: str
    dtype: str
    new_tokens: tuple[int, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes it beside the config.json of a run."""
        write_json(folder / FILE, dataclasses.asdict(self))


def read_note(folder: Path) -> AdapterNote | None:
    """Returns the note in a run's folder of its model; None if the run trained all of the model.

    Raises:
      CheckpointError: If it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return _from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: {error}. It says which weights the run's adapter belongs to; "
            "restore it from a copy."
        ) from error


def _from_json(values: dict[str, Any]) -> AdapterNote:
    adaptation = dict(values["adaptation"])
    adaptation["sites"] = {path: Site(**site) for path, site in adaptation["sites"].items()}
    adaptation["rows"] = tuple(adaptation["rows"])
    new_tokens = tuple(values["new_tokens"])
    rest = {name: values[name] for name in ("base", "revision", "digest", "dtype")}
    return AdapterNote(Adaptation(**adaptation), new_tokens=new_tokens, **rest)
