"""Compiling a step for devices that are not there, and keeping what came of it."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxft.errors import TrainingError
from jaxft.files import write_bytes
from jaxft.planner.topology import compiler_version

# Changes when what is kept of a compilation does.
_FORM = 1
# Of the environment, what compilers read.
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "TPU_LIBRARY_PATH")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The compiler's account of one device's memory, in bytes.

    Attributes:
      total: Most that is allocated at once, the program included.
      arguments: State and batch.
      temporaries: All that lives only during the step; what is passed on in the memory of an
        argument is in both.
      program: Instructions.
      host: Bytes of the host's memory, for one device.
    """

    total: int
    arguments: int
    temporaries: int
    program: int
    host: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A program that was compiled, or why it was not.

    Attributes:
      text: After all passes; empty if it does not fit.
      allocation: None if it does not fit.
      needed: Bytes that a program that does not fit would take; 0 if it fits.
      available: Bytes that the compiler has for it then.
      seconds: Time that compiling took, when it was done.
    """

    text: str
    allocation: Allocation | None
    needed: int = 0
    available: int = 0
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the program fits the device's memory."""
        return self.allocation is not None


def compile_lowered(lowered: Any, options: dict[str, Any], *, target: str, cache: str) -> Compiled:
    """Compiles, or finds what was compiled of the same program before.

    Args:
      lowered: `jit(…).lower(…)`.
      options: For the compiler.
      target: Names the hardware.
      cache: Folder; empty for `~/.cache/jaxft/plans`, `off` for none.

    Raises:
      jax.errors.JaxRuntimeError: What the compiler says but that the program does not fit.
    """
    file = None
    if cache != "off":
        folder = Path(cache or "~/.cache/jaxft/plans").expanduser()
        file = folder / f"{_key(lowered, options, target)}.json.gz"
        if (known := _read(file)) is not None:
            return known
    started = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options)
        found = Compiled(compiled.as_text(), _allocation(compiled.memory_analysis()))
    except jax.errors.JaxRuntimeError as error:
        found = _misfit(str(error))
        if found is None:
            raise
    found = dataclasses.replace(found, seconds=time.monotonic() - started)
    if file is not None:
        _write(file, found)
    return found


def _key(lowered: Any, options: dict[str, Any], target: str) -> str:
    flags = [os.environ.get(name, "") for name in _FLAGS]
    versions = [jax.__version__, metadata.version("jaxlib"), compiler_version(), str(_FORM), target]
    versions += flags
    digest = hashlib.sha256("\n".join(versions).encode())
    digest.update(json.dumps(sorted(options.items())).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:32]


def _read(file: Path) -> Compiled | None:
    try:
        values = json.loads(gzip.decompress(file.read_bytes()))
        allocation = values.pop("allocation")
        return Compiled(allocation=Allocation(**allocation) if allocation else None, **values)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None  # none yet, or half written by a process that was killed


def _write(file: Path, found: Compiled) -> None:
    """Keeps a compilation; that it cannot be kept is no reason to stop."""
    data = gzip.compress(json.dumps(dataclasses.asdict(found)).encode(), 6)
    with contextlib.suppress(OSError, TrainingError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, data)


def _allocation(memory: Any) -> Allocation:
    program = memory.generated_code_size_in_bytes
    # libtpu names what is allocated in all; elsewhere results take room that no argument gives.
    total = getattr(memory, "total_allocation_bytes", 0)
    apart = memory.output_size_in_bytes - memory.alias_size_in_bytes
    summed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + apart
    return Allocation(
        total=(total or summed) + program,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=program,
        host=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
    )


def _misfit(message: str) -> Compiled | None:
    """Reads what a program needs that does not fit, or None if the message says something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    forms = (
        r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)",
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    )
    for form in forms:
        if found := re.search(form, message):
            needed, unit, available, other = found.groups()
            return Compiled(
                "", None, needed=_bytes(needed, unit), available=_bytes(available, other)
            )
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))
