"""Products of groups of rows by kernels for TPU, interpreted, against a loop over the groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxft.errors import ConfigError
from jaxft.hardware.chips import Chip, chip_named
from jaxft.models import grouped
from jaxft.models.families import architecture_from_hf
from jaxft.models.grouped import Sizes, check_groups, choose_blocks, multiply_groups, work
from tests.oracle.cases import CASES
from tests.tpu import compiles_for_tpu, tpu_devices

# Rows of groups: none, fewer than a block, across the border of one; 24 rows are in no group.
SIZES = np.array([0, 70, 190, 92, 0], np.int32)
ROWS, INNER, OUTER = 376, 256, 384


def chip(name: str, **changes: int) -> Chip:
    found = chip_named(name)
    assert found is not None
    return dataclasses.replace(found, **changes)


def test_groups_are_multiplied_with_their_matrices_and_have_their_gradients():
    random = np.random.RandomState(0)
    x, dy = (random.randn(ROWS, size).astype(np.float32) for size in (INNER, OUTER))
    w = random.randn(len(SIZES), OUTER, INNER).astype(np.float32)
    # Of blocks as large there is more than one in each direction.
    small = chip("v5e", kernel_memory=grouped._OWN + (1 << 20))
    assert choose_blocks(Sizes(384, INNER, OUTER, len(SIZES), 4), small) == (128, 128, 256)

    def product(x, w):
        return multiply_groups(x, w, jnp.asarray(SIZES), small, interpret=True)

    out, gradients = jax.vjp(jax.jit(product), x, w)
    # What lies after the last group, whatever it is, goes into nothing.
    dx, dw = gradients(jnp.asarray(np.where(np.arange(ROWS)[:, None] < SIZES.sum(), dy, np.nan)))
    for group, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        mine = slice(end - size, end)
        np.testing.assert_allclose(out[mine], x[mine] @ w[group].T, atol=1e-4)
        np.testing.assert_allclose(dx[mine], dy[mine] @ w[group], atol=1e-4)
        np.testing.assert_allclose(dw[group], dy[mine].T @ x[mine], atol=1e-4)


def test_kernels_that_are_wrong_are_refused(monkeypatch):
    config = architecture_from_hf(CASES["mixtral_tied"]).config
    check_groups(dataclasses.replace(config, experts=None), chip("v6e"))
    check_groups(config)  # on a CPU there are none
    check_groups(config, chip("v6e"), interpret=True)
    gmm, tgmm = grouped.kernels()
    wrong = gmm, lambda *arguments, **settings: 1.1 * tgmm(*arguments, **settings)
    monkeypatch.setattr(grouped, "kernels", lambda: wrong)
    with pytest.raises(ConfigError, match="multiply experts give wrong results"):
        check_groups(config, chip("v6e"), interpret=True)


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(131072, 2048, 768, 128, 2),  # Qwen3-30B-A3B
        Sizes(32768, 4096, 14336, 8, 2),  # Mixtral-8x7B
        Sizes(65536, 2880, 2880, 32, 2),  # gpt-oss, whose widths are no whole lanes
    ],
)
def test_blocks_fit_and_cost_little_beside_what_is_needed(name, sums, sizes):
    where = chip(name)
    blocks = choose_blocks(sizes, where, sums=sums)
    assert grouped._bytes_held(blocks, sizes, sums=sums) < where.kernel_memory
    flops, moved = work(blocks, sizes, where, sums=sums)
    needed = 2.0 * sizes.rows * sizes.inner * sizes.outer
    assert needed < flops < 1.3 * needed
    matrices = sizes.groups * sizes.inner * sizes.outer
    least = sizes.itemsize * (sizes.rows * (sizes.inner + sizes.outer) + matrices)
    bound = max(needed / where.bfloat16, least / where.bandwidth)
    assert moved / where.bandwidth < 1.5 * bound
    # Cores that make a kernel together have as many columns each.
    assert -(-sizes.outer // blocks[2]) % where.kernel_cores == 0


@compiles_for_tpu
@pytest.mark.parametrize("slice_", ["v5e-4", "v5p-8", "v6e-4"])
def test_the_compiler_takes_the_largest_blocks(slice_):
    device = tpu_devices(slice_)[0]
    where = grouped.chip_of(device.device_kind)
    assert where is not None
    sizes = Sizes(4096, 2048, 1536, 4, 2)
    held = grouped._bytes_held(choose_blocks(sizes, where), sizes, sums=False)
    assert held > where.kernel_memory / 3

    def gradients(x, w, sizes):
        return jax.grad(lambda w: jnp.sum(multiply_groups(x, w, sizes, where) ** 2))(w)

    shapes = [((4096, 2048), jnp.bfloat16), ((4, 1536, 2048), jnp.bfloat16), ((4,), jnp.int32)]
    there = [jax.ShapeDtypeStruct(*s, sharding=SingleDeviceSharding(device)) for s in shapes]
    text = jax.jit(gradients).lower(*there).compile().as_text()
    assert text.count("jit(gmm)") and text.count("jit(tgmm)")
