"""Finds the files and hub data sets that a line such as `data.train` names."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from jaxft.config import DataConfig
from jaxft.data import content
from jaxft.data.files import File
from jaxft.data.sources import Source
from jaxft.data.specs import SourceSpec, parse_specs
from jaxft.errors import ConfigError, DataError, collected, nearest, searched

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""From words in file names to the splits that the hub's own library makes of them."""
_HUB_ID = re.compile(
    r"(?P<name>[^\s:\[\]]+)(?::(?P<config>[\w.\-+]+))?(?:\[(?P<split>[^\[\]]+)\])?"
)


def find_sources(
    text: str, config: DataConfig | None = None, *, training: bool = True
) -> list[Source]:
    """Resolves files, folders, globs and hub ids, in the order given.

    Args:
      text: As `parse_specs` reads it, such as `a.jsonl,more/*.csv` or `org/name:config[split]`.
      config: How sources are read that do not say, and whether hub data sets are streamed.
      training: A hub id without a split means 'train', otherwise 'validation'.

    Raises:
      ConfigError: For options of a source that cannot be understood.
      DataError: For files that are not there, with the nearest name, all at once.
    """
    config = config or DataConfig()
    sources: list[Source] = []
    problems: list[str] = []
    for spec in parse_specs(text, config):
        with collected(problems):
            sources += _find(spec, config, training)
    if problems:
        raise DataError(problems)
    if not sources:
        raise ConfigError("No data is named; set --config.data.train to files, globs or hub ids.")
    return sources


def _find(spec: SourceSpec, config: DataConfig, training: bool) -> Sequence[Source]:
    found = _find_files(spec)
    if not found and (hub := _hub_source(spec, config.streaming, training)) is not None:
        if spec.names_split:
            raise DataError(
                f"{spec.name} is a hub data set, so that 'text_split={spec.text_split}' does not "
                "apply; leave it out. It says where plain text is cut into documents."
            )
        return [hub]
    if not found:
        raise DataError(_missing(spec.name))
    if spec.names_split:
        _check_text(found)
    return found


def _check_text(files: list[File]) -> None:
    """Raises DataError for files with rows, which are not split as text is."""
    problems = [
        f"{file.name} holds {file.kind}, so that 'text_split={file.spec.text_split}' does not "
        "apply; leave it out. It says where plain text is cut into documents."
        for file in files
        if file.kind != "text"
    ]
    if problems:
        raise DataError(problems)


def _find_files(spec: SourceSpec) -> list[File]:
    path = Path(spec.name).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = _find_in_folder(path)
    else:
        paths = sorted(Path(item) for item in glob.glob(str(path), recursive=True))
    paths = [item for item in paths if item.is_file()]
    return [File(str(item), spec=spec, path=item) for item in paths]


def _find_in_folder(folder: Path) -> list[Path]:
    """Returns the data files of a folder, without those that only describe the data.

    A folder whose data lie in folders below gives none: it is read in the layout of the hub.

    Raises:
      DataError: If the files are of several parts, such as training and test.
    """
    paths = [path for path in _visible_files(folder, "*") if content.suffix_of(path) != ".md"]
    tables = [path for path in paths if _is_table(path)]
    below = [path for path in _visible_files(folder, "*/*") if _is_table(path)]
    if below and not tables:
        return []
    paths = tables or paths
    named = [path for path in below if _split_of(path.name) or _split_of(path.parent.name)]
    splits = {path: split for path in paths if (split := _split_of(path.name))}
    if named or len(set(splits.values())) > 1:
        parts = [*paths, *named]
        shown = ", ".join(str(path.relative_to(folder)) for path in parts[:8])
        raise DataError(
            f"Folder {str(folder)!r} has data of several parts: {shown}"
            f"{', …' if len(parts) > 8 else ''}. Name the files that are meant, such as "
            f"{str(parts[0])!r}, or the part, such as '{folder}[train]'."
        )
    return paths


def _is_table(path: Path) -> bool:
    return content.suffix_of(path) in content.TABLE_SUFFIXES


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in folder.glob(pattern)
        if content.suffix_of(path) in content.SUFFIXES
        and path.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _split_of(name: str) -> str:
    """Returns the part of a data set that the name of a file or folder tells of, or ''."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _hub_source(spec: SourceSpec, streaming: bool, training: bool) -> Source | None:
    match = _HUB_ID.fullmatch(spec.name)
    if match is None:
        return None
    name = match["name"]
    if not Path(name).is_dir() and (
        name.startswith((".", "/", "~"))
        or content.suffix_of(Path(name)) in content.SUFFIXES
        or name.count("/") != 1
    ):
        return None
    from jaxft.data.hub import HubSource  # takes seconds to import, and few runs need it

    split = match["split"] or ("train" if training else "validation")
    return HubSource(
        name,
        spec=spec,
        split=split,
        configuration=match["config"] or "",
        streaming=streaming,
    )


def _missing(part: str) -> str:
    path = Path(part).expanduser()
    if any(character in part for character in "*?["):
        return f"No file matches {part!r}.{searched(part)}"
    if path.parent.is_dir():
        names = [item.name for item in path.parent.iterdir()]
        return f"There is no file {part!r}.{nearest(path.name, names)}{searched(part)}"
    return f"There is no file {part!r}, and no folder {str(path.parent)!r}.{searched(part)}"
