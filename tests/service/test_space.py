"""Jobs that are over keep what somebody can use, and their log and results."""

import dataclasses

import pytest
from openai import BadRequestError, OpenAI

from jaxft.service import space
from jaxft.service.objects import checkpoint_model
from jaxft.service.space import free_space
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import add, change, now, one

DAY = 24 * 3600


@pytest.fixture
def file(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", b"{}\n"), purpose="fine-tune").id


def make(client: OpenAI, service: Service, file: str, *, model: str = "base", **values) -> str:
    """Returns a job with checkpoints of steps 8 and 16, which have names, and of step 20."""
    job = client.fine_tuning.jobs.create(model=model, training_file=file).id
    run = service.settings.run(job)
    for step in ("8", "16", "20", "24.orbax-checkpoint-tmp"):
        (run / "checkpoints" / step).mkdir(parents=True)
    service.settings.log(job).write_text("the log")
    (run / "metrics.jsonl").touch()
    with service.database.write() as connection:
        row = one(connection, schema.jobs, id=job)
        assert row is not None
        for step in (8, 16):
            name, shared = checkpoint_model(row["tuned_name"], step), {"job_id": job, "step": step}
            add(connection, schema.models, name=name, created_at=1, **shared)
            add(connection, schema.checkpoints, id=name, created_at=1, metrics={}, **shared)
        change(connection, schema.jobs, {"id": job}, finished_at=now(), **values)
    return job


def keeping(service: Service, *, days: int) -> Service:
    settings = dataclasses.replace(service.settings, keep_unfinished=days)
    return dataclasses.replace(service, settings=settings)


def steps(service: Service, job: str) -> set[str]:
    return {path.name for path in (service.settings.run(job) / "checkpoints").iterdir()}


@pytest.mark.parametrize("status", ["succeeded", "cancelled", "failed"])
def test_checkpoints_without_a_name_go_once_the_run_has_ended(
    client: OpenAI, service: Service, file: str, status: str
):
    job = make(client, service, file, status=status, handle="a run")
    under_way = make(client, service, file, status="paused")
    free_space(service)
    assert len(steps(service, job)) == len(steps(service, under_way)) == 4
    with service.database.write() as connection:
        change(connection, schema.jobs, {"id": job}, handle=None)
    free_space(service)
    assert steps(service, job) == {"8", "16"}
    assert len(steps(service, under_way)) == 4
    assert service.settings.log(job).read_text() == "the log"
    assert (service.settings.run(job) / "metrics.jsonl").is_file()


def test_checkpoints_of_jobs_that_did_not_succeed_go_after_some_days_if_that_is_set(
    client: OpenAI, service: Service, file: str
):
    set_to = keeping(service, days=3)
    jobs = {
        status: make(client, service, file, status=status)
        for status in ("succeeded", "cancelled", "failed")
    }
    with service.database.write() as connection:
        change(connection, schema.jobs, {}, finished_at=now() - 4 * DAY)
    jobs["young"] = make(client, service, file, status="failed")
    free_space(service)
    assert all(steps(service, job) == {"8", "16"} for job in jobs.values())
    free_space(set_to)
    left = {name for name, job in jobs.items() if steps(service, job)}
    assert left == {"succeeded", "young"}
    assert not client.fine_tuning.jobs.checkpoints.list(jobs["failed"]).data
    assert len(client.models.list().data) == 1 + 2 * 2
    free_space(set_to)
    said = [event.message for event in client.fine_tuning.jobs.list_events(jobs["failed"])]
    assert said.count("The checkpoints were deleted, 3 days or more after the end") == 1
    assert service.settings.log(jobs["failed"]).is_file()


def test_a_checkpoint_that_another_job_begins_with_is_kept(
    client: OpenAI, service: Service, file: str
):
    set_to = keeping(service, days=1)
    old = make(client, service, file, status="cancelled")
    checkpoint = client.fine_tuning.jobs.checkpoints.list(old).data[0].fine_tuned_model_checkpoint
    client.fine_tuning.jobs.create(model=checkpoint, training_file=file)
    with service.database.write() as connection:
        change(connection, schema.jobs, {"id": old}, finished_at=now() - 2 * DAY)
    free_space(set_to)
    assert steps(service, old) == {"8", "16"}


def test_a_base_stays_for_an_adapter_that_went_on_from_one_that_is_deleted(
    client: OpenAI, service: Service, file: str
):
    def begin(model: str, status: str, rank: int) -> tuple[str, str]:
        job = make(
            client, service, file, model=model, status=status, hyperparameters={"lora_rank": rank}
        )
        [_, first] = client.fine_tuning.jobs.checkpoints.list(job).data
        return job, first.fine_tuned_model_checkpoint

    whole, base = begin("base", "cancelled", 0)
    between, adapter = begin(base, "failed", 8)
    last, _ = begin(adapter, "succeeded", 8)
    with service.database.write() as connection:
        change(connection, schema.jobs, {}, finished_at=now() - 2 * DAY)
    for _ in range(2):
        free_space(keeping(service, days=1))
    assert [bool(steps(service, job)) for job in (whole, between, last)] == [True, False, True]
    with pytest.raises(BadRequestError, match=f"The model of {last} was tuned from it"):
        client.models.delete(base)
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(last).data:
        client.models.delete(checkpoint.fine_tuned_model_checkpoint)
    free_space(keeping(service, days=1))
    assert not steps(service, whole)


def test_tokens_go_with_their_files(client: OpenAI, service: Service, file: str):
    other = client.files.create(file=("valid.jsonl", b"{}\n"), purpose="fine-tune").id
    caches = [service.settings.cache(file, None), service.settings.cache(file, other)]
    for cache in caches:
        cache.mkdir(parents=True)
    free_space(service)
    assert all(cache.is_dir() for cache in caches)
    client.files.delete(other)
    free_space(service)
    assert [cache.is_dir() for cache in caches] == [True, False]


def test_tokens_of_a_file_that_is_uploaded_meanwhile_stay(
    client: OpenAI, service: Service, file: str, monkeypatch: pytest.MonkeyPatch
):
    caches = []

    def upload(*_, **__) -> None:
        number = client.files.create(file=("new.jsonl", b"{}\n"), purpose="fine-tune").id
        caches.append(service.settings.cache(number, None))
        caches[-1].mkdir(parents=True)

    make(client, service, file, status="succeeded")
    monkeypatch.setattr(space, "remove_steps", upload)  # which takes long
    free_space(service)
    assert [cache.is_dir() for cache in caches] == [True]
