"""Takes over into the database what runs have done: each look is one transaction."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from jaxft.formatting import counted
from jaxft.service import following
from jaxft.service.files import add_file
from jaxft.service.following import KEPT_EPOCHS, RunFolder
from jaxft.service.history import OPEN, STARTED, add_delivery, add_event
from jaxft.service.ids import new_id
from jaxft.service.objects import checkpoint_model
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import Row, add, change, now, one, remove

# Times that a run may die without a word of its own, and without a step, before its job has failed.
_MOST_FAILURES = 5
_LOG_END = 500  # characters


def take_progress(service: Service, row: Row, *, runs: bool) -> None:
    """Notes the figures and checkpoints that a run has written since the last look.

    Args:
      service: Of the job.
      row: The job.
      runs: Whether the executor says that it runs.
    """
    folder = RunFolder(service.settings.run(row["id"]))
    metrics = folder.metrics(after=row["seen_step"])
    evaluations = folder.evaluations(after=row["seen_evaluation"])
    checkpoints = _ends_of_epochs(row, folder)
    begins = row["status"] == "queued" and (runs or bool(metrics))
    if not (begins or metrics or evaluations or _differ(service, row, checkpoints)):
        return
    steps = row["steps"] or 0
    with service.database.write() as connection:
        fresh = one(connection, schema.jobs, locks=True, id=row["id"])
        if fresh is None or fresh["status"] not in STARTED:
            return
        values: dict[str, Any] = {}
        if begins:
            values |= {"status": "running", "started_at": fresh["started_at"] or now()}
            add_event(connection, row["id"], "Job runs again" if row["attempt"] else "Job started")
        for record, describe in _in_order(metrics, evaluations):
            message, figures = describe(record, steps)
            add_event(connection, row["id"], message, data=figures)
        if metrics:
            last = metrics[-1]
            values |= {"failures": 0, "seen_step": last["step"]}
            values |= {"trained_tokens": last["trained_tokens"]}
            values |= {"estimated_finish": _finish_of(last, steps)}
        if evaluations:
            values["seen_evaluation"] = evaluations[-1]["step"]
        if values:
            change(connection, schema.jobs, {"id": row["id"]}, **values)
        _note_checkpoints(connection, fresh, folder, checkpoints)


def _in_order(metrics: list[Row], evaluations: list[Row]) -> Iterator[tuple[Any, Any]]:
    """Yields records with what describes them, by steps."""
    both = [(record, following.trained) for record in metrics]
    both += [(record, following.evaluated) for record in evaluations]
    return iter(sorted(both, key=lambda pair: pair[0]["step"]))


def _finish_of(record: Row, steps: int) -> int | None:
    """Returns when a run will be done, by the time that its steps took so far."""
    step, seconds = record["step"], record.get("seconds")
    if not step or not seconds or not steps:
        return None
    return round(now() + seconds / step * (steps - step))


def _ends_of_epochs(row: Row, folder: RunFolder) -> list[int]:
    """Returns the steps of checkpoints at the end of an epoch, the last three."""
    epoch, steps = row["epoch_steps"] or 1.0, row["steps"] or 0
    found = [
        step
        for step in folder.checkpoints()
        if step == steps or step == math.ceil(round(step / epoch) * epoch)
    ]
    return found[-KEPT_EPOCHS:]


def _differ(service: Service, row: Row, steps: list[int]) -> bool:
    with service.database.read() as connection:
        return _noted(connection, row) != set(steps)


def _noted(connection: sa.Connection, row: Row) -> set[int]:
    """Returns the steps of the checkpoints that the database knows."""
    table = schema.checkpoints
    query = sa.select(table.c.step).where(table.c.job_id == row["id"])
    return set(connection.execute(query).scalars())


def _note_checkpoints(
    connection: sa.Connection, row: Row, folder: RunFolder, steps: list[int]
) -> None:
    job, known = row["id"], _noted(connection, row)
    for step in known - set(steps):
        remove(connection, schema.checkpoints, job_id=job, step=step)
        remove(connection, schema.models, name=checkpoint_model(row["tuned_name"], step))
    for step in sorted(set(steps) - known):
        name, values = checkpoint_model(row["tuned_name"], step), {"job_id": job, "step": step}
        values["created_at"] = now()
        metrics = following.checkpoint_metrics(folder, step)
        add(connection, schema.checkpoints, id=new_id("ftckpt_"), metrics=metrics, **values)
        add(connection, schema.models, name=name, **values)
        add_event(connection, job, f"Checkpoint created at step {step}: {name}")


def finish(service: Service, row: Row) -> None:
    """Notes the end of a run; one that was killed or stopped is queued again."""
    result = RunFolder(service.settings.run(row["id"])).result()
    if result is None or result["status"] == "stopped":
        _go_on(service, row, result)
    elif result["status"] == "failed":
        message = "\n".join(result["problems"]) or result["reason"]
        fail(service, row, message, code=_code_of(result))
    else:
        _succeed(service, row, result)


def _code_of(result: Row) -> str:
    codes = {"DataError": "invalid_file_format", "OutOfMemoryError": "out_of_memory"}
    return codes.get(result["reason"], "training_failed")


def _go_on(service: Service, row: Row, result: Row | None) -> None:
    failures = row["failures"] + (result is None)
    if failures >= _MOST_FAILURES:
        message = (
            f"The run died {counted(failures, 'time')} in a row without a step. Its log ends: "
            f"{_log_end(service, row)}"
        )
        fail(service, row, message, code="run_died")
        return
    why = "was stopped" if result else "ended before its time"
    with service.database.write() as connection:
        if change(
            connection,
            schema.jobs,
            {"id": row["id"], "status": STARTED},
            status="queued",
            attempt=row["attempt"] + 1,
            failures=failures,
            handle=None,
            devices=None,
        ):
            text = f"The run {why}; it goes on from its last checkpoint"
            add_event(connection, row["id"], text, level="warn")


def _log_end(service: Service, row: Row) -> str:
    with contextlib.suppress(OSError):
        text = service.settings.log(row["id"]).read_text(errors="replace")
        return text.strip()[-_LOG_END:]
    return "there is none."


def _succeed(service: Service, row: Row, result: Row) -> None:
    number, job = new_id("file-"), row["id"]
    folder = RunFolder(service.settings.run(job))
    size = service.files.write(number, following.results_csv(folder))
    with service.database.write() as connection:
        if not change(
            connection,
            schema.jobs,
            {"id": job, "status": STARTED},
            status="succeeded",
            finished_at=now(),
            estimated_finish=None,
            trained_tokens=result["trained_tokens"],
            result_files=[number],
            handle=None,
            devices=None,
        ):
            return
        add_file(
            service,
            number,
            name=f"{job}_results.csv",
            purpose="fine-tune-results",
            size=size,
            connection=connection,
        )
        step, name = result["step"], row["tuned_name"]
        _note_checkpoints(connection, row, folder, _ends_of_epochs({**row, "steps": step}, folder))
        add(connection, schema.models, name=name, created_at=now(), job_id=job, step=step)
        add_event(connection, job, f"New fine-tuned model created: {name}")
        add_event(connection, job, "The job has successfully completed")
        add_delivery(connection, job, "succeeded")


def fail(
    service: Service,
    row: Row,
    message: str,
    *,
    code: str,
    param: str | None = None,
    ended: bool = True,
) -> None:
    """Notes that a job has failed, and why, unless it is over already.

    Args:
      service: Of the job.
      row: The job.
      message: What is wrong.
      code: Word that programs know it by.
      param: Field of the request.
      ended: Whether its run, if it has one, has ended; one that may not have is stopped later.
    """
    free = {"handle": None, "devices": None} if ended else {}
    message = message.replace(f"{service.settings.job(row['id'])}/", "")
    message = service.settings.without_workdir(message)
    with service.database.write() as connection:
        if change(
            connection,
            schema.jobs,
            {"id": row["id"], "status": OPEN},
            status="failed",
            finished_at=now(),
            estimated_finish=None,
            error={"code": code, "message": message, "param": param},
            **free,
        ):
            add_event(connection, row["id"], message, level="error")
            add_delivery(connection, row["id"], "failed")
