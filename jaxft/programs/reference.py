"""The model that preference training began with, and the log-probabilities it gives.

Held-out rows are scored once, as they are evaluated often. Rows that are trained on are scored once
as well where `objective.reference` is `cached`; else the training step scores them, with a copy of
the starting weights. Scores are kept beside the data's cache, under a key of all that they depend
on: rows, weights, the model's shape, how it is computed and where.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console, data, distributed
from jaxft.config import RunConfig, to_dict
from jaxft.data import cache
from jaxft.errors import CheckpointError
from jaxft.files import write_json
from jaxft.hf.hub import found_anywhere
from jaxft.models.module import Params, init_params
from jaxft.programs.description import Description
from jaxft.programs.digests import digest_of
from jaxft.programs.held_out import HeldOut, score_rows
from jaxft.programs.weights import load_weights, start_adapters
from jaxft.training.program import Evaluator
from jaxft.workdir.source import Source

_SCORES = "scores.npy"
VERSION = 1
"""Part of every key: raise it when the same model would give the same rows other scores."""


class Start(NamedTuple):
    """A note of the weights that a run starts from, and compares with.

    Attributes:
      weights: Digest of all their bits.
      dtypes: `model.dtypes` of the run, on which the digest depends.
      model: Absolute path of their folder, or repository id.
      adapter: Absolute path of the adapter beside them, or its repository id; empty for none.
    """

    weights: str
    dtypes: str
    model: str
    adapter: str = ""


def read_start_note(file: Path) -> Start | None:
    """Returns what a run has noted, on all hosts; None if it has noted nothing."""

    def read() -> list[str] | None:
        return list(json.loads(file.read_text()).values()) if file.is_file() else None

    found = distributed.from_first("reference", read)
    return None if found is None else Start(*found)


@dataclass(frozen=True)
class Reference:
    """The origin of the starting weights' log-probabilities.

    Attributes:
      config: The run's; `model` describes the starting weights.
      evaluator: Scores rows; of the model that training starts from.
      load: Returns the starting weights, on their devices.
      sets: Rows that get their log-probabilities as a column, by name.
      own: Paths of the weights that the training step needs a copy of.
      noted: Note of the run's start, if it goes on; None where nothing is known.
    """

    config: RunConfig
    evaluator: Evaluator
    load: Callable[[], Params]
    sets: Mapping[str, HeldOut]
    own: Collection[str] = ()
    noted: Start | None = None

    def begin(self, params: Params, record: Path) -> Params:
        """Scores rows with the starting weights, and notes which these are.

        Args:
          params: The starting weights, perhaps with adapters.
          record: File of the workdir that it is noted in.

        Returns:
          A copy of the weights that the training step needs one of.
        """
        # An adapter that starts changes nothing: the reference is the model without.
        params = {path: params[path] for path in self.evaluator.abstract.params}
        digest = digest_of(params)
        self._note(digest, record)
        self._attach(digest, lambda: params)
        return {path: jnp.copy(params[path]) for path in self.own}

    def resume(self, record: Path) -> Params:
        """Does what `begin` does, for a run that goes on.

        Raises:
          CheckpointError: If `load` does not return the weights that the run was started with.
        """
        digest, loaded = self.attach(wanted=bool(self.own))
        if self.noted is None:
            self._note(digest, record)
        return {path: loaded[path] for path in self.own}

    def attach(self, *, wanted: bool = False) -> tuple[str, Params]:
        """Gives rows their column, and reads the starting weights only where they are needed.

        Args:
          wanted: Whether the weights are returned; else nothing is.

        Returns:
          Digest of the weights, and the weights if they are wanted.

        Raises:
          CheckpointError: If `load` does not return the weights that the run was started with.
        """
        loaded: Params = {}
        same_dtypes = self.noted is not None and self.noted.dtypes == self.config.model.dtypes
        noted = self.noted.weights if self.noted is not None and same_dtypes else ""

        def load() -> Params:
            if not loaded:
                loaded.update(self.load())
                self._check(digest_of(loaded), noted)
            return loaded

        digest = noted if noted and not wanted else digest_of(load())
        self._attach(digest, load)
        return digest, loaded if wanted else {}

    def _note(self, digest: str, record: Path) -> None:
        model = self.config.model
        if distributed.is_first():
            adapter = self.config.adapter.path
            start = Start(
                digest,
                model.dtypes,
                found_anywhere(model.path),
                found_anywhere(adapter) if adapter else "",
            )
            write_json(record, start._asdict())

    def _check(self, found: str, noted: str) -> None:
        if noted and found != noted:
            raise CheckpointError(
                f"The weights of model.path {self.config.model.path} are not those that the run "
                "was started with, and which it compares with. Restore them, or start a run in "
                "another folder."
            )

    def _attach(self, digest: str, load: Callable[[], Params]) -> None:
        for name, held_out in self.sets.items():
            with console.phase(f"Reference log-probabilities of {name}") as phase:
                scores, found = self._scores(held_out, digest, load)
                phase.detail("from the cache" if found else f"{len(held_out.numbers):,} rows")
            held_out.rows.attach("reference", _spread(held_out, scores))

    def _scores(
        self, held_out: HeldOut, digest: str, load: Callable[[], Params]
    ) -> tuple[np.ndarray, bool]:
        """Returns float32 `[numbers, T]`, and whether they were there."""
        shape = (len(held_out.numbers), held_out.rows.max_length)
        folder, key = data.cache_folder(self.config.data), self._key(held_out, digest)
        kept = _read_scores(folder / key, shape)
        # All hosts score together, whichever of them have the scores already.
        if distributed.everywhere("cached reference", kept is not None) and kept is not None:
            return kept, True
        del kept
        params, train = load(), self.config.train
        batch_size = self.config.eval.batch_size or train.batch_size
        parts = score_rows(self.evaluator, params, held_out, batch_size=batch_size)
        return _keep_scores(folder, key, shape, parts), False

    def _key(self, held_out: HeldOut, digest: str) -> str:
        evaluator = self.evaluator
        ingredients = {
            "version": VERSION,
            "rows": held_out.digest,
            "numbers": list(held_out.numbers) if held_out.is_sample else "all",
            "max_length": held_out.rows.max_length,
            "weights": digest,
            "architecture": repr(evaluator.architecture.config),
            "adaptation": repr(evaluator.architecture.adaptation),
            "dtype": evaluator.numerics.compute_dtype.__name__,
            # Sums are rounded otherwise where they are made in other parts.
            "attention": evaluator.attention.backend,
            "strategy": self.config.strategy,
            "mesh": to_dict(self.config.mesh),
            "devices": jax.device_count(),
            "backend": jax.default_backend(),
        }
        return f"reference-{cache.make_key(ingredients)}"


def _read_scores(folder: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Maps scores that were kept; None if there are none, or the file is damaged."""
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError, ValueError, EOFError):
        found = np.load(folder / _SCORES, mmap_mode="r")
        if found.shape == shape and found.dtype == np.float32:
            return found
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _keep_scores(folder: Path, key: str, shape: tuple[int, int], parts: Any) -> np.ndarray:
    """Writes scores as they come, and returns them mapped from the disk.

    Raises:
      DataError: If the disk is full or the folder cannot be written to.
    """
    with cache.publishing(folder, key, "log-probabilities of the reference") as building:
        scores = np.lib.format.open_memmap(building / _SCORES, "w+", np.float32, shape)
        start = 0
        for part in parts:
            part = part[: shape[0] - start]
            scores[start : start + len(part)] = part
            start += len(part)
        scores.flush()
    # What is mapped stays, even where another process was faster and its folder is the one kept.
    return scores


def read_start(
    config: RunConfig, evaluator: Evaluator, source: Source, description: Description
) -> Params:
    """Returns the weights of step 0, from a model or from chance."""
    adaptation = evaluator.architecture.adaptation
    if config.model.random_init:
        build_model = evaluator.architecture.plain.build(evaluator.numerics)
        seed = config.train.seed
        bare = evaluator.bare

        def make() -> Params:
            params = init_params(build_model, seed)
            return {path: x.astype(bare.abstract.params[path].dtype) for path, x in params.items()}

        params = jax.jit(make, out_shardings=bare.shardings)()
        architecture, target = evaluator.architecture, evaluator.abstract_params
        return params | start_adapters(architecture, params, adaptation, target, seed)
    return load_weights(
        source,
        evaluator.architecture,
        evaluator.abstract,
        evaluator.shardings,
        tokenizer=description.tokenizer,
        new_tokens=description.new_tokens,
        seed=config.train.seed,
    )


def _spread(held_out: HeldOut, scores: np.ndarray) -> np.ndarray:
    """Returns scores for all rows, `[rows, T]`, with NaN where a row was not scored."""
    if not held_out.is_sample:
        return scores
    whole = np.full((len(held_out.rows), scores.shape[1]), np.nan, np.float32)
    whole[np.asarray(held_out.numbers)] = scores
    return whole
