"""What a device kind can do at its best, and how much memory devices and host use now."""

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

_GIB = 1 << 30
_TERA = 1e12


class DeviceSpec(NamedTuple):
    """Published figures of one jax device, which is not always one chip.

    Attributes:
      bfloat16: Dense matrix FLOP/s with 16-bit inputs and float32 sums.
      float32: FLOP/s of float32 matrix products at jax's default precision: one bfloat16 pass on
        TPU, TF32 on NVIDIA from Ampere on.
      memory: Bytes of device memory.
    """

    bfloat16: float
    float32: float
    memory: int


def _tpu(teraflops: float, gib: int) -> DeviceSpec:
    return DeviceSpec(teraflops * _TERA, teraflops * _TERA, gib * _GIB)


def _gpu(teraflops: float, gib: int, *, float32: float | None = None) -> DeviceSpec:
    single = teraflops / 2 if float32 is None else float32
    return DeviceSpec(teraflops * _TERA, single * _TERA, gib * _GIB)


# The first pattern found in `device_kind` wins. On TPU v2, v3 and 7x a chip is two jax devices,
# so its figures are halved.
_SPECS: tuple[tuple[str, DeviceSpec], ...] = (
    # Google: cloud.google.com/tpu/docs, one page per version, "peak compute per chip".
    (r"^TPU v2$", _tpu(45 / 2, 8)),
    (r"^TPU v3$", _tpu(123 / 2, 16)),
    (r"^TPU v4 lite$", _tpu(138, 8)),
    (r"^TPU v4$", _tpu(275, 32)),
    (r"^TPU v5 ?(lite|e)$", _tpu(197, 16)),
    (r"^TPU v5p?$", _tpu(459, 95)),
    (r"^TPU v6 ?(lite|e)$", _tpu(918, 32)),
    (r"^TPU ?v?7x?$", _tpu(2307 / 2, 96)),
    # A slice of a GPU has no published peak; no figure is better than a wrong one.
    (r"\bMIG\b", DeviceSpec(0, 0, 0)),
    # NVIDIA: data sheets, without the factor two of structured sparsity.
    (r"\bGB200\b", _gpu(2500, 186, float32=1250)),
    (r"\bB200\b", _gpu(2250, 180, float32=1100)),
    (r"\bGH200\b", _gpu(989.4, 96)),
    (r"\bH200 NVL\b", _gpu(835.5, 141)),
    (r"\bH200\b", _gpu(989.4, 141)),
    (r"\bH100 NVL\b", _gpu(835.5, 94)),
    (r"\bH100 PCIe\b", _gpu(756, 80)),
    (r"\bH100\b", _gpu(989.4, 80)),
    (r"\bH800\b", _gpu(989.4, 80)),
    (r"\bA100\b.*\b80GB\b", _gpu(312, 80)),
    (r"\bA100\b", _gpu(312, 40)),
    (r"\bA800\b", _gpu(312, 80)),
    (r"\bL40S\b", _gpu(362, 48)),
    (r"\bL40\b", _gpu(181, 48)),
    (r"\bL4\b", _gpu(121, 24)),
    (r"\bA10G\b", _gpu(70, 24)),
    (r"\bA10\b", _gpu(125, 24)),
    (r"\bA30\b", _gpu(165, 24)),
    (r"\bRTX A6000\b", _gpu(154.8, 48)),
    (r"\bRTX 6000 Ada\b", _gpu(364.2, 48, float32=182.1)),
    (r"\bRTX 5090\b", _gpu(209.5, 32)),
    (r"\bRTX 4090\b", _gpu(165.2, 24)),
    (r"\bRTX 3090\b(?! Ti)", _gpu(71, 24)),
    # No bfloat16 and no TF32 in hardware: the float16 rate, and the plain float32 one.
    (r"\bV100-SXM", _gpu(125, 16, float32=15.7)),
    (r"\bV100\b", _gpu(112, 16, float32=14)),
    (r"\bT4\b", _gpu(65, 16, float32=8.1)),
)


class MemoryUse(NamedTuple):
    """Bytes of a device's memory; 0 where the back end does not say."""

    in_use: int
    peak: int
    limit: int


class HostMemory(NamedTuple):
    """Bytes of this process that are in host memory, now and at most."""

    resident: int
    peak: int


def device_spec(device_kind: str) -> DeviceSpec | None:
    """Returns the published figures of `jax.Device.device_kind`, or None where we know none."""
    for pattern, spec in _SPECS:
        if re.search(pattern, device_kind):
            return spec if spec.bfloat16 else None
    return None


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Returns the dense matrix FLOP/s of one jax device, the denominator of MFU.

    Args:
      device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: Type of the matrix products' inputs, a name or anything with one.

    Returns:
      None for an unknown device (every CPU is one) and for other types than 16- and 32-bit floats.
    """
    spec = device_spec(device_kind)
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or dtype.__name__
    if spec is None or name not in ("bfloat16", "float16", "float32"):
        return None
    return spec.float32 if name == "float32" else spec.bfloat16


def device_memory(device: Any) -> MemoryUse | None:
    """Returns what a `jax.Device` says of its memory, or None where it keeps no account (CPU)."""
    stats = device.memory_stats()
    if not stats:
        return None
    in_use = stats.get("bytes_in_use", 0)
    return MemoryUse(in_use, stats.get("peak_bytes_in_use", in_use), stats.get("bytes_limit", 0))


def host_memory() -> HostMemory:
    """Returns the memory of this process; without `/proc` (macOS) `resident` is the peak."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = largest if sys.platform == "darwin" else largest * 1024  # macOS counts in bytes
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return HostMemory(peak, peak)
    resident = pages * resource.getpagesize()
    return HostMemory(resident, max(peak, resident))


def host_memory_total() -> int | None:
    """Returns the bytes this process may use: the machine's, or less in a container."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # absent, or "max"
            continue
        total = min(total, limit)
    return total
