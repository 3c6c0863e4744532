"""Deletes what jobs that are over leave and nobody can use, so that the disk does not fill up."""

import shutil

import sqlalchemy as sa

from jaxft.formatting import counted
from jaxft.service.errors import ApiError
from jaxft.service.history import ACTIVE, add_event
from jaxft.service.models import forget_models, names_of, remove_steps, steps_of
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import now, one

_DAY = 24 * 3600
_UNFINISHED = ("cancelled", "failed")


def free_space(service: Service) -> None:
    """Deletes checkpoints that no name stands for, and tokens of files that are deleted.

    A run keeps steps within an epoch for a crash, and the step at which it was ended. With
    `keep_unfinished` the names of cancelled and failed jobs end as well.
    """
    if days := service.settings.keep_unfinished:
        _drop_unfinished(service, days)
    jobs, files = schema.jobs, schema.files
    # Listed before files are: none of these has tokens of a file that is uploaded meanwhile.
    caches = list(service.settings.caches.glob("*"))
    # Of these no run writes any more.
    over = (jobs.c.status.not_in(ACTIVE), jobs.c.handle.is_(None), jobs.c.devices.is_(None))
    with service.database.read() as connection:
        numbers = list(connection.execute(sa.select(jobs.c.id).where(*over)).scalars())
        kept = {number: steps_of(connection, number) for number in numbers}
        known = set(connection.execute(sa.select(files.c.id)).scalars())
    for number, steps in kept.items():
        remove_steps(service.settings, number, kept=steps)
    for folder in caches:
        if not {name for name in folder.name.split("_") if name} <= known:
            shutil.rmtree(folder, ignore_errors=True)


def _drop_unfinished(service: Service, days: int) -> None:
    """Deletes the models of jobs that were cancelled or failed so many days ago."""
    jobs = schema.jobs
    old = (jobs.c.status.in_(_UNFINISHED), jobs.c.finished_at < now() - days * _DAY)
    has_models = sa.exists().where(schema.models.c.job_id == jobs.c.id)
    with service.database.read() as connection:
        found = list(connection.execute(sa.select(jobs.c.id).where(*old, has_models)).scalars())
    for number in found:
        with service.database.write() as connection:
            row = one(connection, jobs, locks=True, id=number)
            assert row is not None
            try:
                forget_models(connection, row, names_of(connection, number))
            except ApiError:  # another job needs them
                continue
            text = f"The checkpoints were deleted, {counted(days, 'day')} or more after the end"
            add_event(connection, number, text)
