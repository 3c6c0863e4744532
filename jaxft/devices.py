"""How fast a device can be at best, and how much memory devices and host use now."""

import fcntl
import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.chips import chip_of

# Which process uses libtpu is decided by a lock on it.
LIBTPU_LOCK = Path("/tmp/libtpu_lockfile")


class MemoryUse(NamedTuple):
    """Bytes of a device's memory; 0 where the back end does not say."""

    in_use: int
    peak: int
    limit: int


class HostMemory(NamedTuple):
    """Bytes of this process that are in host memory, now and at most."""

    resident: int
    peak: int


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Returns the dense matrix FLOP/s of one jax device, the denominator of MFU.

    Args:
      device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: Type of the matrix products' inputs, a name or anything with one.

    Returns:
      None for an unknown device (every CPU is one) and for other types than 16- and 32-bit floats.
    """
    chip = chip_of(device_kind)
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or dtype.__name__
    if chip is None or name not in ("bfloat16", "float16", "float32"):
        return None
    return chip.core.peak(name)


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


def lock_holder(path: Path) -> int | None:
    """Returns the process that locks a file, 0 if it cannot be named, None if it is free."""
    try:
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if fields[1] != "->" and fields[5].rsplit(":", 1)[-1] == str(inode):
                return max(int(fields[4]), 0)
    except (OSError, IndexError, ValueError):
        pass
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    except OSError:
        return None
    return None
