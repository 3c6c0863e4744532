"""The generator while it runs: its socket, its application, and its end."""

import argparse
import asyncio
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn

from jaxft.models.config import make_numerics
from jaxft.service.generator.app import Desk, make_app
from jaxft.service.generator.driver import Driver
from jaxft.service.generator.models import Models
from jaxft.training.compilation import use_compilation_cache

_SECONDS = 1.0  # between looks at whether anybody needs the process
_GRACE = 2  # seconds that requests and the step under way get to end in


def run(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, or until there was nothing to do for long enough.

    Raises:
      ConfigError: If there are no such types of weights.
    """
    make_numerics(options.dtypes)
    use_compilation_cache("")
    driver = Driver()
    driver.start()
    asyncio.run(_serve(options, driver))
    driver.end()
    driver.join(_GRACE)
    sys.stdout.flush()
    # A program that is being compiled, or a device that hangs, keeps nobody waiting.
    os._exit(0)


async def _serve(options: argparse.Namespace, driver: Driver) -> None:
    models = Models(driver, options.models, options.rows, options.dtypes, options.quantise)
    desk = Desk(driver, models, options.texts)
    config = uvicorn.Config(
        make_app(desk),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    watch = asyncio.create_task(_watch(options, desk, server))
    with _listening(options.socket) as bound:
        await server.serve(sockets=[bound])
    watch.cancel()
    options.socket.unlink(missing_ok=True)


def _listening(path: Path) -> socket.socket:
    """Binds the socket, for this user alone; one that a killed process left is taken away."""
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        bound.bind(str(path))
    finally:
        os.umask(mask)
    return bound


async def _watch(options: argparse.Namespace, desk: Desk, server: uvicorn.Server) -> None:
    """Ends the server when its parent is gone, or nobody asked for anything for a while."""
    while True:
        await asyncio.sleep(_SECONDS)
        idle = not desk.texts and time.monotonic() - desk.last > 60 * options.idle
        gone = options.parent and os.getppid() != options.parent
        if gone or (options.idle and idle):
            server.should_exit = True
