"""Ring attention equals attention over whole rows, in all that a model asks of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxft.config import RunConfig, from_dict
from jaxft.models import ring
from jaxft.models.attention import causal_mask, masked_attention
from jaxft.models.config import Scoring
from jaxft.models.families import architecture_from_hf
from jaxft.models.ring import Ring, ring_attention
from jaxft.models.row_split import RowSplit
from jaxft.training import program
from tests.oracle.cases import CASES
from tests.tiny import relative_error

PLAIN = Scoring(scale=8**-0.5)


def make_placement(context: int, data: int = 1):
    config = RunConfig(strategy="cp")
    config.mesh.context, config.mesh.data = context, data
    return program.make_placement(config, jax.devices()[: context * data])


def random_arrays(length=64, heads=4, kv_heads=2, rows=2, head_dim=8, sinks=False):
    random = np.random.RandomState(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (random.randn(*shape).astype(np.float32) for shape in shapes)
    return q, k, v, random.randn(heads).astype(np.float32) if sinks else None


def packed(rows=2, length=64):
    """Rows of several documents, every second one with padding at its end."""
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        ends = np.array([0.2, 0.65, 0.7, 1.0 if row % 2 else 0.9]) * length
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            segments[row, int(start) : int(end)] = number
    return segments


def whole_rows(q, k, v, sinks, segments, scores):
    slots = jnp.arange(q.shape[1])
    mask = causal_mask(slots, slots, segments, segments, window=scores.window)
    return masked_attention(q, k, v, mask, scores=scores, sinks=sinks)


def around_the_ring(q, k, v, sinks, segments, scores, placement):
    order = placement.slots(q.shape[1])
    with placement.activate():
        arrays = (x[:, order] for x in (q, k, v, segments))
        return ring_attention(*arrays, scores, sinks)[:, np.argsort(order)]


def output_and_gradients(function, *arrays, **kwargs):
    def total(*arrays):
        out = function(*arrays, **kwargs)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(*arrays)


SCORES = Scoring(0.7, cap=1.3, window=6)


@pytest.mark.parametrize(
    ("context", "data", "heads", "scores", "sinks", "block"),
    [
        (4, 2, (4, 1), PLAIN, True, 4),  # two blocks in a chunk
        (8, 1, (4, 2), SCORES, True, 512),  # a window over neighbours: four steps of eight
        (2, 1, (4, 4), Scoring(0.5, cap=0.8), False, 512),
        pytest.param(
            2, 2, (6, 2), Scoring(0.5, 1.3, window=40), True, 4, marks=pytest.mark.slow(seconds=5)
        ),
        pytest.param(
            8, 1, (4, 2), Scoring(0.7, window=2), False, 2, marks=pytest.mark.slow(seconds=5)
        ),
        pytest.param(
            8, 1, (4, 2), Scoring(0.7, window=5), False, 512, marks=pytest.mark.slow(seconds=5)
        ),
        pytest.param(
            8, 1, (4, 4), Scoring(0.7, window=17), True, 512, marks=pytest.mark.slow(seconds=5)
        ),
    ],
)
def test_values_and_gradients_are_those_of_whole_rows(
    monkeypatch, context, data, heads, scores, sinks, block
):
    monkeypatch.setattr(ring, "BLOCK", block)
    arrays = random_arrays(heads=heads[0], kv_heads=heads[1], sinks=sinks)
    kwargs = {"segments": packed(), "scores": scores}
    placement = make_placement(context, data)
    found = output_and_gradients(around_the_ring, *arrays, **kwargs, placement=placement)
    assert relative_error(found, output_and_gradients(whole_rows, *arrays, **kwargs)) < 1e-5


def test_bfloat16_comes_as_near_as_it_does_in_whole_rows():
    """Scores and sums are float32 in both: an error of accumulation would be seen."""
    exact = random_arrays()
    kwargs = {"segments": packed(), "scores": PLAIN}
    halves = tuple(x if x is None else jnp.asarray(x, jnp.bfloat16) for x in exact)
    found = output_and_gradients(around_the_ring, *halves, **kwargs, placement=make_placement(2))
    assert {x.dtype for x in jax.tree.leaves((found[0][1], found[1]))} == {jnp.dtype(jnp.bfloat16)}
    expected = output_and_gradients(whole_rows, *exact, **kwargs)
    of_whole = output_and_gradients(whole_rows, *halves, **kwargs)
    assert relative_error(found[1], expected[1]) < 1.5 * relative_error(of_whole[1], expected[1])


@pytest.mark.parametrize("window", [0, 1, 2, 4, 5, 6, 9, 17, 64])
@pytest.mark.parametrize("context", [2, 4, 8])
def test_only_steps_that_bring_a_visible_key_are_made(context, window):
    length = 64
    order = make_placement(context).slots(length).reshape(context, -1)
    behind = order[:, None, :, None] - order[None, :, None, :]
    visible = (behind >= 0) & ((behind < window) if window else True)
    seen = visible.any(axis=(2, 3))
    steps = [r for r in range(context) if any(seen[i, i - r] for i in range(context))]
    split = RowSplit(make_placement(context), P(None, "context", None), ("context",))
    found = Ring(split, dataclasses.replace(PLAIN, window=window)).steps(length // (2 * context))
    assert found == steps


def test_a_step_is_one_exchange_with_the_neighbour():
    """Eight devices: keys go on seven times, in the backward pass gradients eight times."""
    arrays = random_arrays()
    kwargs = {"segments": packed(), "scores": PLAIN, "placement": make_placement(8)}
    traced = jax.make_jaxpr(lambda *x: around_the_ring(*x, **kwargs))(*arrays)
    assert sends(traced.jaxpr) == 3 * 7  # of keys, values and their segments
    traced = jax.make_jaxpr(lambda *x: output_and_gradients(around_the_ring, *x, **kwargs))(*arrays)
    assert sends(traced.jaxpr) == 2 * 3 * 7 + 2 * 8


def sends(jaxpr) -> int:
    """Counts how often arrays are sent while a program runs."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        parts = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = sum(sends(part) for part in parts if hasattr(part, "eqns"))
        total += (equation.primitive.name == "ppermute") + times * inner
    return total


def compiled_step(context, length, backend):
    """The training step of a tiny model on rows of this length, split over `context` devices."""
    config = from_dict(
        {
            "strategy": "cp",
            "mesh.context": context,
            "model.attention": backend,
            "model.dtypes": "float32",
            "data.max_length": length,
            "train.batch_size": 1,
        }
    )
    placement = program.make_placement(config, jax.devices()[:context])
    architecture = architecture_from_hf(CASES["gqa"])
    evaluator = program.build_evaluator(config, architecture, max_segments=8, placement=placement)
    built = program.build(config, evaluator, steps=10)
    return built.lower().compile()


@pytest.mark.slow(seconds=5)
def test_a_row_too_long_for_one_device_fits_when_it_is_split():
    length = 32768
    alone = compiled_step(1, length, "xla").memory_analysis().temp_size_in_bytes
    shared = compiled_step(8, length, "ring")
    assert shared.memory_analysis().temp_size_in_bytes < 48 * 2**20 < 1000 * 48 * 2**20 < alone
    # Scores of all queries of a device with as many keys exist nowhere.
    shapes = re.findall(r"\w+\[([\d,]+)\]", shared.as_text())
    sizes = [sorted(map(int, shape.split(","))) for shape in set(shapes)]
    assert not [shape for shape in sizes if len(shape) > 1 and shape[-2] > 1024]


@pytest.mark.slow(seconds=50)
def test_memory_of_a_device_falls_with_the_parts_of_a_row():
    two, eight = (
        compiled_step(parts, 131072, "ring").memory_analysis().temp_size_in_bytes
        for parts in (2, 8)
    )
    assert two / eight == pytest.approx(4, rel=0.05)
