"""The model that preference training began with, and the log-probabilities it gives.

Held-out rows are scored once, as they are evaluated often. Rows that are trained on are scored once
as well where `objective.reference` is `cached`; else the training step scores them, with a copy of
the starting weights. Scores are kept beside the data's cache, by the content of rows and weights.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import console, data, distributed
from jaxft.config import RunConfig
from jaxft.errors import CheckpointError
from jaxft.files import write_json
from jaxft.models.module import Params, init_params
from jaxft.programs.description import Description
from jaxft.programs.held_out import HeldOut, score_rows
from jaxft.programs.weights import load_weights
from jaxft.training.program import Evaluator
from jaxft.workdir.source import Source


@dataclass(frozen=True)
class Reference:
    """The origin of the starting weights' log-probabilities.

    Attributes:
      config: The run's.
      evaluator: Scores rows.
      record: File in the workdir that says which weights the run started from; None outside of it.
      load: Returns the starting weights, on their devices.
      sets: Rows that get their log-probabilities as a column, by name.
    """

    config: RunConfig
    evaluator: Evaluator
    record: Path | None
    load: Callable[[], Params]
    sets: Mapping[str, HeldOut]

    def begin(self, params: Params) -> Params:
        """Scores rows with the starting weights, and notes which these are.

        Args:
          params: The starting weights.

        Returns:
          A copy of the weights if the training step needs one; else nothing.
        """
        digest = digest_of(params)
        if self.record is not None and distributed.is_first():
            write_json(self.record, {"weights": digest})
        self._attach(digest, lambda: params)
        return jax.tree.map(jnp.copy, params) if self.is_fixed else {}

    def resume(self) -> Params:
        """Does what `begin` does, for a run that goes on.

        Raises:
          CheckpointError: If `load` does not return the weights that the run was started with.
        """
        return self.attach(wanted=self.is_fixed)

    def attach(self, *, wanted: bool = False) -> Params:
        """Gives rows their column, and reads the starting weights only where they are needed.

        Args:
          wanted: Whether the weights are returned; else nothing is.

        Raises:
          CheckpointError: If `load` does not return the weights that the run was started with.
        """
        noted = self._noted()
        loaded: Params = {}

        def load() -> Params:
            if not loaded:
                loaded.update(self.load())
                self._check(digest_of(loaded), noted)
            return loaded

        digest = noted if noted and not wanted else digest_of(load())
        self._attach(digest, load)
        return loaded if wanted else {}

    @property
    def is_fixed(self) -> bool:
        """Whether the training step computes the log-probabilities itself."""
        return self.config.objective.uses_reference == "fixed"

    def _noted(self) -> str:
        if self.record is None:
            return ""
        record = self.record

        def read() -> str:
            return json.loads(record.read_text())["weights"] if record.is_file() else ""

        return distributed.from_first("reference", read)

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
        key = hashlib.sha256(
            json.dumps(
                [
                    held_out.digest,
                    digest,
                    list(held_out.numbers) if held_out.is_sample else "all",
                    self.evaluator.numerics.compute_dtype.__name__,
                    held_out.rows.max_length,
                ]
            ).encode()
        ).hexdigest()[:24]
        file = data.cache_folder(self.config.data) / f"reference-{key}.npy"
        is_there = distributed.everywhere("cached reference", file.is_file())
        if not is_there:
            config = self.config
            batch_size = config.eval.batch_size or config.train.batch_size
            scores = score_rows(self.evaluator, load(), held_out, batch_size=batch_size)
            write_array(file, scores)
        return np.load(file, mmap_mode="r"), is_there


def read_start(
    config: RunConfig, evaluator: Evaluator, source: Source, description: Description
) -> Params:
    """Returns the weights of step 0, from a model or from chance."""
    if config.model.random_init:
        build_model = evaluator.architecture.build(evaluator.numerics)
        seed = config.train.seed
        return jax.jit(lambda: init_params(build_model, seed), out_shardings=evaluator.shardings)()
    return load_weights(
        source,
        evaluator.architecture,
        evaluator.abstract,
        evaluator.shardings,
        tokenizer=description.tokenizer,
        new_tokens=description.new_tokens,
    )


def _spread(held_out: HeldOut, scores: np.ndarray) -> np.ndarray:
    """Returns scores for all rows, `[rows, T]`, with NaN where a row was not scored."""
    if not held_out.is_sample:
        return scores
    whole = np.full((len(held_out.rows), scores.shape[1]), np.nan, np.float32)
    whole[np.asarray(held_out.numbers)] = scores
    return whole


def write_array(file: Path, array: np.ndarray) -> None:
    """Writes an array at once: readers see all of it, or no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{distributed.process()}.npy")
    np.save(temporary, array)
    temporary.replace(file)


def digest_of(params: Params) -> str:
    """Returns a hash of all bits of some weights, the same for every placement.

    Each parameter's 32-bit words are multiplied by odd numbers of their places and added up modulo
    2**32: a sum that no order changes.
    """
    sums = jax.device_get(_checksums(params))
    text = json.dumps({path: [int(x) for x in sums[path]] for path in sorted(sums)})
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@jax.jit
def _checksums(params: Params) -> dict[str, Any]:
    def checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for dimension, size in enumerate(x.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
            place = place * jnp.uint32(size) + along
        mixed = words * (2 * place + 1)
        return jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(words ^ place, dtype=jnp.uint32)

    return {path: checksum(x) for path, x in params.items()}
