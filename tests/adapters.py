"""Adapters of tiny models: random ones, and any of them merged densely in float64."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxft.hf.peft.adapter import Adapter
from jaxft.models.adapters import Adaptation
from jaxft.models.config import Numerics
from jaxft.models.module import AbstractModel, merge
from jaxft.models.weights import Site
from tests.tiny import Tiny, load_tiny


@functools.cache
def bare_model(case: str) -> Tiny:
    """Returns a case's model; it is shared, so leave it as it is."""
    return load_tiny(case)


@functools.cache
def logits_of(graphdef: Any) -> Callable[..., Array]:
    """Returns what computes a model's logits `[B, T, V]` of parameters and tokens `[B, T]`."""

    @jax.jit
    def forward(params, tokens):
        model = merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model.hidden(tokens, positions, jnp.ones_like(tokens))
        return model.logits(hidden)

    return forward


def shapes_of(tiny: Tiny) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters."""
    return {path: spec.shape for path, spec in tiny.abstract.params.items()}


def linear_sites(tiny: Tiny) -> list[str]:
    """Returns the sites that adapters have by default: every linear layer of the blocks."""
    return sorted(
        path.removesuffix(".w")
        for path in tiny.abstract.params
        if path.startswith("layers.") and path.endswith(".w") and "router" not in path
    )


def random_adapter(
    tiny: Tiny, ranks: Mapping[str, int], *, pissa: bool = False, dora: bool = False, **others: Any
) -> Adapter:
    """Returns pairs of random values of these ranks; alphas are twice the rank."""
    random = np.random.default_rng(7)
    arrays = {}
    for site, rank in ranks.items():
        for a, b in (("lora_a", "lora_b"), ("start_a", "start_b"))[: 1 + pissa]:
            lead, outputs, inputs = sides(tiny, site)
            scale = 0.3 / np.sqrt(rank * np.prod(inputs))
            arrays[f"{site}.{a}"] = scale * random.normal(size=(*lead, rank, *inputs))
            arrays[f"{site}.{b}"] = random.normal(size=(*lead, *outputs, rank))
        if dora:
            arrays[f"{site}.magnitude"] = 1 + 0.1 * random.normal(size=(*lead, *outputs))
    arrays = {path: value.astype(np.float32) for path, value in arrays.items()}
    return Adapter(arrays, {site: 2.0 * rank for site, rank in ranks.items()}, **others)


def add_rest(tiny: Tiny, tables: list[str], whole: list[str], **others: Any) -> Adapter:
    """Returns a pair of the queries, rows of three tokens of tables, and whole parameters."""
    random = np.random.default_rng(3)
    queries = [site for site in linear_sites(tiny) if site.endswith(("attn.q", "attn.q_down"))]
    adapter = random_adapter(tiny, dict.fromkeys(queries, 2), **others)
    width = tiny.architecture.config.embed
    shapes = {f"{table}.rows": (3, width) for table in tables}
    shapes |= {path: tiny.abstract.params[path].shape for path in whole}
    rest = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return dataclasses.replace(adapter, arrays={**adapter.arrays, **rest})


def sides(tiny: Tiny, site: str) -> tuple[tuple[int, ...], ...]:
    """Returns the leading sizes of a site's weight, its outputs and its inputs."""
    [rule] = [rule for rule in tiny.architecture.naming.rules if rule.ours == f"{site}.w"]
    shape = tiny.abstract.params[rule.ours].shape
    lead, outputs, inputs = rule.sides(shape[rule.leading :])
    return (*shape[: rule.leading], *lead), outputs, inputs


def merged(tiny: Tiny, adapter: Adapter) -> dict[str, Any]:
    """Returns the model's parameters with everything of an adapter in them.

    It is written apart from the model's own way to apply adapters, by the formulas of the papers:
    https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2402.09353.
    """
    params = {path: np.array(value, np.float64) for path, value in tiny.params.items()}
    for path in adapter.whole():
        params[path] = np.array(adapter.arrays[path], np.float64)
    for table in adapter.owners("rows"):
        params[f"{table}.w"][list(adapter.tokens)] = adapter.arrays[f"{table}.rows"]
    for site in adapter.owners("lora_b"):
        params[f"{site}.w"] += adapter.scale(site) * update(tiny, adapter, site)
        if (magnitude := adapter.arrays.get(f"{site}.magnitude")) is not None:
            params[f"{site}.w"] *= per_output(tiny, site, magnitude, params[f"{site}.w"])
    specs = tiny.abstract.params
    return {path: jnp.asarray(value, specs[path].dtype) for path, value in params.items()}


def adapted(tiny: Tiny, adapter: Adapter) -> tuple[AbstractModel, dict[str, Any]]:
    """Returns the model with leaves for an adapter, and the values of all parameters."""
    sites = {
        site: Site(
            adapter.rank(site),
            alpha,
            adapter.rslora,
            magnitude=f"{site}.magnitude" in adapter.arrays,
            start=f"{site}.start_a" in adapter.arrays,
        )
        for site, alpha in adapter.alphas.items()
    }
    adaptation = Adaptation(sites, rows=adapter.tokens)
    architecture = dataclasses.replace(tiny.architecture, adaptation=adaptation)
    abstract = architecture.abstract(Numerics())
    params = {**tiny.params, **adapter.arrays}
    assert params.keys() == abstract.params.keys()
    return abstract, {path: jnp.asarray(value) for path, value in params.items()}


def update(tiny: Tiny, adapter: Adapter, site: str) -> np.ndarray:
    """Returns B A of a site less that of its start."""
    lead, outputs, inputs = sides(tiny, site)
    total = np.zeros(())
    for a, b, sign in (("lora_a", "lora_b", 1), ("start_a", "start_b", -1)):
        if f"{site}.{a}" in adapter.arrays:
            left = adapter.arrays[f"{site}.{b}"].astype(np.float64)
            right = adapter.arrays[f"{site}.{a}"].astype(np.float64)
            rank = left.shape[-1]
            total = total + sign * np.matmul(
                left.reshape(*lead, -1, rank), right.reshape(*lead, rank, -1)
            )
    return total.reshape(*lead, *outputs, *inputs)


def per_output(tiny: Tiny, site: str, magnitude: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns what DoRA multiplies each output of a weight with, broadcastable to the weight."""
    _, _, inputs = sides(tiny, site)
    norms = np.sqrt(np.sum(weight**2, axis=tuple(range(-len(inputs), 0))))
    return np.expand_dims(magnitude / norms, axis=tuple(range(-len(inputs), 0)))
