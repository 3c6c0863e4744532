"""`jaxft serve`: the server, and the worker beside it."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from jaxft import console
from jaxft.errors import ConfigError
from jaxft.service.app import make_app
from jaxft.service.executors import make_executor
from jaxft.service.gate import read_digests
from jaxft.service.generator.client import Generator, runtime_folder
from jaxft.service.settings import Settings
from jaxft.service.state import Service
from jaxft.service.target import variables_of

_LOCAL = ("127.0.0.1", "localhost", "::1")
_AGAIN = 2.0  # seconds before a worker that died is started again
_GRACE = 20.0
_REST = 60

log = logging.getLogger("jaxft.service")


def prepare(settings: Settings) -> Service:
    """Makes the folders and tables of a service, or brings them up to date; opens it.

    Raises:
      ConfigError: If its folder or database cannot be used.
    """
    try:
        if not settings.workdir.exists():
            settings.workdir.mkdir(mode=0o700, parents=True)  # files and models of its users
        for folder in (settings.temporary, settings.workdir / "jobs"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir={settings.workdir} cannot be used: {error.strerror}."
        ) from error
    service = Service.open(settings)
    service.database.migrate()
    return service


def serve(settings: Settings, *, host: str, port: int, hosts: tuple[str, ...] = ()) -> None:
    """Serves until Ctrl-C or SIGTERM. Jobs that run go on, and are found again.

    Args:
      settings: The service's.
      host: Address that it listens on.
      port: Port; 0 takes a free one.
      hosts: Further names that it may be addressed by.

    Raises:
      ConfigError: If the address is open to others and there is no token, or it is taken, and for
        options that the executor has not.
    """
    settings.check()
    service = prepare(settings)
    make_executor(settings)  # the worker's own; options are refused here
    if not is_loopback(host) and not read_digests(service):
        raise ConfigError(
            f"--host={host} is open to others, who could use your devices. Make a token first: "
            f"jaxft serve --workdir={settings.workdir} --new_token=NAME"
        )
    # Bodies of requests wait on the disk that they go to, and not in memory.
    tempfile.tempdir = str(settings.temporary)
    # uvicorn sends the signal that ended it once more, which is to end this block in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        _bound(host, port) as listener,
        _worker(settings),
        tempfile.TemporaryDirectory(prefix="jaxft-", dir=runtime_folder()) as folder,
        contextlib.closing(_generator(settings, Path(folder))) as generator,
    ):
        address = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        names = tuple({*_LOCAL, host, *hosts}) if is_loopback(host) or hosts else ()
        app = make_app(service, hosts=names, needs_token=not is_loopback(host), generator=generator)
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=5,
            # Longer than clients keep a connection that rests: none sends into one that ends.
            timeout_keep_alive=_REST,
            access_log=False,
            server_header=False,
        )
        console.log(f"Serving {', '.join(settings.models)} at {address}/v1")
        console.log(f"The page: {address}/")
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
    service.database.close()


def _generator(settings: Settings, folder: Path) -> Generator:
    return Generator(
        folder / "generator.sock",
        log=settings.workdir / "generator.log",
        options=settings.generation,
        environment=devices_of(settings.generate_on),
    )


def devices_of(devices: str) -> dict[str, str]:
    """Returns the environment of a process that computes on some devices: `cpu`, or `0,1`."""
    if devices == "cpu":
        return {"JAX_PLATFORMS": "cpu"}
    # Which of the two it has is not known to the server, which never starts jax.
    found = variables_of("gpu", devices)
    with contextlib.suppress(ConfigError):  # so many GPUs, which TPUs have not in a process
        found |= variables_of("tpu", devices)
    return found


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {reason}. Name another --port, or 0 "
            "for a free one."
        ) from error


@contextlib.contextmanager
def _worker(settings: Settings) -> Iterator[None]:
    """Keeps a worker alive during the block."""
    path, stop = settings.write(), threading.Event()
    command = [sys.executable, "-m", "jaxft.service.worker", f"--settings={path}"]
    command += [f"--parent={os.getpid()}"]
    processes: list[subprocess.Popen] = []

    def keep() -> None:
        while not stop.is_set():
            # A group of its own: Ctrl-C is for the server, which then ends the worker.
            processes[:] = [subprocess.Popen(command, start_new_session=True)]
            while processes[0].poll() is None and not stop.wait(0.2):
                pass
            if not stop.is_set():
                log.warning("the worker ended with %s; it starts again", processes[0].returncode)
                stop.wait(_AGAIN)

    thread = threading.Thread(target=keep, name="worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for process in processes:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


def workdir_of(path: str) -> Path:
    """Returns the absolute folder of a service."""
    return Path(os.path.abspath(os.path.expanduser(path)))
