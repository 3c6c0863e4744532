"""Events of jobs and deliveries, noted in the transaction in which they happen."""

from typing import Any

import sqlalchemy as sa

from jaxft.service.ids import new_id
from jaxft.service.store import schema
from jaxft.service.store.database import add, now

STARTED = ("queued", "running")
"""Statuses of jobs that have passed their check, and that a run is of or will be."""

OPEN = ("validating_files", *STARTED)
"""Statuses of jobs that the worker takes further."""

ACTIVE = (*OPEN, "paused")
"""Statuses of jobs that are not over."""


def add_event(
    connection: sa.Connection,
    job: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Notes an event of a job; one with `data` has figures."""
    add(
        connection,
        schema.events,
        id=new_id("ftevent-"),
        job_id=job,
        created_at=now(),
        level=level,
        message=message,
        type="message" if data is None else "metrics",
        data=data,
    )


def add_delivery(connection: sa.Connection, job: str, status: str) -> None:
    """Notes that webhooks are to be told of the end of a job."""
    time, number = now(), new_id("evt_")
    body = {
        "id": number,
        "object": "event",
        "created_at": time,
        "type": f"fine_tuning.job.{status}",
        "data": {"id": job},
    }
    add(
        connection,
        schema.deliveries,
        id=number,
        created_at=time,
        body=body,
        attempts=0,
        next_at=time,
        done_at=None,
    )
