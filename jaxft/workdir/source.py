"""The origin of a model: a Hugging Face folder or id, or a run and one of its checkpoints."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from jaxft.config import RunConfig
from jaxft.errors import CheckpointError, ConfigError, ModelError
from jaxft.hf.folder import ModelFolder
from jaxft.hf.hub import resolve
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.training.adaptation import adapted, quantised
from jaxft.workdir.adapter_note import AdapterNote, read_note
from jaxft.workdir.checkpoint import Checkpoints


@dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
      folder: Hugging Face folder: of the model itself, or the one that a run keeps beside its
        checkpoints, without weights.
      checkpoints: Folder of the run's checkpoints, if the weights are there.
      step: Step of the checkpoint.
      path: Path or id in the user's spelling.
      choice: Reason for this step, such as "the best".
    """

    folder: Path
    checkpoints: Path | None = None
    step: int = 0
    path: str = ""
    choice: str = ""

    @functools.cached_property
    def described(self) -> ModelFolder:
        """The small files of the folder, each read once."""
        return ModelFolder(self.folder)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """Shape and naming of the stored model; raises ModelError if it is not supported."""
        found = architecture_from_hf(self.described.config)
        if self.note is None:
            return found
        return dataclasses.replace(found, adaptation=self.note.adaptation)

    @functools.cached_property
    def note(self) -> AdapterNote | None:
        """The adapter of a run that trained one, without its values."""
        return None if self.checkpoints is None else read_note(self.folder)

    @functools.cached_property
    def base(self) -> "Source":
        """The model that the run's adapter is made for.

        Raises:
          CheckpointError: If it is not where it was.
        """
        assert self.note is not None
        try:
            return find_source(self.note.base, revision=self.note.revision)
        except (ModelError, ConfigError) as error:
            raise CheckpointError(
                f"{self.name} is an adapter of {self.note.base}, which cannot be read: {error}"
            ) from error

    @property
    def name(self) -> str:
        """The model in words: its path, and which checkpoint of it."""
        if self.checkpoints is None:
            return self.path or str(self.folder)
        choice = f" ({self.choice})" if self.choice else ""
        return f"{self.checkpoints.parent}, step {self.step}{choice}"


def is_run(path: str | Path) -> bool:
    """Returns whether a path is the workdir of a run: a folder of checkpoints and of a model."""
    folder = Path(path).expanduser()
    return (folder / "checkpoints").is_dir() and (folder / "model").is_dir()


def find_source(
    path_or_repo_id: str | Path, *, revision: str = "", step: str = "best", weights: bool = True
) -> Source:
    """Tells a Hugging Face folder or id from a run's workdir or one of its checkpoints.

    Args:
      path_or_repo_id: Folder with config.json and safetensors, repository id, workdir of a run,
        or `workdir/checkpoints/120`.
      revision: Branch, tag or commit of a repository id.
      step: For a workdir: `best` (lowest validation loss, the newest if none was evaluated),
        `latest`, or a number.
      weights: Whether a repository's weights are needed.

    Raises:
      ConfigError: If a step is named of what has none.
      ModelError: If there is no such folder or repository.
      CheckpointError: If the workdir has no such checkpoint.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.name in ("", ".."):  # as in `--checkpoint=.` within the folder
        path = path.resolve()
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        if step not in ("best", path.name):
            raise ConfigError(
                f"{path} is the checkpoint of step {path.name}, and the step asked for is {step}. "
                f"Leave --step out, or name the run: {path.parent.parent}."
            )
        path, step = path.parent.parent, path.name
    if not is_run(path):
        name = str(path_or_repo_id)
        if step != "best":
            raise ConfigError(
                f"{name} is not the folder of a run, so it has no step {step!r}. Leave --step out, "
                "or name the run's workdir."
            )
        return Source(resolve(name, revision=revision, weights=weights), path=name)
    folder = resolve(str(path), revision=revision) / "checkpoints"
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    best = checkpoints.best_step()
    checkpoints.close()
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint; the run saved none yet.")
    if step not in ("best", "latest") and not (step.isdecimal() and int(step) in steps):
        raise CheckpointError(
            f"{folder} has no checkpoint {step!r}; it has {', '.join(map(str, steps))}. Name one "
            "of them, 'best' or 'latest'."
        )
    named = {"latest": steps[-1], "best": steps[-1] if best is None else best}
    choice = {"latest": "the newest", "best": "the best"}.get(step, "")
    if step == "best" and best is None:
        choice = "the newest; none was evaluated"
    number = named[step] if step in named else int(step)
    return Source(path / "model", folder, number, str(path), choice)


def find_architecture(config: RunConfig) -> Architecture:
    """Reads a run's model from its config.json, of a folder or the hub; no weights are needed.

    What the run learns beside the model is part of it, and the type that holds its weights. As no
    tokenizer is read, added tokens have the first ids, and the tables no rows more.

    Raises:
      ModelError: If there is no such model, or it is not supported.
      ConfigError: If the run's adapter cannot be.
    """
    model = config.model
    found = find_source(model.path, revision=model.revision, weights=False).architecture
    if not found.adaptation:
        added = range(len(model.added_tokens))
        found = adapted(found, config.adapter, added=added, whole=model.random_init)
    return quantised(found, model.quantise)
