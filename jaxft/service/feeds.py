"""Events of jobs as they happen, read once for all who follow a job."""

import asyncio
import json
import math
import time
import weakref
from collections.abc import AsyncIterator

import sqlalchemy as sa

from jaxft.service.history import ACTIVE
from jaxft.service.objects import event_object
from jaxft.service.state import Service, in_thread
from jaxft.service.store import schema
from jaxft.service.store.database import Row

_EVERY = 0.5  # seconds between looks at the database
_AT_ONCE = 1000  # events that are sent before a slow reader is waited for
_SILENCE = 15.0  # seconds after which a line is sent, so that nobody between takes it for dead


class Feeds:
    """Finds the feed of a job, which is there as long as anybody follows it."""

    def __init__(self, service: Service):
        self._service = service
        self._feeds: weakref.WeakValueDictionary[str, Feed] = weakref.WeakValueDictionary()

    def follow(self, job: str) -> AsyncIterator[str]:
        """Yields the events of a job as server-sent events, the oldest first, until it is over."""
        feed = self._feeds.get(job)
        if feed is None:
            feed = self._feeds[job] = Feed(self._service, job)
        return feed.follow()


class Feed:
    """The events of a job, as text that is sent to each who follows it.

    Args:
      service: The job's.
      job: Its id.
    """

    def __init__(self, service: Service, job: str):
        self._service, self._job = service, job
        self._texts: list[str] = []
        self._last = 0  # number of the last event that was read
        self._is_over = False
        self._looking, self._looked = asyncio.Lock(), -math.inf

    async def follow(self) -> AsyncIterator[str]:
        """Yields all events there are, and then those that happen."""
        sent, spoken = 0, time.monotonic()
        while True:
            await self._look()
            while texts := self._texts[sent : sent + _AT_ONCE]:
                yield "".join(texts)
                sent, spoken = sent + len(texts), time.monotonic()
            if self._is_over:
                yield "data: [DONE]\n\n"
                return
            if time.monotonic() - spoken > _SILENCE:
                spoken = time.monotonic()
                yield ": waiting\n\n"
            await asyncio.sleep(_EVERY)

    async def _look(self) -> None:
        """Reads what has happened, unless another follower has just done so."""
        async with self._looking:
            if self._is_over or time.monotonic() - self._looked < _EVERY:
                return
            rows, status = await in_thread(self._news)
            self._looked = time.monotonic()
            for row in rows:
                data = json.dumps(event_object(row))
                self._texts.append(f"event: {row['type']}\ndata: {data}\n\n")
                self._last = row["number"]
            self._is_over = status not in ACTIVE

    def _news(self) -> tuple[list[Row], str]:
        jobs, events = schema.jobs, schema.events
        with self._service.database.read() as connection:
            status = connection.execute(sa.select(jobs.c.status).where(jobs.c.id == self._job))
            query = sa.select(events).where(
                events.c.job_id == self._job, events.c.number > self._last
            )
            found = connection.execute(query.order_by(events.c.number)).mappings().all()
            return [dict(row) for row in found], status.scalar_one()
