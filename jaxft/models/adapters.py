"""Low-rank adapters of a model: which weights have one, what trains, and what it starts from."""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxft.errors import ConfigError
from jaxft.hf.peft.adapter import LEAVES, START_LEAVES, TRAINED_LEAVES
from jaxft.models.module import (
    Param,
    Params,
    cast,
    is_unlearnt,
    merge,
    modules_in,
    optional,
)
from jaxft.models.quantised import is_leaf
from jaxft.models.weights import Site, Weight

# Passes over the weight with which its largest singular vectors are found, and further columns.
_PASSES, _OVERSAMPLED = 4, 8


@dataclass(frozen=True)
class Adaptation:
    """Learning beside a model whose own weights stay as they are.

    Attributes:
      sites: Adapter of each weight that has one, by the path of its module.
      start: Origin of the adapters' values: `zero`, `pissa` or `orthogonal`.
      rows: Ids of tokens whose rows of the tables are learnt apart.
      trained: Regular expression searched in paths: further parameters that train; empty for none.
      whole: Whether the model's own weights are kept with the adapter, as nobody has them else.
    """

    sites: Mapping[str, Site] = field(default_factory=dict)
    start: str = "zero"
    rows: tuple[int, ...] = ()
    trained: str = ""
    whole: bool = False

    def __bool__(self) -> bool:
        """Whether anything is learnt in this way."""
        return bool(self.sites or self.rows or self.trained)

    @property
    def has_dropout(self) -> bool:
        """Whether a training step needs seeds for masks."""
        return any(site.dropout for site in self.sites.values())

    def is_learnt(self, path: str) -> bool:
        """Whether a parameter has gradients.

        `trained` chooses among the model's own: neither what adapters are made of, nor codes.
        """
        if is_unlearnt(path):
            return False
        if is_beside(path) or is_leaf(path):
            return path.rpartition(".")[2] in TRAINED_LEAVES
        return bool(self.trained and re.search(self.trained, path))

    def is_kept(self, path: str) -> bool:
        """Whether a parameter is part of the adapter, and not of the model that it is made for."""
        return self.whole or self.is_learnt(path) or path.rpartition(".")[2] in START_LEAVES


NOTHING = Adaptation()


def is_beside(path: str) -> bool:
    """Whether a parameter is a leaf of an adapter, which files of the model do not have."""
    return path.rpartition(".")[2] in LEAVES


def weights_in(module: nnx.Module) -> dict[str, Weight]:
    """Returns the weights of a model by the path of their module."""
    return {path: part for path, part in modules_in(module) if isinstance(part, Weight)}


def is_table(weight: Weight) -> bool:
    """Whether tokens are looked up in a weight, or made of it."""
    return weight.axes[0] in ("vocab", "positions")


def attach(module: nnx.Module, adaptation: Adaptation, frozen_dtype: Any) -> None:
    """Adds the leaves of adapters to a model, as zeros, and narrows what does not train.

    Args:
      module: The model; its layers are stacked.
      adaptation: What is learnt; its sites are weights of the model.
      frozen_dtype: Type in which parameters are kept that have no gradient.
    """
    weights = weights_in(module)
    for path, site in adaptation.sites.items():
        _attach_site(weights[path], site, path)
    if adaptation.rows:
        for weight in weights.values():
            if weight.axes == ("vocab", "embed"):
                rows = jnp.zeros((len(adaptation.rows), weight.w.shape[1]), weight.w.dtype)
                weight.rows = optional(Param(rows, axes=("rows", "embed")))
                weight.added = adaptation.rows
    # A starting pair stays exact: it is subtracted from one that trains, in the same type.
    # What routers choose by is never rounded.
    cast(
        module,
        frozen_dtype,
        lambda path: not (adaptation.is_learnt(path) or is_beside(path) or is_unlearnt(path)),
    )


def _attach_site(weight: Weight, site: Site, path: str) -> None:
    axes = weight.w.get_metadata()["axes"]
    lead = len(axes) - len(weight.axes) + weight.lead
    shape, inputs = weight.w.shape, len(axes) - weight.inputs
    sizes = shape[:lead], shape[lead:inputs], shape[inputs:]
    names = axes[:lead], axes[lead:inputs], axes[inputs:]

    def zeros(*parts: tuple) -> Any:
        (shape, axes) = (sum(part, ()) for part in zip(*parts, strict=True))
        return optional(Param(jnp.zeros(shape, weight.w.dtype), axes=axes))

    first, outputs, last = zip(sizes, names, strict=True)
    rank = ((site.rank,), ("rank",))
    weight.site, weight.number = site, zlib.crc32(path.encode())
    weight.lora_a, weight.lora_b = zeros(first, rank, last), zeros(first, outputs, rank)
    if site.magnitude:
        weight.magnitude = zeros(first, outputs)
    if site.start:
        weight.start_a, weight.start_b = zeros(first, rank, last), zeros(first, outputs, rank)


def start_values(
    graphdef: Any,
    base: Mapping[str, Array],
    adaptation: Adaptation,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    seed: int,
) -> Params:
    """Returns the leaves of adapters at step 0, where the model is as good as without them.

    Args:
      graphdef: Structure of the model without adapters.
      base: Its parameters.
      adaptation: What is learnt.
      abstract: Shape, dtype and sharding of each leaf.
      seed: Of the random values.
    """
    wanted = {path: spec for path, spec in abstract.items() if path not in base}

    def make(base: Mapping[str, Array]) -> Params:
        weights, found = weights_in(merge(graphdef, base)), {}
        for path, site in adaptation.sites.items():
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            shapes = {leaf: wanted[f"{path}.{leaf}"].shape for leaf in ("lora_a", "lora_b")}
            leaves = _start_of_site(weights[path], site, adaptation.start, shapes, key)
            found |= {f"{path}.{leaf}": value for leaf, value in leaves.items()}
        for path in wanted:
            if path.endswith(".rows"):
                table = weights[path.removesuffix(".rows")]
                found[path] = table.w[...][jnp.asarray(adaptation.rows)]
        return {path: found[path].astype(spec.dtype) for path, spec in wanted.items()}

    shardings = {path: spec.sharding for path, spec in wanted.items()}
    return jax.jit(make, out_shardings=shardings)(dict(base))


def _start_of_site(
    weight: Weight, site: Site, start: str, shapes: Mapping[str, tuple[int, ...]], key: Array
) -> dict[str, Array]:
    """Returns the leaves of one site, float32."""
    of_a, of_b = shapes["lora_a"], shapes["lora_b"]
    fan_in = math.prod(of_a[len(of_a) - weight.inputs :])
    if start == "zero":
        # Uniform within 1 / sqrt(inputs), as the adapters of the paper's authors start.
        a = jax.random.uniform(key, of_a, jnp.float32, -1, 1) / math.sqrt(fan_in)
        leaves = {"lora_a": a, "lora_b": jnp.zeros(of_b, jnp.float32)}
    elif start == "orthogonal":
        leaves = _orthogonal(key, of_a, of_b, site.rank, weight.inputs)
    else:
        leaves = _principal(weight, site, of_a, of_b, key)
        leaves |= {"start_a": leaves["lora_a"], "start_b": leaves["lora_b"]}
    if site.magnitude:
        # What is added is nothing yet: the norm is the weight's own.
        wide = weight.value(jnp.float32)
        inputs = tuple(range(wide.ndim - weight.inputs, wide.ndim))
        leaves["magnitude"] = jnp.sqrt(jnp.sum(jnp.square(wide), axis=inputs))
    return leaves


def _orthogonal(
    key: Array, of_a: tuple[int, ...], of_b: tuple[int, ...], rank: int, inputs: int
) -> dict[str, Array]:
    """Returns matrices that are not zero but whose product is: they share no direction of r."""
    of_basis, for_a, for_b = jax.random.split(key, 3)
    count = len(of_a) - inputs - 1
    lead, half = of_a[:count], rank // 2
    basis = jnp.linalg.qr(jax.random.normal(of_basis, (*lead, rank, rank)))[0]
    # Small beside the weight, as in PEFT.
    wide, tall = (
        jax.random.normal(key, (*lead, half, math.prod(shape))) / 10
        for key, shape in ((for_a, of_a[count + 1 :]), (for_b, of_b[count:-1]))
    )
    a = jnp.einsum("...hr,...hi->...ri", basis[..., 0::2, :], wide)
    b = jnp.einsum("...ho,...hr->...or", tall, basis[..., 1::2, :])
    return {"lora_a": a.reshape(of_a), "lora_b": b.reshape(of_b)}


def _principal(
    weight: Weight, site: Site, of_a: tuple[int, ...], of_b: tuple[int, ...], key: Array
) -> dict[str, Array]:
    """Returns the part of the weight that r singular values hold (PiSSA, arXiv:2404.02948).

    By subspace iteration from a random start (Halko et al., arXiv:0909.4061), matrix by matrix.
    """
    wide = weight.value(jnp.float32)
    fan_in = math.prod(of_a[len(of_a) - weight.inputs :])
    outputs = math.prod(of_b[len(of_a) - weight.inputs - 1 : -1])
    matrices = wide.reshape(-1, outputs, fan_in)
    columns = min(site.rank + _OVERSAMPLED, outputs, fan_in)

    def factors(w: Float[Array, "O I"]) -> tuple[Array, Array]:
        q = jax.random.normal(key, (fan_in, columns))
        for _ in range(_PASSES):
            q = jnp.linalg.qr(w @ q)[0]
            q = jnp.linalg.qr(w.T @ q)[0]
        u, s, vt = jnp.linalg.svd(w @ q, full_matrices=False)
        root = jnp.sqrt(s[: site.rank] / site.scale)
        return root[:, None] * (vt @ q.T)[: site.rank], u[:, : site.rank] * root[None]

    with jax.default_matmul_precision("highest"):
        a, b = jax.lax.map(factors, matrices)
    return {"lora_a": a.reshape(of_a), "lora_b": b.reshape(of_b)}


def choose_sites(
    weights: Mapping[str, Weight],
    names: Mapping[str, str],
    *,
    targets: str,
    rank: int,
    alpha: float,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rslora: bool,
    magnitude: bool,
    dropout: float,
    start: str,
) -> dict[str, Site]:
    """Returns the adapter of each weight that gets one.

    Patterns are regular expressions, searched in the path of a weight's module and in the name that
    files have for it.

    Args:
      weights: Of the model, by path.
      names: What files call the module of each.
      targets: Pattern of those that get an adapter; empty for every projection of the layers but
        routers.
      rank: Of adapters that no pattern of `ranks` matches.
      alpha: Numerator of the scale of those that no pattern of `alphas` matches; 0 for twice their
        rank.
      ranks: Rank by pattern; the first that matches counts.
      alphas: Numerator by pattern, likewise.
      rslora: As in `Site`.
      magnitude: As in `Site`.
      dropout: As in `Site`.
      start: As in `Adaptation`.

    Raises:
      ConfigError: With all that cannot be, such as a pattern that matches nothing.
    """
    looked_up = ("embed", "positions", "per_layer.table")
    candidates = {path: weight for path, weight in weights.items() if path not in looked_up}

    def matches(pattern: str, path: str) -> bool:
        return any(re.search(pattern, text) for text in (path, names.get(path, "")) if text)

    def by_pattern(table: Mapping[str, Any], path: str, otherwise: Any) -> Any:
        return next((v for pattern, v in table.items() if matches(pattern, path)), otherwise)

    chosen = [
        path
        for path, weight in candidates.items()
        if (
            matches(targets, path)
            if targets
            else path.startswith("layers.") and "router" not in weight.axes
        )
    ]
    sites = {
        path: Site(
            by_pattern(ranks, path, rank),
            float(by_pattern(alphas, path, alpha or 2 * by_pattern(ranks, path, rank))),
            rslora,
            magnitude,
            dropout,
            start == "pissa",
        )
        for path in chosen
    }
    known = ", ".join(f"{path} ({names[path]})" if path in names else path for path in candidates)
    problems = [
        f"adapter.{key} {pattern!r} matches no weight that can have an adapter; these are {known}."
        for key, patterns, among in (
            ("targets", [targets] if targets else [], candidates),
            ("ranks", ranks, chosen),
            ("alphas", alphas, chosen),
        )
        for pattern in patterns
        if not any(matches(pattern, path) for path in among)
    ]
    problems += site_problems(sites, weights, start)
    if problems:
        raise ConfigError(problems)
    return {path: site for path, site in sites.items() if site.rank}


def site_problems(
    sites: Mapping[str, Site], weights: Mapping[str, Weight], start: str
) -> list[str]:
    """Returns what weights of a model cannot have of adapters that start in this way."""
    return [
        problem
        for path, site in sites.items()
        for problem in _problems_of(path, weights[path], site, start)
    ]


def _problems_of(path: str, weight: Weight, site: Site, start: str) -> list[str]:
    if not site.rank:
        return []
    problems = []
    shape = weight.w.shape[-len(weight.axes) + weight.lead :]
    fan_in = math.prod(shape[len(shape) - weight.inputs :])
    widest = min(fan_in, math.prod(shape) // fan_in)
    if site.rank > widest:
        problems.append(
            f"{path} can have an adapter of rank {widest} at most, not {site.rank}; set "
            f"--config.adapter.ranks='{path}={widest}', or a smaller adapter.rank."
        )
    if start == "orthogonal" and site.rank % 2:
        problems.append(
            f"{path}: adapter.start 'orthogonal' halves the rank, and {site.rank} is odd."
        )
    if (site.magnitude or site.dropout) and (weight.lead or is_table(weight)):
        what = "adapter.dora" if site.magnitude else "adapter.dropout"
        problems.append(
            f"{path} cannot have {what}: PEFT has none for experts and heads either. Leave it out "
            "of --config.adapter.targets, or set the key to zero."
        )
    return problems
