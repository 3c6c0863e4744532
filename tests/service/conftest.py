"""A service with its server in a thread, on SQLite and on PostgreSQL; a SLURM cluster."""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from openai import OpenAI

from jaxft.service.app import make_app
from jaxft.service.gate import Gate
from jaxft.service.server import prepare
from jaxft.service.settings import Settings
from jaxft.service.state import Service
from tests.service import postgres as server
from tests.service.slurm_cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if server.find_programs() is None or server.user() is None:
        pytest.skip("needs PostgreSQL's programs, and a user other than root to run them")
    folder = tmp_path_factory.mktemp("postgres")
    for path in (folder, *folder.parents[:3]):  # another user has to get there
        path.chmod(path.stat().st_mode | 0o011)
    with server.postgres(folder) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow(seconds=2))])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return ""
    return server.make_database(request.getfixturevalue("postgres"), tmp_path.name)


@pytest.fixture
def settings(tmp_path: Path, database: str) -> Settings:
    return Settings(
        workdir=tmp_path / "service",
        models={"base": str(tmp_path / "base")},
        database=database,
        organization="lab",
        max_file_bytes=1 << 20,
        max_upload_bytes=4 << 20,
    )


@pytest.fixture
def service(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    found = prepare(settings)
    monkeypatch.setattr(tempfile, "tempdir", str(settings.temporary))  # as `serve` does
    settings.write()
    yield found
    found.database.close()


@contextlib.contextmanager
def serving(app: Gate) -> Iterator[str]:
    """Serves an application during the block; yields its address."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            thread.join(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with serving(make_app(service)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing():
        pytest.skip(reason)
    # Sockets have short paths.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        SlurmCluster(Path(folder)) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("SQUEUE_PARTITION", "another")  # a person's default, which must not matter
        yield cluster
