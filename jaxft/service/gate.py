"""The gate of every request: its id, its token, its size, its rate, and errors in one shape."""

import collections
import hashlib
import hmac
import logging
import secrets
import time
import types
import urllib.parse

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxft.errors import ConfigError
from jaxft.formatting import format_bytes
from jaxft.service.errors import ApiError
from jaxft.service.ids import letters
from jaxft.service.settings import Settings
from jaxft.service.state import Service, in_thread
from jaxft.service.store import schema
from jaxft.service.store.database import add, now, remove

_KNOWN_FOR = 2.0  # seconds that tokens are remembered
_BODY = 8 << 20  # bytes of a body that is no file
_ROOM = 1 << 20  # of a form beside the file in it
_OPEN = ("/", "/health")  # what needs no token: the page asks for one itself
_OPENED = "/open/"  # addresses that are secret themselves
_WINDOW = 60.0
_CALLERS = 10_000  # of which rates are remembered before the silent ones are forgotten

log = logging.getLogger("jaxft.service")


def new_token(service: Service, name: str) -> str:
    """Makes a token; only its digest is kept.

    Raises:
      ConfigError: If one has that name.
    """
    token = f"sk-jaxft-{letters(40)}"
    try:
        with service.database.write() as connection:
            add(connection, schema.tokens, name=name, created_at=now(), digest=_digest(token))
    except IntegrityError as error:
        raise ConfigError(f"There is a token called {name!r} already.") from error
    return token


def drop_token(service: Service, name: str) -> bool:
    """Deletes a token; returns whether there was one."""
    with service.database.write() as connection:
        return remove(connection, schema.tokens, name=name)


def read_digests(service: Service) -> list[str]:
    """Returns the digests of all tokens."""
    with service.database.read() as connection:
        return list(connection.execute(sa.select(schema.tokens.c.digest)).scalars())


def _digest(token: str) -> str:
    # Tokens are 238 bits of chance: nothing is gained by a slow digest.
    return hashlib.sha256(token.encode()).hexdigest()


class Gate:
    """Stands before the routes, which find `state` as `request.app.state`.

    Args:
      app: The routes.
      service: Knows the tokens and bounds.
      hosts: Names that a request may be addressed to, against other sites' names that lead here;
        empty: any.
      needs_token: Whether nobody is let in where there is no token, as on an open address.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: Service,
        hosts: tuple[str, ...] = (),
        needs_token: bool = False,
    ):
        self.state = types.SimpleNamespace(service=service)
        self._app, self._service, self._hosts = app, service, hosts
        self._needs_token = needs_token
        self._digests: list[str] = []
        self._read_at = -_KNOWN_FOR
        self._requests: dict[str, collections.deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or says why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self
        number, started = f"req_{secrets.token_hex(12)}", False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", number.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            request = Request(scope)
            if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
                raise ApiError("The address holds a NUL character, which no name has.")
            self._check_origin(request)
            await self._check_token(request)
            await self._app(scope, self._bounded(request, receive), answer)
        except Exception as error:
            if started:  # too late for another answer
                raise
            if isinstance(error, HTTPException) and error.status_code == 404:
                error = _no_such_path(scope["method"], scope["path"])
            await _response(error, number, self._service.settings)(scope, receive, answer)

    def _check_origin(self, request: Request) -> None:
        """Refuses what pages of other sites make a browser send."""
        host = request.headers.get("host", "")
        if self._hosts and _name_of(host) not in self._hosts:
            raise ApiError(
                f"This server is not {host!r}; it is called {', '.join(self._hosts)} "
                "(--host and --allow_host say so).",
                status=421,
            )
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(f"Pages of {origin} may not use this server.", status=403)

    async def _check_token(self, request: Request) -> None:
        digests = await self._known_digests()
        who = request.client.host if request.client else ""
        path = request.scope["path"]  # not of `request.url`, which a Host header has a part in
        if (digests or self._needs_token) and path not in _OPEN and not path.startswith(_OPENED):
            kind, _, token = request.headers.get("authorization", "").partition(" ")
            digest = _digest(token.strip()) if kind.lower() == "bearer" else ""
            # All are compared, so that time says nothing.
            if not sum(hmac.compare_digest(digest, known) for known in digests):
                self._count(who)
                raise ApiError(
                    "The API key is missing or wrong: send 'Authorization: Bearer …' with one that "
                    "`jaxft serve --new_token` made.",
                    status=401,
                    code="invalid_api_key",
                )
            who = digest
        self._count(who)

    async def _known_digests(self) -> list[str]:
        if time.monotonic() - self._read_at > _KNOWN_FOR:
            self._digests = await in_thread(read_digests, self._service)
            self._read_at = time.monotonic()
        return self._digests

    def _count(self, who: str) -> None:
        most = self._service.settings.requests_per_minute
        if not most:
            return
        present = time.monotonic()
        if len(self._requests) > _CALLERS:
            old = present - _WINDOW
            self._requests = {k: v for k, v in self._requests.items() if v and v[-1] > old}
        times = self._requests.setdefault(who, collections.deque())
        while times and times[0] <= present - _WINDOW:
            times.popleft()
        if len(times) >= most:
            wait = max(1, round(times[0] + _WINDOW - present))
            raise ApiError(
                f"More than {most} requests in a minute; wait {wait} s.",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                headers={"retry-after": str(wait)},
            )
        times.append(present)

    def _bounded(self, request: Request, receive: Receive) -> Receive:
        """Returns a `receive` that refuses bodies beyond the bound of their kind."""
        is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
        most = self._service.settings.max_file_bytes + _ROOM if is_form else _BODY
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most, is_form)
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _too_large(most, is_form)
            return message

        return bounded


def _name_of(host: str) -> str | None:
    """Returns a Host header without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _too_large(most: int, is_form: bool) -> ApiError:
    more = " Send larger files in parts: client.uploads." if is_form else ""
    return ApiError(
        f"The request is larger than {format_bytes(most)}.{more}",
        status=413,
        code="request_too_large",
    )


def _no_such_path(method: str, path: str) -> ApiError:
    if path.startswith("/v1/"):
        text = f"{method} {path} is none of the calls that this server has (docs/service.md)."
    else:
        text = (
            f"There is no {path} here: the calls are under /v1, as in base_url=http://HOST:PORT/v1."
        )
    return ApiError(text, status=404, code="unknown_url")


def _response(error: Exception, number: str, settings: Settings) -> Response:
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = ApiError(str(error.detail), status=error.status_code, headers=headers)
    if not isinstance(error, ApiError):
        log.error("request %s failed", number, exc_info=error)
        error = ApiError(
            f"The server failed; its log has more, under {number}.", status=500, kind="server_error"
        )
    error.message = settings.without_workdir(error.message)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
