"""Work of kernels, whose insides a compiled program does not show, by the shapes of their calls."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxft.compiled.hlo import Computation, Instruction, arrays
from jaxft.hardware.chips import Chip
from jaxft.models.config import DecoderConfig, DeltaConfig
from jaxft.models.delta import Chunking, chunking
from jaxft.models.grouped import Sizes, choose_blocks, work
from jaxft.planner.timeline import ATTENTION, MATMUL, Kernel, Rates

# What share of a matrix unit's rate flash attention reaches if a head is as wide as the unit,
# counting pairs of query and key that see each other. From a profile of Qwen3-8B on v6e-8: 1,177 ms
# a step for two forward passes and a backward one of 2.5 times their work, 25 % of the peak, with
# heads of 128 on a unit of 256 (github.com/vlasenkoalexey/tpu_performance_autoresearch_wiki,
# wiki/analyses/2026-06-12-maxtext-vs-jax-bucket-diff.md).
EFFICIENCY = 0.5
# Matrix products over the pairs of query and key: with heads of queries and keys, and of values.
_PRODUCTS = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1)}
# Of the kernel that makes the gradients of queries together with those of keys and values.
_FUSED_PRODUCTS = (3, 2)


def efficiency(chip: Chip, head_dim: int) -> float:
    """Returns the share of a chip's peak that flash attention reaches."""
    return EFFICIENCY * min(1.0, head_dim / chip.lanes) if chip.lanes else EFFICIENCY


def visible_pairs(length: int, window: int) -> float:
    """Returns the pairs of query and key of a row that see each other, to within half a token."""
    window = min(window or length, length)
    return window * (length - window / 2)


def mean_visible_pairs(config: DecoderConfig, length: int, *, head_dim: int = 0) -> float:
    """Returns `visible_pairs` of a row in a layer, the mean over the layers with attention.

    Layers count by the size of their heads, so that products of all heads are this times their
    mean size.

    Args:
      config: Of the model.
      length: Positions of the row.
      head_dim: Size of a head in the layers that count; all do if it is 0.
    """
    sizes = [layer.head_dim for layer in config.attending]
    counts = [size * (head_dim in (0, size)) for size in sizes]
    pairs = [visible_pairs(length, window) for window in config.windows]
    return math.sumprod(pairs, counts) / sum(counts)


class Recurrence(NamedTuple):
    """Work of the gated delta rule of `models/delta.py` on one token.

    Attributes:
      forward: Multiplications of products, forward.
      backward: Multiplications of products of the backward pass.
      kept: Bytes that wait for the backward pass: what is given, and states.
      in_hand: Bytes that the backward pass of a layer has in hand.
    """

    forward: float
    backward: float
    kept: float
    in_hand: float


def delta_rule(
    sizes: DeltaConfig, length: int, itemsize: int, platform: str, *, values: float, keys: float
) -> Recurrence:
    """Returns the work on one token of a row.

    Args:
      sizes: Of heads.
      length: Positions of the row.
      itemsize: Bytes of a number of values.
      platform: Kind of device.
      values: Heads of values on a device.
      keys: Heads of keys there.
    """
    chunk, span = _cut(length, platform)
    state = sizes.key_dim * sizes.value_dim
    # Of keys with keys and with queries; of factors with values, keys, the state and corrections.
    alike = 2 * chunk * sizes.key_dim
    factors = chunk * (sizes.key_dim + 2 * sizes.value_dim) + 3 * state
    # The backward pass makes corrections again, and the states within a span, but no outputs.
    corrected = chunk * (sizes.key_dim + sizes.value_dim + 1) + state * (1 + (span > 1))
    of_token = itemsize * (3 * sizes.key_dim + sizes.value_dim + chunk) + 4 * 3 * chunk
    given = itemsize * (2 * keys * sizes.key_dim + values * sizes.value_dim)
    kept = given + 4 * values * state / (chunk * span)
    at_once = 2 * values * (of_token + (4 * state / chunk if span > 1 else 0))
    return Recurrence(
        forward=keys * alike + values * (factors + chunk),
        backward=3 * keys * alike + values * (2 * factors + corrected + 2 * chunk**2 + chunk),
        kept=kept,
        in_hand=kept + given + at_once * min(1.0, chunk * span / length),
    )


class Traffic(NamedTuple):
    """Memory traffic of the gated delta rule for one token: reads and writes of main memory.

    Attributes:
      passed: Bytes of what is given, comes out and waits, in a forward pass.
      passed_back: The same of the backward pass.
      handed: Bytes of what one product hands to another, in a forward pass.
      handed_back: The same of the backward pass.
    """

    passed: float
    passed_back: float
    handed: float
    handed_back: float


def delta_traffic(
    sizes: DeltaConfig,
    length: int,
    itemsize: int,
    platform: str,
    *,
    values: float,
    keys: float,
    stays: bool,
) -> Traffic:
    """Returns the memory traffic for one token of a row: what is made is written and read.

    Args:
      sizes: As of `delta_rule`; so are `length`, `itemsize`, `platform`, `values` and `keys`.
      length: Positions of the row.
      itemsize: Bytes of a number of values.
      platform: Kind of device.
      values: Heads of values on a device.
      keys: Heads of keys there.
      stays: Whether what products make of one chunk stays in the memory beside the core.
    """
    chunk, span = _cut(length, platform)
    square, state = 4 * chunk, 4 * sizes.key_dim * sizes.value_dim / chunk
    of_key, of_value = itemsize * sizes.key_dim, itemsize * sizes.value_dim
    # Queries and keys are normalised; all is put in the order of chunks, and back.
    normed, out, states = 2 * keys * of_key, values * of_value, values * state / span
    given = normed + out
    # What products make: float32 are what is alike, the system, its inverse, outputs and states.
    outputs = values * 4 * sizes.value_dim
    inside = values * (2 * square + of_key + 2 * of_value + state) + 2 * keys * square
    gradients = values * (5 * square + 4 * of_key + 3 * of_value + 3 * state) + 2 * normed
    away = 2 * (not stays or span > 1)
    return Traffic(
        passed=2 * normed + 3 * given + 3 * out + states,
        passed_back=3 * normed + 4 * given + 3 * out + states,
        handed=away * (inside + outputs),
        # All is made again but the outputs.
        handed_back=away * (inside + gradients),
    )


def _cut(length: int, platform: str) -> Chunking:
    """Returns how a row is cut."""
    suited = chunking(platform)
    chunk = min(suited.chunk, 1 << (length - 1).bit_length())
    return Chunking(chunk, math.gcd(suited.span, -(-length // chunk)))


def splash_flops(
    instruction: Instruction, computation: Computation, config: DecoderConfig
) -> tuple[float, int] | None:
    """Returns FLOPs of one run of a splash kernel and its head size, or None for another kernel.

    Pairs that a block of the kernel scores and hides count as nothing.

    Args:
      instruction: The call.
      computation: Where it stands.
      config: Of the model, whose layers' windows hide pairs; the mean over layers with heads of
        this size.
    """
    kind = next((k for k in _PRODUCTS if f"splash_mha_{k}" in instruction.name), "")
    if not kind:
        return None
    operands = [arrays(computation.instructions[name].shape)[0] for name in instruction.operands]
    # Queries, keys and values `[rows, heads, positions, size]`, rows left out where there is one.
    tables = [a.sizes for a in operands if a.dtype in ("bf16", "f32") and len(a.sizes) >= 3]
    (*rows, heads, queries, size), keys = tables[0], max(table[-2] for table in tables)
    value_size = tables[2][-1]
    pairs = mean_visible_pairs(config, keys, head_dim=size)
    of_keys, of_values = _PRODUCTS[kind]
    if kind == "dkv" and len(arrays(instruction.shape)) > 2:
        of_keys, of_values = _FUSED_PRODUCTS
    products = of_keys * size + of_values * value_size
    # Of a row that is split over devices each has its share of the queries.
    return 2.0 * products * math.prod(rows) * heads * pairs * (queries / keys), size


def grouped_work(
    instruction: Instruction, computation: Computation, config: DecoderConfig, chip: Chip
) -> tuple[float, float, float] | None:
    """Returns the work of a kernel of `models/grouped.py`, or None for another one.

    Where experts lie on several devices there is room for more rows than come to these on average,
    which alone are multiplied.

    Args:
      instruction: The call.
      computation: Where it stands.
      config: Of the model.
      chip: On which it runs.

    Returns:
      FLOPs of the products asked for, FLOPs with what blocks compute in vain, and bytes of main
      memory.
    """
    kind = re.search(r"\bjit\((t?)gmm\)", instruction.origin)
    if not kind or not instruction.target or config.experts is None:
        return None
    *_, left, right = (arrays(computation.instructions[n].shape)[0] for n in instruction.operands)
    result, sums = arrays(instruction.shape)[0], bool(kind[1])
    groups, (rows, inner) = (result if sums else right).sizes[0], left.sizes
    itemsize = left.bytes // math.prod(left.sizes)
    sizes = Sizes(rows, inner, result.sizes[-1], groups, itemsize)
    parts, chosen = config.experts.count / groups, config.experts.chosen
    used = chosen / (parts * min(chosen, groups))
    blocks = choose_blocks(sizes, chip, sums=sums)
    done, moved = work(blocks, sizes, chip, used=used, sums=sums)
    return 2.0 * used * rows * inner * sizes.outer, done, moved


def kernels_of(
    config: DecoderConfig, chip: Chip, rates: Rates
) -> Callable[[Instruction, Computation], Kernel | None]:
    """Returns a function that says what one run of a kernel is, None for another instruction.

    Args:
      config: Of the model.
      chip: On which it runs; rates of it may be unknown.
      rates: Shares of its published rates that are reached.
    """

    def kernel(instruction: Instruction, computation: Computation) -> Kernel | None:
        if not chip.bfloat16 or instruction.opcode != "custom-call":
            return None
        if found := splash_flops(instruction, computation, config):
            flops, size = found
            return Kernel(ATTENTION, flops, flops / (chip.bfloat16 * efficiency(chip, size)))
        if found := grouped_work(instruction, computation, config, chip):
            flops, done, moved = found
            products = done / (chip.bfloat16 * chip.product_share)
            return Kernel(MATMUL, flops, max(products, moved / (chip.bandwidth * rates.memory)))
        return None

    return kernel
