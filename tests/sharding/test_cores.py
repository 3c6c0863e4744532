"""Products of few rows, shared out over the cores of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.sharding import cores
from tests.tiny import load_tiny, make_program


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 2, 33, 300])
@pytest.mark.parametrize("outputs", [12, 7])
def test_a_product_is_the_same_on_any_number_of_cores(monkeypatch, count, rows, outputs):
    monkeypatch.setattr(cores, "_cores", lambda: count)
    x, w = (jax.random.normal(jax.random.key(n), (n, 16), jnp.bfloat16) for n in (rows, outputs))
    found = jax.jit(cores.product, static_argnums=2)(x, w, jnp.float32)
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_core_has_a_product_of_its_own(monkeypatch):
    monkeypatch.setattr(cores, "_cores", lambda: 2)
    for rows, shape in ((1, "f32[2,1,6]"), (8, "f32[2,6,8]")):
        text = jax.jit(cores.product).lower(jnp.ones((rows, 16)), jnp.ones((12, 16)))
        assert f"{shape}{{2,1,0}} dot(" in text.compile().as_text()


def test_devices_that_are_many_or_no_cpus_share_out_nothing():
    assert cores.on_one_cpu()
    for devices, alone in ((1, True), (2, False)):
        placement = make_program(load_tiny("gqa"), devices).evaluator.placement
        with placement.activate():
            assert cores.on_one_cpu() == alone
