"""Reads data sets of the Hugging Face hub, or of a local folder in their layout."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from jaxft.data.problems import Problems
from jaxft.data.sources import Row, Source, drop_filler
from jaxft.errors import DataError, nearest


@dataclass(frozen=True)
class HubSource(Source):
    """One split of a hub data set; the name is its repository id, or a local folder.

    Attributes:
      configuration: Name of a configuration; empty for the only one.
      streaming: Read over the network row by row, without downloading the files first.
    """

    configuration: str = field(default="", kw_only=True)
    streaming: bool = field(default=False, kw_only=True)

    def origin(self, line: int) -> str:
        """Returns `org/name:config[split]:row`."""
        configuration = f":{self.configuration}" if self.configuration else ""
        return f"{self.name}{configuration}[{self.split}]:{line}"

    def fingerprint(self) -> str:
        """The commit of a streamed repository, otherwise the fingerprint of the prepared files."""
        if not self.streaming:
            return str(self._load()._fingerprint)
        folder = Path(self.name)
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return repr(
                [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            )
        try:
            return str(HfApi().dataset_info(self.name).sha)
        except Exception as error:
            raise self._explain(error) from error

    def rows(self, problems: Problems) -> Iterator[Row]:
        """Yields rows; labels stored as numbers are given their names."""
        data = self._load()
        labels = {
            name: feature
            for name, feature in (data.features or {}).items()
            if isinstance(feature, datasets.ClassLabel)
        }
        for line, value in enumerate(data, start=1):
            row = drop_filler(value)
            for name, feature in labels.items():
                if row[name] is not None and row[name] >= 0:
                    row[name] = feature.int2str(row[name])
            yield Row(row, line)

    def _load(self) -> Any:
        try:
            return datasets.load_dataset(
                self.name,
                self.configuration or None,
                split=self.split,
                streaming=self.streaming,
            )
        except Exception as error:  # the library's errors share no class and name few remedies
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> DataError:
        if isinstance(error, GatedRepoError):
            return DataError(
                f"Data set {self.name!r} is gated: accept its terms on "
                f"https://huggingface.co/datasets/{self.name} and log in with `hf auth login`."
            )
        if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError):
            return DataError(
                f"There is no file and no hub data set {self.name!r}. Check the spelling; a "
                "private one needs `hf auth login`."
            )
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        reason = " HF_HUB_OFFLINE is set, so only what is cached can be read." if offline else ""
        return DataError(
            f"Data set {self.origin(1).rpartition(':')[0]!r} cannot be loaded: "
            f"{type(error).__name__}: {error}.{self._splits(error)}{reason}"
        )

    def _splits(self, error: Exception) -> str:
        if not (isinstance(error, ValueError) and "split" in str(error).lower()):
            return ""
        try:
            names = datasets.get_dataset_split_names(self.name, self.configuration or None)
        except Exception:
            return ""
        return f" Its splits are {', '.join(names)}.{nearest(self.split, names)}"
