"""A device's memory by what it is for."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jaxft.hardware.chips import Chip
from jaxft.models.config import DecoderConfig
from jaxft.planner.compilation import Compiled
from jaxft.planner.liveness import Buffer, Peak

KINDS: tuple[str, ...] = (
    "parameters",
    "optimizer",
    "reference",
    "batch",
    "padding",
    "gradients",
    "activations",
    "logits",
    "weights",
    "temporaries",
    "program",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      limit: Memory that is free for a program; 0 if it is not known.
      used: Need of the step; of one that does not fit, the compiler's figure for it.
      kinds: `used` by kind. The split of what only lives during the step follows the schedule to
        its fullest moment, scaled to the compiler's sum; in what does not fit it is not known, and
        `temporaries` are all of it.
      host: Bytes of the host's memory, for one device.
      host_limit: Memory of the host for one device; 0 if it is not known.
    """

    limit: int
    used: int
    kinds: dict[str, int]
    host: int = 0
    host_limit: int = 0

    @property
    def fits(self) -> bool:
        """Whether it is enough, on the device and on the host."""
        enough = not self.limit or self.used <= self.limit
        return enough and (not self.host_limit or self.host <= self.host_limit)

    @property
    def headroom(self) -> int:
        """Bytes left; negative for what is missing."""
        return self.limit - self.used


def memory_of(
    compiled: Compiled,
    peak: Peak,
    held: Mapping[str, int],
    chip: Chip,
    *,
    trained: Collection[tuple[int, ...]],
    fixed: Collection[tuple[int, ...]],
    batch: int,
    architecture: DecoderConfig,
) -> Memory:
    """Splits what a program takes.

    Args:
      compiled: The program.
      peak: Its fullest moment.
      held: Bytes of parameters, gradients, optimizer state and reference on one device.
      chip: One device's.
      trained: Shapes of what a device holds of parameters that train.
      fixed: Shapes of what it holds of the others.
      batch: Bytes of what a device holds of the batch.
      architecture: Of the model.
    """
    allocation = compiled.allocation
    assert allocation is not None
    kinds = dict.fromkeys(KINDS, 0)
    for kind in ("parameters", "optimizer", "reference"):
        kinds[kind] = held[kind]
    kinds["batch"] = batch
    # TPUs keep arrays in tiles, which small dimensions do not fill.
    kinds["padding"] = max(0, allocation.arguments - sum(kinds.values()))
    kinds["program"] = allocation.program
    found = dict.fromkeys(KINDS, 0)
    for buffer in peak.buffers:
        found[_kind(buffer, trained, fixed, architecture)] += buffer.bytes
    inside = max(0, allocation.total - allocation.arguments - allocation.program)
    total = sum(found.values())
    # What the walk misses is room that the allocator leaves; what it counts twice is scaled away.
    scale = min(1.0, inside / total) if total else 0.0
    for kind, size in found.items():
        kinds[kind] += round(size * scale)
    kinds["temporaries"] += inside - sum(round(size * scale) for size in found.values())
    return Memory(
        limit=chip.limit,
        used=allocation.total,
        kinds=kinds,
        host=allocation.host,
        host_limit=chip.host_memory,
    )


def memory_without_program(compiled: Compiled, held: Mapping[str, int], chip: Chip) -> Memory:
    """Splits what a program that does not fit would take, as far as it is known."""
    kinds = dict.fromkeys(KINDS, 0)
    for kind in ("parameters", "optimizer", "reference", "gradients"):
        kinds[kind] = held[kind]
    kinds["temporaries"] = max(0, compiled.needed - sum(kinds.values()))
    return Memory(limit=compiled.available or chip.limit, used=compiled.needed, kinds=kinds)


def _kind(
    buffer: Buffer,
    trained: Collection[tuple[int, ...]],
    fixed: Collection[tuple[int, ...]],
    architecture: DecoderConfig,
) -> str:
    """Names a buffer by its shape, which is that of a parameter, of a stack or of logits."""
    sizes = tuple(size for size in buffer.sizes if size > 1)
    own, layer = _sizes(trained)
    if sizes in own:
        return "gradients"
    if sizes in layer:
        return "gradients" if "transpose" in buffer.origin else "weights"
    own_fixed, layer_fixed = _sizes(fixed)
    own, layer = own | own_fixed, layer | layer_fixed
    if sizes in own_fixed | layer_fixed:
        return "weights"
    if len(sizes) >= 3 and buffer.sizes[0] == architecture.layers:
        return "activations"
    if _is_gathered(sizes, own | layer, architecture):
        return "weights"
    if architecture.vocab in sizes:
        return "logits"
    return "temporaries"


def _sizes(
    shapes: Collection[tuple[int, ...]],
) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Returns sizes other than 1 of arrays, and of those that hold many layers one layer's."""
    own = {tuple(size for size in shape if size > 1) for shape in shapes}
    return own, {tuple(s for s in shape[1:] if s > 1) for shape in shapes if len(shape) > 1}


def _is_gathered(
    sizes: tuple[int, ...], shapes: set[tuple[int, ...]], architecture: DecoderConfig
) -> bool:
    """Whether a buffer is a parameter whose embedding dimension was put together."""
    count = math.prod(sizes)
    return architecture.embed in sizes and any(
        len(shape) >= 2 and count % math.prod(shape) == 0
        for shape in shapes
        if len(shape) == len(sizes) and sum(a != b for a, b in zip(shape, sizes, strict=True)) == 1
    )
