"""XLA's options for the training step on a chip, where its own defaults leave time unused.

`train.compiler_options` goes on top. What each is worth stands in `docs/planning.md`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxft import console
from jaxft.hardware.chips import CHIPS, chip_of

type Options = dict[str, str | bool]

# Where a product meets a weight that is to be gathered, the compiler may cut it into a piece for
# each device's part, so that parts travel beside it. Our weights are cut along what products sum
# over: pieces add up in bfloat16, rounded each time, in memory, which costs more than it hides.
_WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# SparseCores make gathers and reduce-scatters while the core goes on with products. By themselves
# the chips do the second on their core, which stands still meanwhile.
_SPARSE_CORES: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    # Those over all chips of a slice, too, in which several dimensions of its network take part.
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    # What is fused with products of the core is not left to SparseCores.
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
}
# By `Chip.name`. An option that others need stands before them.
BY_CHIP: dict[str, Options] = {
    chip.name: _WHOLE_PRODUCTS | (_SPARSE_CORES if chip.offloads else {})
    for chip in CHIPS
    if chip.is_tpu
}


def step_options(device: Any, chosen: Options) -> Options:
    """Returns the options with which a training step is compiled.

    Args:
      device: A device of this process, or one that is only compiled for.
      chosen: From `train.compiler_options`.
    """
    chip = chip_of(device.device_kind)
    return (_accepted(device, chip.name) if chip else {}) | chosen


@functools.cache
def _accepted(device: Any, chip: str) -> Options:
    """Returns a chip's options without those that its compiler refuses, which are logged."""
    wanted = BY_CHIP.get(chip, {})
    if not wanted or _refusal(device, wanted) is None:
        return wanted
    kept: Options = {}
    for name, value in wanted.items():
        reason = _refusal(device, kept | {name: value})
        if reason is None:
            kept[name] = value
        else:
            console.log(f"Compiled without {name}, which this compiler refuses: {reason}")
    return kept


def _refusal(device: Any, options: Options) -> str | None:
    """Returns why the compiler of a device refuses options, or None if it takes them.

    It looks at them before it looks at the program, of which one addition is enough.
    """
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return str(error).partition("\n")[0]
    return None
