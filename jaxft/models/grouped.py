"""Products of groups of rows with a matrix each, by the kernels of JAX for TPU, in blocks that fit.

XLA's own kernel takes 128 or 256 rows at a time however large the matrices are, and so reads each
row again for every few columns: of Mixtral-8x7B's experts dozens of times.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.errors import ConfigError
from jaxft.hardware.chips import Chip, chip_of
from jaxft.models.config import DecoderConfig
from jaxft.sharding.rules import active_placement

# Columns of an array come in multiples of this. Most rows that are taken at a time; fewer than the
# matrix unit has columns would leave it idle while it takes in the next of a matrix.
_LANES, _MOST = 128, 1024
# On-chip memory that a kernel takes beside its blocks: 0.3 MiB of some on v6e.
_OWN = 1 << 20
# Most blocks into which a dimension of a matrix is cut.
_CUTS = 64


class Sizes(NamedTuple):
    """Sizes of a product of groups.

    Attributes:
      rows: Rows of all groups.
      inner: Columns of rows: what is summed over, or the rows of a gradient's matrices.
      outer: Columns of the result.
      groups: Matrices.
      itemsize: Bytes of a number.
    """

    rows: int
    inner: int
    outer: int
    groups: int
    itemsize: int


type Blocks = tuple[int, int, int]


def kernels() -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Returns the kernels: rows with matrices, and the gradient of matrices."""
    # Not needed elsewhere than on TPU, and slow to import.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def chip_with_kernel(dtype: Any) -> Chip | None:
    """Returns the TPU that is computed on if it has these kernels for a type, or None."""
    placement = active_placement()
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    known = chip is not None and chip.is_tpu and dtype in (jnp.bfloat16, jnp.float32)
    return chip if known else None


def multiply_groups(
    x: Float[Array, "N I"],
    w: Float[Array, "E O I"],
    sizes: Int[Array, " E"],
    chip: Chip,
    *,
    interpret: bool = False,
) -> Float[Array, "N O"]:
    """Multiplies consecutive groups of rows with a matrix each.

    Rows after the last group are not read, and what they get, forward and backward, is not defined.

    Args:
      x: Rows.
      w: Matrices, of the type of `x`.
      sizes: Rows of each group; int32.
      chip: On which it runs.
      interpret: Run the kernels as plain operations, on any device.
    """
    rows, (groups, outer, inner), dtype = x.shape[0], w.shape, x.dtype
    precision = jax.config.jax_default_matmul_precision
    gmm, tgmm = kernels()

    def by_rows(x: Array, w: Array, sizes: Array, *, transposed: bool) -> Array:
        inner, outer = w.shape[:0:-1] if transposed else w.shape[1:]
        blocks = choose_blocks(Sizes(x.shape[0], inner, outer, groups, dtype.itemsize), chip)
        return gmm(x, w, sizes, dtype, blocks, transpose_rhs=transposed, interpret=interpret)

    @jax.custom_vjp
    def product(x: Array, w: Array, sizes: Array) -> Array:
        return by_rows(x, w, sizes, transposed=True)

    def backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
        x, w, sizes = kept
        with jax.default_matmul_precision(precision):
            dx = by_rows(dy, w, sizes, transposed=False)
            of_w = Sizes(x.shape[0], outer, inner, groups, dtype.itemsize)
            blocks = choose_blocks(of_w, chip, sums=True)
            dw = tgmm(dy.T, x, sizes, w.dtype, blocks, interpret=interpret)
        return dx, dw, None

    product.defvjp(lambda *kept: (product(*kept), kept), backward)
    # Blocks of rows are whole.
    padded = jnp.pad(x, ((0, -rows % chip.lanes), (0, 0)))
    return product(padded, w, sizes)[:rows]


def check_groups(config: DecoderConfig, chip: Chip | None = None, *, interpret: bool = False):
    """Compares the kernels with plain products, of a model with experts on the device in use.

    Args:
      config: Of the model.
      chip: On which it runs; by default the one in use, where there is nothing to compare if it is
        no TPU.
      interpret: As `multiply_groups`.

    Raises:
      ConfigError: If products or gradients differ by more than bfloat16 explains.
    """
    chip = chip or chip_with_kernel(jnp.bfloat16)
    if config.experts is None or chip is None:
        return
    sizes, inner, outer = np.array([100, 0, 300, 80], np.int32), 256, 384
    of_row = np.repeat(np.arange(len(sizes)), sizes)
    random = np.random.default_rng(0)
    shapes = (sizes.sum(), inner), (len(sizes), outer, inner)
    x, w = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes)

    def grouped(x: Array, w: Array) -> Array:
        return multiply_groups(x, w, jnp.asarray(sizes), chip, interpret=interpret)

    def plain(x: Array, w: Array) -> Array:
        every = jnp.einsum("ni,eoi->neo", x, w, precision="highest")
        return every[np.arange(len(of_row)), of_row]

    def of(product: Any, x: Array, w: Array) -> Any:
        def total(x: Array, w: Array) -> tuple[Array, Array]:
            out = product(x, w).astype(jnp.float32)
            return jnp.sum(jnp.sin(out / 16)), out

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, w)

    exact = of(plain, x.astype(jnp.float32), w.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(of(grouped, x, w)), jax.tree.leaves(exact), strict=True):
        error, scale = (float(jnp.max(jnp.abs(y))) for y in (a.astype(jnp.float32) - b, b))
        if not error <= 0.03 * scale:
            raise ConfigError(
                "The kernels that multiply experts give wrong results on this device (largest "
                f"difference {error:.3g} where values reach {scale:.3g}). Use a newer jax."
            )


@functools.cache
def choose_blocks(sizes: Sizes, chip: Chip, *, sums: bool = False) -> Blocks:
    """Returns the rows, inner and outer columns at a time with which a product should take least.

    It takes the longer of what it computes, with what blocks at the edges compute in vain, at the
    rate of large products, and of what passes main memory. Of equals the larger blocks.

    Args:
      sizes: Of the product.
      chip: On which it runs.
      sums: Whether rows are summed over: the gradient of the matrices.
    """
    rows = [n for n in range(chip.lanes, _MOST + 1, chip.lanes) if sizes.rows % n == 0]
    cuts = itertools.product(rows, _parts(sizes.inner), _parts(sizes.outer))
    there = chip.kernel_memory - _OWN
    fitting = [b for b in cuts if _bytes_held(b, sizes, sums=sums) <= there]

    def takes(blocks: Blocks) -> tuple[float, int]:
        flops, moved = work(blocks, sizes, chip, sums=sums)
        products = flops / (chip.bfloat16 * chip.product_share)
        return max(products, moved / chip.bandwidth), -math.prod(blocks)

    return min(fitting, key=takes)


def _parts(size: int) -> list[int]:
    """Returns block sizes that cut a dimension into equal parts, up to whole lanes."""
    found = {-(-size // (n * _LANES)) * _LANES for n in range(1, _CUTS + 1)}
    # A block of the whole dimension need not be of whole lanes.
    return sorted(size if block >= size else block for block in found)


def _bytes_held(blocks: Blocks, sizes: Sizes, *, sums: bool) -> int:
    """Returns bytes of on-chip memory: blocks twice, as the next come meanwhile, and a sum."""
    rows, inner, outer = (-(-size // _LANES) * _LANES for size in blocks)
    there = (inner if sums else rows) * outer
    read = rows * inner + (rows if sums else inner) * outer
    held = 2 * sizes.itemsize * (read + there) + 4 * there
    # The kernel of gradients masks and transposes its rows in float32.
    return held + 4 * rows * (2 * inner + outer) * sums


def work(
    blocks: Blocks, sizes: Sizes, chip: Chip, *, used: float = 1.0, sums: bool = False
) -> tuple[float, float]:
    """Returns FLOPs of a product, with what blocks compute in vain, and bytes of main memory.

    Args:
      blocks: In which it is made.
      sizes: Of the product.
      chip: On which it runs.
      used: Share of the rows that are in a group.
      sums: Whether rows are summed over: the gradient of the matrices.
    """
    rows, inner, outer = blocks
    n, k = -(-sizes.outer // outer), -(-sizes.inner // inner)
    # A block of rows is computed once for each group that it has rows of.
    taken = used * sizes.rows + (sizes.groups - 1) * rows
    # Columns are shared out among the cores that make a kernel together.
    columns = -(-n // chip.kernel_cores) * chip.kernel_cores * outer
    matrices = sizes.groups * sizes.inner * sizes.outer
    moved = taken * sizes.inner * n
    if sums:
        moved += taken * sizes.outer * k + matrices
    else:
        # A matrix stays while its rows pass, if what is summed over is one block.
        moved += matrices if k == 1 else taken / rows * sizes.inner * sizes.outer
        moved += used * sizes.rows * sizes.outer
    return 2.0 * taken * k * inner * columns, sizes.itemsize * moved
