"""The form of the call that the first scripts have: /v1/fine-tunes."""

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxft.service.bodies import Hyperparameters, JobCreate, OldestCreate, read_body
from jaxft.service.errors import ApiError, not_found
from jaxft.service.jobs import cancel, make_job
from jaxft.service.objects import oldest_object
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row


async def create(request: Request) -> Response:
    """Takes a job."""
    service, body = service_of(request), await read_body(request, OldestCreate)
    asked = {
        name: value
        for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
        if (value := getattr(body, name)) is not None
    }
    wanted = JobCreate(
        model=body.model or _only_model(service),
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        hyperparameters=Hyperparameters(**asked),
    )
    row = await in_thread(make_job, service, wanted, legacy=True)
    return JSONResponse(await in_thread(_described, service, row["id"]))


def _only_model(service: Service) -> str:
    """Returns the model of a request that names none."""
    names = list(service.settings.models)
    if len(names) > 1:
        raise ApiError(f"model is missing; there are {', '.join(names)}.", param="model")
    return names[0]


async def list_all(request: Request) -> Response:
    """Lists all jobs of this form, as it was: without pages."""
    service, jobs = service_of(request), schema.jobs

    def find() -> list[str]:
        with service.database.read() as connection:
            query = sa.select(jobs.c.id).where(jobs.c.legacy.is_(True)).order_by(jobs.c.number)
            return list(connection.execute(query).scalars())

    numbers = await in_thread(find)
    data = [await in_thread(_described, service, number) for number in numbers]
    return JSONResponse({"object": "list", "data": data})


async def retrieve(request: Request) -> Response:
    """Describes a job."""
    return JSONResponse(
        await in_thread(_described, service_of(request), request.path_params["job"])
    )


async def cancel_one(request: Request) -> Response:
    """Cancels a job."""
    service, number = service_of(request), request.path_params["job"]
    await in_thread(_described, service, number)
    await in_thread(cancel, service, number)
    return JSONResponse(await in_thread(_described, service, number))


async def list_events(request: Request) -> Response:
    """Lists the events of a job."""
    found = await in_thread(_described, service_of(request), request.path_params["job"])
    return JSONResponse({"object": "list", "data": found["events"]})


def _described(service: Service, number: str) -> dict:
    jobs, events, files = schema.jobs, schema.events, schema.files
    with service.database.read() as connection:
        query = sa.select(jobs).where(jobs.c.id == number, jobs.c.legacy.is_(True))
        row = connection.execute(query).mappings().first()
        if row is None:
            raise not_found("fine-tune", number)
        query = sa.select(events).where(events.c.job_id == number, events.c.type == "message")
        found = [dict(e) for e in connection.execute(query.order_by(events.c.number)).mappings()]
        names = [row["training_file"], row["validation_file"], *row["result_files"]]
        query = sa.select(files).where(files.c.id.in_([name for name in names if name]))
        known: dict[str, Row] = {f["id"]: dict(f) for f in connection.execute(query).mappings()}
    return oldest_object(dict(row), service.settings.organization_id, known, found)


ROUTES = [
    Route("/fine-tunes", create, methods=["POST"]),
    Route("/fine-tunes", list_all),
    Route("/fine-tunes/{job}", retrieve),
    Route("/fine-tunes/{job}/cancel", cancel_one, methods=["POST"]),
    Route("/fine-tunes/{job}/events", list_events),
]
