"""Several adapters of one model beside each other, without copies of it.

They are the columns of one wide adapter: its rank is the sum of theirs, and a row of a batch takes
those columns alone that are its own. A product with all of them reads each adapter once, and what
is not a row's own is zero before it is multiplied on, so that the row is what it is alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxft.hf.peft.adapter import PAIRS
from jaxft.models.adapters import Adaptation, weights_in
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel, Params, without_memory
from jaxft.models.weights import Site
from jaxft.programs.description import grown
from jaxft.programs.model import Model
from jaxft.programs.texts import Columns
from jaxft.programs.weights import load_beside
from jaxft.training.adaptation import quantised
from jaxft.workdir.source import Source

_LEAST = 16  # columns; there are this many, or twice as many, and so on


def reason_apart(source: Source) -> str:
    """Returns why an adapter needs a model of its own, as far as it holds what others do not.

    Empty if it is of low-rank pairs alone, of weights that each row of a batch can have others of.
    """
    adaptation = source.architecture.adaptation
    if adaptation.whole or source.base is None:
        return "it belongs to weights that nobody else has"
    if adaptation.trained:
        return "it holds weights that were trained as a whole"
    if adaptation.rows or (source.note is not None and source.note.new_tokens):
        return "it holds rows of tokens"
    if any(site.magnitude for site in adaptation.sites.values()):
        return "it has magnitudes (DoRA)"
    weights = weights_in(without_memory(source.architecture.plain.build(make_numerics("float32"))))
    for path in adaptation.sites:
        if not path.startswith("layers.") or not weights[path].takes_columns:
            return f"{path} is applied to all rows of a batch together"
    return ""


def load_adapter(source: Source, base: Model, *, dtypes: str) -> Model | None:
    """Loads an adapter of pairs on a model that is loaded; its arrays are shared, not copied.

    Args:
      source: The adapter; `reason_apart` gave none.
      base: The model that it is made for.
      dtypes: With which the model was loaded.

    Returns:
      What `load_source` gives; None if the adapter has the model otherwise than it is loaded: with
      more tokens, or in another type.

    Raises:
      CheckpointError: If the model is another one than the adapter was trained on.
    """
    tokenizer = source.described.load_tokenizer()
    architecture = quantised(grown(source.architecture, tokenizer), base.architecture.quantise)
    abstract = architecture.abstract(make_numerics(dtypes))
    alike = architecture.config == base.architecture.config and all(
        (spec.shape, spec.dtype) == (abstract.params[path].shape, abstract.params[path].dtype)
        for path, spec in base.abstract.params.items()
    )
    if not alike:
        return None
    sharding = _shared_sharding(base.params)
    leaves = load_beside(source, architecture, abstract, base.params, sharding)
    model = Model(architecture, abstract, base.params | leaves, tokenizer, source)
    known = model.has_token, base.has_token
    return model if np.array_equal(*known) else None


class SideBySide:
    """The adapters of a model.

    Args:
      model: Without an adapter.
      dtypes: With which it was loaded.

    Attributes:
      graphdef: Structure of the model with the wide adapter.
      width: Columns of the wide adapter.
    """

    def __init__(self, model: Model, *, dtypes: str):
        self._model, self._numerics = model, make_numerics(dtypes)
        self.graphdef: Any = model.abstract.graphdef
        self.width = 0
        self._abstract: AbstractModel = model.abstract
        self._leaves: Params = {}
        self._held: list[Columns] = []
        self._numbers = 0

    @property
    def params(self) -> Params:
        """Parameters of the model and of the wide adapter."""
        return self._model.params | self._leaves

    def add(self, adapter: Model) -> Columns:
        """Gives an adapter columns; those that others have stay where they are.

        Args:
          adapter: From `load_adapter`.
        """
        parts = _pairs(adapter)
        rank = max(a.shape[1] for a, _ in parts.values())
        start = self._gap(rank)
        width = self.width or _LEAST
        while width < start + rank:
            width *= 2
        sites = {path.rpartition(".")[0] for path in self._leaves} | parts.keys()
        self._widen(sorted(sites), width)
        for site, (a, b) in parts.items():
            for leaf, value, axis in (("lora_a", a, 1), ("lora_b", b, -1)):
                path = f"{site}.{leaf}"
                self._leaves[path] = _put(self._leaves[path], value, axis, start)
        self._numbers += 1
        columns = Columns(self._numbers, start, start + rank)
        self._held.append(columns)
        return columns

    def remove(self, columns: Columns) -> None:
        """Frees the columns of an adapter, with which no text is written any more."""
        self._held.remove(columns)
        for path, leaf in self._leaves.items():
            axis = 1 if path.endswith("lora_a") else -1
            shape = list(leaf.shape)
            shape[axis] = columns.end - columns.start
            nothing = np.zeros(shape, leaf.dtype)
            # Another adapter there may lack some of its sites.
            self._leaves[path] = _put(leaf, nothing, axis, columns.start)

    def _gap(self, rank: int) -> int:
        """Returns the first column behind which so many are free."""
        start = 0
        for held in sorted(self._held, key=lambda columns: columns.start):
            if held.start - start >= rank:
                break
            start = held.end
        return start

    def _widen(self, sites: list[str], width: int) -> None:
        """Makes the wide adapter have these sites and so many columns."""
        known = {path.rpartition(".")[0] for path in self._leaves}
        if width == self.width and known == set(sites):
            return
        adaptation = Adaptation({site: Site(width, float(width)) for site in sites})
        wide: Architecture = replace(self._model.architecture, adaptation=adaptation)
        abstract = wide.abstract(self._numerics)
        sharding, leaves = _shared_sharding(self._model.params), {}
        for path, spec in abstract.params.items():
            if path in self._model.params:
                continue
            leaves[path] = jax.device_put(np.zeros(spec.shape, spec.dtype), sharding)
            if path in self._leaves:
                axis = 1 if path.endswith("lora_a") else -1
                leaves[path] = _put(leaves[path], self._leaves[path], axis, 0)
        self._leaves, self.width = leaves, width
        self.graphdef, self._abstract = abstract.graphdef, abstract


def _pairs(adapter: Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns both matrices of each site, `[L, r, *in]` and `[L, *out, r]`, with scale and start.

    A starting pair, which is subtracted, becomes further columns.
    """
    found = {}
    for path, site in adapter.architecture.adaptation.sites.items():
        of_a, of_b = [], []
        for a, b, sign in PAIRS:
            if f"{path}.{a}" in adapter.params:
                narrow, wide = (np.asarray(adapter.params[f"{path}.{leaf}"]) for leaf in (a, b))
                of_a.append(narrow)
                of_b.append((wide.astype(np.float32) * (sign * site.scale)).astype(wide.dtype))
        found[path] = np.concatenate(of_a, axis=1), np.concatenate(of_b, axis=-1)
    return found


def _put(leaf: Array, part: Array | np.ndarray, axis: int, start: int) -> Array:
    """Returns a leaf with a part at some columns."""
    places = [0] * leaf.ndim
    places[axis] = start
    return jax.device_put(jax.lax.dynamic_update_slice(leaf, part, places), leaf.sharding)


def _shared_sharding(params: Mapping[str, Array]) -> Any:
    """Returns the placement of what every device has that has parameters."""
    sharding = next(iter(params.values())).sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
