"""Reads data sets of the Hugging Face hub, or of a local folder in their layout."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from jaxft.data.problems import Problems
from jaxft.data.sources import Source, drop_filler, place_of
from jaxft.errors import DataError, nearest

_PATIENCE = 10.0
"""Seconds until a hub that does not answer counts as out of reach."""

# The library prints its warnings itself; the root logger would print them a second time.
logging.getLogger("huggingface_hub").propagate = False


@dataclass(frozen=True)
class HubSource(Source):
    """One split of a hub data set; the name is its repository id, or a local folder.

    Attributes:
      configuration: Name of a configuration; empty for the only one.
      streaming: Read over the network row by row, without downloading the files first.
    """

    configuration: str = field(default="", kw_only=True)
    streaming: bool = field(default=False, kw_only=True)

    @property
    def is_streamed(self) -> bool:
        """Whether rows come over the network one by one."""
        return self.streaming

    def origin(self, line: int, number: int = 0) -> str:
        """Returns `org/name:config[split]:row`."""
        configuration = f":{self.configuration}" if self.configuration else ""
        return place_of(f"{self.name}{configuration}[{self.split}]", line, number)

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

    def _values(self, problems: Problems) -> Iterator[tuple[Any, int]]:
        """Yields rows; labels stored as numbers are given their names."""
        data = self._load()
        labels = {
            name: feature
            for name, feature in (data.features or {}).items()
            if isinstance(feature, datasets.ClassLabel)
        }
        try:
            for line, value in enumerate(data, start=1):
                row = drop_filler(value)
                for name, feature in labels.items():
                    if row[name] is not None and row[name] >= 0:
                        row[name] = feature.int2str(row[name])
                yield row, line
        except Exception as error:  # the network, or a file that is not like the others
            raise self._explain(error) from error

    def _load(self) -> Any:
        with self._cache_alone_if_out_of_reach():
            try:
                return datasets.load_dataset(
                    self.name,
                    self.configuration or None,
                    split=self.split,
                    streaming=self.streaming,
                )
            except Exception as error:  # the library's errors share no class and name few remedies
                raise self._explain(error) from error

    @contextlib.contextmanager
    def _cache_alone_if_out_of_reach(self) -> Iterator[None]:
        """Asks the hub once; the library would try six times before it looks into its cache."""
        if constants.HF_HUB_OFFLINE or Path(self.name).is_dir():
            yield
            return
        try:
            HfApi().dataset_info(self.name, timeout=_PATIENCE)
        except (HfHubHTTPError, ValueError):  # it answered, and the library tells what is wrong
            yield
        except Exception as error:  # the client passes on the errors of the transport it uses
            before = constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE
            constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = True
            try:
                yield
            except DataError:
                raise DataError(
                    f"Data set {self.origin(1).rpartition(':')[0]!r} is neither a file nor in the "
                    f"cache, and {constants.ENDPOINT} cannot be reached: {error}."
                ) from error
            finally:
                constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE = before
        else:
            yield

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
