"""The devices that jobs run on: found without taking them, as the server's processes share them."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxft.errors import ConfigError
from jaxft.files import write_json

# How the chips of a process lie on its host, and the port of the first one.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_PORT = 8476
_SHOWN = 2000  # characters of what jax said
_SECONDS = 120  # for jax to start on an accelerator


@dataclass(frozen=True, slots=True)
class Target:
    """Devices of one job.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`; empty where a topology names the devices.
      kind: Name that jax has for them.
      count: Number of them.
      limit: Bytes of memory of each; 0 if it is not known.
      topology: Slice as `jaxft plan` names it; empty for devices that no rates are published of.
    """

    platform: str
    kind: str
    count: int
    limit: int
    topology: str


def find_target(cache: Path, topology: str, devices: str) -> Target:
    """Looks at the devices of this machine in a process that ends at once.

    Args:
      cache: File that keeps what was found, for when a job has the devices.
      topology: Slice that jobs run on elsewhere; it is taken for granted.
      devices: Devices of one job, such as `0,1`; empty: all.

    Raises:
      ConfigError: If jax finds no devices and none were found before.
    """
    if topology:
        return Target("", "", 0, 0, topology)
    code = f"from jaxft.service.target import describe_devices; describe_devices({devices!r})"
    command = [sys.executable, "-c", code]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:  # a job may have the devices
        if cache.is_file():
            return Target(**json.loads(cache.read_text(encoding="utf-8")))
        said = str(getattr(error, "stderr", None) or error).strip()
        raise ConfigError(f"jax finds no devices to train on: {said[-_SHOWN:]}") from error
    target = Target(**json.loads(found.stdout.splitlines()[-1]))
    write_json(cache, asdict(target))
    return target


def variables_of(platform: str, devices: str) -> dict[str, str]:
    """Returns the environment in which a process sees some of the devices alone.

    On a TPU host the visible chips are not enough: libtpu locks the host unless it is told how the
    chips of its process lie, and on which port it may listen.

    Raises:
      ConfigError: If so many chips of a TPU make no slice.
    """
    if not devices or platform == "cpu":
        return {}
    if platform != "tpu":
        return {"CUDA_VISIBLE_DEVICES": devices}
    chips = devices.split(",")
    if len(chips) not in _BOUNDS:
        raise ConfigError(f"{devices} are {len(chips)} chips; a process may have 1, 2, 4 or 8.")
    port = _PORT + int(chips[0])
    return {
        "TPU_VISIBLE_CHIPS": devices,
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS[len(chips)],
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": str(port),
        "CLOUD_TPU_TASK_ID": "0",
    }


def check_devices(devices: str) -> None:
    """Raises ConfigError for what names no devices, as `0,1` does."""
    if not re.fullmatch(r"\d+(,\d+)*", devices):
        raise ConfigError(f"{devices!r} names no devices; expected numbers, such as 0,1.")


def describe_devices(devices: str) -> None:
    """Prints the `Target` of this machine as a line of JSON."""
    import jax

    from jaxft.hardware.chips import chip_of
    from jaxft.hardware.devices import room

    found = jax.local_devices()
    first, count = found[0], len(found)
    if devices and first.platform != "cpu":
        count = len(devices.split(","))
    chip, topology = chip_of(first.device_kind), ""
    if chip is not None and chip.network is not None:
        topology = f"{chip.name}:{count // chip.cores if chip.is_tpu else count}"
    target = Target(first.platform, first.device_kind, count, room([first]).limit, topology)
    print(json.dumps(asdict(target)))
