"""Peak rates of devices, and the memory that devices and host have and use now."""

import errno
import fcntl
import math
import os
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax

from jaxft.formatting import format_bytes
from jaxft.hardware.chips import chip_of

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


class Room(NamedTuple):
    """Memory that programs can have on each of some devices.

    Attributes:
      limit: Bytes in all; 0 if it is not known.
      free: Bytes of them that nothing uses yet.
      name: Owner of the memory in words, such as `a TPU v4`.
    """

    limit: int
    free: int
    name: str

    def __str__(self) -> str:
        if not self.limit:
            return f"what {self.name} has is not known"
        text = f"{self.name} has {format_bytes(self.limit)}"
        if self.free < 0.99 * self.limit:
            text += f", {format_bytes(self.free)} of it free"
        return text


# What XLA and the libraries of GPUs say if memory is short.
_EXHAUSTED = re.compile(
    r"out of memory|out_of_memory|ran out of|failed to allocate|alloc_failed|exceeds available"
    r"|cannot allocate memory",
    re.IGNORECASE,
)


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


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Returns the bytes of an array on a device, where two numbers of 4 bits share one."""
    return math.ceil(math.prod(shape) * jax.dtypes.itemsize_bits(dtype) / 8)


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
    return min([total, *(limit for limit, _ in _memory_groups())])


def host_memory_free() -> int | None:
    """Returns the bytes that this process may still take, or None where that is not known."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    if found is None:
        return None
    left = [limit - used for limit, used in _memory_groups()]
    return max(0, min([int(found.group(1)) * 1024, *left]))


def _memory_groups() -> Iterator[tuple[int, int]]:
    """Yields limit and use in bytes of the control groups that this process is in, if limited.

    A container is one, and so is a job of SLURM.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if not controllers:
            mount, names = "", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        path = PurePosixPath(place)
        for group in (path, *path.parents):
            folder = Path("/sys/fs/cgroup", mount, *group.parts[1:])
            try:
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                stat = (folder / "memory.stat").read_text(encoding="ascii")
            except (OSError, ValueError):  # absent, or "max"
                continue
            # Cached files are given up when memory is short.
            cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
            yield limit, used - int(cached.group(1)) if cached else used


def room(devices: Sequence[Any]) -> Room:
    """Returns what each of some devices of this process has, where they differ the least."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        total, free = host_memory_total() or 0, host_memory_free()
        share = total // len(devices)
        name = "this machine" if len(devices) == 1 else f"each of {len(devices)} CPU devices"
        return Room(share, share if free is None else free // len(devices), name)
    uses = [use for use in map(device_memory, devices) if use is not None and use.limit]
    if not uses:
        chip = chip_of(kind)
        limit = chip.core.limit if chip is not None else 0
        return Room(limit, limit, f"a {kind}")
    return Room(
        min(use.limit for use in uses), min(use.limit - use.in_use for use in uses), f"a {kind}"
    )


def shortage(error: BaseException | None) -> str:
    """Returns what an error or its causes say of memory that was short; empty if nothing."""
    while error is not None:
        said = str(error).strip().partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        of_host = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        of_device = isinstance(error, jax.errors.JaxRuntimeError) and _EXHAUSTED.search(str(error))
        if of_host or of_device:
            said = f"{said.rstrip('.')}." if said else ""
            return said if said.lower().startswith("out of memory") else f"Out of memory: {said}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


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
