"""`python -m jaxft.service.generator --socket=PATH`: generates text until it is told to end."""

import argparse
import asyncio
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn

from jaxft.errors import JaxftError
from jaxft.models.config import make_numerics
from jaxft.service.generator.app import Desk, make_app
from jaxft.service.generator.driver import Driver
from jaxft.service.generator.models import Models

_GRACE = 2  # seconds that requests and the step under way get to end in


def main() -> None:
    """Serves until SIGTERM or SIGINT, or until there was nothing to do for long enough."""
    options = _options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    driver = Driver()
    driver.start()
    asyncio.run(_serve(options, driver))
    driver.end()
    driver.join(_GRACE)
    sys.stdout.flush()
    # A program that is being compiled, or a device that hangs, keeps nobody waiting.
    os._exit(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxft.service.generator", description=__doc__)
    add = parser.add_argument
    add("--socket", type=Path, required=True, help="path of the unix socket")
    add("--models", type=int, default=4, help="whole models held at a time")
    add("--rows", type=int, default=32, help="texts that a model continues at a time")
    add("--texts", type=int, default=256, help="texts that wait or are under way at a time")
    add("--dtypes", default="float32", help="float32, mixed or bfloat16")
    add("--quantise", default="", help="codes of the layers' weights, such as nf4")
    add("--idle", type=float, default=0, help="minutes without a request after which it ends")
    add("--parent", type=int, default=0, help="process id; when that process is gone, it ends")
    options = parser.parse_args()
    for name in ("models", "rows", "texts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    try:
        make_numerics(options.dtypes)
    except JaxftError as error:
        parser.error(str(error))
    return options


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
        await asyncio.sleep(1)
        idle = not desk.texts and time.monotonic() - desk.last > 60 * options.idle
        gone = options.parent and os.getppid() != options.parent
        if gone or (options.idle and idle):
            server.should_exit = True


if __name__ == "__main__":
    main()
