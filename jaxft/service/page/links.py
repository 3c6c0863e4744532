"""Addresses that a browser opens or downloads without a token: of chance, and for a short time.

A browser sends no Authorization header with what it opens in a tab or saves as a file. So the page,
which has a token, asks for such an address first.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from jaxft.service.errors import not_found
from jaxft.service.page import archives

PREFIX = "/open/"
_SECONDS = 600.0
# The report of a run is a page with a script; in a sandbox it has an origin of its own, and reaches
# neither this server nor what the browser keeps for it.
_SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)


@dataclass(frozen=True, slots=True)
class _Link:
    path: Path
    name: str
    until: float


class Links:
    """The addresses that are open now."""

    def __init__(self):
        self._links: dict[str, _Link] = {}

    def open(self, path: Path, name: str) -> str:
        """Returns an address of a page, or of a folder as an archive with this name."""
        present = time.monotonic()
        self._links = {key: link for key, link in self._links.items() if link.until > present}
        key = secrets.token_urlsafe(24)
        self._links[key] = _Link(path, name, present + _SECONDS)
        return PREFIX + key

    def find(self, key: str) -> tuple[Path, str]:
        """Returns path and name; raises ApiError for what was not opened, or long ago."""
        link = self._links.get(key)
        if link is None or link.until <= time.monotonic() or not link.path.exists():
            raise not_found("link", key)
        return link.path, link.name


async def follow(request: Request) -> Response:
    """Sends what an address was opened for."""
    links: Links = request.app.state.links
    path, name = links.find(request.path_params["key"])
    headers = {"cache-control": "no-store", "referrer-policy": "no-referrer"}
    if not path.is_dir():
        headers["content-security-policy"] = _SANDBOX
        return FileResponse(path, media_type="text/html", headers=headers)
    entries = archives.entries_of(path, name)
    headers["content-length"] = str(archives.size_of(entries))
    headers["content-disposition"] = f'attachment; filename="{name}.tar"'
    pieces: Iterator[bytes] = archives.pieces_of(entries)
    return StreamingResponse(pieces, media_type="application/x-tar", headers=headers)
