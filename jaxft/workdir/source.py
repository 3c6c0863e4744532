"""The origin of a model: a Hugging Face folder or id, or a run and one of its checkpoints.

A folder or a run may hold an adapter alone: then the model that it is made for is found as well.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from jaxft import console
from jaxft.config import RunConfig
from jaxft.errors import CheckpointError, ConfigError, ModelError
from jaxft.hf.folder import ModelFolder, read_json
from jaxft.hf.hub import found_anywhere, resolve
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.fields import understand
from jaxft.hf.peft.modules import CONFIG, WEIGHTS
from jaxft.hf.peft.read import read_adapter
from jaxft.hf.stored import INDEX, SINGLE
from jaxft.hf.tokenizer import has_tokenizer
from jaxft.models.adapter_files import adaptation_of
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.vocabulary import with_rows_for
from jaxft.training.adaptation import as_run
from jaxft.workdir.adapter_note import AdapterNote, read_note
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.workdir import Workdir

# Fields of a model's shape that tell it from another; an adapter may have grown its vocabulary.
_SHAPE = ("embed", "layers", "heads", "kv_heads", "head_dim", "mlp")


@dataclass(frozen=True)
class Source:
    """The origin of a model.

    Attributes:
      folder: Hugging Face folder: of the model itself, the one that a run keeps beside its
        checkpoints, without weights, or one of an adapter in PEFT's format.
      checkpoints: Folder of the run's checkpoints, if the weights are there.
      step: Step of the checkpoint.
      path: Path or id in the user's spelling.
      choice: Reason for this step, such as "the best".
      revision: Branch, tag or commit that was asked for of a repository.
      base: Model that an adapter is made for, and that is read from elsewhere.
      beside: Folder or repository of a multimodal model of which a run holds the text alone, where
        it is not the one that the run names.
    """

    folder: Path
    checkpoints: Path | None = None
    step: int = 0
    path: str = ""
    choice: str = ""
    revision: str = ""
    base: "Source | None" = None
    beside: str = ""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and no whole model."""
        return self.note is not None or self.is_peft

    @property
    def is_peft(self) -> bool:
        """Whether it is the folder of an adapter in PEFT's format."""
        is_adapter = (self.folder / CONFIG).is_file() and not _holds_model(self.folder)
        return self.checkpoints is None and is_adapter

    @functools.cached_property
    def described(self) -> ModelFolder:
        """The small files of the model, each read once; an adapter may have its own tokenizer."""
        if not self.is_peft or self.base is None:
            return ModelFolder(self.folder)
        base = self.base.described
        own = has_tokenizer(self.folder)
        return ModelFolder(base.path, self.folder if own else base.tokenizer_path)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """Shape and naming of the stored model; raises ModelError if it is not supported."""
        found = self._whole
        if self.is_peft:
            return dataclasses.replace(found, adaptation=adaptation_of(self.adapter))
        if self.note is None:
            return found
        return dataclasses.replace(found, adaptation=self.note.adaptation)

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The content of a folder in PEFT's format.

        Raises:
          ModelError: If it cannot be read, or is not an adapter of the base.
        """
        abstract = self._whole.abstract(make_numerics("float32"))
        shapes = {path: spec.shape for path, spec in abstract.params.items()}
        return read_adapter(self.folder, self._whole.naming, shapes)

    @functools.cached_property
    def _whole(self) -> Architecture:
        found = architecture_from_hf(self.described.config)
        if not self.is_peft:
            return found
        tokenizer = self.described.load_tokenizer()
        try:
            return with_rows_for(found, tokenizer)
        except ModelError as error:
            if self.base is None or not has_tokenizer(self.folder):
                raise
            raise ModelError(
                f"{self.name} is an adapter of another model than {self.base.name}: the tokenizer "
                f"beside it has more tokens than that model's embedding, {found.config.vocab} "
                "rows. Name the model that it was made for with --base."
            ) from error

    @functools.cached_property
    def note(self) -> AdapterNote | None:
        """The adapter of a run that trained one, without its values."""
        return None if self.checkpoints is None else read_note(self.folder)

    @property
    def name(self) -> str:
        """The model in words: its path, and which checkpoint of it."""
        if self.checkpoints is None:
            return self.path or str(self.folder)
        choice = f" ({self.choice})" if self.choice else ""
        return f"{self.checkpoints.parent}, step {self.step}{choice}"


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def _refuse_two(folder: Path, name: str) -> None:
    """Raises ModelError if a folder holds a model, and an adapter of perhaps another one."""
    if _holds_model(folder) and all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        raise ModelError(
            f"{name} holds a model and an adapter, {WEIGHTS}: which of the two is meant? Move the "
            f"adapter's files, {CONFIG} and {WEIGHTS}, to a folder of their own, and name that or "
            "this one."
        )


def is_run(path: str | Path) -> bool:
    """Returns whether a path is the workdir of a run: a folder of checkpoints and of a model."""
    folder = Path(path).expanduser()
    return (folder / "checkpoints").is_dir() and (folder / "model").is_dir()


def find_source(
    path_or_repo_id: str | Path,
    *,
    revision: str = "",
    step: str = "best",
    weights: bool = True,
    base: str = "",
    whole: bool = False,
) -> Source:
    """Tells a Hugging Face folder or id from a run's workdir or one of its checkpoints.

    Args:
      path_or_repo_id: Folder with config.json and safetensors, folder of an adapter in PEFT's
        format, repository id, workdir of a run, or `workdir/checkpoints/120`.
      revision: Branch, tag or commit of a repository id.
      step: For a workdir: `best` (lowest validation loss, the newest if none was evaluated),
        `latest`, or a number.
      weights: Whether a repository's weights are needed.
      base: Model that an adapter is made for, where it is no longer the one that the adapter
        names; found as `path_or_repo_id` is.
      whole: Whether the base may be the multimodal model of which a run holds the text alone.

    Raises:
      ConfigError: If a step is named of what has none, or a base of what is a whole model.
      ModelError: If there is no such folder or repository.
      CheckpointError: If the workdir has no such checkpoint.
    """
    found = _find_alone(path_or_repo_id, revision=revision, step=step, weights=weights)
    if found.is_adapter and not (found.note and found.note.adaptation.whole):
        return _with_base(found, base, "", weights=weights)
    if base and whole and found.checkpoints is not None and found.architecture.naming.others:
        return dataclasses.replace(found, beside=base)
    if base:
        held = "holds all its weights" if found.is_adapter else "is a whole model and no adapter"
        raise ConfigError(f"{found.name} {held}: it takes no other base ({base}).")
    return found


def find_start(config: RunConfig, *, weights: bool, step: str = "best") -> Source:
    """Returns the origin of the weights that a run starts with: a model, or an adapter beside it.

    Args:
      config: The run.
      weights: Whether a repository's weights are needed.
      step: Which checkpoint of an adapter's run, as for `find_source`.

    Raises:
      ConfigError: If `model.path` is an adapter, or `adapter.path` is none.
      ModelError: If there is no such folder or repository, or the adapter is none of this model.
      CheckpointError: If a workdir has no checkpoint.
    """
    model = config.model
    if not config.adapter.path:
        found = _find_alone(model.path, revision=model.revision, step="best", weights=weights)
        if found.is_adapter:
            raise ConfigError(
                f"model.path {model.path} is an adapter, not a whole model. To train it further, "
                f"set --config.adapter.path={model.path} and name its model by model.path. To "
                "start from both as one model, merge them: "
                f"jaxft export --merge --checkpoint={model.path} --output=FOLDER"
            )
        return found
    found = _find_alone(config.adapter.path, revision="", step=step, weights=weights)
    if not found.is_adapter:
        raise ConfigError(
            f"adapter.path {config.adapter.path} is a whole model, not an adapter. Name it by "
            "--config.model.path=…, and set --config.adapter.rank=16 for an adapter that starts."
        )
    if found.note is not None and found.note.adaptation.whole:
        raise ConfigError(
            f"adapter.path {config.adapter.path} belongs to random weights that its run alone has. "
            "Merge both, and name the result by model.path: "
            f"jaxft export --merge --checkpoint={config.adapter.path} --output=FOLDER"
        )
    return _with_base(found, model.path, model.revision, weights=weights)


def find_resumed(config: RunConfig, workdir: Workdir, step: int) -> Source | None:
    """Returns what a run goes on from: its own adapter, on `model.path`; None if it has none.

    Args:
      config: The run.
      workdir: Of the run.
      step: Of its newest checkpoint; 0 if there is none.

    Raises:
      ModelError: If there is no such model.
    """
    own = Source(workdir.model, workdir.checkpoints, step, str(workdir.path))
    if not step or own.note is None or own.note.adaptation.whole:
        return None
    return _with_base(own, config.model.path, config.model.revision, weights=True)


def _with_base(found: Source, base: str, revision: str, *, weights: bool) -> Source:
    """Returns an adapter with its model: the one that is named, else that which it names itself."""
    if base:
        source = _find_alone(base, revision=revision, step="best", weights=weights)
        _say_other_name(found, base)
    else:
        base, revision = _named_base(found)
        try:
            source = _find_alone(base, revision=revision, step="best", weights=weights)
        except (ModelError, ConfigError, CheckpointError) as error:
            raise ModelError(
                f"{found.name} is an adapter of {base}, which cannot be read: {error} If that "
                "model is elsewhere now, name it with --base."
            ) from error
    if source.is_adapter:
        raise ModelError(
            f"{base}, the base of the adapter {found.name}, is an adapter itself. Merge it "
            "(jaxft export --merge), and name the result with --base."
        )
    if found.note is not None:
        _refuse_another_shape(found, source)
    return dataclasses.replace(found, base=source)


def _refuse_another_shape(found: Source, base: Source) -> None:
    """Raises ModelError if a run's adapter was made for a model of another shape."""
    ours, theirs = found.architecture.config, base.architecture.config
    other = [name for name in _SHAPE if getattr(ours, name) != getattr(theirs, name)]
    if other:
        raise ModelError(
            f"{found.name} is an adapter of another model than {base.name}: "
            + ", ".join(
                f"{name} {getattr(ours, name)}, not {getattr(theirs, name)}" for name in other
            )
            + ". Name the model that it was made for with --base."
        )


def _say_other_name(found: Source, base: str) -> None:
    """Says so if an adapter in PEFT's format, which notes no weights, names another base."""
    named = understand(read_json(found.folder / CONFIG)).base if found.is_peft else ""
    if named and found_anywhere(named) != found_anywhere(base):
        console.log(
            f"The adapter {found.name} names {named} as its base, and is put beside {base}. Its "
            "format does not say of which weights it is: make sure that they are the same.",
            style="yellow",
        )


def _named_base(found: Source) -> tuple[str, str]:
    """Returns name and revision of the model that an adapter says it is made for."""
    if found.note is not None:
        return found.note.base, found.note.revision
    config = understand(read_json(found.folder / CONFIG))
    if not config.base:
        raise ModelError(
            f"{found.name} is an adapter, and its {CONFIG} does not say of which model "
            "(base_model_name_or_path). Name that with --base."
        )
    return config.base, config.revision


def _find_alone(path_or_repo_id: str | Path, *, revision: str, step: str, weights: bool) -> Source:
    """Returns a source without the model that it may be an adapter of."""
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
        folder = resolve(name, revision=revision, weights=weights)
        _refuse_two(folder, name)
        return Source(folder, path=name, revision=revision)
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
    if config.adapter.path:
        found = find_start(config, weights=False).architecture
    else:
        found = find_source(model.path, revision=model.revision, weights=False).architecture
    return as_run(found, config)
