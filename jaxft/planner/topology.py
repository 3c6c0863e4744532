"""Names of TPU slices and GPU clusters, and devices to compile for without having them."""

import functools
import importlib.util
import itertools
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxft.errors import ConfigError, nearest
from jaxft.hardware.chips import CHIPS, Chip, Switch, Torus, chip_named, chip_of
from jaxft.hardware.devices import LIBTPU_LOCK, lock_holder

LOCAL = "local"
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x"}
# Chips of slices that are sold, with their layout; larger ones in three dimensions are as near to
# a cube as multiples of 4 can be (docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e, tpu7x).
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
_FLAT |= {256: (16, 16)}
_OLD = {4: (2, 2), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_OLD |= {512: (16, 32), 1024: (32, 32)}
_SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
# Most chips of one slice.
_LARGEST = {"v2": 256, "v3": 1024, "v4": 4096, "v5p": 8960, "tpu7x": 9216}
# Most devices of a plan. GPUs are made up as CPU devices, of which jax makes some 500 a second.
_MOST_DEVICES = {True: 65_536, False: 8192}  # by whether they are TPUs
_MOST_SLICES = 256
# TPUs whose names count cores of which a chip has two.
_BY_CORES = ("v2", "v3", "v4", "v5p", "tpu7x")


@dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
      name: Name that was asked for.
      chip: Kind of chip.
      shape: Chips of one slice along each dimension of its torus; of GPUs their number.
      slices: Number of slices.
      local: Whether these are the devices of this machine.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1
    local: bool = False

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def device_count(self) -> int:
        """Jax devices of all slices."""
        return self.chips * self.chip.cores

    @property
    def sold_as(self) -> str:
        """The name under which one slice is sold, `v5p-64`; empty if it is none of those."""
        count = math.prod(self.shape)
        if not self.chip.is_tpu or sold_shape(self.chip, count) != self.shape:
            return ""
        return f"{self.chip.name}-{count * (2 if self.chip.name in _BY_CORES else 1)}"

    @property
    def can_compile(self) -> bool:
        """Whether there is a compiler for it here."""
        return self.local or self.chip.is_tpu

    def devices(self) -> Sequence[Any]:
        """Returns devices that can be compiled for; they need not exist.

        Raises:
          ConfigError: If libtpu is missing, or another process keeps it, or refuses the layout.
        """
        if self.local:
            return jax.devices()
        if not self.chip.is_tpu:
            raise ConfigError(f"There is no compiler for {self.name} here, only an estimate.")
        return _tpu_devices(self.chip.name, self.shape, self.slices)


def parse(name: str) -> Topology:
    """Reads `v5e:4x4`, `v5p-64`, `2xv5e:16x16`, `h100:64` or `local`.

    Raises:
      ConfigError: If there is no such chip or slice; it offers the nearest names.
    """
    if name == LOCAL:
        return _local()
    match = re.fullmatch(r"(?:(\d+)x)?([a-zA-Z][\w.-]*?)([-:])(\d+(?:x\d+)*)", name)
    if match is None:
        raise ConfigError(
            f"--topology is {name!r}; expected a slice such as v5e:4x4, v5p-64 or 2xv5e:16x16, "
            f"GPUs such as h100:64, or {LOCAL} for the devices of this machine."
        )
    count, kind, mark, size = match.groups()
    chip = chip_named(_ALIASES.get(kind.lower(), kind.lower()))
    if chip is None or chip.network is None:
        known = [chip.name for chip in CHIPS if chip.network]
        raise ConfigError(
            f"--topology is {name!r}, and {'no links of' if chip else 'no chip'} {kind!r} "
            f"{'are' if chip else 'is'} known; known are {', '.join(known)}."
            f"{'' if chip else nearest(kind.lower(), known, cutoff=0.6)}"
        )
    slices = int(count or 1)
    if slices < 1 or (slices > 1 and not chip.dcn):
        raise ConfigError(
            f"--topology is {name!r}; there is one slice of {chip.name} or more."
            if slices < 1
            else f"--topology is {name!r}, but slices of {chip.name} cannot be joined."
        )
    if isinstance(chip.network, Switch):
        shape = _gpus(name, chip, count, size)
    elif "x" in size:
        shape = tuple(int(part) for part in size.split("x"))
    else:
        shape = _by_count(name, chip, int(size), by_name=mark == "-")
    if isinstance(chip.network, Torus):
        _check_shape(name, chip, chip.network, shape)
    topology = Topology(name, chip, shape, slices)
    most = _MOST_DEVICES[chip.is_tpu]
    if topology.device_count > most or slices > _MOST_SLICES:
        raise ConfigError(
            f"--topology is {name!r}, {topology.device_count:,} devices of {slices:,} slices; "
            f"plans are made for {most:,} and {_MOST_SLICES} at most."
        )
    return topology


def _local() -> Topology:
    devices = jax.devices()
    kind = devices[0].device_kind
    chip = chip_of(kind) or Chip(name=kind, kind=kind, bfloat16=0, float32=0, memory=0)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if chip.is_tpu:
        first = [d for d in devices if getattr(d, "slice_index", 0) == 0]
        size = tuple(1 + max(d.coords[i] for d in first) for i in range(3))
        shape = size[: chip.network.dimensions] if isinstance(chip.network, Torus) else size
    else:
        shape = (len(devices) // slices,)
    return Topology(LOCAL, chip, shape, slices, local=True)


def _gpus(name: str, chip: Chip, slices: str | None, size: str) -> tuple[int, ...]:
    if slices or "x" in size or int(size) < 1:
        raise ConfigError(
            f"--topology is {name!r}; GPUs are counted, those of all machines together, such as "
            f"{chip.name}:8 or {chip.name}:64."
        )
    return (int(size),)


def _by_count(name: str, chip: Chip, count: int, *, by_name: bool) -> tuple[int, ...]:
    per = 2 if by_name and chip.name in _BY_CORES else 1
    shape = sold_shape(chip, count // per) if count % per == 0 else None
    if shape is None:
        sold = [per * chips for chips in sizes_sold(chip)]
        close = sorted(sold, key=lambda other: abs(math.log(other / max(1, count))))[:3]
        mark = "-" if by_name else ":"
        names = ", ".join(f"{chip.name}{mark}{other}" for other in sorted(close))
        what = "cores, two a chip" if per == 2 else "chips"
        raise ConfigError(
            f"--topology is {name!r}, and {chip.name} has no slice of {count} {what}. "
            f"The nearest are {names}; other layouts can be given as {chip.name}:AxB"
            f"{'xC' if _dimensions(chip) == 3 else ''}."
        )
    return shape


def _dimensions(chip: Chip) -> int:
    assert isinstance(chip.network, Torus)
    return chip.network.dimensions


def _check_shape(name: str, chip: Chip, torus: Torus, shape: tuple[int, ...]) -> None:
    if min(shape, default=0) < 1:
        raise ConfigError(f"--topology is {name!r}; every size is 1 or more.")
    if len(shape) != torus.dimensions:
        example = ":4x4x4" if torus.dimensions == 3 else ":4x4"
        raise ConfigError(
            f"--topology is {name!r}, but slices of {chip.name} have {torus.dimensions} "
            f"dimensions, such as {chip.name}{example}."
        )
    odd = [size for size in shape[:2] if size % 2]
    if odd and math.prod(shape) > 1:
        raise ConfigError(
            f"--topology is {name!r}, but a host has 2 x 2 chips: the first two sizes are even."
        )
    largest = _LARGEST.get(chip.name, 256)
    if math.prod(shape) > largest:
        raise ConfigError(
            f"--topology is {name!r}, {math.prod(shape)} chips; a slice of {chip.name} has "
            f"{largest} at most. Join several: 2x{chip.name}:…"
        )


def sold_shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """Returns the layout of the slice of so many chips, or None if none is sold."""
    if _dimensions(chip) == 2:
        table = _OLD if chip.name in ("v2", "v3") else _FLAT
        return table.get(chips) if chips <= _LARGEST.get(chip.name, 256) else None
    if chips in _SMALL:
        return _SMALL[chips]
    if chips % 64 or not 0 < chips <= _LARGEST[chip.name]:
        return None
    quarter = chips // 64
    divisors = [d for d in range(1, quarter + 1) if quarter % d == 0]
    layouts = [
        (4 * a, 4 * b, 4 * (quarter // (a * b)))
        for a, b in itertools.combinations_with_replacement(divisors, 2)
        if quarter % (a * b) == 0 and quarter // (a * b) >= b
    ]
    return min(layouts, key=sum)


def sizes_sold(chip: Chip) -> list[int]:
    """Returns how many chips the slices have that are sold, in order."""
    largest = _LARGEST.get(chip.name, 256)
    return [n for n in range(1, largest + 1) if sold_shape(chip, n) is not None]


def next_larger(topology: Topology) -> Topology | None:
    """Returns the next larger slice of the same chip whose size is twice as large or more.

    Of GPUs it has twice as many.
    """
    count = math.prod(topology.shape)
    if topology.local or 2 * topology.device_count > _MOST_DEVICES[topology.chip.is_tpu]:
        return None
    if not topology.chip.is_tpu:
        return Topology(f"{topology.chip.name}:{2 * count}", topology.chip, (2 * count,))
    larger = [n for n in sizes_sold(topology.chip) if n >= 2 * count and n & (n - 1) == 0]
    if not larger:
        return None
    shape = sold_shape(topology.chip, larger[0])
    assert shape is not None
    prefix = f"{topology.slices}x" if topology.slices > 1 else ""
    name = f"{prefix}{topology.chip.name}:{'x'.join(map(str, shape))}"
    return Topology(name, topology.chip, shape, topology.slices)


def use_compiler_alone() -> None:
    """Keeps jax off accelerators for the rest of this process, which only compiles.

    Call it before anything uses jax.
    """
    _prepare_libtpu()
    jax.config.update("jax_platforms", "cpu")


def _prepare_libtpu() -> None:
    """Sets what libtpu reads from the environment when it is loaded."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling opens no chip: another process may use them, or compile, too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # libtpu asks which hosts there are; off a TPU it finds no answer and complains of it.
    for name, value in (
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
    ):
        if os.environ.get(name, "WARNING").startswith("WARNING"):
            os.environ[name] = value


def compiler_version() -> str:
    """Returns the version of libtpu, or an empty text."""
    from importlib import metadata

    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def _tpu_devices(chip: str, shape: tuple[int, ...], slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    if not (os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")):
        raise ConfigError(
            "Planning for TPUs needs their compiler, libtpu, but no TPU: "
            "pip install 'jax[tpu]', or set TPU_LIBRARY_PATH to a libtpu.so."
        )
    _prepare_libtpu()
    torus = chip_named(chip)
    assert torus is not None and isinstance(torus.network, Torus)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    single = math.prod(shape) == 1
    options["chips_per_host_bounds"] = (1, 1, 1) if single else (2, 2, 1)
    options["wrap"] = (*torus.network.wraps(shape), False)[:3]
    layout = "x".join(map(str, shape))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this machine has no TPU
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip}:{layout}", **options
            ).devices
    except Exception as error:  # jaxlib's errors have no class of their own
        raise _refused(f"{chip}:{layout}", str(error)) from error


def _refused(name: str, reason: str) -> ConfigError:
    if "lockfile" in reason:
        holder = lock_holder(LIBTPU_LOCK)
        who = f"process {holder}" if holder else "another process"
        return ConfigError(
            f"libtpu cannot be used: {who} keeps its lock {LIBTPU_LOCK}. End that process, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1; delete the file if nobody is left."
        )
    first = (reason.splitlines() or ["it gives no reason"])[0]
    return ConfigError(f"libtpu gives no devices for {name}: {first}")
