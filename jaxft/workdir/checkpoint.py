"""Checkpoints of a run: asynchronous, atomic, the newest and the best kept, written by Orbax."""

import contextlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint.checkpoint_managers import (  # pyright: ignore[reportMissingImports]
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from jaxft import distributed
from jaxft.errors import CheckpointError
from jaxft.formatting import format_storage
from jaxft.training.optimizers.averages import evaluated
from jaxft.training.state import TrainState
from jaxft.workdir import narrow

# Where a checkpoint is moved before it is deleted.
_REMOVED = "removed"
# The most that is stored as one, so that a part of a parameter can be read alone.
_CHUNK = 128 * 2**20
# What reading in parts keeps, for parts that lie in the same chunk.
_CACHE = 512 * 2**20
# Added to scores by another yardstick, which come after all by this one.
_OTHER = 1e9


def _passes_through_orbax(trace: TracebackType | None) -> bool:
    while trace is not None:
        if "orbax" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


def _quieten_orbax() -> None:
    """Drops tracebacks that Orbax's threads print where a read or write fails: it raises as well.

    One failure makes a dozen of them, of all that was under way, some long after it.
    """

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info
        return not (error and ("orbax" in record.pathname or _passes_through_orbax(error[2])))

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    print_unraisable = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not (late or _passes_through_orbax(unraisable.exc_traceback)):
            print_unraisable(unraisable)

    sys.unraisablehook = hook


_quieten_orbax()


@dataclass(frozen=True, slots=True)
class Progress:
    """The knowledge of a run beside its arrays; kept as JSON in every checkpoint.

    Attributes:
      data: State of the data iterator.
      tokens: Tokens of the log periods that are over, padding left out.
      trained_tokens: Tokens among them that carried loss.
      seconds: Time of training in those periods.
      period: `Sums` of the period under way, as a dict.
      best_loss: Lowest validation loss so far; infinite before the first evaluation.
      best_score: Lowest score so far: of validation losses, or of shares of wrong answers.
      reference_score: The last one that fell by the minimum change that counts as improvement.
      stale_evaluations: Evaluations since then.
      yardstick: Figure that is scored, and the data. The scores above are all by this one.
    """

    data: dict[str, Any]
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    period: dict[str, Any] = field(default_factory=dict)
    best_loss: float = float("inf")
    best_score: float = float("inf")
    reference_score: float = float("inf")
    stale_evaluations: int = 0
    yardstick: str = ""


class _Manager(ocp.CheckpointManager):
    """Leaves it to the trainer to ask whether the run has to stop.

    Orbax asks as well, from a thread and for steps that have passed: processes that agree on a step
    to stop at just then could agree on one that another has done already.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, below `folder`; a folder that is not complete does not count.

    Args:
      folder: Where they lie.
      keep_last: Newest ones that are kept, beside the best.
      read_only: Change nothing.
      yardstick: What the scores of those that will be saved measure, and on which data. Scores by
        another one are not compared with them: such a checkpoint is the best only until one by this
        yardstick is saved.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 1, read_only: bool = False, yardstick: str = ""
    ):
        self._yardstick = yardstick
        # Orbax keeps the last of an order: the lowest score, of equal ones the newest.
        best = BestN(
            get_metric_fn=self._rank, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        # Orbax's own read_only refuses to save, which nobody asks of it here, and warns.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep_last), best]),
            best_fn=self._rank,  # without it Orbax writes no metrics
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            # Renamed before they are deleted: a folder with a step's name is always complete.
            todelete_subdir=None if read_only else _REMOVED,
        )
        self.folder = folder.absolute()
        self._read_only = read_only
        if not read_only:
            self._delete_removed()
        try:
            self._manager = _Manager(
                self.folder,
                options=options,
                item_names=("params", "trained", "optimizer", "progress", "config"),
            )
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be used: {error}.") from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest score by the newest yardstick, if any has one."""
        found = [(step, self._metrics(step)) for step in self.steps()]
        scored = [
            (metrics.get("yardstick", ""), score, -step)
            for step, metrics in found
            if (score := _score(metrics)) is not None
        ]
        if not scored:
            return None
        newest = scored[-1][0]
        return -min((score, step) for yardstick, score, step in scored if yardstick == newest)[1]

    def score(self, step: int) -> float | None:
        """Score that was measured at this checkpoint, if any."""
        return _score(self._metrics(step))

    def _metrics(self, step: int) -> Mapping[str, Any]:
        return self._manager.metrics(step) or {}

    def _rank(self, metrics: Mapping[str, Any]) -> float:
        """Returns what the best checkpoint has least of."""
        score = _score(metrics)
        if score is None:
            return float("inf")
        return score if metrics.get("yardstick", "") == self._yardstick else _OTHER + score

    def save(
        self,
        state: TrainState,
        *,
        progress: Progress,
        config: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Starts writing the state; returns once it is copied off the device.

        Args:
          state: What is saved.
          progress: What is saved beside it.
          config: `{dotted path: value}`.
          score: Measured by the yardstick; lower is better.

        Raises:
          CheckpointError: If this or the previous save failed, such as for a full disk. Older
            checkpoints are intact.
        """
        step = int(state.step)
        if step in self.steps():
            return
        self.wait()
        self.check_space(state, count=1)
        params = narrow.widened(state.saved | evaluated(state.trainable, state.opt_state))
        raw = {"trained": ocp.args.StandardSave(state.trainable)} if state.is_averaged else {}
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(
                        params, save_args={k: _chunks(v) for k, v in params.items()}
                    ),
                    **raw,
                    optimizer=ocp.args.StandardSave(state.opt_state),
                    progress=ocp.args.JsonSave(progress_to_json(progress)),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                metrics={"score": score, "yardstick": self._yardstick},
                force=True,
            )

    def wait(self) -> None:
        """Blocks until what was started is on disk."""
        with self._explained(None):
            self._manager.wait_until_finished()
        if not self._read_only:
            self._delete_removed()

    def close(self) -> None:
        """Waits, then releases threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes. What ended the block goes first: an interrupt does not wait for a save."""
        if kind is None:
            self.close()
        elif kind is not KeyboardInterrupt:
            with contextlib.suppress(CheckpointError):
                self.close()

    def restore(
        self, abstract: TrainState, step: int, base: Mapping[str, jax.Array] | None = None
    ) -> tuple[TrainState, Progress]:
        """Returns state and progress of a checkpoint, on any mesh.

        Args:
          abstract: Shapes, dtypes and the shardings to restore into.
          step: One of `steps()`.
          base: Parameters that no checkpoint holds.
        """
        kept = abstract.trainable if abstract.is_averaged else {}
        raw = {"trained": ocp.args.StandardRestore(kept)} if kept else {}
        items = self._read(
            step,
            **raw,
            params=narrow.asked(abstract.saved),
            optimizer=ocp.args.StandardRestore(abstract.opt_state),
            progress=ocp.args.JsonRestore(),
        )
        params = narrow.narrowed(items["params"], abstract.saved)
        trained = items["trained"] if kept else params
        state = TrainState(
            step=jax.make_array_from_callback(
                (), abstract.step.sharding, lambda _: np.asarray(step, np.int32)
            ),
            trainable={path: trained[path] for path in abstract.trainable},
            frozen={path: params[path] for path in abstract.frozen},
            opt_state=items["optimizer"],
            base=dict(base or {}),
        )
        return state, progress_from_json(items["progress"])

    def restore_params(
        self, abstract: Mapping[str, jax.ShapeDtypeStruct], step: int
    ) -> dict[str, jax.Array]:
        """Returns the parameters alone, into the shardings and dtypes of `abstract`."""
        return narrow.narrowed(self._read(step, params=narrow.asked(abstract))["params"], abstract)

    def open_params(self, shapes: Mapping[str, tuple[int, ...]], step: int) -> dict[str, "Stored"]:
        """Returns parameters that are read later and in parts, into the host's memory.

        Raises:
          CheckpointError: If they are not there or have other shapes.
        """
        folder = self.folder / str(step) / "params"
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        try:
            zarr3 = json.loads((folder / "_METADATA").read_text()).get("use_zarr3")
            base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
            driver = "zarr3" if zarr3 else "zarr"
            opening = {
                path: ts.open(
                    {"driver": driver, "kvstore": {**base, "path": f"{path}/"}},
                    read=True,
                    open=True,
                    context=context,
                )
                for path in shapes
            }
            found = {path: Stored(store.result()) for path, store in opening.items()}
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error
        other = [
            f"Checkpoint {step} in {self.folder}: {path} has shape {list(found[path].shape)}; the "
            f"config.json beside it asks for {list(shape)}."
            for path, shape in shapes.items()
            if found[path].shape != shape
        ]
        if other:
            raise CheckpointError(other)
        return found

    def restore_progress(self, step: int) -> Progress:
        """Returns what a checkpoint knows beside its arrays."""
        return progress_from_json(self._read(step, progress=ocp.args.JsonRestore())["progress"])

    def restore_config(self, step: int) -> dict[str, Any]:
        """Returns the run's config, `{dotted path: value}`."""
        return self._read(step, config=ocp.args.JsonRestore())["config"]

    def _delete_removed(self) -> None:
        if distributed.is_first():
            shutil.rmtree(self.folder / _REMOVED, ignore_errors=True)

    def check_space(self, state: TrainState, *, count: int) -> None:
        """Raises CheckpointError if the disk has no room for `count` checkpoints in all.

        Args:
          state: Real or abstract; its size is what counts.
          count: Those that are there are counted in.
        """
        if not distributed.is_first():
            return  # The disk is the same one, and one answer is enough.
        raw = state.trainable if state.is_averaged else {}
        arrays = jax.tree.leaves((state.saved, raw, state.opt_state))
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        need = max(count - len(self.steps()), 1) * size
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise CheckpointError(
                f"A checkpoint takes {format_storage(size)} and {format_storage(need)} are "
                f"needed, but {self.folder} has {format_storage(free)} free. Older checkpoints are "
                "intact; free some space, lower --config.train.keep_last, or choose another "
                "--config.train.workdir, and start again with --resume."
            )

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = "the last checkpoint" if step is None else f"checkpoint {step}"
            self._delete_torn()
            raise CheckpointError(
                f"Writing {name} in {self.folder} failed: {_reason(error)}. Complete checkpoints: "
                f"{self._complete()}; they are intact. Free some space or repair access, then "
                "start again with --resume."
            ) from error

    def _delete_torn(self) -> None:
        # A half-written checkpoint may hold the space that the next start needs.
        if not distributed.is_first():
            return
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _complete(self) -> str:
        found = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())
        return ", ".join(map(str, found)) or "none"

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        remedy = f"move the folder {step} away so that the one before it is used"
        if "structures do not match" in str(error):  # the others are no better
            remedy = "leave it and restore the keys that were changed, as logged"
        return CheckpointError(
            f"Checkpoint {step} in {self.folder} cannot be read: {_reason(error)}. There are "
            f"{self._complete()}: name another with --step, or {remedy}."
        )


class Stored:
    """An array of a checkpoint, of which only what is indexed is read."""

    def __init__(self, store: ts.TensorStore):
        self.shape: tuple[int, ...] = tuple(store.shape)
        self._store = store

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(self._store[index].read().result())
        except ValueError as error:
            raise CheckpointError(f"A checkpoint cannot be read: {_reason(error)}.") from error


def _chunks(array: jax.Array) -> ocp.SaveArgs:
    """Returns how an array is cut on disk: large stacks into layers, and into heads or experts."""
    if array.nbytes <= _CHUNK:
        return ocp.SaveArgs()
    axes = {3: (0,), 4: (0, 1)}.get(array.ndim, ())
    return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=axes)


def _reason(error: BaseException) -> str:
    """Returns what first went wrong, in a line; storage back ends raise OSErrors of many types."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    return "the disk is full" if "No space left" in text else text.partition("\n")[0]


def _score(metrics: Mapping[str, Any]) -> float | None:
    return metrics.get("score", metrics.get("loss"))  # runs of older versions have the loss


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Returns a dict that JSON can hold: an infinite loss becomes null."""
    fields = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
    return {k: None if v == float("inf") else v for k, v in fields.items()}


def progress_from_json(fields: Mapping[str, Any]) -> Progress:
    """Inverse of `progress_to_json`; what only other versions know is left out."""
    values: dict[str, Any] = {
        name: float("inf") if value is None else value
        for name, value in fields.items()
        if name in Progress.__dataclass_fields__
    }
    return Progress(**values)
