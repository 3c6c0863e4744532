"""Models by name: /v1/models, and what a name stands for."""

import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxft.errors import nearest
from jaxft.service.answers import reused
from jaxft.service.errors import ApiError
from jaxft.service.history import ACTIVE
from jaxft.service.objects import checkpoint_model, model_object
from jaxft.service.paging import listed
from jaxft.service.settings import Settings
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row, one, remove

_OWNER = "jaxft"


@dataclass(frozen=True, slots=True)
class Served:
    """A model that can be used.

    Attributes:
      name: The name that clients use.
      path: Folder or repository id of a model, or workdir of a run, as `jaxft.load` takes it.
      step: Checkpoint of a run.
      created: Time in seconds since 1970.
      owner: The words for who made it.
    """

    name: str
    path: str
    step: str = "best"
    created: int = 0
    owner: str = _OWNER


class Models:
    """Finds models by name: base models of the settings, tuned ones of the database."""

    def __init__(self, service: Service):
        self._service = service

    async def find(self, name: str) -> Served:
        """Returns a model; raises ApiError if there is none of that name."""
        return await in_thread(self._find, name)

    def _find(self, name: str) -> Served:
        with self._service.database.read() as connection:
            return find_served(self._service, connection, name)


def find_served(service: Service, connection: sa.Connection, name: str) -> Served:
    """Returns the model of a name.

    Raises:
      ApiError: If there is none.
    """
    if name in service.settings.models:
        return Served(name, service.settings.models[name])
    row = one(connection, schema.models, name=name)
    if row is None:
        known = [*service.settings.models, *connection.execute(sa.select(schema.models.c.name))]
        hint = nearest(name, [item if isinstance(item, str) else item[0] for item in known])
        bases = list(service.settings.models)
        some = ", ".join(bases[:5]) + (" and others" if len(bases) > 5 else "")
        raise ApiError(
            f"The model {name!r} does not exist.{hint} Base models here are {some}; "
            "client.models.list() has all.",
            status=404,
            param="model",
            code="model_not_found",
        )
    path = str(service.settings.run(row["job_id"]))
    owner = service.settings.organization_id
    return Served(name, path, str(row["step"]), row["created_at"], owner)


def find_tuned(service: Service, connection: sa.Connection, name: str) -> Row:
    """Returns the row of a tuned model; raises ApiError if there is none of that name."""
    served = find_served(service, connection, name)
    row = one(connection, schema.models, name=served.name)
    if row is None:
        raise ApiError(f"{name} is a base model, not a tuned one.", param="model")
    return row


def all_tuned(service: Service) -> list[Row]:
    """Returns the rows of all tuned models, the newest first."""
    table = schema.models
    with service.database.read() as connection:
        query = sa.select(table).order_by(table.c.number.desc())
        return [dict(row) for row in connection.execute(query).mappings()]


async def list_models(request: Request) -> Response:
    """Lists base models and tuned ones, the newest first."""
    service = service_of(request)
    tuned = [
        model_object(row["name"], row["created_at"], service.settings.organization_id)
        for row in await in_thread(all_tuned, service)
    ]
    bases = [model_object(name, 0, _OWNER) for name in service.settings.models]
    return JSONResponse(listed([*tuned, *bases], has_more=False))


async def retrieve_model(request: Request) -> Response:
    """Describes a model."""
    models: Models = request.app.state.models
    found = await models.find(request.path_params["model"])
    return JSONResponse(model_object(found.name, found.created, found.owner))


async def delete_model(request: Request) -> Response:
    """Deletes a tuned model; with that of a job's end go its checkpoints and their disk space."""
    service, name = service_of(request), request.path_params["model"]
    if name in service.settings.models:
        raise ApiError(
            f"{name} is a base model of this server, which only its owner removes.",
            status=403,
            param="model",
        )
    await in_thread(_delete, service, name)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


def _delete(service: Service, name: str) -> None:
    with service.database.write() as connection:
        row = find_tuned(service, connection, name)
        own = one(connection, schema.jobs, locks=True, id=row["job_id"])
        assert own is not None
        whole = name == own["tuned_name"]
        forget_models(connection, own, names_of(connection, own["id"]) if whole else [name])
        kept = steps_of(connection, own["id"])
    remove_steps(service.settings, own["id"], kept=kept)


def names_of(connection: sa.Connection, job: str) -> list[str]:
    """Returns the names of the models that a job has made."""
    query = sa.select(schema.models.c.name).where(schema.models.c.job_id == job)
    return list(connection.execute(query).scalars())


def steps_of(connection: sa.Connection, job: str) -> set[int]:
    """Returns the steps that the models of a job are of."""
    query = sa.select(schema.models.c.step).where(schema.models.c.job_id == job)
    return set(connection.execute(query).scalars())


def forget_models(connection: sa.Connection, own: Row, names: list[str]) -> None:
    """Deletes models of a job, and what lists them as checkpoints.

    Raises:
      ApiError: If something needs them.
    """
    _refuse_if_needed(connection, own, names)
    checkpoints = schema.checkpoints
    query = sa.select(checkpoints.c.step).where(checkpoints.c.job_id == own["id"])
    for step in list(connection.execute(query).scalars()):
        if checkpoint_model(own["tuned_name"], step) in names:
            remove(connection, checkpoints, job_id=own["id"], step=step)
    remove(connection, schema.models, name=tuple(names))


def remove_steps(settings: Settings, job: str, *, kept: Container[int]) -> None:
    """Deletes the checkpoints and exports of a job, whose run has ended, but for some steps."""
    for folder in (settings.run(job) / "checkpoints", settings.exports(job)):
        for path in folder.glob("*"):
            # One that was not completed has more in its name than the step.
            if (step := path.name.partition(".")[0]).isdecimal() and int(step) not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _refuse_if_needed(connection: sa.Connection, own: Row, names: list[str]) -> None:
    """Raises ApiError if a job is under way, or other jobs need models of it.

    Args:
      connection: To the database.
      own: The job that made the models.
      names: Those that are to be deleted.
    """
    models, jobs = schema.models, schema.jobs
    if own["status"] in ACTIVE:
        raise ApiError(f"{own['id']} is not over: cancel it first.", code="model_in_use")
    # An adapter of a model that was trained whole is nothing without it, and neither is what goes
    # on from that adapter.
    is_base = own["hyperparameters"].get("lora_rank") == 0
    for user in _begun_with(connection, jobs.c.model.in_(names), onward=is_base):
        job = user["id"]
        has_models = sa.select(models.c.name).where(models.c.job_id == job).limit(1)
        if user["status"] in ACTIVE:
            raise ApiError(f"The model is needed by {job}, which is not over.", code="model_in_use")
        if is_base and connection.execute(has_models).first() is not None:
            raise ApiError(
                f"The model of {job} was tuned from it and is nothing without it: delete that "
                "model first.",
                code="model_in_use",
            )


def _begun_with(
    connection: sa.Connection, chosen: sa.ColumnElement[bool], *, onward: bool
) -> Iterator[Row]:
    """Yields jobs by the models that they began with.

    Args:
      connection: To the database.
      chosen: Condition of the first ones.
      onward: Whether jobs that began with models of these follow, and so on; of those that are
        deleted too.
    """
    jobs = schema.jobs
    for row in connection.execute(sa.select(jobs).where(chosen)).mappings().all():
        yield dict(row)
        if onward:
            name = row["tuned_name"]
            theirs = jobs.c.model.startswith(f"{name}:", autoescape=True)
            yield from _begun_with(connection, sa.or_(jobs.c.model == name, theirs), onward=onward)


ROUTES = [
    Route("/models", reused(list_models)),
    Route("/models/{model:path}", reused(retrieve_model)),
    Route("/models/{model:path}", delete_model, methods=["DELETE"]),
]
