"""Says how each parameter of a model is stored, and what does not fit, without reading weights."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxft.formatting import format_storage
from jaxft.hf.decoded import Mxfp4, Stored
from jaxft.hf.folder import fp8_block, read_config
from jaxft.hf.hub import remote_tensors, resolve
from jaxft.hf.read import DTYPES, Entry
from jaxft.hf.rules import Rule, Tensor, expand
from jaxft.hf.stored import group_names, named_as, paired, stored_tensors, unfit
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf

type Shape = tuple[int, ...]

_HEADER = ("parameter", "shape", "type", "tensor", "layout", "shape", "type", "")


@dataclass(frozen=True, slots=True)
class Line:
    """One rule, or a name that no rule knows.

    Attributes:
      ours: Dotted path of the parameter; empty where there is none.
      shape: Shape of the whole parameter.
      dtype: Type it is loaded as.
      theirs: Names of its tensors as a pattern.
      layout: Layout of the file's axes and of ours.
      shape_theirs: Shape that each of the file's tensors should have, or has where no rule knows
        it.
      dtypes: Types in which they are stored.
      state: `ok`, or what is the matter.
      fits: Whether it does not keep the model from being loaded.
    """

    ours: str
    shape: Shape
    dtype: str
    theirs: str
    layout: str
    shape_theirs: Shape
    dtypes: tuple[str, ...]
    state: str
    fits: bool

    def cells(self) -> tuple[str, ...]:
        """Returns the texts of a row of the table."""
        shapes = ("×".join(map(str, shape)) for shape in (self.shape, self.shape_theirs))
        ours, theirs = shapes
        stored = ", ".join(self.dtypes)
        return (self.ours, ours, self.dtype, self.theirs, self.layout, theirs, stored, self.state)


@dataclass(frozen=True, slots=True)
class Check:
    """The parts of a model, and whether it can be loaded.

    Attributes:
      lines: One for each rule that the model uses, then the names that no rule knows.
      problems: Problems of files that cannot be read.
      parameters: Number of parameters.
      beside: Number of values in tensors that are passed through.
      loaded_bytes: Size once loaded.
      stored_bytes: Size in the files.
    """

    lines: list[Line]
    problems: list[str]
    parameters: int
    beside: int
    loaded_bytes: int
    stored_bytes: int

    @property
    def fits(self) -> bool:
        """Whether everything is there, as it should be."""
        return not self.problems and all(line.fits for line in self.lines)


def check(path_or_repo_id: str | Path, *, revision: str = "", dtypes: str = "float32") -> Check:
    """Compares the headers of a model's files with what its config.json asks for.

    Of a repository that is not in the cache, only the small files and the headers are fetched.

    Args:
      path_or_repo_id: Folder with config.json and safetensors, or repository id.
      revision: Branch, tag or commit of a repository id.
      dtypes: `float32`, `mixed` or `bfloat16`, as it would be loaded.

    Raises:
      ModelError: If it cannot be found or its family is not supported.
    """
    folder = resolve(str(path_or_repo_id), revision=revision, weights=False)
    config = read_config(folder)
    architecture = architecture_from_hf(config)
    params = architecture.abstract(make_numerics(dtypes)).params
    remote = not Path(path_or_repo_id).expanduser().is_dir()
    if remote and not any(folder.glob("*.safetensors")):
        entries = remote_tensors(str(path_or_repo_id), revision=revision)
        stored = paired(entries, fp8_block(config))
        problems = []
    else:
        stored, problems = stored_tensors(folder)
    rules = architecture.naming.rules_for(stored)
    tensors = list(expand(rules, {path: spec.shape for path, spec in params.items()}))
    expected = {tensor.name: tensor for tensor in tensors}
    stored = named_as(stored, [*expected, *architecture.naming.copies], architecture.naming)
    lines = list(_known(rules, params, tensors, stored))
    lines += _unknown(architecture, expected, stored)
    return Check(
        lines,
        problems,
        parameters=sum(math.prod(spec.shape) for spec in params.values()),
        beside=sum(
            math.prod(entry.shape)
            for name, entry in stored.items()
            if entry is not None and architecture.naming.is_other(name)
        ),
        loaded_bytes=sum(math.prod(s.shape) * s.dtype.itemsize for s in params.values()),
        stored_bytes=sum(s.size for name in expected if (s := stored.get(name)) is not None),
    )


def _known(
    rules: Iterable[Rule],
    params: Mapping[str, jax.ShapeDtypeStruct],
    tensors: list[Tensor],
    stored: Mapping[str, Stored | None],
) -> Iterator[Line]:
    of_rule: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            of_rule.setdefault(part.rule.ours, []).append(tensor)
    for rule in rules:
        if rule.ours in params:
            spec = params[rule.ours]
            state, fits = _state(of_rule[rule.ours], stored)
            yield Line(
                rule.ours,
                spec.shape,
                spec.dtype.name,
                rule.theirs,
                rule.layout,
                of_rule[rule.ours][0].shape,
                _dtypes(of_rule[rule.ours], stored),
                state,
                fits,
            )


def _state(tensors: list[Tensor], stored: Mapping[str, Stored | None]) -> tuple[str, bool]:
    """Returns what is the matter with the tensors of a rule, and whether it is nothing."""
    missing = [tensor.name for tensor in tensors if tensor.name not in stored]
    unreadable = [t.name for t in tensors if stored.get(t.name, missing) is None]
    reasons = dict.fromkeys(unfit(stored.get(tensor.name), tensor) for tensor in tensors)
    states = [f"MISSING {name}" for name in group_names(missing)]
    states += [f"UNREADABLE {name}" for name in group_names(unreadable)]
    states += [f"WRONG: {reason}" for reason in reasons if reason]
    return "; ".join(states) or "ok", not states


def _unknown(
    architecture: Architecture,
    expected: Mapping[str, Tensor],
    stored: Mapping[str, Stored | None],
) -> Iterator[Line]:
    extra: dict[tuple[str, bool, Shape, tuple[str, ...]], list[str]] = {}
    for name, entry in stored.items():
        if name in expected or entry is None:
            continue
        known = architecture.naming.is_known(name)
        copied = architecture.naming.copies.get(name)
        state = f"copy of {copied} (values not compared)" if copied else "ignored"
        if architecture.naming.is_other(name):
            state = "passed through"
        key = (state if known else "UNEXPECTED", known, entry.shape, _words([entry]))
        extra.setdefault(key, []).append(name)
    for (state, fits, shape, dtypes), names in extra.items():
        for group in group_names(names):
            yield Line("", (), "", group, "", shape, dtypes, state, fits)


def _dtypes(tensors: list[Tensor], stored: Mapping[str, Stored | None]) -> tuple[str, ...]:
    found = (stored.get(tensor.name) for tensor in tensors)
    return _words([entry for entry in found if entry is not None])


def _words(entries: list[Stored]) -> tuple[str, ...]:
    words = (
        ("mxfp4" if isinstance(entry, Mxfp4) else "fp8")
        if not isinstance(entry, Entry)
        else DTYPES[entry.dtype].name
        if entry.dtype in DTYPES
        else entry.dtype
        for entry in entries
    )
    return tuple(dict.fromkeys(words))


def describe(found: Check) -> str:
    """Returns the table, the totals and the problems as text."""
    rows = [_HEADER, *(line.cells() for line in found.lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    bad = sum(not line.fits for line in found.lines) + len(found.problems)
    whole = f" of text, {found.parameters + found.beside:,} in all" if found.beside else ""
    totals = (
        f"{found.parameters:,} parameters{whole}; "
        f"{format_storage(found.stored_bytes)} in the files, "
        f"{format_storage(found.loaded_bytes)} loaded. "
        + (f"Lines that do not fit: {bad}." if bad else "Everything fits.")
    )
    return "\n".join([*table, "", *found.problems, totals])
