"""Start and rendezvous of the processes of a run."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxft.distributed import watch
from jaxft.distributed.talk import barrier, check_same, client, count, key_of, me, read_all
from jaxft.distributed.watch import FAREWELL, PULSE, Watch, dismiss_sentinel, fail, start_sentinel
from jaxft.errors import ConfigError, JaxftError, OutOfMemoryError, TrainingError

# Seconds in which all hosts must have started.
_START = 300
# Seconds without a sign of life after which jax ends processes with a stack trace, sometimes after
# half of the time: `watch.LOST`, which names the host, comes first.
_LOST_TO_JAX = 110


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
        client().key_value_set(key_of("host", me()), socket.gethostname())
        watcher = Watch()
        watcher.start()
        check_same("versions", {name: _version(name) for name in ("jaxft", "jax", "jaxlib")})
        yield
        barrier("end")
        if ended := read_all("ended"):  # It took this host for lost, which only was slow.
            watcher.follow(ended)
    except JaxftError as error:
        _await_verdict(error)
        fail(error.problems, error.exit_code)
    except KeyboardInterrupt:
        fail(["stopped."], 130)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) and error.code else 1
        fail([f"exited with {error.code!r} before the end of the run."], status)
    except Exception as error:
        _await_verdict(error)
        traceback.print_exc()
        fail([f"{type(error).__name__}: {error}"], 1)
    if Watch.leaving.is_set():
        _wait_to_be_ended()
    Watch.over.set()
    dismiss_sentinel()


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
    start_sentinel()
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
        dismiss_sentinel()
        raise ConfigError(
            f"The processes of this run could not be joined: {error}. Name them with "
            "--coordinator=HOST:PORT --processes=N --process=I."
        ) from error
    finally:
        timer.cancel()
    if count() == 1:
        dismiss_sentinel()


def _end_start(coordinator: str) -> NoReturn:
    known = f" at {coordinator}" if coordinator else ""
    print(
        f"jaxft: Not all processes of this run reached the coordinator{known} within {_START} s. "
        "Look at the hosts whose logs say nothing, check that each is started with its own number "
        "and that the port is open between them, and start all of them again.",
        file=sys.stderr,
        flush=True,
    )
    dismiss_sentinel()
    os._exit(1)


def _await_verdict(error: BaseException | None) -> None:
    """Waits, if another host's death may be behind an error, for the watch to say so first."""
    if isinstance(error, OutOfMemoryError):
        return
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    if error is not None and Watch.leaving.wait(watch.LOST + 5):
        _wait_to_be_ended()


def _wait_to_be_ended() -> NoReturn:
    """Leaves it to the watch, which has begun to end this process, with which status it does."""
    while True:
        time.sleep(PULSE)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
                connection.settimeout(FAREWELL)
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
                connection.settimeout(_START + FAREWELL)
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
