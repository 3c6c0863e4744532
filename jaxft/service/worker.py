"""The worker: checks jobs, hands them to the executor, and follows their runs to the end.

`python -m jaxft.service.worker --settings=FILE`. Everything that it knows is in the database, each
step of a job is one transaction, and nothing is done that it could not do again: killed at any
moment, the next worker goes on.
"""

import argparse
import contextlib
import fcntl
import logging
import math
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from jaxft.service.checks import Checks
from jaxft.service.executors import Executor, ExecutorError, Launch, State, make_executor
from jaxft.service.files import drop_expired
from jaxft.service.following import RunFolder
from jaxft.service.history import OPEN, STARTED, add_event
from jaxft.service.progress import fail, finish, take_progress
from jaxft.service.settings import Settings
from jaxft.service.space import free_space
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import Row, change, now, one
from jaxft.service.webhooks import Webhooks

_TICK = 0.5
_LEASE = 30  # seconds after which another worker takes the jobs of one that is silent
_SWEEP = 300.0
_REPEAT = 60.0  # seconds until a warning that still holds is logged again
_REFUSED = 15.0  # seconds until an executor that did not take a job is asked again

log = logging.getLogger("jaxft.service")


class Worker:
    """Does what the jobs of a service need next.

    Args:
      settings: The service's.
      executor: Runs jobs; as the settings say if absent.
    """

    def __init__(self, settings: Settings, *, executor: Executor | None = None):
        self._settings = settings
        self._service = Service.open(settings)
        self._executor = executor or make_executor(settings)
        self._webhooks = Webhooks(self._service)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._checks = Checks(self._service)
        self._swept = 0.0
        self._warned: dict[str, float] = {}  # when a text was logged last
        self._refused: dict[str, float] = {}  # when a job was not taken by the executor

    def run(self, stop: threading.Event) -> None:
        """Works until it is asked to stop; runs go on without it."""
        with _alone(self._settings.workdir, stop):
            if not stop.is_set():
                self._release_all()
            while not stop.is_set():
                try:
                    self.tick()
                except SQLAlchemyError:
                    log.exception("the database does not answer; asking again")
                    stop.wait(10 * _TICK)
                stop.wait(_TICK)
            self.close()

    def close(self) -> None:
        """Ends the check that is under way, and lets others take the jobs."""
        self._checks.close()
        self._webhooks.close()
        self._release_all()
        self._service.database.close()

    def tick(self) -> None:
        """Looks at each job once."""
        rows = self._take()
        self._checks.drop_all_but({r["id"] for r in rows if r["status"] == "validating_files"})
        for row in rows:
            try:
                self._advance(row)
            except ExecutorError as error:
                self._warn(f"{row['id']}: {error}")
            except OperationalError:  # the database does not answer
                raise
            except Exception:
                # One job must not keep the others waiting.
                self._warn(f"{row['id']} cannot go on: {traceback.format_exc()}")
                text = "The server failed on this job; its log has more."
                fail(self._service, row, text, code="server_error", ended=False)
        self._checks.look_at_previews()
        self._webhooks.deliver()
        if time.monotonic() - self._swept > _SWEEP:
            self._swept = time.monotonic()
            drop_expired(self._service)
            free_space(self._service)
            self._checks.drop_previews()

    def _warn(self, text: str) -> None:
        """Logs a text once in a while, however often it holds."""
        time_ = time.monotonic()
        self._warned = {one: at for one, at in self._warned.items() if time_ - at < _REPEAT}
        if text not in self._warned:
            self._warned[text] = time_
            log.warning("%s", text)

    # Which jobs are this worker's.

    def _take(self) -> list[Row]:
        """Takes all jobs that there is something to do for, and that no other worker has."""
        jobs, time_ = schema.jobs, now()
        open_ = sa.or_(
            jobs.c.status.in_(OPEN),
            # Of a job that is over or paused, whose run has to end.
            jobs.c.handle.is_not(None),
            jobs.c.devices.is_not(None),  # noted before a run is submitted
        )
        free = sa.or_(
            jobs.c.taken_by.is_(None), jobs.c.taken_by == self._name, jobs.c.taken_until < time_
        )
        query = sa.select(jobs).where(open_, free).order_by(jobs.c.number)
        with self._service.database.read() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        if not any(self._is_to_take(row, time_) for row in rows):
            return rows
        if not self._service.database.is_sqlite:
            query = query.with_for_update(skip_locked=True)
        with self._service.database.write() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
            old = [row for row in rows if self._is_to_take(row, time_)]
            if old:
                change(
                    connection,
                    jobs,
                    {"id": tuple(row["id"] for row in old)},
                    taken_by=self._name,
                    taken_until=time_ + _LEASE,
                )
        return rows

    def _is_to_take(self, row: Row, time_: int) -> bool:
        """Returns whether a job is not this worker's, or will soon be anyone's again."""
        return row["taken_by"] != self._name or row["taken_until"] - time_ < _LEASE / 2

    def _release_all(self) -> None:
        """Gives up what this worker, or one before it on this machine, has taken."""
        host = self._name.partition(":")[0]
        jobs = schema.jobs
        with self._service.database.write() as connection:
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.taken_by.startswith(f"{host}:", autoescape=True))
                .values(taken_by=None, taken_until=None)
            )

    # What a job needs next.

    def _advance(self, row: Row) -> None:
        status, handle = row["status"], row["handle"]
        if status == "validating_files":
            self._checks.advance(row)
        elif status == "queued" and handle is None:
            self._submit(row)
        elif status in STARTED:
            self._follow(row)
        else:
            self._end(row)

    def _submit(self, row: Row) -> None:
        if time.monotonic() - self._refused.get(row["id"], -math.inf) < _REFUSED:
            return
        devices = self._free_devices(row)
        if devices is None:
            return
        launch = self._launch({**row, "devices": devices})
        handle = self._executor.find(launch)
        if handle is None:
            # Noted before it is done: what was submitted and not noted is found by this name.
            if not self._note(row, status="queued", devices=devices):
                return  # cancelled or paused meanwhile
            # That of an earlier start must not pass for the end of this one.
            RunFolder(self._settings.run(row["id"])).forget_result()
            try:
                handle = self._executor.submit(launch)
            except ExecutorError:
                self._refused[row["id"]] = time.monotonic()
                raise
            self._refused.pop(row["id"], None)
        self._note(row, handle=handle, devices=devices)

    def _note(self, row: Row, *, status: str = "", **values: Any) -> bool:
        """Changes columns of a job, if it has the status; returns whether it had."""
        where = {"id": row["id"]} | ({"status": status} if status else {})
        with self._service.database.write() as connection:
            return change(connection, schema.jobs, where, **values)

    def _launch(self, row: Row) -> Launch:
        return Launch(
            job=row["id"],
            attempt=row["attempt"],
            config=self._settings.config(row["id"]),
            log=self._settings.log(row["id"]),
            devices=row["devices"] or "",
            platform=self._checks.target.platform,
        )

    def _free_devices(self, row: Row) -> str | None:
        """Returns devices that no other job has, or '' for what a scheduler chooses.

        Jobs are begun in the order in which they came.
        """
        if row["devices"] is not None:  # of a worker that died as it submitted the run
            return row["devices"]
        jobs = schema.jobs
        with self._service.database.read() as connection:
            used = list(
                connection.execute(
                    sa.select(jobs.c.devices).where(
                        jobs.c.devices.is_not(None), jobs.c.id != row["id"]
                    )
                ).scalars()
            )
            earlier = connection.execute(
                sa.select(sa.func.count()).where(
                    jobs.c.status == "queued",
                    jobs.c.handle.is_(None),
                    jobs.c.number < row["number"],
                )
            ).scalar_one()
        if self._settings.executor != "local":
            return "" if len(used) < self._settings.most_jobs else None
        sets = self._settings.device_sets or ("",)
        free = [item for item in sets if item not in used]
        return free[0] if len(free) > earlier else None

    def _follow(self, row: Row) -> None:
        """Takes in what a run has written since the last look, and its end."""
        state = self._executor.state(row["handle"])
        # Read after its state: what a run that has ended wrote last is not missed.
        take_progress(self._service, row, runs=state is State.RUNNING)
        if state is State.ENDED:
            with self._service.database.read() as connection:
                fresh = one(connection, schema.jobs, id=row["id"])
            if fresh is not None and fresh["status"] in STARTED:
                finish(self._service, fresh)

    def _end(self, row: Row) -> None:
        """Stops the run of a job that is over or paused; its devices are free then."""
        # A worker that died may have submitted a run whose handle it did not note.
        handle = row["handle"] or self._executor.find(self._launch(row))
        if handle is not None and self._executor.state(handle) is not State.ENDED:
            self._executor.stop(handle)
            return
        if row["status"] == "paused":
            self._take_last_words(row)
        self._note(row, handle=None, devices=None, attempt=row["attempt"] + 1)

    def _take_last_words(self, row: Row) -> None:
        """Notes the step that a paused run has saved."""
        result = RunFolder(self._settings.run(row["id"])).result()
        if result is not None and result["step"]:
            with self._service.database.write() as connection:
                one(connection, schema.jobs, locks=True, id=row["id"])  # events keep their order
                add_event(connection, row["id"], f"Step {result['step']} is saved")


@contextlib.contextmanager
def _alone(workdir: Path, stop: threading.Event) -> Iterator[None]:
    """Waits until no other worker of this machine works for the service, or `stop` is set."""
    with (workdir / "worker.lock").open("w") as file:
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.wait(_TICK)
        yield


def _stop_with_parent(parent: int, stop: threading.Event) -> None:
    """Sets `stop` once the server is no more: the next one starts a worker of its own."""
    while os.getppid() == parent and not stop.wait(_TICK):
        pass
    stop.set()


def main() -> None:
    """Works until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id of the server")
    options = parser.parse_args()
    settings = Settings.read(options.settings)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    watch = threading.Thread(target=_stop_with_parent, args=(options.parent, stop), daemon=True)
    watch.start()
    Worker(settings).run(stop)


if __name__ == "__main__":
    main()
