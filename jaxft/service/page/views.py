"""Jobs and models as the page shows them: with progress, charts and reports."""

import functools
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.reporting.charts import Plot, plot
from jaxft.reporting.curves import make_charts
from jaxft.reporting.figures import PRIMARY, Run
from jaxft.service.errors import ApiError
from jaxft.service.following import RunFolder
from jaxft.service.jobs import find_job
from jaxft.service.models import all_tuned
from jaxft.service.objects import job_object
from jaxft.service.page.exports import forms_of
from jaxft.service.page.links import Links
from jaxft.service.paging import find_page, listed, page_of
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row

_MOST = 200


async def list_jobs(request: Request) -> Response:
    """Lists jobs with how far they are, those of the oldest form of the call too."""
    service = service_of(request)
    page = page_of(request.query_params, limit=20, most=_MOST)

    def find() -> tuple[list[dict[str, Any]], bool]:
        with service.database.read() as connection:
            rows, has_more = find_page(connection, schema.jobs, page)
            return _shown(service, connection, rows), has_more

    return JSONResponse(listed(*await in_thread(find)))


async def retrieve_job(request: Request) -> Response:
    """Describes a job with how far it is, the forms of its model, and whether it has a report."""
    service, number = service_of(request), request.path_params["job"]

    def find() -> dict[str, Any]:
        with service.database.read() as connection:
            [shown] = _shown(service, connection, [find_job(connection, number)])
        report = service.settings.run(number) / "report.html"
        return {**shown, "forms": forms_of(service, number), "has_report": report.is_file()}

    return JSONResponse(await in_thread(find))


def _shown(service: Service, connection: sa.Connection, rows: list[Row]) -> list[dict[str, Any]]:
    """Returns jobs with the names of their files, which may be deleted by now."""
    files = schema.files
    numbers = {row[name] for row in rows for name in ("training_file", "validation_file")}
    query = sa.select(files.c.id, files.c.filename).where(files.c.id.in_(numbers))
    names = {row.id: row.filename for row in connection.execute(query)}
    return [
        {
            **job_object(row, service.settings.organization_id),
            "method": row["method"],
            "started_at": row["started_at"],
            "step": row["seen_step"],
            "steps": row["steps"],
            "training_name": names.get(row["training_file"]),
            "validation_name": names.get(row["validation_file"]),
        }
        for row in rows
    ]


async def list_charts(request: Request) -> Response:
    """Draws the figures of a job as its report does, as far as it is."""
    service, number = service_of(request), request.path_params["job"]

    def draw() -> list[dict[str, Any]]:
        with service.database.read() as connection:
            row = find_job(connection, number)
        run = service.settings.run(number)
        sizes = tuple(_size(run / name) for name in ("metrics.jsonl", "eval.jsonl"))
        return _charts(run, row["method"], sizes)

    return JSONResponse({"object": "list", "data": await in_thread(draw)})


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@functools.lru_cache(maxsize=32)
def _charts(path: Path, method: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns the charts of a run, drawn once for as many as look at it.

    Args:
      path: Folder of the run.
      method: Method of its job.
      sizes: Bytes of the files of its figures, to which lines are added.
    """
    folder = RunFolder(path)
    evaluations = folder.evaluations()
    run = Run(
        metrics=folder.metrics(),
        evaluations={PRIMARY: evaluations} if evaluations else {},
        units="pairs" if method == "dpo" else "documents",
        is_sft=method != "dpo",
    )
    return [_chart(plot(chart)) for chart in make_charts(run)]


def _chart(drawn: Plot) -> dict[str, Any]:
    """Returns what templates/charts.html draws, for a script to draw."""
    mark = drawn.mark
    return {
        "title": drawn.title,
        "note": drawn.note,
        "wide": drawn.wide,
        "series": [
            {"name": item.name, "style": item.style, "color": item.color} for item in drawn.series
        ],
        "grid": drawn.grid,
        "up": [{"at": tick.at, "text": tick.text} for tick in drawn.up],
        "across": [{"at": tick.at, "text": tick.text} for tick in drawn.across],
        "shapes": [{"classes": shape.classes, "path": shape.path} for shape in drawn.shapes],
        "mark": None if mark is None else {"x": mark.x, "y": mark.y, "text": mark.text},
        "hover": drawn.hover,
    }


async def open_report(request: Request) -> Response:
    """Gives an address for the page that a run has written of itself."""
    service, number = service_of(request), request.path_params["job"]

    def find() -> str:
        with service.database.read() as connection:
            find_job(connection, number)
        report = service.settings.run(number) / "report.html"
        if not report.is_file():
            raise ApiError(f"{number} has no report yet.", status=404, code="not_found")
        links: Links = request.app.state.links
        return links.open(report, "report.html")

    return JSONResponse({"url": await in_thread(find)})


async def list_models(request: Request) -> Response:
    """Lists tuned models with the job, step and base that each is of, newest first; then bases."""
    service = service_of(request)

    def find() -> list[dict[str, Any]]:
        return [*_tuned(service), *({"name": name, "job": None} for name in bases)]

    bases = service.settings.models
    return JSONResponse({"object": "list", "data": await in_thread(find)})


def _tuned(service: Service) -> list[dict[str, Any]]:
    rows, jobs = all_tuned(service), schema.jobs
    with service.database.read() as connection:
        query = sa.select(jobs.c.id, jobs.c.model).where(
            jobs.c.id.in_({row["job_id"] for row in rows})
        )
        bases = {job.id: job.model for job in connection.execute(query)}
    forms = {job: forms_of(service, job) for job in {row["job_id"] for row in rows}}
    return [
        {
            "name": row["name"],
            "job": row["job_id"],
            "step": row["step"],
            "base": bases[row["job_id"]],
            "created_at": row["created_at"],
            "forms": forms[row["job_id"]],
        }
        for row in rows
    ]
