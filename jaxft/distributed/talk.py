"""The talk between the processes of a run: values, barriers, checks."""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # its client is nowhere public

from jaxft.errors import CheckpointError, ConfigError, TrainingError

# A day: for waits that end with the other host's work or, if it dies, with this process.
_WORK = 24 * 3600
# Seconds until a file that was written on one host must be seen on the others.
_STORAGE = 5

AGAIN = (
    "Complete checkpoints are intact. Start the same command again on all hosts, training with "
    "--resume."
)

_used: dict[str, int] = {}


def process() -> int:
    """Number of this process; 0 if it is the only one."""
    return jax_distributed.global_state.process_id


def count() -> int:
    """Number of processes; 1 without `together`."""
    return jax_distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this is the one process that logs and writes files."""
    return process() == 0


def is_first_on_machine() -> bool:
    """Whether no process of a lower number runs on the same machine."""
    if count() == 1:
        return True
    names = {int(key.rpartition("/")[2]): name for key, name in read_all("host").items()}
    return process() == min(n for n, name in names.items() if name == names[process()])


def host_name(number: int) -> str:
    """Returns 'host 2 (name)'."""
    try:
        name = client().key_value_try_get(key_of("host", str(number)))
    except jax.errors.JaxRuntimeError:
        return f"host {number}"
    return f"host {number} ({name})"


def barrier(name: str, *, timeout: float = _WORK) -> None:
    """Waits until every process has come here, `timeout` seconds at most.

    The default is for any work: if a host dies in the meantime, the watch ends this process.

    Raises:
      TrainingError: After that time; names the hosts that have not come.
    """
    if count() == 1:
        return
    place = _unique(name)
    client().key_value_set(key_of("barrier", place, me()), "")
    try:
        client().wait_at_barrier(f"jaxft/{place}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise  # A host was lost; the watch says which.
        here = {int(key.rpartition("/")[2]) for key in read_all("barrier", place)}
        missing = [host_name(i) for i in range(count()) if i not in here]
        raise TrainingError(
            f"Waited {timeout:g} s at {name!r} for {', '.join(missing) or 'the other hosts'}. Its "
            f"log says what it does, or how it ended. {AGAIN}"
        ) from None


def from_first[Value](name: str, make: Callable[[], Value]) -> Value:
    """Returns what `make` returns on host 0; elsewhere it is not called.

    If it raises there, the other hosts end by their watch.

    Args:
      name: Says what it is.
      make: Returns what JSON can hold.
    """
    if count() == 1:
        return make()
    key = key_of("value", _unique(name))
    if is_first():
        value = make()
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, _WORK * 1000))


def from_all[Value](name: str, here: Value) -> list[Value]:
    """Returns what each host gives, in no order.

    Args:
      name: Says what it is.
      here: What this host gives, which JSON can hold.
    """
    if count() == 1:
        return [here]
    place = _unique(name)
    client().key_value_set(key_of("all", place, me()), json.dumps(here))
    barrier(name)
    return [json.loads(said) for said in read_all("all", place).values()]


def everywhere(name: str, here: bool) -> bool:
    """Returns whether something holds on every host.

    Args:
      name: Says what it is.
      here: Whether it holds on this host.
    """
    return all(from_all(name, here))


def check_same(name: str, values: Mapping[str, Any]) -> None:
    """Compares values that JSON can hold with those of host 0.

    Raises:
      ConfigError: If some differ: the hosts would not compute the same program.
    """
    here = json.loads(json.dumps(dict(values)))
    there = from_first(name, lambda: here)
    different = [
        f"{key} is {here.get(key)!r} on {host_name(process())} and {there.get(key)!r} on "
        f"{host_name(0)}."
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
    if different:
        raise ConfigError(
            [f"The hosts differ in {name}; start the same command on all of them.", *different]
        )


def hosts_that_do_not_see(folder: Path) -> list[str]:
    """Returns the hosts to which `folder` is another one than to host 0; it may not exist yet."""
    if count() == 1:
        return []
    above = [path := folder.expanduser().absolute(), *path.parents]
    levels, name = from_first("token", lambda: _write_token(above))
    if not name:
        return []  # What writes there next explains it better.
    token, limit = above[min(levels, len(above) - 1)] / name, time.monotonic() + _STORAGE
    while not (seen := token.exists()) and time.monotonic() < limit:
        time.sleep(0.1)
    place = _unique("sees")
    client().key_value_set(key_of("sees", place, me()), "1" if seen else "")
    barrier("storage")
    if is_first():
        token.unlink(missing_ok=True)
    blind = [int(k.rpartition("/")[2]) for k, value in read_all("sees", place).items() if not value]
    return [host_name(i) for i in sorted(blind)]


def require_shared(folder: Path) -> None:
    """Raises CheckpointError unless all hosts see the same `folder`."""
    blind = hosts_that_do_not_see(folder)
    if blind:
        raise CheckpointError(
            f"{folder} is not the same folder on all hosts: what {host_name(0)} writes is not seen "
            f"on {', '.join(blind)}. All hosts write parts of a checkpoint, so train.workdir must "
            "lie on storage that they share."
        )


@contextlib.contextmanager
def first_host_first(name: str, folder: Path) -> Iterator[None]:
    """Lets host 0 fill a cache that all hosts see before they read it; else all fill their own."""
    wait = count() > 1 and not hosts_that_do_not_see(folder)
    if wait and not is_first():
        barrier(name)
    yield
    if wait and is_first():
        barrier(name)


def client() -> Any:
    """Returns the client of the key-value store on host 0; None in a single process."""
    return jax_distributed.global_state.client


def me() -> str:
    """Returns the number of this process as the last part of a key."""
    return str(process())


def key_of(*parts: str) -> str:
    """Returns the key of an entry in the store."""
    return "/".join(("jaxft", *parts))


def read_all(*parts: str) -> dict[str, str]:
    """Returns what all hosts wrote under a key, by the whole key, which ends in their number."""
    return dict(client().key_value_dir_get(key_of(*parts) + "/"))


def _unique(name: str) -> str:
    """Returns a name for this use: all hosts come to the same uses in the same order."""
    _used[name] = _used.get(name, 0) + 1
    return f"{name}-{_used[name]}"


def _write_token(above: Sequence[Path]) -> tuple[int, str]:
    """Writes a file to the first folder that exists; returns its place in the list and its name."""
    levels = next(level for level, path in enumerate(above) if path.is_dir())
    name = f".jaxft-{uuid.uuid4().hex}"
    try:
        (above[levels] / name).touch()
    except OSError:
        return levels, ""
    return levels, name
