"""Work of attention: kernels, whose insides a compiled program does not show, by their shapes."""

import math

from jaxft.compiled.hlo import Computation, Instruction, arrays
from jaxft.hardware.chips import Chip
from jaxft.models.config import DecoderConfig

# What share of a matrix unit's rate flash attention reaches if a head is as wide as the unit,
# counting pairs of query and key that see each other. From a profile of Qwen3-8B on v6e-8: 1,177 ms
# a step for two forward passes and a backward one of 2.5 times their work, 25 % of the peak, with
# heads of 128 on a unit of 256 (github.com/vlasenkoalexey/tpu_performance_autoresearch_wiki,
# wiki/analyses/2026-06-12-maxtext-vs-jax-bucket-diff.md).
EFFICIENCY = 0.5
# Matrix products over the pairs of query and key, of which the forward pass has two.
_PRODUCTS = {"fwd": 2.0, "dkv": 4.0, "dq": 3.0}
# Of the kernel that makes the gradients of queries together with those of keys and values.
_FUSED_PRODUCTS = 5.0


def efficiency(chip: Chip, head_dim: int) -> float:
    """Returns the share of a chip's peak that flash attention reaches."""
    return EFFICIENCY * min(1.0, head_dim / chip.lanes) if chip.lanes else EFFICIENCY


def visible_pairs(length: int, window: int) -> float:
    """Returns the pairs of query and key of a row that see each other, to within half a token."""
    window = min(window or length, length)
    return window * (length - window / 2)


def mean_visible_pairs(config: DecoderConfig, length: int) -> float:
    """Returns `visible_pairs` of a row in a layer, the mean over the model's layers."""
    windows = [config.kinds[i].window for i in config.pattern]
    return sum(visible_pairs(length, window) for window in windows) / len(windows)


def splash_flops(
    instruction: Instruction, computation: Computation, config: DecoderConfig
) -> tuple[float, int] | None:
    """Returns FLOPs of one run of a splash kernel and its head size, or None for another kernel.

    Pairs that a block of the kernel scores and hides count as nothing.

    Args:
      instruction: The call.
      computation: Where it stands.
      config: Of the model, whose layers' windows hide pairs; the mean over layers.
    """
    kind = next((k for k in _PRODUCTS if f"splash_mha_{k}" in instruction.name), "")
    if not kind:
        return None
    operands = [arrays(computation.instructions[name].shape)[0] for name in instruction.operands]
    # Queries, keys and values `[rows, heads, positions, size]`, rows left out where there is one.
    tables = [a.sizes for a in operands if a.dtype in ("bf16", "f32") and len(a.sizes) >= 3]
    (*rows, heads, queries, size), keys = tables[0], max(table[-2] for table in tables)
    pairs = mean_visible_pairs(config, keys)
    products = _PRODUCTS[kind]
    if kind == "dkv" and len(arrays(instruction.shape)) > 2:
        products = _FUSED_PRODUCTS
    # Of a row that is split over devices each has its share of the queries.
    return 2.0 * products * math.prod(rows) * heads * pairs * (queries / keys) * size, size
