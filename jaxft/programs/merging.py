"""Adapters merged into the weights that they are made for, in float32, a part at a time."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxft.hf.peft.adapter import PAIRS, Adapter
from jaxft.hf.save import Readable
from jaxft.models.adapters import weights_in
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import without_memory

# Values that are worked on at a time.
_AT_A_TIME = 2**24

type Index = tuple[slice, ...]


class Merged:
    """A weight with its adapter, of which a part is made when it is asked for.

    Args:
      weight: As it is stored, `[lead…, *out, *in]`.
      adapter: Has leaves of it.
      site: Path of its module.
      lead: How many of its dimensions are neither outputs nor inputs.
      inputs: How many are inputs.
    """

    def __init__(self, weight: Readable, adapter: Adapter, site: str, *, lead: int, inputs: int):
        self.shape = weight.shape
        self._weight, self._adapter, self._site = weight, adapter, site
        self._lead, self._inputs = lead, inputs

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.parts(index)[1]

    def parts(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is stored and what is merged, both float32, where an index says."""
        first = len(self.shape) - self._inputs
        # The norms that DoRA divides by are those of whole rows.
        wide = (*index[:first], *[slice(None)] * self._inputs)
        before = np.asarray(self._weight[wide]).astype(np.float32)
        after = self._with_pairs(before, wide)
        self._set_rows(after, index[0])
        inside = (..., *index[first:])
        return before[inside], after[inside]

    def _with_pairs(self, before: np.ndarray, index: Index) -> np.ndarray:
        arrays, site = self._adapter.arrays, self._site
        after = before.copy()
        for a, b, sign in PAIRS:
            if f"{site}.{a}" in arrays:
                scale = np.float32(sign * self._adapter.scale(site))
                after += scale * self._product(arrays[f"{site}.{a}"], arrays[f"{site}.{b}"], index)
        magnitude = arrays.get(f"{site}.magnitude")
        if magnitude is not None:
            over = tuple(range(-self._inputs, 0))
            norm = np.sqrt(np.sum(np.square(after), axis=over, keepdims=True))
            wanted = magnitude[index[: -self._inputs]]
            after *= wanted.reshape(norm.shape) / np.where(norm > 0, norm, 1)
        return after

    def _product(self, a: np.ndarray, b: np.ndarray, index: Index) -> np.ndarray:
        lead, outputs = index[: self._lead], index[self._lead : -self._inputs]
        a, b = a[lead], b[(*lead, *outputs)]
        sizes, rank = b.shape[: self._lead], b.shape[-1]
        product = b.reshape(*sizes, -1, rank) @ a.reshape(*sizes, rank, -1)
        return product.reshape(*b.shape[:-1], *a.shape[self._lead + 1 :])

    def _set_rows(self, table: np.ndarray, taken: slice) -> None:
        """Puts the rows of tokens in the place of those that a part of a table has."""
        rows = self._adapter.arrays.get(f"{self._site}.rows")
        if rows is None:
            return
        start, stop, _ = taken.indices(self.shape[0])
        tokens = np.asarray(self._adapter.tokens)
        inside = (start <= tokens) & (tokens < stop)
        table[tokens[inside] - start] = rows[inside]


def merged(
    architecture: Architecture, params: Mapping[str, Readable], adapter: Adapter
) -> dict[str, Readable]:
    """Returns the parameters of a model with an adapter in them.

    Args:
      architecture: Of the model.
      params: Without the adapter, `{path: parameter}`.
      adapter: One of this model.
    """
    module = without_memory(architecture.plain.build(make_numerics("float32")))
    sites = adapter.owners("lora_b") | adapter.owners("rows")
    found: dict[str, Readable] = {**params, **{p: adapter.arrays[p] for p in adapter.whole()}}
    for path, weight in weights_in(module).items():
        if path in sites:
            stacked = len(weight.w.shape) - len(weight.axes)
            found[f"{path}.w"] = Merged(
                found[f"{path}.w"],
                adapter,
                path,
                lead=stacked + weight.lead,
                inputs=weight.inputs,
            )
    return found


def surviving(merged: Mapping[str, Readable], written: Mapping[str, Readable]) -> float:
    """Returns the share of what adapters add to weights that is left of it in files.

    It is the part of what was written less what was there that points along the update: 1 if all
    is left, 0 if rounding has put every weight back to what it was.

    Args:
      merged: Parameters as `merged` returns them.
      written: The same, as they were written.
    """
    kept = whole = 0.0
    for path, parameter in merged.items():
        if not isinstance(parameter, Merged):
            continue
        for index in parts_of(parameter.shape):
            before, after = parameter.parts(index)
            change = after - before
            left = np.asarray(written[path][index]).astype(np.float32) - before
            kept += float(np.vdot(left, change))
            whole += float(np.vdot(change, change))
    return kept / whole if whole else 1.0


def parts_of(shape: tuple[int, ...]) -> Iterator[Index]:
    """Yields indices of parts of a parameter, some rows each, that cover it."""
    step = max(1, _AT_A_TIME * shape[0] // math.prod(shape))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        yield (rows, *(slice(0, size) for size in shape[1:]))
