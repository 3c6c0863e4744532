"""Several processes as one run: how they start, what they tell each other, how they end together.

A process is called a host here, as most clusters start one on each; the first is number 0.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # its client is nowhere public

from jaxft.errors import CheckpointError, ConfigError, JaxftError, OutOfMemoryError, TrainingError

# Seconds in which all hosts must have started.
_START = 300
# Seconds without a sign of life after which a host counts as lost: ours, which names the host, and
# jax's, which ends processes with a stack trace, sometimes after half of the time.
_LOST = 40
_LOST_TO_JAX = 110
# Seconds between signs of life, and between looks at how the others are.
_PULSE = 1.0
# Seconds that host 0, which the others talk through, waits for them to read why it ends.
_FAREWELL = 10
# A day: for waits that end with the other host's work or, if it dies, with this process.
_WORK = 24 * 3600
# Seconds until a file that was written on one host must be seen on the others.
_STORAGE = 5

# Where jax tells all hosts that one of them caught SIGTERM.
_SIGTERM = "RECEIVED_PREEMPTION_NOTICE"

# Set while a loop asks jax at every step whether to stop; else SIGTERM ends the run at once.
sigterm_is_answered = threading.Event()

_AGAIN = (
    "Complete checkpoints are intact. Start the same command again on all hosts, training with "
    "--resume."
)
# Runs beside a process of several and speaks for it if it is torn down from below Python.
_SENTINEL = """\
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1])
"""


def process() -> int:
    """Number of this process; 0 if it is the only one."""
    return jax_distributed.global_state.process_id


def count() -> int:
    """Number of processes; 1 without `together`."""
    return jax_distributed.global_state.num_processes or 1


def is_first() -> bool:
    """Whether this is the one process that logs and writes files."""
    return process() == 0


def _join(coordinator: str, processes: int, process: int) -> None:
    """Joins the processes of a run, if there are several."""
    if coordinator or processes or process != -1:
        arguments = _explicit(coordinator, processes, process)
    else:
        arguments = _environment()
    if arguments is None:
        return
    if coordinator and processes > 1:
        _roll_call(coordinator, processes, process)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _start_sentinel()
    timer = threading.Timer(_START, _end_start, [coordinator])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=_LOST_TO_JAX,
            # Ours ends first: jax's ends in a stack trace.
            initialization_timeout=_START + 60,
        )
    except (RuntimeError, ValueError, OSError) as error:
        _dismiss_sentinel()
        raise ConfigError(
            f"The processes of this run could not be joined: {error}. Name them with "
            "--coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    finally:
        timer.cancel()
    if count() == 1:
        _dismiss_sentinel()


@contextlib.contextmanager
def together(*, coordinator: str = "", processes: int = 0, process: int = -1) -> Iterator[None]:
    """Runs the block as one of several processes: if it fails on one host, all of them end.

    Enter it before jax is used. Without arguments the processes are found by the environment of
    Cloud TPU, SLURM, Open MPI or a Kubernetes job, where it says that there are several. In a
    single process errors are raised as ever; in one of several they are printed with its number,
    and the process ends with the error's exit status. So does SIGTERM on any host, with status 143,
    unless a training loop answers it.

    Args:
      coordinator: `HOST:PORT` of process 0, which the others must be able to reach.
      processes: How many there are.
      process: Number of this one.

    Raises:
      ConfigError: If the arguments are incomplete or wrong.
      TrainingError: If not all of them start within five minutes; says which are missing.
    """
    _join(coordinator, processes, process)
    if count() == 1:
        yield
        return
    try:
        _client().key_value_set(_key("host", _me()), socket.gethostname())
        watch = _Watch()
        watch.start()
        check_same("versions", {name: _version(name) for name in ("jaxft", "jax", "jaxlib")})
        yield
        barrier("end")
        if ended := _read("ended"):  # It took this host for lost, which only was slow.
            watch.follow(ended)
    except JaxftError as error:
        _await_verdict(error)
        _fail(error.problems, error.exit_code)
    except KeyboardInterrupt:
        _fail(["stopped."], 130)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) and error.code else 1
        _fail([f"exited with {error.code!r} before the end of the run."], status)
    except Exception as error:
        _await_verdict(error)
        traceback.print_exc()
        _fail([f"{type(error).__name__}: {error}"], 1)
    if _Watch.leaving.is_set():
        _wait_to_be_ended()
    _Watch.over.set()
    _dismiss_sentinel()


def _await_verdict(error: BaseException | None) -> None:
    """Waits, if another host's death may be behind an error, for the watch to say so first."""
    if isinstance(error, OutOfMemoryError):
        return
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    if error is not None and _Watch.leaving.wait(_LOST + 5):
        _wait_to_be_ended()


def _wait_to_be_ended() -> NoReturn:
    """Leaves it to the watch, which has begun to end this process, with which status it does."""
    while True:
        time.sleep(_PULSE)


def refuse_several(command: str) -> None:
    """Raises ConfigError if a launcher started several processes of a command that is for one."""
    several = _launcher()
    if several is not None:
        raise ConfigError(
            f"jaxft {command} runs in a single process, and {several} started several of it. Run "
            "it once, outside of the launcher; on a host of a TPU slice set JAX_PLATFORMS=cpu."
        )


def require_joined() -> None:
    """Raises ConfigError if jax computes with several processes that `together` did not join."""
    if jax.process_count() != count():
        raise ConfigError(
            f"jax computes with {jax.process_count()} processes, which are not watched. Put the "
            "script's work into `with jaxft.distributed.together():`, entered before jax is used "
            "and instead of jax.distributed.initialize()."
        )


def barrier(name: str, *, timeout: float = _WORK) -> None:
    """Waits until every process has come here, `timeout` seconds at most.

    The default is for any work: if a host dies in the meantime, the watch ends this process.

    Raises:
      TrainingError: After that time; names the hosts that have not come.
    """
    if count() == 1:
        return
    place = _unique(name)
    _client().key_value_set(_key("barrier", place, _me()), "")
    try:
        _client().wait_at_barrier(f"jaxft/{place}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise  # A host was lost; the watch says which.
        here = {int(key.rpartition("/")[2]) for key in _read("barrier", place)}
        missing = [host_name(i) for i in range(count()) if i not in here]
        raise TrainingError(
            f"Waited {timeout:g} s at {name!r} for {', '.join(missing) or 'the other hosts'}. Its "
            f"log says what it does, or how it ended. {_AGAIN}"
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
    key = _key("value", _unique(name))
    if is_first():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, _WORK * 1000))


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


def everywhere(name: str, here: bool) -> bool:
    """Returns whether something holds on every host.

    Args:
      name: Says what it is.
      here: Whether it holds on this host.
    """
    if count() == 1:
        return here
    place = _unique(name)
    _client().key_value_set(_key("everywhere", place, _me()), str(here))
    barrier(name)
    return all(said == "True" for said in _read("everywhere", place).values())


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
    _client().key_value_set(_key("sees", place, _me()), "1" if seen else "")
    barrier("storage")
    if is_first():
        token.unlink(missing_ok=True)
    blind = [int(k.rpartition("/")[2]) for k, value in _read("sees", place).items() if not value]
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


def host_name(number: int) -> str:
    """Returns 'host 2 (name)'."""
    try:
        name = _client().key_value_try_get(_key("host", str(number)))
    except jax.errors.JaxRuntimeError:
        return f"host {number}"
    return f"host {number} ({name})"


# --- What the environment says -------------------------------------------------------------------


def _explicit(coordinator: str, processes: int, process: int) -> dict[str, Any]:
    problems = []
    if not (coordinator and processes and process != -1):
        problems.append("--coordinator, --processes and --process belong together: give all three.")
    else:
        found = re.fullmatch(r".+:(\d+)", coordinator)
        if not found or not 0 < int(found.group(1)) < 65536:
            problems.append(
                f"--coordinator is {coordinator!r}; expected HOST:PORT, such as 10.0.0.2:8476, "
                "with a port from 1 to 65535."
            )
        if processes < 1:
            problems.append(f"--processes is {processes}; expected how many there are.")
        elif not 0 <= process < processes:
            problems.append(
                f"--process is {process} of --processes {processes}; expected 0 to {processes - 1}."
            )
    if problems:
        raise ConfigError(problems)
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _environment() -> dict[str, Any] | None:
    """Returns arguments of `jax.distributed.initialize`, or None if this process is alone."""
    launcher = _launcher()
    if launcher is None:
        return None
    variables = os.environ
    if launcher == "SLURM":
        # jax takes one GPU for each task; one task on a node is meant to have all of its GPUs.
        alone = variables["SLURM_NTASKS"] == variables.get("SLURM_STEP_NUM_NODES")
        gpus = int(variables.get("SLURM_GPUS_ON_NODE", 0)) if alone else 0
        return {"local_device_ids": list(range(gpus))} if gpus else {}
    if launcher == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in variables:
        if importlib.util.find_spec("mpi4py") is None:
            raise ConfigError(
                f"Open MPI 5 started {variables['OMPI_COMM_WORLD_SIZE']} processes, which find "
                "each other with mpi4py. Install it with 'pip install mpi4py', or name them with "
                "--coordinator=HOST:PORT --processes=N --process=I."
            )
        return {"cluster_detection_method": "mpi4py"}
    return {}


def _launcher() -> str | None:
    """Names what started this process as one of several; None if nothing did."""
    variables = os.environ
    slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    if all(f"SLURM_{name}" in variables for name in slurm):
        tasks = variables.get("SLURM_STEP_NUM_TASKS", variables["SLURM_NTASKS"])
        return "SLURM" if int(tasks) > 1 else None
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if _tpu_hosts() > 1:
        return "Cloud TPU"
    indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= variables.keys()
    if indexed and importlib.util.find_spec("kubernetes") is not None:
        return "Kubernetes"
    return None


def _tpu_hosts() -> int:
    """Returns the number of hosts of all TPU slices of this run."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return 1
    if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        return 1
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    if names is None:
        names = _metadata("worker-network-endpoints")
    if slices is None:
        found = re.search(r"MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env"))
        slices = found.group(1) if found else "1"
    return len(names.split(",")) * int(slices)


def _metadata(attribute: str) -> str:
    """Returns an attribute of a Google Compute Engine machine; empty where there is none."""
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return ""


# --- Who is there -------------------------------------------------------------------------------


def _roll_call(coordinator: str, processes: int, process: int) -> None:
    """Waits until all processes have started; jax would not say who is missing.

    Process 0 listens where jax's coordinator will.

    Raises:
      TrainingError: If some do not come, or two come with the same number.
    """
    host, _, port = coordinator.rpartition(":")
    if process == 0:
        problem = _call_roll(int(port), processes)
    else:
        problem = _answer_roll(host.strip("[]"), int(port), processes, process)
    if problem:
        raise TrainingError(problem)


def _call_roll(port: int, processes: int) -> str:
    """Returns what is wrong, which it tells those that came, or nothing if all came."""
    limit = time.monotonic() + _START
    came: dict[int, tuple[socket.socket, str]] = {}
    wrong = []
    try:
        listener = _listen(port)
    except OSError as error:
        return f"Port {port} cannot be listened at ({error}). Give --coordinator another one."
    with listener, contextlib.ExitStack() as connections:
        while len(came) < processes - 1 and not wrong:
            listener.settimeout(max(limit - time.monotonic(), 0.001))
            try:
                connection = connections.enter_context(listener.accept()[0])
                connection.settimeout(_FAREWELL)
                number, expected, name = _receive(connection)
            except TimeoutError:
                if time.monotonic() > limit:
                    break
                continue
            except (OSError, ValueError, TypeError):
                continue  # Not one of ours.
            if expected != processes:
                wrong.append(f"{name} was started with --processes={expected}, not {processes}")
            elif number == 0 or number in came:
                other = came[number][1] if number else socket.gethostname()
                wrong.append(f"--process={number} was started twice, on {other} and on {name}")
            came[number] = (connection, name)
        missing = sorted(set(range(1, processes)) - came.keys())
        if wrong:
            problem = f"The processes do not fit together: {wrong[0]}. Start all of them again."
        elif missing:
            problem = (
                f"Waited {_START} s for {', '.join(f'host {i}' for i in missing)} of {processes} "
                "to start. Look there for an error or for what keeps it waiting, and start all of "
                "them again."
            )
        else:
            problem = ""
        for connection, _ in came.values():
            with contextlib.suppress(OSError):
                _send(connection, problem)
                connection.recv(1)  # The other side closes first, so that the port is free at once.
    return problem


def _answer_roll(host: str, port: int, processes: int, process: int) -> str:
    """Tells process 0 that this one is there; returns what is wrong by its word."""
    limit, error = time.monotonic() + _START, None
    while time.monotonic() < limit:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _send(connection, [process, processes, socket.gethostname()])
                connection.settimeout(_START + _FAREWELL)
                return _receive(connection)
        except (OSError, ValueError) as failed:
            error = failed
            time.sleep(0.2)
    return (
        f"Host 0 did not answer at {host}:{port} for {_START} s ({error}). Check that it was "
        "started, and that this port is open between the hosts; then start all of them again."
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection: socket.socket, value: Any) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> Any:
    with connection.makefile("rb") as file:
        return json.loads(file.readline(10_000))


# --- What hosts tell each other ------------------------------------------------------------------


def _client() -> Any:
    return jax_distributed.global_state.client


def _me() -> str:
    return str(process())


def _key(*parts: str) -> str:
    return "/".join(("jaxft", *parts))


def _read(*parts: str) -> dict[str, str]:
    return dict(_client().key_value_dir_get(_key(*parts) + "/"))


_used: dict[str, int] = {}


def _unique(name: str) -> str:
    """Returns a name for this use: all hosts come to the same uses in the same order."""
    _used[name] = _used.get(name, 0) + 1
    return f"{name}-{_used[name]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_token(above: Sequence[Path]) -> tuple[int, str]:
    """Writes a file to the first folder that exists; returns its place in the list and its name."""
    levels = next(level for level, path in enumerate(above) if path.is_dir())
    name = f".jaxft-{uuid.uuid4().hex}"
    try:
        (above[levels] / name).touch()
    except OSError:
        return levels, ""
    return levels, name


# --- How they end --------------------------------------------------------------------------------


# Held by the thread that ends the process, whose exit status counts; it is never given back.
_ending = threading.Lock()


class _Watch(threading.Thread):
    """Shows that this host lives, and ends the process when another one ended or was lost."""

    over = threading.Event()  # the run is over, there is nothing to watch any more
    leaving = threading.Event()  # this process has said why it ends

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self._seen: dict[str, tuple[str, float]] = {}

    def run(self) -> None:
        beat = 0
        while not self.over.wait(_PULSE):
            beat += 1
            try:
                _client().key_value_set(_key("alive", _me()), str(beat), allow_overwrite=True)
                stopped = not sigterm_is_answered.is_set() and _sigterm_arrived()
                ended = _read("ended")
                lost = self._lost_hosts() if is_first() and not ended else {}
            except jax.errors.JaxRuntimeError as error:
                stopped, ended, lost = (
                    False,
                    {},
                    {0: f"it cannot be reached ({_first_line(error)})"},
                )
            if self.over.is_set() or self.leaving.is_set():
                return
            if stopped and not sigterm_is_answered.is_set():
                _fail([f"Stopped by SIGTERM outside of training steps. {_AGAIN}"], 143)
            for number, text in lost.items():
                _say([f"{host_name(number)} was lost: {text}. {_AGAIN}"])
            if lost:
                self._excuse(lost)
                _leave(1, "; ".join(f"{host_name(i)} was lost: {t}" for i, t in lost.items()))
            if ended:
                self.follow(ended)

    def _lost_hosts(self) -> dict[int, str]:
        """Returns hosts that have shown no sign of life for too long, and what is known of them."""
        now, beats = time.monotonic(), _read("alive")
        for number in range(1, count()):
            beat = beats.get(_key("alive", str(number)), "")
            if self._seen.get(str(number), ("none", 0.0))[0] != beat:
                self._seen[str(number)] = (beat, now)
        return {
            int(number): f"no sign of life for {_LOST} s, as if it was killed or its network failed"
            for number, (_, since) in self._seen.items()
            if now - since > _LOST
        }

    def _excuse(self, lost: Mapping[int, str]) -> None:
        """Spares host 0 the wait for those that will not read why it ends."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for number in lost.keys() - {0}:
                _client().key_value_set(_key("gone", str(number)), "")

    def follow(self, ended: Mapping[str, str]) -> None:
        """Ends this process after others; an error of its own that is on its way goes first."""
        if self.leaving.wait(2 * _PULSE):
            return
        texts = []
        for key, text in ended.items():
            number = int(key.rpartition("/")[2])
            texts.append(f"{host_name(number)} ended, and so this one does. It said: {text}")
        _say([*texts, _AGAIN])
        _leave(1, "")


def _sigterm_arrived() -> bool:
    """Returns whether jax has caught SIGTERM on any host."""
    try:
        return bool(_client().key_value_try_get(_SIGTERM))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _say(problems: list[str]) -> None:
    for problem in problems:
        print(f"jaxft: host {process()}: {problem}", file=sys.stderr, flush=True)


def _fail(problems: list[str], status: int) -> NoReturn:
    _Watch.leaving.set()
    _say(problems)
    _leave(status, " ".join(problems))


def _leave(status: int, reason: str) -> NoReturn:
    """Ends this process at once: others hang in collectives, and threads in what they wait for.

    Args:
      status: Exit status.
      reason: What the other hosts are told; empty if they know.
    """
    _Watch.leaving.set()
    _ending.acquire()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if reason:
            _client().key_value_set(_key("ended", _me()), reason)
        _client().key_value_set(_key("gone", _me()), "")
        limit = time.monotonic() + _FAREWELL
        # The others hear of it through this process.
        while is_first() and len(_read("gone")) < count() and time.monotonic() < limit:
            time.sleep(0.1)
    _dismiss_sentinel()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_start(coordinator: str) -> NoReturn:
    known = f" at {coordinator}" if coordinator else ""
    print(
        f"jaxft: Not all processes of this run reached the coordinator{known} within {_START} s. "
        "Look at the hosts whose logs say nothing, check that each is started with its own number "
        "and that the port is open between them, and start all of them again.",
        file=sys.stderr,
        flush=True,
    )
    _dismiss_sentinel()
    os._exit(1)


_sentinel: subprocess.Popen[bytes] | None = None


def _start_sentinel() -> None:
    """Starts a small process that speaks if this one ends without a word.

    jax ends a process from below Python when its coordinator is gone, gloo may when another host
    is, and schedulers kill.
    """
    global _sentinel
    text = (
        f"jaxft: {socket.gethostname()}: this process was ended from outside Python. As a rule "
        "another host was lost, host 0 or one that its log names, or this one was killed for "
        f"memory or by the scheduler: the first error in all logs is the cause. {_AGAIN}\n"
    )
    _sentinel = subprocess.Popen(
        [sys.executable, "-ISc", _SENTINEL, text], stdin=subprocess.PIPE, start_new_session=True
    )


def _dismiss_sentinel() -> None:
    if _sentinel is None or _sentinel.stdin is None or _sentinel.stdin.closed:
        return
    with contextlib.suppress(OSError):
        _sentinel.stdin.write(b"end")
        _sentinel.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        _sentinel.wait(5)
