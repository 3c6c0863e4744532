"""Checks of jobs, and of files before a job is made of them, in processes beside the worker."""

import logging
import os
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from jaxft.errors import JaxftError
from jaxft.files import write_json
from jaxft.formatting import counted, format_duration
from jaxft.service.checker import FAILED, Checkers
from jaxft.service.errors import ApiError
from jaxft.service.history import add_event
from jaxft.service.models import find_served
from jaxft.service.progress import fail
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import Row, change, now, one
from jaxft.service.target import Target, find_target

log = logging.getLogger("jaxft.service")

_START_SECONDS = 60  # of a run, beside its steps: loading and compiling, roughly
_PREVIEW_SECONDS = 3600
_AT_ONCE = 4  # checks; each takes a core and half a gigabyte


class Checks:
    """Checks that are under way.

    Args:
      service: Whose jobs are checked.
    """

    def __init__(self, service: Service):
        self._service, self._settings = service, service.settings
        most = min(_AT_ONCE, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix="check")
        self._under_way: dict[str, Future[dict[str, Any]]] = {}
        self._previews: set[str] = set()
        self._found: Target | None = None
        self._finding = threading.Lock()
        self._checkers = Checkers(lambda: self.target)

    @property
    def target(self) -> Target:
        """The devices of a job, looked at once."""
        with self._finding:
            if self._found is None:
                sets = self._settings.device_sets
                cache = self._settings.workdir / "devices.json"
                topology = self._settings.topology
                self._found = find_target(cache, topology, sets[0] if sets else "")
            return self._found

    def close(self) -> None:
        """Ends the checks that are under way; they are made again later."""
        self._checkers.close()
        self._pool.shutdown(cancel_futures=True)

    def advance(self, row: Row) -> None:
        """Begins the check of a job, or takes its result."""
        future = self._under_way.get(row["id"])
        if future is None:
            try:
                request = self._request(row)
            except ApiError as error:
                fail(self._service, row, error.message, code="invalid_file", param=error.param)
                return
            self._under_way[row["id"]] = self._pool.submit(self._ask, row["id"], request)
        elif future.done():
            del self._under_way[row["id"]]
            self._take_result(row, future.result())

    def drop_all_but(self, jobs: Collection[str]) -> None:
        """Ends the checks of jobs that are checked no more, such as cancelled ones."""
        for number, future in list(self._under_way.items()):
            if number in self._previews or number in jobs:
                continue
            if not future.cancel():
                self._checkers.give_up(number)
            del self._under_way[number]

    def _ask(self, number: str, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkers.check(number, request)
        except JaxftError as error:  # there are no devices
            return {"error": {"code": "no_devices", "message": str(error), "param": None}}
        except Exception:
            log.exception("a check failed")
            return {"error": {"code": "check_failed", "message": FAILED, "param": None}}

    def _request(self, row: Row, *, shown: bool = False) -> dict[str, Any]:
        """Returns what `checking.check` is asked; raises ApiError for what is there no more."""
        with self._service.database.read() as connection:
            model = find_served(self._service, connection, row["model"])
            training = self._file(connection, row["training_file"], "training_file")
            validation = self._file(connection, row["validation_file"], "validation_file")
        wandb = [item["wandb"]["project"] for item in row["integrations"]]
        return {
            "path": model.path,
            "step": model.step,
            "method": row["method"],
            "asked": row["asked"],
            "seed": row["seed"],
            "training": training[0],
            "training_name": training[1],
            "validation": validation[0],
            "validation_name": validation[1],
            "workdir": str(self._settings.run(row["id"])),
            "cache": str(self._settings.cache(row["training_file"], row["validation_file"])),
            "wandb": wandb[0] if wandb else "",
            "name": row.get("tuned_name", ""),  # a preview has none
            "shown": shown,
        }

    def _file(self, connection: sa.Connection, number: str | None, param: str) -> tuple[str, str]:
        """Returns where a file is and what its user calls it."""
        if not number:
            return "", ""
        file = one(connection, schema.files, id=number)
        if file is None:
            raise ApiError(f"The file {number} was deleted, or has expired.", param=param)
        return str(self._service.files.path(number)), file["filename"]

    def _take_result(self, row: Row, result: dict[str, Any]) -> None:
        if error := result.get("error"):
            fail(self._service, row, error["message"], code=error["code"], param=error["param"])
            return
        self._settings.run(row["id"]).mkdir(parents=True, exist_ok=True)
        write_json(self._settings.config(row["id"]), result["config"])
        seconds = result["step_seconds"] * result["steps"]
        with self._service.database.write() as connection:
            if change(
                connection,
                schema.jobs,
                {"id": row["id"], "status": "validating_files"},
                status="queued",
                hyperparameters=result["hyperparameters"],
                steps=result["steps"],
                epoch_steps=result["epoch_steps"],
                estimated_finish=round(now() + seconds + _START_SECONDS) if seconds else None,
            ):
                add_event(connection, row["id"], _describe(result, seconds))
                if lost := _describe_losses(result):
                    add_event(connection, row["id"], lost, level="warn")
                add_event(connection, row["id"], "Job is queued")

    def look_at_previews(self) -> None:
        """Begins the checks that a page has asked for, or takes their results."""
        table = schema.previews
        with self._service.database.read() as connection:
            query = sa.select(table).where(table.c.status == "waiting").order_by(table.c.number)
            rows = [dict(row) for row in connection.execute(query).mappings()]
        self._previews = {row["id"] for row in rows}
        for row in rows:
            future = self._under_way.get(row["id"])
            if future is None:
                try:
                    request = self._request(row["request"] | {"id": row["id"]}, shown=True)
                except ApiError as error:
                    self._answer(row, error.body())
                    continue
                self._under_way[row["id"]] = self._pool.submit(self._ask, row["id"], request)
            elif future.done():
                del self._under_way[row["id"]]
                self._answer(row, future.result())

    def _answer(self, row: Row, result: dict[str, Any]) -> None:
        result.pop("config", None)  # it names folders of the server
        if error := result.get("error"):
            error["message"] = self._settings.without_workdir(error["message"])
        with self._service.database.write() as connection:
            change(connection, schema.previews, {"id": row["id"]}, status="done", result=result)

    def drop_previews(self) -> None:
        """Deletes those that are old."""
        table = schema.previews
        with self._service.database.write() as connection:
            old = table.c.created_at < now() - _PREVIEW_SECONDS
            connection.execute(sa.delete(table).where(old))


def _describe_losses(result: dict[str, Any]) -> str:
    """Says which examples are not trained on; empty if all are."""
    parts = []
    if result["left_out"]:
        parts.append(
            f"{result['left_out']:,} of {result['examples']:,} examples are left out: they are too "
            "long, or have nothing to train"
        )
    if result["bad_rows"]:
        parts.append(f"{counted(result['bad_rows'], 'bad row')} of the file are left out")
    return "; ".join(parts)


def _describe(result: dict[str, Any], seconds: float) -> str:
    length = f", about {format_duration(seconds)}" if seconds else ""
    return (
        f"Files validated: {result['examples']:,} examples, {result['tokens']:,} tokens in "
        f"{counted(result['rows'], 'row')}, {counted(result['steps'], 'step')}{length}. Training "
        f"takes {result['takes']}"
    )
