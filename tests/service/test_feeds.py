"""Events of jobs as they are sent to all who follow them."""

import asyncio
from collections.abc import Callable

import pytest

from jaxft.service import feeds, jobs
from jaxft.service.bodies import JobCreate
from jaxft.service.feeds import Feeds
from jaxft.service.files import add_file
from jaxft.service.history import add_event
from jaxft.service.ids import new_id
from jaxft.service.state import Service


@pytest.fixture
def job(service: Service, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(feeds, "_EVERY", 0.05)
    file = add_file(service, new_id("file-"), name="a", purpose="fine-tune", size=1)
    return jobs.make_job(service, JobCreate(model="base", training_file=file["id"]))["id"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Returns a list that has an item for each look at the database."""
    found: list[None] = []
    news = feeds.Feed._news
    monkeypatch.setattr(feeds.Feed, "_news", lambda feed: (found.append(None), news(feed))[1])
    return found


async def all_of(found: Feeds, job: str) -> str:
    return "".join([text async for text in found.follow(job)])


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def test_all_followers_of_a_job_get_all_events_and_share_each_look(
    service: Service, job: str, looks: list[None]
):
    async def main() -> list[str]:
        found = Feeds(service)
        early = [asyncio.create_task(all_of(found, job)) for _ in range(20)]
        await until(lambda: len(looks) == 3)
        with service.database.write() as connection:
            add_event(connection, job, "news")
        await until(lambda: len(looks) == 5)
        late = [asyncio.create_task(all_of(found, job)) for _ in range(20)]
        await until(lambda: len(looks) == 6)
        jobs.cancel(service, job)
        return await asyncio.gather(*early, *late)

    texts = asyncio.run(asyncio.wait_for(main(), 20))
    assert len(texts) == 40 and len(set(texts)) == 1
    assert texts[0].count("event: message\n") == 4 and texts[0].endswith("data: [DONE]\n\n")
    assert texts[0].index("Created") < texts[0].index("news") < texts[0].index("cancelled")
    assert len(looks) < 15  # of which there would be 200


def test_a_slow_reader_is_sent_a_few_events_at_a_time_and_misses_none(
    service: Service, job: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feeds, "_AT_ONCE", 3)

    async def main() -> list[str]:
        events, texts = Feeds(service).follow(job), []
        with service.database.write() as connection:
            for i in range(8):
                add_event(connection, job, f"news {i}")
        async for text in events:
            if not texts:
                jobs.cancel(service, job)
            texts.append(text)
            await asyncio.sleep(0.06)
        return texts

    texts = asyncio.run(asyncio.wait_for(main(), 20))
    assert [text.count("event: ") for text in texts] == [3, 3, 3, 1, 1, 0]
    assert "".join(texts).count("news") == 8 and "cancelled" in texts[-2]


def test_a_feed_that_nobody_follows_any_more_is_forgotten(
    service: Service, job: str, looks: list[None]
):
    async def main() -> None:
        found = Feeds(service)
        following = asyncio.create_task(all_of(found, job))
        await until(lambda: len(looks) == 2)
        assert len(found._feeds) == 1
        following.cancel()
        await asyncio.wait([following])
        del following
        await until(lambda: not found._feeds)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_feed_without_news_says_at_times_that_it_lives(
    service: Service, job: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feeds, "_SILENCE", 0.2)

    async def main() -> list[str]:
        events = Feeds(service).follow(job)
        return [await anext(events) for _ in range(3)]

    first, *others = asyncio.run(asyncio.wait_for(main(), 20))
    assert first.startswith("event: message") and others == [": waiting\n\n"] * 2
