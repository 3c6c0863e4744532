"""Adapters in weights, against dense matrices in float64; what rounding leaves of them."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jaxft.models.adapter_files import adaptation_of
from jaxft.programs.merging import merged, surviving
from tests.adapters import add_rest, bare_model, linear_sites, random_adapter
from tests.adapters import merged as merged_densely
from tests.oracle.cases import FAMILY_CASES

CASE = {family: names[0] for family, names in FAMILY_CASES.items()}


def arrays_of(tiny):
    return {path: np.asarray(value) for path, value in tiny.params.items()}


def slices(shape):
    return tuple(slice(0, size) for size in shape)


@pytest.mark.parametrize("family", CASE)
def test_weights_of_every_family_get_what_dense_matrices_get(family):
    tiny = bare_model(CASE[family])
    ranks = dict.fromkeys(linear_sites(tiny), 2)
    adapter = random_adapter(tiny, ranks, pissa=True, dora=True, rslora=True)
    found = merged(tiny.architecture, arrays_of(tiny), adapter)
    for path, expected in merged_densely(tiny, adapter).items():
        whole = found[path][slices(expected.shape)]
        np.testing.assert_allclose(whole, expected, atol=1e-5, err_msg=path)
        # A part of every axis is the part of the whole.
        part = tuple(slice(size // 2, size) for size in expected.shape)
        np.testing.assert_allclose(found[path][part], whole[part], atol=1e-6, err_msg=path)
    assert adaptation_of(adapter).sites.keys() == ranks.keys()


def test_a_row_of_zeros_has_no_direction_and_stays_one():
    tiny = bare_model(CASE["llama"])
    adapter = random_adapter(tiny, {"layers.mlp.up": 2}, dora=True)
    arrays = {**adapter.arrays, "layers.mlp.up.lora_b": adapter.arrays["layers.mlp.up.lora_b"] * 0}
    stored = arrays_of(tiny)
    weight = stored["layers.mlp.up.w"] = stored["layers.mlp.up.w"].copy()
    weight[0, 3] = 0
    adapter = dataclasses.replace(adapter, arrays=arrays)
    found = merged(tiny.architecture, stored, adapter)["layers.mlp.up.w"][slices(weight.shape)]
    assert np.isfinite(found).all() and not found[0, 3].any() and found[0, 2].any()


def test_rows_of_tokens_and_whole_parameters_are_put_in_their_place():
    tiny = bare_model(CASE["llama"])
    adapter = add_rest(tiny, ["embed", "head"], ["norm.scale"], tokens=(9, 3, 5))
    found = merged(tiny.architecture, arrays_of(tiny), adapter)
    for path, expected in merged_densely(tiny, adapter).items():
        np.testing.assert_allclose(found[path][slices(expected.shape)], expected, atol=1e-5)
    rows = found["embed.w"][slice(4, 10), slice(0, 32)]
    np.testing.assert_array_equal(rows[5], adapter.arrays["embed.rows"][0])
    assert adaptation_of(adapter).is_learnt("norm.scale")


@pytest.mark.parametrize(("size", "low", "high"), [(1.0, 0.99, 1.01), (1e-5, 0, 0.05)])
def test_an_update_below_the_last_bit_of_a_type_is_lost(size, low, high):
    tiny = bare_model(CASE["llama"])
    adapter = random_adapter(tiny, {"layers.mlp.up": 2})
    alphas = {site: size * alpha for site, alpha in adapter.alphas.items()}
    adapter = dataclasses.replace(adapter, alphas=alphas)
    stored = {path: x.astype(ml_dtypes.bfloat16) for path, x in arrays_of(tiny).items()}
    found = merged(tiny.architecture, stored, adapter)
    path = "layers.mlp.up.w"
    exact = found[path][slices(stored[path].shape)]
    assert surviving(found, {path: exact}) == pytest.approx(1)
    assert low <= surviving(found, {path: exact.astype(ml_dtypes.bfloat16)}) <= high
