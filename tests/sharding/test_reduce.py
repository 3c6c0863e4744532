"""Weights whose gradients are reduced straight into their shards: equal results, fewer bytes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.hardware.chips import chip_named
from jaxft.sharding import reduce, scatter
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, load_strategy
from jaxft.training.objectives.token_scores import cross_entropy, token_scores
from tests.strategies import MESHES
from tests.tiny import load_tiny, random_rows, relative_error


def place(name: str) -> Placement:
    strategy = load_strategy(name)
    return Placement(name, strategy, make_mesh(MESHES[name], strategy, name=name))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def value_and_gradients(function, placement: Placement | None, *arrays):
    """Returns them for the mean of the sine of what the function gives."""

    def total(*arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    def whole(*arrays):
        if placement is None:
            return jax.value_and_grad(total, (0, 1))(*arrays)
        with placement.activate():
            return jax.value_and_grad(total, (0, 1))(*arrays)

    return jax.jit(whole)(*arrays)


WEIGHTS = [
    (("heads", "head_dim", "embed"), (4, 6, 16), 1),
    (("embed", "heads", "head_dim"), (16, 4, 6), 2),
    (("embed", "mlp"), (16, 24), 1),
]


@pytest.mark.parametrize("name", ["zero2", "fsdp_tp", "fsdp_cp"])
@pytest.mark.parametrize(("axes", "shape", "inputs"), WEIGHTS)
def test_a_product_and_its_gradients_do_not_depend_on_placement(name, axes, shape, inputs):
    x, w = normal(8, 8, *shape[-inputs:]), normal(*shape, seed=1)

    def product(x, w):
        return reduce.project(x, w, axes=axes, inputs=inputs)

    found = value_and_gradients(product, place(name), x, w)
    assert relative_error(found, value_and_gradients(product, None, x, w)) < 1e-5


def stored_weight(shape) -> tuple[np.ndarray, np.ndarray]:
    codes = np.random.RandomState(1).randint(-9, 9, shape).astype(np.int8)
    return codes, 0.1 * normal(*shape[:-1], shape[-1] // 2, seed=2)


def decode(codes, scales):
    return codes.astype(jnp.float32) * jnp.repeat(scales, 2, axis=-1)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tp", "fsdp_cp"])
@pytest.mark.parametrize(("axes", "shape", "inputs"), WEIGHTS)
def test_a_product_with_what_is_decoded_does_not_depend_on_placement(name, axes, shape, inputs):
    x, (codes, scales) = normal(8, 8, *shape[-inputs:]), stored_weight(shape)

    def product(x, bias):
        out = reduce.project_decoded(x, (codes, scales), decode, axes=axes, inputs=inputs)
        return out + bias

    def plain(x, bias):
        w = decode(codes, scales)
        return reduce.project(x, w, axes=axes, inputs=inputs) + bias

    bias = normal(*shape[:-inputs])[None, None]
    # The sum itself is small beside its parts; the bias has the gradient of each output.
    _, found = value_and_gradients(product, place(name), x, bias)
    _, expected = value_and_gradients(plain, None, x, bias)
    assert relative_error(found, expected) < 1e-5


def test_what_is_stored_travels_and_is_kept_and_not_what_is_decoded():
    placement, (axes, shape, inputs) = place("fsdp"), WEIGHTS[0]
    sharding = NamedSharding(placement.mesh, P(None, None, "fsdp"))
    stored = tuple(jax.device_put(part, sharding) for part in stored_weight(shape))
    x = jax.device_put(normal(8, 8, shape[-1]), NamedSharding(placement.mesh, P("fsdp")))

    def output(x, stored):
        with placement.activate():
            return reduce.project_decoded(x, stored, decode, axes=axes, inputs=inputs)

    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: output(x, stored), x)[1], x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept) if leaf.shape == shape} <= {"int8"}
    gradient = jax.jit(jax.grad(lambda x, stored: jnp.sum(jnp.sin(output(x, stored)))))
    text = gradient.lower(x, stored).compile().as_text()
    gathers = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    codes, scales = ",".join(map(str, shape)), ",".join(map(str, (*shape[:-1], shape[-1] // 2)))
    assert set(gathers) == {("s8", codes), ("f32", scales)}


@pytest.mark.parametrize("name", ["zero2", "fsdp_tp", "fsdp_cp", "pp"])
def test_looking_rows_up_and_its_gradient_do_not_depend_on_placement(name):
    tokens = np.random.RandomState(0).randint(0, 32, (8, 8)).astype(np.int32)
    table, scale = normal(32, 16), normal(8, 8, 16, seed=1)

    def rows(table, scale):
        found = reduce.look_up(table, tokens, axes=("vocab", "embed"), dtype=jnp.float32)
        return found * scale

    found = value_and_gradients(rows, place(name), table, scale)
    assert relative_error(found, value_and_gradients(rows, None, table, scale)) < 1e-5


@pytest.mark.slow(seconds=3, but=r"^fsdp_tp-5$")
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", ["fsdp_tp", "fsdp_cp"])
def test_cross_entropy_and_its_gradients_do_not_depend_on_placement(name, chunk):
    """With a bound on logits, weights of rows in place of ones, and chunks that do not divide."""
    tiny = load_tiny("gemma2_gqa")
    rows, hidden = random_rows(8, 24, 64), normal(8, 24, tiny.architecture.config.embed)
    of_rows = normal(8, seed=2)

    def run(placement):
        def total(hidden, params):
            given = (tiny.merge(params), hidden, rows.targets, rows.weights)
            scores = token_scores(*given, chunk=chunk)
            total = jnp.sum(scores.log_probs * rows.weights, axis=-1)
            terms = cross_entropy(*given, chunk=chunk)
            return jnp.sum(total * of_rows) + terms.total, (scores, terms)

        def whole(hidden, params):
            if placement is None:
                return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, params)
            with placement.activate():
                return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, params)

        return jax.jit(whole)(hidden, tiny.params)

    (total, terms), gradients = run(place(name))
    (wanted_total, wanted), wanted_gradients = run(None)
    np.testing.assert_allclose(total, wanted_total, rtol=1e-5)
    assert relative_error(terms, wanted) < 1e-5
    assert relative_error(gradients, wanted_gradients) < 1e-5


def collectives_of(name: str, axes, shape, inputs: int) -> set[str]:
    placement = place(name)

    def gradient(x, w):
        with placement.activate():
            return jax.grad(
                lambda w: jnp.sum(jnp.sin(reduce.project(x, w, axes=axes, inputs=inputs)))
            )(w)

    def spec(array_axes, array_shape, rules=None):
        found = placement.spec(array_axes, array_shape, "w", rules=rules)
        return NamedSharding(placement.mesh, found)

    tokens = (8, 8, shape[-1])
    of_tokens = spec(("batch", "seq", "act_embed"), tokens)
    x = jax.ShapeDtypeStruct(tokens, jnp.float32, sharding=of_tokens)
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spec(axes, shape))
    of_gradient = spec(axes, shape, placement.gradient_rules)
    compiled = jax.jit(gradient, out_shardings=of_gradient).lower(x, w).compile()
    return set(re.findall(r"(all-reduce|all-gather|reduce-scatter)\(", compiled.as_text()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {"all-reduce"}),
        ("zero1", {"all-reduce"}),
        ("zero2", {"reduce-scatter"}),
        ("hsdp", {"all-gather", "reduce-scatter", "all-reduce"}),
        ("fsdp_cp", {"all-gather", "reduce-scatter"}),
    ],
)
def test_a_gradient_is_reduced_as_its_placement_says(name, expected):
    """`hsdp` and `fsdp` with `data` reduce over replicas what is left after scattering."""
    axes, shape, inputs = WEIGHTS[0]
    found = collectives_of(name, axes, shape, inputs)
    if name == "fsdp_cp":
        found.discard("all-reduce")  # `data` has two devices in this mesh
    assert found == expected


def compiled_text(step, *arrays) -> str:
    return step.lower(*arrays).compile().as_text()


def as_if_by_hops(monkeypatch, **figures) -> None:
    known = chip_named("v5e")
    assert known is not None
    chip = dataclasses.replace(known, name="new", **figures)
    monkeypatch.setattr(scatter, "chip_of", lambda kind: chip)


def place_on_ring(monkeypatch, *sizes: int) -> Placement:
    """Returns `zero2` on as many devices, as if they lay on a network with these dimensions."""
    monkeypatch.setattr(scatter, "rings", lambda mesh, axis: sizes)
    strategy = load_strategy("zero2")
    return Placement(
        "zero2", strategy, make_mesh({"data": math.prod(sizes)}, strategy, name="zero2")
    )


@pytest.mark.parametrize("hops", [False, True])
@pytest.mark.parametrize("sizes", [(8,), (2, 4), (4, 2), (2, 2, 2), (3,), (3, 2)])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_sum_along_rings_gives_each_device_its_part(monkeypatch, sizes, dimension, hops):
    """Only TPUs tell their rings; the sum must be the same however they lie."""
    if hops:
        as_if_by_hops(monkeypatch)
    placement = place_on_ring(monkeypatch, *sizes)
    parts = normal(math.prod(sizes), *((48, 9), (9, 48))[dimension])
    spec = P("data", None) if dimension == 0 else P(None, "data")
    scattered = jax.shard_map(
        lambda x: scatter.reduce_scatter(x[0], "data", dimension, placement),
        mesh=placement.mesh,
        in_specs=P("data"),
        out_specs=spec,
        check_vma=False,
    )
    step = jax.jit(scattered)
    np.testing.assert_allclose(step(parts), parts.sum(0), rtol=1e-5, atol=1e-5)
    found = set(re.findall(r"(collective-permute|reduce-scatter)\(", compiled_text(step, parts)))
    assert found == {"collective-permute" if hops else "reduce-scatter"}


@pytest.mark.parametrize("sizes", [(8,), (2, 4), (3,), (1,)])
@pytest.mark.parametrize(("axes", "shape", "inputs"), WEIGHTS)
def test_a_product_is_computed_two_parts_at_a_time_beside_the_copies(
    monkeypatch, sizes, axes, shape, inputs
):
    as_if_by_hops(monkeypatch, bandwidth=1e30)  # no part is too narrow
    shape = tuple(48 if axis == "embed" else n for axis, n in zip(axes, shape, strict=True))
    placement = place_on_ring(monkeypatch, *sizes)
    x, w = normal(24, 10, *shape[-inputs:]), normal(*shape, seed=1)

    def product(x, w):
        return reduce.project(x, w, axes=axes, inputs=inputs)

    _, found = value_and_gradients(product, placement, x, w)
    _, expected = value_and_gradients(product, None, x, w)
    assert relative_error(found, expected) < 1e-5
    lowered = jax.jit(lambda x, w: value_and_gradients(product, placement, x, w)).lower(x, w)
    made = re.findall(r"= f32\[([\d,]*)\]\S* (?:dot|custom-call)\(", lowered.compile().as_text())
    sizes_made = {math.prod(map(int, dims.split(","))) for dims in made if dims}
    whole = math.prod(shape)
    assert whole // sizes[0] * min(2, sizes[0]) in sizes_made
    assert sizes[0] <= 2 or whole not in sizes_made


@pytest.mark.parametrize("figures", [None, {}, {"bandwidth": 1e30}])
def test_a_sum_along_rings_is_the_same_for_all_stages_of_a_pipeline(monkeypatch, figures):
    """As one collective, by copies, and by copies of parts of a product."""
    monkeypatch.setattr(scatter, "rings", lambda mesh, axis: (4,) if figures else (2, 2))
    if figures is not None:
        as_if_by_hops(monkeypatch, **figures)
    strategy = load_strategy("pp_fsdp_tp")
    sizes = {"stage": 2, "fsdp": 4}
    placement = Placement("pp_fsdp_tp", strategy, make_mesh(sizes, strategy, name="pp_fsdp_tp"))
    x, w = normal(2, 8, 4, 16), normal(2, 24, 16, seed=1)

    def product(x, w):
        return reduce.project(x, w, axes=("mlp", "embed"), inputs=1)

    def gradient(x, w, mapped):
        return jax.grad(lambda w: jnp.sum(jnp.sin(mapped(product)(x, w))))(w)

    def staged(x, w):
        with placement.activate():
            return gradient(x, w, lambda f: jax.vmap(f, spmd_axis_name="stage"))

    assert relative_error(jax.jit(staged)(x, w), gradient(x, w, jax.vmap)) < 1e-5
