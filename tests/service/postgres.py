"""A PostgreSQL of the tests' own: started on loopback in a folder, and ended with them."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg


def find_programs() -> Path | None:
    """Returns the folder of PostgreSQL's programs; Debian's are in no PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def user() -> str | None:
    """Returns the user that it runs as: PostgreSQL refuses root. None if there is no other."""
    if os.getuid():
        return ""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Runs a server during the block; yields its URL without the name of a database."""
    programs, name = find_programs(), user()
    assert programs is not None and name is not None
    as_user = ["setpriv", f"--reuid={name}", f"--regid={name}", "--clear-groups"] if name else []
    if name:
        shutil.chown(folder, name, name)
    data, port = folder / "data", _free_port()
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", "test", "-A", "trust", "--no-sync"]
    subprocess.run([*as_user, *initdb], check=True, capture_output=True, cwd=folder)
    options = {"listen_addresses": "127.0.0.1", "port": port, "fsync": "off"}
    options["unix_socket_directories"] = ""
    command = [str(programs / "postgres"), "-D", str(data)]
    command += [f"-c{key}={value}" for key, value in options.items()]
    log = (folder / "log.txt").open("w")
    with log, subprocess.Popen([*as_user, *command], stdout=log, stderr=log, cwd=folder) as process:
        try:
            url = f"postgresql://test@127.0.0.1:{port}"
            _wait(f"{url}/postgres")
            yield url
        finally:
            process.terminate()


def make_database(url: str, name: str) -> str:
    """Makes an empty database; returns its URL."""
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{url}/{name}"


def _wait(url: str) -> None:
    for _ in range(100):
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
