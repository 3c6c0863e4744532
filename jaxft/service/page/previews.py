"""Looks at data before a job is made of it: the worker checks it as it would check the job."""

from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.service.bodies import JobCreate, read_body
from jaxft.service.errors import ApiError, not_found
from jaxft.service.ids import new_id
from jaxft.service.jobs import read_request
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row, add, now, one

_MOST_WAITING = 20


async def create_preview(request: Request) -> Response:
    """Asks for a look at the data of a job; the body is that of the job."""
    body = await read_body(request, JobCreate)
    return JSONResponse(_object(await in_thread(_create, service_of(request), body)))


def _create(service: Service, body: JobCreate) -> Row:
    table = schema.previews
    with service.database.write() as connection:
        asked = read_request(service, connection, body)
        waiting = sa.select(sa.func.count()).where(table.c.status == "waiting")
        if connection.execute(waiting).scalar_one() >= _MOST_WAITING:
            raise ApiError(
                f"{_MOST_WAITING} looks at data are waiting already; ask again in a minute.",
                status=429,
                code="rate_limit_exceeded",
            )
        return add(
            connection,
            table,
            id=new_id("preview-"),
            created_at=now(),
            status="waiting",
            request={**asked, "seed": body.seed or 0},
            result=None,
        )


async def retrieve_preview(request: Request) -> Response:
    """Says what was found, or that it is still looked for."""
    service, number = service_of(request), request.path_params["preview"]

    def find() -> Row:
        with service.database.read() as connection:
            row = one(connection, schema.previews, id=number)
        if row is None:
            raise not_found("preview", number)
        return row

    return JSONResponse(_object(await in_thread(find)))


def _object(row: Row) -> dict[str, Any]:
    names = ("id", "created_at", "status", "result")
    return {"object": "jaxft.preview", **{name: row[name] for name in names}}
