"""The folder a run writes to: its layout, who may use it, and writes that are never half done."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig, held_out_share, to_dict
from jaxft.errors import CheckpointError, ConfigError, nearest_of
from jaxft.files import TEMPORARY, write_error, write_json
from jaxft.models.activations import AUTO
from jaxft.workdir.environment import environment
from jaxft.workdir.lock import Lock, hold

# Keys on which "the run goes on where it stopped" depends; others may change and are reported.
_FIXED = (
    "model.",
    "data.",
    "objective.",
    "adapter.",
    "train.seed",
    "train.batch_size",
    "optim.freeze",
    "optim.name",
    "optim.moments",
    "optim.ema",
)
_FREE = (
    "model.attention",
    "model.remat",
    "model.offload",
    "data.cache",
    "data.bad_share",
    "data.validation",
    "objective.chunk",
    "objective.reference",
)
# Where the weights are that an adapter is made for.
_OF_A_BASE = ("model.path", "model.revision")
_LOCK = "run.lock"
_FILES = (
    _LOCK,
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "eval.jsonl",
    "samples.jsonl",
    "skipped.jsonl",
    "reference.json",
    "goodput.jsonl",
    "report.html",
    "result.json",
)
_FOLDERS = ("events", "checkpoints", "model", "profile", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workdir:
    """A run's folder. `Workdir.check` and `begin` make one; `read` looks at one that is there.

    Attributes:
      path: The folder.
      resumed: Whether it holds an earlier part of this run.
      changes: One text per configuration key that differs from that part.
    """

    path: Path
    resumed: bool = False
    changes: tuple[str, ...] = ()

    def name(self, config: Mapping[str, Any]) -> str:
        """Returns what the run is called by its resolved configuration."""
        return config.get("train.name") or self.path.name

    @property
    def config(self) -> Path:
        """Resolved configuration, `{dotted path: value}`."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions and devices, from `environment()`."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per log step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object per evaluation and data set."""
        return self.path / "eval.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object per generated answer."""
        return self.path / "samples.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per bad row that the data was read without."""
        return self.path / "skipped.jsonl"

    @property
    def reference(self) -> Path:
        """Record of the weights a preference run compares with, from `programs.reference`."""
        return self.path / "reference.json"

    @property
    def goodput(self) -> Path:
        """One JSON object per part of the run that came to its end, from `workdir.goodput`."""
        return self.path / "goodput.jsonl"

    @property
    def report(self) -> Path:
        """The page that `jaxft.reporting.report` writes."""
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """The end of the run; absent while it is under way, and after it was killed."""
        return self.path / "result.json"

    @property
    def events(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "events"

    @property
    def profile(self) -> Path:
        """Folder of traces, from `programs.profiler`."""
        return self.path / "profile"

    @property
    def model(self) -> Path:
        """Folder of config.json, tokenizer and chat template; checkpoints are read with these."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def has_report_since(self, step: int) -> bool:
        """Whether the report was written after the checkpoint of a step."""
        report, checkpoint = self.report, self.checkpoints / str(step)
        return report.is_file() and report.stat().st_mtime >= checkpoint.stat().st_mtime

    @classmethod
    def check(
        cls, path: str | Path, config: RunConfig, *, resume: bool, overwrite: bool
    ) -> "Workdir":
        """Says whether a run may use the folder; changes nothing before `begin`.

        A folder in which a start failed before its first record counts as empty. Resuming where
        there is no run starts one, so that a restarted job needs no other command.

        Raises:
          ConfigError: If the configuration is wrong, or both flags are set.
          CheckpointError: If the folder holds a run and neither flag is set, if a key that the
            continuation depends on has changed, or if files would be deleted that no run made.
        """
        if resume and overwrite:
            raise ConfigError(
                "--resume continues the run in the folder and --overwrite deletes it; give one."
            )
        config.validate()
        folder = absolute(path)
        with explained(folder):
            return cls._check(folder, config, resume=resume, overwrite=overwrite)

    @classmethod
    def _check(cls, folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> "Workdir":
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(
                f"{folder} is a file; a run needs a folder. Name one with --config.train.workdir=…."
            )
        if not _holds_run(folder):
            _refuse_files_of_others(folder)
            return cls(path=folder)
        if resume:
            return cls._continue(folder, config)
        if overwrite:
            _refuse_foreign_files(folder)
            return cls(path=folder)
        raise CheckpointError(
            f"{folder} holds another run. Continue it with --resume, delete it with --overwrite, "
            "or name another folder with --config.train.workdir=…."
        )

    @classmethod
    def read(cls, path: str | Path) -> "Workdir":
        """Returns the workdir of an existing run.

        Raises:
          CheckpointError: If the folder holds none.
        """
        folder = absolute(path)
        with explained(folder):
            has_config = (folder / "config.json").is_file()
        if not has_config:
            raise CheckpointError(f"{folder} is no run's folder: it has no config.json.")
        return cls(path=folder, resumed=True)

    @classmethod
    def _continue(cls, folder: Path, config: RunConfig) -> "Workdir":
        changes = _changes(folder / "config.json", config)
        fatal = [text for text, is_fixed in changes if is_fixed]
        if fatal:
            raise CheckpointError(
                [
                    f"{folder} cannot be resumed, because the run would not go on where it "
                    "stopped. Restore these keys, or start a run in another folder:",
                    *fatal,
                ]
            )
        return cls(path=folder, resumed=True, changes=tuple(text for text, _ in changes))

    def recorded(self, key: str) -> Any:
        """Returns the value that a key had in the run, or its default if it was not there yet."""
        return (to_dict(RunConfig()) | _read_config(self.config))[key]

    def begin(self, config: RunConfig) -> None:
        """Deletes an earlier run, unless it is resumed, and describes this one.

        Raises:
          CheckpointError: If the folder cannot be made.
        """
        with explained(self.path):
            if not self.resumed:
                _remove_run(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, to_dict(config))
        write_json(self.environment, environment())


def absolute(path: str | Path) -> Path:
    """Returns the folder that `train.workdir` names, under a name of its own: no `.` or `..`.

    Raises:
      ConfigError: If it begins with the home of a user who has none.
    """
    try:
        whole = Path(path).expanduser().absolute()
        return whole.resolve() if ".." in whole.parts else whole
    except RuntimeError as error:
        raise ConfigError(f"train.workdir is {str(path)!r}: {error}.") from error


def nearest_run(folder: Path) -> str:
    """Returns the name most like the folder's among the runs beside it, or an empty string."""
    beside = [p.name for p in folder.parent.glob("*/") if p != folder and _holds_run(p)]
    return nearest_of(folder.name, beside, cutoff=0.5)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Lock]:
    """Keeps other runs out of a folder during the block; it is made if it is not there.

    A block that leaves a new folder empty leaves none.

    Raises:
      CheckpointError: If another run is using it, or it cannot be made or written to.
    """
    with contextlib.ExitStack() as stack:
        with explained(folder):
            for made in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                made.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, made)
            lock = stack.enter_context(hold(folder / _LOCK))
        yield lock


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what the system says of a run's folder into a CheckpointError."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError is of characters that no name can have
        raise _unusable(folder, error) from error


@contextlib.contextmanager
def explained_files(folder: Path) -> Iterator[None]:
    """Turns what the system says of files in a run's folder into a JaxftError."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str) or folder not in Path(error.filename).parents:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise write_error(Path(error.filename), error) from error
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be the folder of a run: {_reason(folder, error)}. Name another one with "
        "--config.train.workdir=…."
    )


def _reason(folder: Path, error: Exception) -> str:
    for path in (*reversed(folder.parents), folder):
        with contextlib.suppress(OSError, ValueError):
            if path.is_file():
                return f"{path} is a file"
            if path.is_symlink() and not path.exists():
                return f"{path} is a link to {os.readlink(path)}, where there is nothing"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or folder}: {error.strerror}"
    return str(error)


def _holds_run(folder: Path) -> bool:
    records = (folder / "metrics.jsonl", folder / "eval.jsonl")
    if any(path.is_file() and path.stat().st_size for path in records):
        return True
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _refuse_files_of_others(folder: Path) -> None:
    """Raises CheckpointError if names that a run uses are taken by what no run made."""
    taken = [n for n in (*_FILES, *_FOLDERS) if n != _LOCK and (folder / n).exists()]
    if taken == ["result.json"] and {"status", "reason", "problems"} <= _keys(folder / taken[0]):
        return  # of a start that was refused
    described = _keys(folder / "config.json")
    ours = bool(described) and described <= set(to_dict(RunConfig()))
    if taken and not ours:
        raise CheckpointError(
            f"{folder} holds {', '.join(taken)}, which no run of jaxft made and which a run would "
            "replace. Name another folder with --config.train.workdir=…."
        )


def _keys(path: Path) -> set[str]:
    """Returns the keys of a JSON object; none if there is no such file, or it holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return set(found) if isinstance(found, dict) else set()


def _refuse_foreign_files(folder: Path) -> None:
    foreign = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in (*_FILES, *_FOLDERS) and not path.name.startswith(TEMPORARY)
    )
    if foreign:
        shown = ", ".join(foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise CheckpointError(
            f"--overwrite will not delete {folder}: it also holds {shown}, which no run makes. "
            "Move that away, or name another folder with --config.train.workdir=…."
        )


def _remove_run(folder: Path) -> None:
    leftovers = list(folder.glob(f"{TEMPORARY}*")) if folder.is_dir() else []
    named = [folder / name for name in (*_FOLDERS, *_FILES) if name != _LOCK]
    for path in [*named, *leftovers]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_fixed(key: str, values: Iterable[Any], config: RunConfig) -> bool:
    if key == "data.validation" and any(map(held_out_share, values)):
        return True  # what is held out is not trained
    if key in _OF_A_BASE and config.adapter.is_used and not config.model.random_init:
        return False  # the base may have moved: its weights are compared with what was noted
    if key == "optim.beta1" and config.optim.name == "schedule_free":
        return True  # the parameters are made of it and of the average that is evaluated
    return key.startswith(_FIXED) and key not in _FREE


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), so it is unknown what would be resumed. Restore "
            "it, or start a run in another folder."
        ) from error


def _changes(path: Path, config: RunConfig) -> list[tuple[str, bool]]:
    """Returns for each key that changed a text, and whether the run cannot go on with it."""
    old = _read_config(path)
    new, defaults = to_dict(config), to_dict(RunConfig())
    old = defaults | {key: value for key, value in old.items() if key in new}
    return [
        (
            f"{key} was {old[key]!r} and is now {new[key]!r}.",
            _is_fixed(key, (old[key], new[key]), config),
        )
        for key in new
        if old[key] != new[key] and key != "train.workdir" and not _is_left_open(key, new[key])
    ]


def _is_left_open(key: str, value: Any) -> bool:
    """Whether a run takes for a key's value what it took before."""
    return key == "model.remat" and value == AUTO
