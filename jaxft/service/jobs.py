"""Jobs, their events and checkpoints: /v1/fine_tuning/jobs."""

import secrets
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxft.service.answers import reused
from jaxft.service.bodies import Hyperparameters, JobCreate, read_body
from jaxft.service.errors import ApiError, not_found
from jaxft.service.feeds import Feeds
from jaxft.service.files import find_file
from jaxft.service.history import ACTIVE, STARTED, add_delivery, add_event
from jaxft.service.ids import letters, new_id
from jaxft.service.keys import check_keys
from jaxft.service.models import find_served
from jaxft.service.objects import checkpoint_object, event_object, job_object
from jaxft.service.paging import find_page, listed, page_of, read_page
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row, add, change, now, one

_MOST = 1000


async def create_job(request: Request) -> Response:
    """Takes a job; whether its files and settings are right is checked before it is queued."""
    body = await read_body(request, JobCreate)
    service = service_of(request)
    return _described(service, await in_thread(make_job, service, body))


def _described(service: Service, row: Row) -> Response:
    return JSONResponse(job_object(row, service.settings.organization_id))


def make_job(service: Service, body: JobCreate, *, legacy: bool = False) -> Row:
    """Adds a job.

    Raises:
      ApiError: If it names no model or file that is there, or settings that are not understood.
    """
    time = now()
    with service.database.write() as connection:
        request = read_request(service, connection, body)
        model, organization = request["model"], service.settings.organization
        row = {
            "id": new_id("ft-" if legacy else "ftjob-"),
            "created_at": time,
            "started_at": None,
            "finished_at": None,
            "estimated_finish": None,
            "status": "validating_files",
            **request,
            "tuned_name": f"ft:{_stem(model)}:{organization}:{body.suffix or ''}:{letters(8)}",
            "suffix": body.suffix,
            "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
            "hyperparameters": _shown(request["method"], request["asked"]),
            "metadata": body.metadata or {},
            "trained_tokens": None,
            "error": None,
            "result_files": [],
            "legacy": legacy,
            "attempt": 0,
            "failures": 0,
            "handle": None,
            "devices": None,
            "taken_by": None,
            "taken_until": None,
            "seen_step": 0,
            "seen_evaluation": -1,
            "steps": None,
            "epoch_steps": None,
        }
        add(connection, schema.jobs, **row)
        add_event(connection, row["id"], f"Created fine-tuning job: {row['id']}")
        add_event(connection, row["id"], "Checking the files and whether the job fits")
    return row


def read_request(service: Service, connection: sa.Connection, body: JobCreate) -> Row:
    """Returns what the check of a job is asked, by column.

    Raises:
      ApiError: If it names no model or file that is there, or settings that are not understood.
    """
    method, asked = _asked(body)
    check_keys(asked.config)
    find_served(service, connection, body.model)
    for field in ("training_file", "validation_file"):
        if (number := getattr(body, field)) is None:
            continue
        if find_file(connection, number, param=field)["purpose"] != "fine-tune":
            raise ApiError(
                f"{number} was not uploaded with purpose 'fine-tune'.",
                param=field,
                code="invalid_file_purpose",
            )
    return {
        "model": body.model,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "method": method,
        "asked": asked.model_dump(),
        "integrations": [item.model_dump() for item in body.integrations or []],
    }


def _stem(model: str) -> str:
    """Returns the base in the name of a tuned model; of one that is tuned again, its own base."""
    return model.split(":")[1] if model.startswith("ft:") else model


def _asked(body: JobCreate) -> tuple[str, Hyperparameters]:
    """Returns the method of a job and its settings, in whichever form the request has them."""
    kind = body.method.type if body.method else "supervised"
    if kind == "reinforcement":
        raise ApiError(
            "method.type 'reinforcement' is not supported; there are supervised and dpo.",
            param="method.type",
            code="unsupported_method",
        )
    assert body.method is None or kind in ("supervised", "dpo")
    if body.method is not None:
        other = "dpo" if kind == "supervised" else "supervised"
        for name in (other, "reinforcement"):
            if getattr(body.method, name) is not None:
                raise ApiError(
                    f"method.{name} is set, but method.type is {kind!r}.", param=f"method.{name}"
                )
    tuning = getattr(body.method, kind) if body.method else None
    if tuning is not None and body.hyperparameters is not None:
        raise ApiError(
            f"hyperparameters is set twice: leave it out beside method.{kind}.",
            param="hyperparameters",
        )
    asked = tuning.hyperparameters if tuning else body.hyperparameters or Hyperparameters()
    if kind != "dpo" and asked.beta != "auto":
        raise ApiError("beta is of DPO; set method.type to 'dpo'.", param="hyperparameters.beta")
    return kind, asked


def _shown(method: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that a client sees before they are resolved."""
    names = ["n_epochs", "batch_size", "learning_rate_multiplier", "lora_rank"]
    return {name: asked[name] for name in [*names, *(["beta"] if method == "dpo" else [])]}


async def list_jobs(request: Request) -> Response:
    """Lists jobs; `metadata[key]=value` chooses among them."""
    service, query, table = service_of(request), request.query_params, schema.jobs
    page = page_of(query, limit=20, most=_MOST)
    where: list[Any] = [table.c.legacy.is_(False)]
    if query.get("metadata") == "null":
        where.append(sa.cast(table.c.metadata, sa.Text) == "{}")
    for name, value in query.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            where.append(table.c.metadata[name[9:-1]].as_string() == value)
    rows, has_more = await read_page(service, table, page, *where)
    organization = service.settings.organization_id
    return JSONResponse(listed([job_object(row, organization) for row in rows], has_more))


async def retrieve_job(request: Request) -> Response:
    """Describes a job."""
    return _described(service_of(request), await _found(request))


async def _found(request: Request) -> Row:
    service, number = service_of(request), request.path_params["job"]

    def find() -> Row:
        with service.database.read() as connection:
            return find_job(connection, number)

    return await in_thread(find)


def find_job(connection: sa.Connection, number: str, *, locks: bool = False) -> Row:
    """Returns a job, which `locks` keeps as it is for a transaction; raises ApiError for none."""
    row = one(connection, schema.jobs, locks=locks, id=number)
    if row is None:
        raise not_found("fine-tuning job", number)
    return row


async def cancel_job(request: Request) -> Response:
    """Cancels a job; its run is asked to end."""
    service, number = service_of(request), request.path_params["job"]
    return _described(service, await in_thread(cancel, service, number))


def cancel(service: Service, number: str) -> Row:
    """Cancels a job.

    Raises:
      ApiError: If it is over already.
    """
    with service.database.write() as connection:
        row = find_job(connection, number, locks=True)
        _require(row, ACTIVE, "cancelled")
        return _turn(connection, row, "cancelled", finished_at=now(), estimated_finish=None)


async def pause_job(request: Request) -> Response:
    """Lets a job rest; its run saves and ends."""
    service, number = service_of(request), request.path_params["job"]

    def pause() -> Row:
        with service.database.write() as connection:
            row = find_job(connection, number, locks=True)
            _require(row, STARTED, "paused")
            return _turn(connection, row, "paused", estimated_finish=None)

    return _described(service, await in_thread(pause))


async def resume_job(request: Request) -> Response:
    """Queues a paused job again; it goes on from its checkpoint."""
    service, number = service_of(request), request.path_params["job"]

    def resume() -> Row:
        with service.database.write() as connection:
            row = find_job(connection, number, locks=True)
            _require(row, ("paused",), "resumed")
            return _turn(connection, row, "queued")

    return _described(service, await in_thread(resume))


def _require(row: Row, statuses: tuple[str, ...], wish: str) -> None:
    if row["status"] not in statuses:
        raise ApiError(
            f"The job {row['id']} is {row['status']}, so it cannot be {wish}; expected "
            f"{' or '.join(statuses)}.",
            code="invalid_job_status",
        )


_TURNS = {
    "cancelled": "The job was cancelled",
    "paused": "The job was paused",
    "queued": "The job was resumed",
}


def _turn(connection: sa.Connection, row: Row, status: str, **values: Any) -> Row:
    change(connection, schema.jobs, {"id": row["id"]}, status=status, **values)
    add_event(connection, row["id"], _TURNS[status])
    if status == "cancelled":
        add_delivery(connection, row["id"], status)
    return {**row, "status": status, **values}


async def list_events(request: Request) -> Response:
    """Lists events, or with `stream=true` sends them as they happen, the oldest first."""
    if request.query_params.get("stream") == "true":
        feeds: Feeds = request.app.state.feeds
        events = feeds.follow((await _found(request))["id"])
        return StreamingResponse(events, media_type="text/event-stream")
    _, rows, has_more = await _page_of_job(request, schema.events, limit=20)
    return JSONResponse(listed([event_object(row) for row in rows], has_more))


async def list_checkpoints(request: Request) -> Response:
    """Lists the checkpoints that are kept."""
    job, rows, has_more = await _page_of_job(request, schema.checkpoints, limit=10)
    data = [checkpoint_object(row, job["tuned_name"]) for row in rows]
    return JSONResponse(listed(data, has_more))


async def _page_of_job(
    request: Request, table: sa.Table, *, limit: int
) -> tuple[Row, list[Row], bool]:
    """Returns a job, rows of it in a table as the request asks for, and whether there are more."""
    service, number = service_of(request), request.path_params["job"]
    page = page_of(request.query_params, limit=limit, most=_MOST)

    def find() -> tuple[Row, list[Row], bool]:
        with service.database.read() as connection:
            job = find_job(connection, number)
            return job, *find_page(connection, table, page, table.c.job_id == number)

    return await in_thread(find)


ROUTES = [
    Route("/fine_tuning/jobs", create_job, methods=["POST"]),
    Route("/fine_tuning/jobs", reused(list_jobs)),
    Route("/fine_tuning/jobs/{job}", reused(retrieve_job)),
    Route("/fine_tuning/jobs/{job}/cancel", cancel_job, methods=["POST"]),
    Route("/fine_tuning/jobs/{job}/pause", pause_job, methods=["POST"]),
    Route("/fine_tuning/jobs/{job}/resume", resume_job, methods=["POST"]),
    Route("/fine_tuning/jobs/{job}/events", reused(list_events)),
    Route("/fine_tuning/jobs/{job}/checkpoints", reused(list_checkpoints)),
]
