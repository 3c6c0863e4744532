"""The parts of a server that its routes share."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from starlette.requests import Request

from jaxft.service.settings import Settings
from jaxft.service.store.blobs import Blobs
from jaxft.service.store.database import Database


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of a server.

    Attributes:
      settings: The settings it was started with.
      database: All that it remembers but contents of files.
      files: Contents of files.
      parts: Contents of parts of uploads.
    """

    settings: Settings
    database: Database
    files: Blobs
    parts: Blobs

    @classmethod
    def open(cls, settings: Settings) -> "Service":
        """Opens a service's database and folders; its tables are there."""
        return cls(settings, Database(settings.url), Blobs(settings.files), Blobs(settings.parts))


def service_of(request: Request) -> Service:
    """Returns the service that a request is for."""
    return request.app.state.service


async def in_thread[Found](function: Callable[..., Found], *args: Any, **kwargs: Any) -> Found:
    """Calls what waits for a disk or a database, while other requests go on."""
    return await to_thread.run_sync(functools.partial(function, *args, **kwargs))
