"""Answers that are given again while nothing is written."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from openai import OpenAI
from starlette.requests import Request
from starlette.responses import JSONResponse

from jaxft.service import answers
from jaxft.service.answers import Answers
from jaxft.service.errors import ApiError
from jaxft.service.ids import new_id
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import add


async def nothing() -> None:
    pass


class Asked:
    """An endpoint that answers how often it was asked, and does something `meanwhile`."""

    def __init__(self, service: Service):
        self._service, self._answers = service, Answers(service.database)
        self.times, self.length = 0, 0
        self.meanwhile: Callable[[], Awaitable[None]] = nothing

    async def _endpoint(self, _: Request) -> JSONResponse:
        self.times += 1
        times = self.times
        await self.meanwhile()
        return JSONResponse({"times": times, "more": "x" * self.length})

    async def answer(self, path: str, query: str = "") -> str:
        scope = {"type": "http", "path": path, "query_string": query.encode(), "headers": []}
        found = await self._answers.answer(Request(scope), self._endpoint)
        return bytes(found.body).decode()[: len('{"times":1')]

    def __call__(self, path: str = "/v1/files", query: str = "") -> int:
        return int(asyncio.run(self.answer(path, query))[-1])

    def write(self) -> None:
        with self._service.database.write() as connection:
            add(connection, schema.tokens, name=new_id("a-"), created_at=0, digest="")


@pytest.fixture
def ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> Asked:
    if not service.database.is_sqlite:
        pytest.skip("nothing is kept of PostgreSQL")
    monkeypatch.setattr(answers, "now", lambda: 0)
    return Asked(service)


def test_an_answer_is_given_again_until_something_is_written(ask: Asked):
    assert [ask(), ask(), ask()] == [1, 1, 1]
    ask.write()
    assert [ask(), ask()] == [2, 2]


def test_another_address_has_another_answer(ask: Asked):
    for _ in range(2):
        assert [ask("/a"), ask("/b"), ask("/a", "limit=1")] == [1, 2, 3]


def test_an_answer_is_made_anew_each_second_as_files_expire(
    ask: Asked, monkeypatch: pytest.MonkeyPatch
):
    ask()
    monkeypatch.setattr(answers, "now", lambda: 1)
    assert ask() == 2


def test_what_was_read_before_a_commit_is_not_given_after_it(ask: Asked):
    async def write_and_notice() -> None:
        ask.meanwhile = nothing
        ask.write()
        await ask.answer("/another")

    ask.meanwhile = write_and_notice
    assert ask("/slow") == 1
    assert ask("/another") == 2  # kept
    assert ask("/slow") == 3


def test_an_error_is_not_kept(ask: Asked):
    async def fail() -> None:
        raise ApiError("no")

    ask.meanwhile = fail
    with pytest.raises(ApiError):
        ask()
    ask.meanwhile = nothing
    assert [ask(), ask()] == [2, 2]


def test_no_more_is_kept_than_there_is_room_for(ask: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "_MOST", 2500)
    ask.length = 1000
    ask.write()
    assert [ask(path) for path in "abc"] == [1, 2, 3]
    assert [ask(path) for path in "abc"] == [1, 2, 4]


def test_clients_see_at_once_what_was_written(client: OpenAI, service: Service):
    for i in range(5):
        number = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune").id
        found = client.files.list().data
        assert found[0].id == number and len(found) == i + 1
        assert client.files.retrieve(number).id == number
    with service.database.write() as connection:  # as the worker does
        add(connection, schema.models, name="ft:new", created_at=0, job_id="ftjob-a", step=1)
    assert [model.id for model in client.models.list()] == ["ft:new", "base"]
