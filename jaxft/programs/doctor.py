"""Looks over the machine before a run: each check is one line with what to do about it."""

import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxft.config import RunConfig
from jaxft.errors import JaxftError
from jaxft.formatting import format_bytes, format_storage
from jaxft.hardware.chips import chip_of
from jaxft.hardware.devices import LIBTPU_LOCK, device_memory, host_memory_total, lock_holder
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.quantised import parameter_count
from jaxft.programs import capacity
from jaxft.programs.estimates import Estimates
from jaxft.programs.storage import checkpoint_bytes
from jaxft.training.adaptation import as_run
from jaxft.workdir.source import find_architecture

Status = Literal["ok", "warning", "error"]

_HUB_TIMEOUT = 5.0  # seconds
_GIB = 1 << 30
# PCI functions of Google that are TPUs; its network cards share the vendor id.
_TPU_PCI = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    Attributes:
      name: Name of the thing that is looked at.
      status: "error" is what a run would fail on.
      detail: Findings in words.
      advice: Remedy in words; empty if nothing is wrong.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def run_doctor(config: RunConfig | None = None) -> list[Check]:
    """Looks at versions, devices, memory, disk, cache and hub; never raises, never hangs.

    Args:
      config: A run to check the machine for; None looks at what any run needs.
    """
    config_or_default = config or RunConfig()
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", _check_versions),
        ("TPU lock", lambda: check_libtpu_lock(LIBTPU_LOCK)),
        ("devices", _check_devices),
        ("host memory", _check_host_memory),
        ("run's memory", lambda: check_run_memory(config)),
        ("disk", lambda: check_disk(config)),
        ("compilation cache", lambda: check_cache(config_or_default.train.compilation_cache)),
        (
            "hub",
            lambda: check_hub(
                constants.ENDPOINT,
                token=huggingface_hub.get_token(),
                offline=constants.HF_HUB_OFFLINE,
            ),
        ),
        ("wandb", lambda: _check_wandb(config_or_default.train.wandb)),
    ]
    found = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:  # one broken check must not hide the others
            found.append(Check(name, "error", f"{type(error).__name__}: {error}"))
    return found


def print_checks(checks: list[Check]) -> int:
    """Prints the checks as a table and returns the exit code: 1 if one is an error."""
    signs = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "error": ("error", "red")}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        detail = Text(check.detail)
        if check.advice:
            detail.append("\n→ " + check.advice, style="bold")
        table.add_row(Text(*signs[check.status]), Text(check.name), detail)
    Console().print(table)
    return int(any(check.status == "error" for check in checks))


def _check_versions() -> Iterator[Check]:
    try:
        distribution = importlib.metadata.distribution("jaxft")
    except importlib.metadata.PackageNotFoundError:
        yield Check("python", "ok", platform.python_version())
        yield Check(
            "packages",
            "warning",
            "jaxft is not installed, so the versions it needs are unknown",
            "Install it: pip install -e .",
        )
        return
    yield check_python(distribution.metadata.get("Requires-Python") or "")
    yield from check_requirements(distribution.requires or [])


def check_python(bounds: str) -> Check:
    """Compares the running Python with bounds such as '>=3.12'."""
    version = platform.python_version()
    if SpecifierSet(bounds).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "error", f"{version}; jaxft needs {bounds}", "Use a newer Python.")


def check_requirements(requirements: list[str]) -> Iterator[Check]:
    """Compares installed packages with the requirements of a distribution, extras left out."""
    fine = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, requirement.specifier
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "error", f"not installed; jaxft needs {name}{bounds}", _pip(name))
            continue
        if bounds.contains(version, prereleases=True):
            fine.append(f"{name} {version}")
        else:
            advice = _pip(f"{name}{bounds}")
            yield Check(name, "error", f"{version}; jaxft needs {bounds}", advice)
    yield Check("packages", "ok", ", ".join(fine) or "none needed")


def _pip(requirement: str) -> str:
    return f"pip install '{requirement}'"


def check_libtpu_lock(path: Path) -> Iterator[Check]:
    """Looks whether another process holds the lock without which libtpu does not start."""
    if importlib.util.find_spec("libtpu") is None and not path.exists():
        return
    holder = lock_holder(path)
    if holder is None or holder == os.getpid():
        yield Check("TPU lock", "ok", "free")
        return
    yield Check(
        "TPU lock",
        "warning",
        f"{path} is held by process {holder}" if holder else f"{path} is held by another process",
        "The TPU serves one process at a time: end that one, or set JAX_PLATFORMS=cpu for one "
        "that needs no TPU.",
    )


def _check_devices() -> Iterator[Check]:
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield Check(
            "devices",
            "error",
            f"jax found none: {str(error).splitlines()[0]}",
            "Check the driver and the installed extra, or set JAX_PLATFORMS=cpu.",
        )
        return
    kind = devices[0].device_kind
    yield Check("devices", "ok", f"{len(devices)} x {kind} ({jax.default_backend()})")
    yield from check_missed_accelerator(jax.default_backend(), _accelerators())
    yield from _check_device_memory(devices)
    yield _check_matmul(devices)


def _accelerators() -> set[str]:
    """Returns which of 'gpu' and 'tpu' the machine has, asking the system and not jax."""
    found = set()
    if glob.glob("/dev/nvidia[0-9]*"):
        found.add("gpu")
    if glob.glob("/dev/accel[0-9]*"):
        found.add("tpu")
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            ids = [Path(vendor).with_name(n).read_text().strip() for n in ("vendor", "device")]
        except OSError:
            continue
        if ids[0] == "0x1ae0" and ids[1] in _TPU_PCI:
            found.add("tpu")
    return found


def check_missed_accelerator(backend: str, present: set[str]) -> Iterator[Check]:
    """Warns of an accelerator that the machine has and jax does not use."""
    if backend != "cpu" or not present:
        return
    platforms = os.environ.get("JAX_PLATFORMS")
    kind = "gpu" if "gpu" in present else "tpu"
    extra, name = {"gpu": ("cuda13", "an NVIDIA GPU"), "tpu": ("tpu", "a TPU")}[kind]
    advice = (
        f"JAX_PLATFORMS is {platforms!r}; unset it."
        if platforms and "cpu" in platforms
        else f"Install jax for it: pip install 'jax[{extra}]'."
    )
    yield Check("accelerator", "warning", f"there is {name}, but jax uses the CPU", advice)


def _check_device_memory(devices: list[Any]) -> Iterator[Check]:
    uses = [device_memory(device) for device in devices]
    if None in uses:
        return
    limit = min(use.limit for use in uses if use)
    in_use = max(use.in_use for use in uses if use)
    chip = chip_of(devices[0].device_kind)
    detail = f"{format_bytes(limit)} for jax on each device, {format_bytes(in_use)} in use"
    if chip:
        detail += f", of {format_bytes(chip.core.memory)}"
    if chip and limit < 0.5 * chip.core.memory:
        advice = "Another process may hold the rest, or XLA_PYTHON_CLIENT_MEM_FRACTION limits it."
        yield Check("device memory", "warning", detail, advice)
    else:
        yield Check("device memory", "ok", detail)


def _check_matmul(devices: list[Any]) -> Check:
    """Multiplies small integers, which every precision does exactly, on each device."""
    left = np.arange(64 * 64).reshape(64, 64) % 7
    wrong = []
    for device in devices:
        x = jax.device_put(jnp.asarray(left, jnp.float32), device)
        if not np.array_equal(np.asarray(x @ x.T), left @ left.T):
            wrong.append(str(device))
    if wrong:
        advice = "Do not train on it: restart the machine, or report the driver."
        return Check("matrix product", "error", f"wrong on {', '.join(wrong)}", advice)
    return Check("matrix product", "ok", f"right on {len(devices)} device(s)")


def _check_host_memory() -> Iterator[Check]:
    total = host_memory_total()
    if total is not None:
        yield Check("host memory", "ok", f"{format_bytes(total)}, {os.cpu_count()} CPUs")


def check_disk(config: RunConfig | None) -> Iterator[Check]:
    """Compares the free disk under the workdir with the checkpoints a run keeps at once."""
    folder = _existing(Path(config.train.workdir if config else "").expanduser().absolute())
    free = shutil.disk_usage(folder).free
    detail = f"{format_storage(free)} free at {folder}"
    if config is None or not config.model.path:
        low = free < 5 * _GIB
        advice = "A checkpoint of a model of 1 billion parameters takes 12 GB." if low else ""
        yield Check("disk", "warning" if low else "ok", detail, advice)
        return
    architecture = _architecture(config)
    if architecture is None:
        detail += "; the model's size is unknown, as its config.json is not on this machine"
        yield Check("disk", "ok", detail)
        return
    needed = checkpoint_bytes(config, architecture)
    count = parameter_count(architecture.abstract(make_numerics(config.model.dtypes)).params)
    detail += f"; checkpoints need up to {format_storage(needed)} ({count:,} parameters)"
    if needed <= free:
        yield Check("disk", "ok", detail)
        return
    advice = (
        "Free some space, name another --config.train.workdir, or lower --config.train.keep_last."
    )
    yield Check("disk", "error", detail, advice)


def check_run_memory(config: RunConfig | None) -> Iterator[Check]:
    """Compares what a step of the run takes, by estimate, with the memory that is here."""
    if config is None or not config.model.path:
        return
    name, architecture = "run's memory", _architecture(config)
    if architecture is None:
        detail = "unknown, as the model's config.json is not on this machine"
        yield Check(name, "warning", detail, "Download the model first: hf download …")
        return
    try:
        config.validate()
        judged = capacity.judge(config, Estimates(architecture), capacity.here(config))
    except JaxftError as error:
        yield Check(name, "error", "the run cannot be placed here", " ".join(error.problems))
        return
    if judged.fits:
        yield Check(name, "ok", str(judged))
        return
    advice = capacity.advise(judged.changes)
    if judged.fits_alone:
        yield Check(name, "warning", f"fits only in memory that is now in use: {judged}", advice)
    else:
        yield Check(name, "error", f"does not fit: {judged}", advice)


def _architecture(config: RunConfig) -> Architecture | None:
    path: Any = Path(config.model.path).expanduser() / "config.json"
    if not path.is_file():
        try:
            path = huggingface_hub.try_to_load_from_cache(
                config.model.path, "config.json", revision=config.model.revision or None
            )
        except HFValidationError:  # a folder that is not there
            return None
        if not isinstance(path, str):
            return None
    if config.adapter.path:
        is_here = Path(config.adapter.path).expanduser().exists()
        return find_architecture(config) if is_here else None
    found = architecture_from_hf(json.loads(Path(path).read_text(encoding="utf-8")))
    return as_run(found, config)


def check_cache(folder: str) -> Iterator[Check]:
    """Checks that compiled programs can be kept, so that the next start is fast."""
    if folder == "off":
        yield Check("compilation cache", "ok", "off")
        return
    path = Path(folder or "~/.cache/jaxft/xla").expanduser().absolute()
    parent = _existing(path)
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            pass
    except OSError as error:
        yield Check(
            "compilation cache",
            "warning",
            f"{path} cannot be written: {error.strerror}",
            "Name another folder with --config.train.compilation_cache=…; else each start "
            "compiles anew.",
        )
        return
    yield Check("compilation cache", "ok", str(path))


def check_hub(endpoint: str, *, token: str | None, offline: bool) -> Iterator[Check]:
    """Asks the hub who the token belongs to; the token itself is never shown.

    The request runs in a thread, because looking up a host name knows no time limit.
    """
    if offline:
        yield Check("hub", "ok", "not asked, HF_HUB_OFFLINE is set: local and cached files only")
        return
    answer: list[tuple[int, dict[str, Any]] | Exception] = []
    thread = threading.Thread(
        target=lambda: answer.append(_ask_hub(endpoint, token)), daemon=True, name="ask-hub"
    )
    thread.start()
    thread.join(_HUB_TIMEOUT + 1)
    result = answer[0] if answer else TimeoutError(f"no answer in {_HUB_TIMEOUT:.0f} s")
    if isinstance(result, Exception):
        reason = getattr(result, "reason", None) or result
        yield Check(
            "hub",
            "warning",
            f"{endpoint} cannot be reached: {reason}",
            "Local files work. For hub ids fix the network, set HTTPS_PROXY or HF_ENDPOINT, or "
            "set HF_HUB_OFFLINE=1 to use what is cached without asking.",
        )
        return
    yield Check("hub", "ok", f"{endpoint} answers")
    yield _check_token(token, *result)


def _check_token(token: str | None, status: int, user: dict[str, Any]) -> Check:
    login = "Make one at huggingface.co/settings/tokens, then: hf auth login"
    if not token:
        return Check("hub token", "ok", "none; gated and private models need one (hf auth login)")
    if status == 200:
        return Check("hub token", "ok", f"valid, of {user.get('name', 'an unnamed user')}")
    if status in (401, 403):
        return Check("hub token", "warning", "the hub does not know it; it may be revoked", login)
    return Check("hub token", "warning", f"not checked: the hub answered with status {status}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Keeps the token from following a redirect to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _ask_hub(endpoint: str, token: str | None) -> tuple[int, dict[str, Any]] | Exception:
    headers = {"User-Agent": "jaxft"} | ({"Authorization": f"Bearer {token}"} if token else {})
    url = f"{endpoint.rstrip('/')}/api/whoami-v2"
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        request = urllib.request.Request(url, headers=headers)
        with opener.open(request, timeout=_HUB_TIMEOUT) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, {}  # any answer shows that the hub is there
    except (OSError, ValueError) as error:
        return error


def _check_wandb(project: str) -> Iterator[Check]:
    installed = importlib.util.find_spec("wandb") is not None
    if installed:
        yield Check("wandb", "ok", importlib.metadata.version("wandb"))
    elif project:
        detail = f"not installed, but train.wandb is {project!r}"
        yield Check("wandb", "error", detail, "pip install wandb, or leave train.wandb empty.")
    else:
        yield Check("wandb", "ok", "not installed; only needed for train.wandb")


def _existing(path: Path) -> Path:
    """Returns the folder itself or the nearest one above it that is there."""
    while not path.is_dir():
        path = path.parent
    return path
