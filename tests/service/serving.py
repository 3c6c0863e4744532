"""A server of text in this process: the routes, the generator behind a socket, and a client."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount

from jaxft.service.completions import ROUTES
from jaxft.service.errors import ApiError
from jaxft.service.generator.app import Desk, make_app
from jaxft.service.generator.client import Generator
from jaxft.service.generator.driver import Driver
from jaxft.service.generator.models import Models


class Names:
    """Models by name: the folders of one."""

    def __init__(self, folder: Path):
        self.folder = folder

    async def find(self, name: str) -> SimpleNamespace:
        path = self.folder / name
        if "/" in name or not path.is_dir():
            raise ApiError(
                f"The model {name!r} does not exist.", status=404, code="model_not_found"
            )
        return SimpleNamespace(path=str(path), step="best")


class Near(Generator):
    """The client of a generator that is in this process."""

    async def _started(self) -> httpx.AsyncClient:
        if self._client is None:
            # Nothing is kept open that a loop which has ended would have to close.
            limits = httpx.Limits(max_keepalive_connections=0)
            transport = httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits)
            self._client = httpx.AsyncClient(
                transport=transport, base_url="http://near", timeout=60
            )
        return self._client


@contextlib.contextmanager
def serving(app: Starlette, **options) -> Iterator[uvicorn.Server]:
    """Serves an application from a thread."""
    config = uvicorn.Config(
        app, log_level="error", lifespan="off", timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(10)


def front(folder: Path, generator: Generator) -> Starlette:
    """Returns the application of the routes."""

    async def refuse(request, error):
        return JSONResponse(error.body(), status_code=error.status)

    app = Starlette(routes=[Mount("/v1", routes=ROUTES)], exception_handlers={ApiError: refuse})
    app.state.models, app.state.generator = Names(folder), generator
    return app


@contextlib.contextmanager
def client_of(app: Starlette) -> Iterator[openai.OpenAI]:
    """Gives a client of an application that is served on a port of this machine."""
    with serving(app, host="127.0.0.1", port=0) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
        ) as client:
            yield client


@contextlib.contextmanager
def near(folder: Path, **options) -> Iterator[tuple[openai.OpenAI, Desk]]:
    """Gives a client of the models in a folder, and what is behind it."""
    driver = Driver()
    driver.start()
    desk = Desk(driver, Models(driver, **options))
    socket = folder / "g.sock"
    with serving(make_app(desk), uds=str(socket)), client_of(front(folder, Near(socket))) as client:
        yield client, desk
    driver.end()
    driver.join(10)
