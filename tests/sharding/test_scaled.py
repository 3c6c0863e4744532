"""Products of 8-bit numbers: bounds in closed form, exact cases, gradients, what travels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.compiled.hlo import Module, arrays
from jaxft.planner.cost import product_flops
from jaxft.sharding import reduce
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, load_strategy
from jaxft.sharding.scaled import FORMATS, largest_code, project_scaled, scale
from tests.sharding.test_reduce import WEIGHTS, normal, place, value_and_gradients
from tests.tiny import relative_error
from tests.tpu import compiles_for_tpu, tpu_devices

AXES = ("mlp", "embed")
# Half of the distance between neighbours: of int8 everywhere 1, of floats a share of the number,
# and of the smallest ones that of the numbers below the normal ones.
HALF_STEPS = {
    jnp.dtype(jnp.int8): (0.0, 0.5),
    jnp.dtype(jnp.float8_e4m3fn): (2.0**-4, 2.0**-10),
}


def tokens_and_weight(outputs: int = 24, inputs: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Returns both with rows of very different sizes."""
    sizes = 10.0 ** np.random.RandomState(2).uniform(-4, 2, (2, 8, 1))
    x = (normal(2, 8, inputs) * sizes).astype(np.float32)
    return x, normal(outputs, inputs, seed=1) * np.logspace(-2, 2, outputs)[:, None].astype("f4")


def product(x, w, kind: str = "int8"):
    return project_scaled(x, w, axes=AXES, inputs=1, kind=kind)


def half_steps(x: np.ndarray, dtype) -> np.ndarray:
    """Returns the largest error of each number, rounded along the last dimension."""
    relative, absolute = HALF_STEPS[jnp.dtype(dtype)]
    largest = np.max(np.abs(x), axis=-1, keepdims=True)
    return np.maximum(relative * np.abs(x), absolute * largest / largest_code(dtype))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_is_within_half_a_step_of_each_number_of_the_whole_one(kind):
    x, w = tokens_and_weight()
    dtype = FORMATS[kind]
    of_x, of_w = half_steps(x, dtype), half_steps(w, dtype)
    bound = of_x @ np.abs(w).T + np.abs(x) @ of_w.T + of_x @ of_w.T
    error = np.abs(product(x, w, kind) - x @ w.T)
    assert np.all(error <= 1.001 * bound)
    assert np.max(error / bound) > 0.05  # and is no whole product


@pytest.mark.parametrize("kind", FORMATS)
def test_gradients_of_inputs_are_within_half_a_step_of_those_of_the_rounded_weight(kind):
    x, w = tokens_and_weight()
    dy = normal(2, 8, 24, seed=3) * 10.0 ** np.arange(-8, 0, dtype=np.float32)[None, :, None]
    codes, scales = scale(w, FORMATS[kind], (1,))
    codes, scales = np.asarray(codes, np.float32), np.asarray(scales)
    found, of_weight = jax.vjp(lambda x, w: product(x, w, kind), x, w)[1](dy)
    bound = half_steps(dy * scales, FORMATS[kind]) @ np.abs(codes)
    error = np.abs(found - (dy * scales) @ codes)
    assert np.all(error <= 1.001 * bound) and np.max(error / bound) > 0.05
    # The gradient of the weight is whole.
    whole = np.einsum("btf,btd->fd", dy, x)
    assert relative_error(of_weight, whole) < 1e-6


def test_numbers_that_are_codes_are_multiplied_exactly():
    """Integers to 127, and floats of few bits, with powers of two as scales."""
    random = np.random.RandomState(0)
    for kind, most in (("int8", 127), ("fp8", 16)):
        x, w = (random.randint(-most, most + 1, shape).astype(np.float32) for shape in SHAPES)
        x[..., 0] = w[..., 0] = largest_code(FORMATS[kind])
        expected = x @ w.T
        assert np.all(np.abs(expected) < 2**24)
        np.testing.assert_array_equal(product(x, w, kind), expected)
        x, w = (
            x * 2.0 ** random.randint(-9, 9, (2, 8, 1)),
            w * 2.0 ** random.randint(-9, 9, (24, 1)),
        )
        np.testing.assert_array_equal(product(*map(np.float32, (x, w)), kind), x @ w.T)


SHAPES = ((2, 8, 48), (24, 48))


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_made_of_zeros_and_what_is_not_finite_stays_so(kind):
    x, w = tokens_and_weight()
    x[0, 0] = w[3] = 0
    x[0, 1, 5], x[0, 2, 7], w[4, 6] = np.nan, np.inf, np.nan
    out = np.asarray(product(x, w, kind))
    assert np.all(out[0, 0, [0, 1, 2, 3, 5]] == 0)
    assert np.all(np.isnan(out[0, 1])) and not np.any(np.isfinite(out[0, 2]))
    assert np.all(np.isnan(out[:, :, 4]))
    assert np.all(np.isfinite(np.delete(out[0, 3:], 4, axis=-1)))


@pytest.mark.parametrize("name", ["zero2", "fsdp", "fsdp_tp", "fsdp_tp_sp", "fsdp_cp"])
@pytest.mark.parametrize(("axes", "shape", "inputs"), WEIGHTS)
def test_a_product_and_its_gradients_do_not_depend_on_placement(name, axes, shape, inputs):
    x, w = normal(8, 8, *shape[-inputs:]), normal(*shape, seed=1)

    def rounded(x, w):
        return project_scaled(x, w, axes=axes, inputs=inputs, kind="int8")

    def whole(x, w):
        return reduce.project(x, w, axes=axes, inputs=inputs)

    _, one = value_and_gradients(rounded, None, x, w)
    assert relative_error(value_and_gradients(rounded, place(name), x, w)[1], one) < 1e-5
    assert relative_error(value_and_gradients(whole, None, x, w)[1], one) > 0.01


def test_codes_travel_and_not_the_weight():
    placement, (axes, shape, inputs) = place("fsdp"), WEIGHTS[0]
    w = jax.device_put(normal(*shape), NamedSharding(placement.mesh, P(None, None, "fsdp")))
    x = jax.device_put(normal(8, 8, shape[-1]), NamedSharding(placement.mesh, P("fsdp")))

    def total(x, w):
        with placement.activate():
            return jnp.sum(jnp.sin(project_scaled(x, w, axes=axes, inputs=inputs, kind="int8")))

    text = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile().as_text()
    gathers = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    assert set(gathers) == {("s8", ",".join(map(str, shape)))}
    # Of the largest magnitudes, which lie on several devices, those of outputs.
    largest = re.findall(r"= f32\[([\d,]*)\]\S* all-reduce\(.*to_apply=%region_\S*max", text)
    assert set(largest) <= {",".join(map(str, shape[:2])) + ",1", ",".join(map(str, shape[:2]))}


@compiles_for_tpu
@pytest.mark.parametrize(
    ("name", "kind", "types"),
    [
        ("v5e:2x2", "int8", ["s8 s8", "s8 s8"]),
        pytest.param("v6e:2x2", "int8", ["s8 s8", "s8 s8"], marks=pytest.mark.slow(seconds=5)),
        pytest.param(
            "tpu7x:2x2x1",
            "fp8",
            ["f8e4m3fn f8e4m3fn", "f8e4m3fn f8e4m3fn"],
            marks=pytest.mark.slow(seconds=5),
        ),
    ],
)
def test_a_tpu_multiplies_codes_and_they_travel(name, kind, types):
    """Forward and for the gradient of inputs; that of the weight is a product of bfloat16."""
    strategy = load_strategy("fsdp")
    mesh = make_mesh({}, strategy, name="fsdp", devices=tpu_devices(name))
    placement = Placement("fsdp", strategy, mesh)

    def total(x, w):
        with placement.activate():
            out = project_scaled(x, w, axes=AXES, inputs=1, kind=kind)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8, 512, 1024), P("fsdp")), ((2048, 1024), P(None, "fsdp")))
    )
    text = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile().as_text()
    module = Module(text)
    found = []
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if product_flops(computation, instruction):
                operands = [computation.instructions[n].shape for n in instruction.operands[:2]]
                found.append(" ".join(arrays(shape)[0].dtype for shape in operands))
    # On v5e the last is computed part by part.
    assert sorted(found) == sorted(["bf16 bf16"] * found.count("bf16 bf16") + types)
    assert "bf16 bf16" in found
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", text)
    assert gathered == [types[0].split()[0]]
