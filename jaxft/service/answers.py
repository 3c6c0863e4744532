"""Answers that are given again while the database is as it was."""

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.service.store.database import Database, now

_MOST = 16 << 20  # bytes that are kept

type Endpoint = Callable[[Request], Awaitable[Response]]


class Answers:
    """Keeps what was answered from the database alone, until its next commit.

    Args:
      database: One whose commits are not known keeps nothing.
    """

    def __init__(self, database: Database):
        self._database = database
        self._state: tuple[int, int] | None = None
        self._kept: dict[tuple[str, bytes], Response] = {}
        self._room = _MOST

    async def answer(self, request: Request, endpoint: Endpoint) -> Response:
        """Returns what an endpoint answers."""
        state = self._look()
        key = request.scope["path"], request.scope["query_string"]
        if (kept := self._kept.get(key)) is not None:
            return kept
        found = await endpoint(request)
        # What was read while another commit was noticed is of either side of it.
        if state is not None and state == self._state and type(found) is JSONResponse:
            self._keep(key, found)
        return found

    def _look(self) -> tuple[int, int] | None:
        """Returns what answers depend on, and forgets those of another state."""
        commits = self._database.commits()
        # Files expire by the clock.
        state = None if commits is None else (commits, now())
        if state is None or state != self._state:
            self._state, self._room = state, _MOST
            self._kept.clear()
        return state

    def _keep(self, key: tuple[str, bytes], answer: Response) -> None:
        if key not in self._kept and len(answer.body) <= self._room:
            self._kept[key] = answer
            self._room -= len(answer.body)


def reused(endpoint: Endpoint) -> Endpoint:
    """Returns an endpoint that answers again what it has answered while nothing was written.

    Args:
      endpoint: Answers by the address and the database alone.
    """

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        answers: Answers = request.app.state.answers
        return await answers.answer(request, endpoint)

    return answer
