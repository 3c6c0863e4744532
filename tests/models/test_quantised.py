import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import quantised
from tests.oracle.cases import NF4

KINDS = sorted(quantised.DTYPES)
# Root of the mean square of what is lost of normal numbers, over theirs, at most.
LOST = {"nf4": 0.095, "int4": 0.105, "int8": 0.0065, "fp8": 0.027}


@pytest.fixture(scope="module")
def oracle():
    with np.load(NF4) as stored:
        return dict(stored)


def test_nf4_has_the_published_levels(oracle):
    np.testing.assert_array_equal(np.asarray(quantised.NF4, np.float32), oracle["table"])


@pytest.mark.slow(seconds=2)
def test_nf4_encodes_and_decodes_as_bitsandbytes_does(oracle):
    codes, scales = quantised.encode(jnp.asarray(oracle["w"]), "nf4", block=64)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.uint8), oracle["codes"])
    np.testing.assert_array_equal(np.asarray(scales).astype(np.float32), oracle["scales"])
    values = quantised.decode(codes, scales, jnp.float32)
    np.testing.assert_array_equal(np.asarray(values), oracle["values"])


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_are_what_their_shapes_say_and_lose_no_more_than_expected(kind):
    shape, axes = (2, 4, 128), ("heads", "head_dim", "embed")
    w = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    w = w.at[0, 0].set(0).at[0, 1].mul(1e-6).at[0, 2].mul(1e6)
    codes, scales = quantised.encode(w, kind, block=64)
    leaves = quantised.abstract(shape, axes, kind)
    found = {"codes": codes, "scales": scales}
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (of_shape, jnp.dtype(dtype)) for name, (of_shape, dtype, _) in leaves.items()
    }
    assert {of_axes for _, _, of_axes in leaves.values()} == {axes}
    values = quantised.decode(codes, scales, jnp.float32)
    assert not values[0, 0].any()
    rows, back = w.reshape(8, 128)[1:], values.reshape(8, 128)[1:]
    lost = jnp.linalg.norm(back - rows, axis=-1) / jnp.linalg.norm(rows, axis=-1)
    assert 0.9 * LOST[kind] < float(jnp.mean(lost)) < 1.1 * LOST[kind]
    in_bfloat16 = quantised.decode(codes, scales, jnp.bfloat16)
    np.testing.assert_array_equal(in_bfloat16, values.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_gets_the_nearest_value(kind):
    w = jax.random.normal(jax.random.key(1), (4, 64), jnp.float32)
    codes, scales = quantised.encode(w, kind, block=64)
    if kind == "fp8":
        every = jnp.arange(256, dtype=jnp.uint8).view(codes.dtype)
        every = every[jnp.isfinite(every.astype(jnp.float32))]
    else:
        info = jnp.iinfo(codes.dtype)
        every = jnp.arange(info.min, info.max + 1).astype(codes.dtype)
    possible = quantised.decode(jnp.broadcast_to(every, (4, every.size)), scales, jnp.float32)
    nearest = jnp.min(jnp.abs(w[..., None] - possible[:, None]), axis=-1)
    lost = jnp.abs(w - quantised.decode(codes, scales, jnp.float32))
    np.testing.assert_allclose(lost, nearest, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "block"),
    [(64, 64), (128, 64), (4096, 64), (14336, 64), (80, 40), (2880, 60), (896, 56), (8, 8), (7, 7)],
)
def test_blocks_have_64_numbers_or_the_most_that_fill_a_dimension_and_its_parts(size, block):
    assert quantised.block_size(size) == block


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_weight_are_encoded_as_in_the_whole(kind):
    w, block = jax.random.normal(jax.random.key(2), (3, 2880), jnp.float32), 60
    assert quantised.block_size(2880) == block != quantised.block_size(360)
    codes, scales = quantised.encode(w, kind, block=block)
    for part in range(8):
        here = slice(part * 360, (part + 1) * 360)
        of_part = quantised.encode(w[1:, here], kind, block=block)
        np.testing.assert_array_equal(of_part[0], codes[1:, here])
        np.testing.assert_array_equal(of_part[1], scales[1:, part * 6 : (part + 1) * 6])
