"""Comparing what was exported with what it was made of."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxft.errors import ModelError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import room
from jaxft.hf.load import open_params
from jaxft.hf.read import Reader
from jaxft.hf.save import Readable
from jaxft.hf.stored import tensor_dtypes
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.programs.merging import parts_of, surviving
from jaxft.programs.model import load_source
from jaxft.workdir.source import Source

# Most that logits may move if weights are rounded, as a share of the largest one, and if sums are
# only made in another order.
_ROUNDING, _REORDERED = 0.1, 1e-3
# Less than this of what an adapter adds is worth a warning.
_LITTLE = 0.9

# Opens the parameters that were exported.
type Opener = Callable[[], AbstractContextManager[Mapping[str, Readable]]]


class LogitDifference(NamedTuple):
    """The distance between the logits of two models.

    Attributes:
      difference: Largest difference.
      largest: Largest logit of the first model.
      tokens: Number of random tokens.
    """

    difference: float
    largest: float
    tokens: int

    def __str__(self) -> str:
        share = self.difference / self.largest
        return (
            f"Largest difference of logits, of {self.tokens} random tokens: "
            f"{self.difference:.3g}, which is {share:.2%} of the largest logit"
        )


def verify(source: Source, architecture: Architecture, folder: Path, opened: Opener) -> str:
    """Compares an export with what it was made of; returns what was compared, and the verdict.

    Raises:
      ModelError: If the exported folder holds other weights than rounding explains.
    """
    made_of, equal = _made_of(source), _compare_weights(source, architecture, folder, opened)
    exact, count, names = equal
    logits = difference_of_logits(source, Source(folder))
    if exact and logits.difference == 0:
        return (
            f"Verified: compared {count}, and logits of {logits.tokens} random tokens. All are "
            "equal."
        )
    # bfloat16 keeps 8 bits: logits move by a few hundredths of their size, not by their size.
    if exact or not logits.difference <= _ROUNDING * logits.largest:
        raise ModelError(
            f"The export gives other logits than {made_of}: they differ by up to "
            f"{logits.difference:.3g}. Nothing was kept of it; report this with the model's "
            "config.json."
        )
    return (
        f"Verified: compared {count}. Each is equal once rounded to {names}. {logits}; up to "
        f"{_ROUNDING:.0%} is taken for rounding."
    )


def verify_adapter(source: Source, written: Source) -> str:
    """Compares an adapter with the same in PEFT's format; returns what was compared.

    Raises:
      ModelError: If the logits are others.
    """
    logits = difference_of_logits(source, written)
    if not logits.difference <= _REORDERED * logits.largest:
        raise ModelError(
            f"The exported adapter gives other logits than {_made_of(source)}: they differ by up "
            f"to {logits.difference:.3g}. Nothing was kept of it; report this with the model's "
            "config.json."
        )
    return f"Verified: loaded the adapter again. {logits}."


def judge_merged(
    source: Source, architecture: Architecture, folder: Path, opened: Opener, *, weights: bool
) -> Iterator[str]:
    """Yields what is to be said of an adapter that was merged.

    Args:
      source: The adapter.
      architecture: Of the model with the adapter.
      folder: Holds the merged model.
      opened: Opens what was written.
      weights: Whether to compare all weights with those that were written.
    """
    if weights:
        _, count, names = _compare_weights(source, architecture, folder, opened)
        yield f"Verified: compared {count}. Each is equal once rounded to {names}."
    names = set(tensor_dtypes(folder).values())
    if names != {"float32"}:
        yield _what_is_left(architecture, folder, opened, ", ".join(sorted(names)))
    host = room(jax.devices("cpu"))
    size = sum(
        4 * math.prod(spec.shape)
        for spec in architecture.abstract(make_numerics("float32")).params.values()
    )
    if host.limit and size > host.free:
        yield f"Logits are not compared: the model takes {format_bytes(size)}, and {host}."
        return
    logits = difference_of_logits(source, Source(folder))
    yield f"{logits}: between the model with its adapter and the merged one."


def _what_is_left(architecture: Architecture, folder: Path, opened: Opener, dtypes: str) -> str:
    with opened() as params, _exported(folder, architecture) as written:
        share = min(1.0, surviving(params, written))
    text = f"Of what the adapter adds to weights, {share:.1%} is left once rounded to {dtypes}."
    if share >= _LITTLE:
        return text
    return (
        f"{text} The rest is smaller than what that type can tell apart, and lost. Keep all of it "
        "with --dtype=float32, or export the adapter itself, without --merge."
    )


def _compare_weights(
    source: Source, architecture: Architecture, folder: Path, opened: Opener
) -> tuple[bool, str, str]:
    """Returns whether all are equal, how many and which were compared, and types that were written.

    Raises:
      ModelError: If one is not even equal once rounded.
    """
    exact, values, made_of = True, 0, _made_of(source)
    for path, ours, theirs in _pairs(architecture, folder, opened):
        values += ours.size
        if ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes():
            continue
        wide = ours.astype(np.float32)
        written = theirs.astype(np.float32)
        exact &= np.array_equal(wide, written, equal_nan=True)
        if not np.array_equal(wide.astype(theirs.dtype), theirs, equal_nan=True):
            raise ModelError(
                f"The export holds other weights than {made_of}: {path} differs by up to "
                f"{np.max(np.abs(wide - written)):.3g}. Nothing was kept of it; report this with "
                "the model's config.json."
            )
    names = ", ".join(sorted(set(tensor_dtypes(folder).values())))
    count = f"all {values:,} weights of {made_of} with those of the export, loaded again"
    return exact, count, names


def _pairs(
    architecture: Architecture, folder: Path, opened: Opener
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields the name of a parameter, some rows of it as exported from, and as exported."""
    with opened() as ours, _exported(folder, architecture) as theirs:
        for path, parameter in theirs.items():
            for index in parts_of(parameter.shape):
                yield path, np.asarray(ours[path][index]), np.asarray(parameter[index])


@contextlib.contextmanager
def _exported(folder: Path, architecture: Architecture) -> Iterator[Mapping[str, Readable]]:
    abstract = architecture.plain.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in abstract.items()}
    with Reader() as reader:
        yield open_params(reader, folder, architecture.naming, shapes)


def difference_of_logits(one: Source, other: Source) -> LogitDifference:
    """Compares the logits of two models of one shape, both in float32."""
    # On the host: a model that needed several devices to train fits there.
    host = jax.devices("cpu")[0]
    model = load_source(one, device=host)
    config = model.architecture.config
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, min(64, config.max_length)))
    ours = jax.device_get(model(tokens))
    del model
    theirs = jax.device_get(load_source(other, device=host)(tokens))
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    difference = float(np.max(np.abs(ours - theirs), where=~same, initial=0))
    return LogitDifference(difference, float(np.max(np.abs(ours))), tokens.size)


def _made_of(source: Source) -> str:
    if source.checkpoints is None:
        return f"{source.folder}"
    return f"checkpoint {source.step} of {source.checkpoints.parent}"
