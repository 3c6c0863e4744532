"""A run's folder, on several hosts: who uses it, what of it is resumed, what is kept in it."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxft import data, distributed
from jaxft.config import RunConfig
from jaxft.data import BatchIterator, TokenRows
from jaxft.data.template import resolve_template
from jaxft.errors import CheckpointError, ConfigError, TrainingError
from jaxft.files import as_json, rewrite_jsonl, write_json
from jaxft.hf.save_tokenizer import save_tokenizer
from jaxft.models.families import Architecture
from jaxft.programs.beside import copy_files, note_others
from jaxft.programs.description import hf_config, tensor_dtypes_of
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.lock import Lock
from jaxft.workdir.source import Source
from jaxft.workdir.workdir import Workdir, claimed


@contextlib.contextmanager
def claimed_by_first(folder: Path) -> Iterator[Lock | None]:
    """Keeps other runs out of the folder; one host holds its lock for all."""
    if distributed.is_first():
        with claimed(folder) as lock:
            yield lock
    else:
        yield None


def check_workdir(path: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> Workdir:
    """Returns the workdir as host 0 finds it: the others must not see what it changes later."""
    distributed.require_shared(path)

    def find() -> dict[str, Any]:
        found = Workdir.check(path, config, resume=resume, overwrite=overwrite)
        return {"resumed": found.resumed, "changes": found.changes}

    found = distributed.from_first("workdir", find)
    return Workdir(path=path, resumed=found["resumed"], changes=tuple(found["changes"]))


def begin(workdir: Workdir, config: RunConfig, lock: Lock | None) -> None:
    """Prepares the folder on host 0, once no other host looks at what was in it."""
    distributed.barrier("workdir is read")
    if lock is not None:
        lock.check()
        workdir.begin(config)
    distributed.barrier("workdir is ready")


def newest_checkpoint(workdir: Workdir) -> tuple[int, Progress]:
    """Returns the step that the run goes on from, 0 if it starts, and how far it had come."""
    start, reached = 0, Progress(data={})
    if workdir.resumed and workdir.checkpoints.is_dir():
        checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
        start = max(checkpoints.steps(), default=0)
        distributed.check_same("newest checkpoint", {"step": start})
        if start:
            reached = checkpoints.restore_progress(start)
        checkpoints.close()
    return start, reached


def has_report(workdir: Workdir, start: int) -> bool:
    """Whether nothing is left to write of a run that has done its steps, as if it was killed."""
    return distributed.from_first("report", lambda: workdir.has_report_since(start))


def refuse_workdir_of_start(config: RunConfig) -> None:
    """Raises ConfigError if the run would write into the folder of its model, or its adapter's."""
    workdir = _real(config.train.workdir)
    for key, path in (("model.path", config.model.path), ("adapter.path", config.adapter.path)):
        # A run is read from its parts, each of which may be a link.
        parts = [_real(path, part) for part in ("", "checkpoints", "model")] if path else []
        if any(part.exists() and part.is_relative_to(workdir) for part in parts):
            raise ConfigError(
                f"train.workdir and {key} are the same folder, {workdir}, which the run would "
                "overwrite. Name another one with --config.train.workdir=…."
            )


def _real(*path: str) -> Path:
    return Path(os.path.realpath(os.path.expanduser(os.path.join(*path))))


def check_same_data(counts: Progress, iterator: BatchIterator, workdir: Workdir) -> None:
    """Raises CheckpointError if the data is not what the run was started with."""
    now = iterator.state()
    if {"position": now["position"]} | counts.data != now:
        raise CheckpointError(
            f"The data has changed since {workdir.path} was started: "
            f"{'; '.join(_describe_changes(counts.data, now))}. Restore the training data, or "
            "start a run in another folder."
        )


def _describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns in words what differs between the data of a checkpoint and that of now."""
    forms = {
        "rows": "{:,} rows then, {:,} now",
        "batch_size": "batches of {:,} rows then, of {:,} now",
        "shuffle": "--config.data.shuffle={} then, {} now",
        "seed": "--config.train.seed={} then, {} now",
    }
    changed = [key for key in forms if before.get(key) != now[key] and key in before]
    found = [forms[key].format(before[key], now[key]) for key in changed]
    if not found and before.get("digest") != now["digest"]:
        return [f"there are as many rows, {now['rows']:,}, but with other tokens"]
    return found or [f"{before.get('position', 0):,} rows were read, which is no place in it now"]


def keep_model_files(
    workdir: Workdir,
    config: RunConfig,
    source: Source,
    architecture: Architecture,
    tokenizer: Any,
    *,
    is_chat: bool,
) -> None:
    """Puts config.json, tokenizer and template beside the checkpoints, so that they stand alone."""
    folder = workdir.model
    template = resolve_template(tokenizer, config.data).text if is_chat else None
    dtypes = {} if config.model.random_init else tensor_dtypes_of(source)
    try:
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            file = source.described.path / name
            if file.is_file():
                (folder / name).write_bytes(file.read_bytes())
        described = hf_config(source, architecture)
        if architecture.naming.alone is not None:
            copy_files(source.described.path, folder)
        if described != source.described.config:
            (folder / "config.json").write_text(as_json(described), encoding="utf-8")
        save_tokenizer(tokenizer, folder, chat_template=template)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TrainingError(
            f"{folder} cannot be written: {error}. Free some disk space or fix the folder's "
            "permissions, then start again."
        ) from error
    # Layers that guess further tokens belong to weights that a random start does without.
    is_part = architecture.naming.alone is not None
    if (is_part or not config.model.random_init) and (
        not architecture.adaptation or architecture.adaptation.whole
    ):
        note_others(source, architecture, folder)
    write_json(folder / "tensor_dtypes.json", dtypes)


def list_skipped(workdir: Workdir, sets: Mapping[str, TokenRows]) -> None:
    """Lists in the workdir the bad rows that the data was read without."""
    # A held-out part of the training data was read together with it.
    read = {rows.documents.skipped: name for name, rows in reversed(list(sets.items()))}
    records = [
        {"set": name, **record}
        for name, rows in sets.items()
        if read[rows.documents.skipped] == name
        for record in data.skipped_rows(rows)
    ]
    # An earlier part of the run may have had other validation data, with bad rows of its own.
    if distributed.is_first() and (records or workdir.skipped.exists()):
        rewrite_jsonl(workdir.skipped, records)
