"""Jobs before anything runs, by the real client."""

import time

import httpx
import openai
import pytest
from openai import OpenAI

from jaxft.service.client import OpenAI as OldClient
from jaxft.service.history import add_event
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import change

LINES = b'{"messages": []}\n'


@pytest.fixture
def file(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", LINES), purpose="fine-tune").id


def test_a_job_has_all_that_clients_read(client: OpenAI, file: str):
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file,
        validation_file=file,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto", "batch_size": 4}},
        },
    )
    assert job.id.startswith("ftjob-") and job.object == "fine_tuning.job"
    assert (job.status, job.model, job.seed) == ("validating_files", "base", 7)
    assert job.fine_tuned_model is None and job.finished_at is None and job.error is None
    assert job.metadata == {"team": "a"} and job.result_files == []
    assert job.integrations is not None and job.integrations[0].wandb.project == "p"
    assert job.method is not None and job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert job.hyperparameters.batch_size == 4 and job.hyperparameters.n_epochs == "auto"
    assert job.organization_id == "org-lab"
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert [e.level for e in events] == ["info", "info"] and job.id in events[-1].message


def test_the_older_form_of_hyperparameters_is_taken(client: OpenAI, file: str):
    job = client.fine_tuning.jobs.create(
        model="base", training_file=file, hyperparameters={"n_epochs": 2}
    )
    assert job.hyperparameters.n_epochs == 2
    assert job.method is not None and job.method.type == "supervised"


def test_a_seed_is_drawn_where_none_is_given(client: OpenAI, file: str):
    seeds = {
        client.fine_tuning.jobs.create(model="base", training_file=file).seed for _ in range(2)
    }
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "bas"}, "model", "model_not_found"),
        ({"model": "../base"}, "model", "model_not_found"),
        ({"model": "/etc"}, "model", "model_not_found"),
        ({"model": 3}, "model", None),
        ({"model": None}, "model", None),
        ({"training_file": "file-none"}, "training_file", "not_found"),
        ({"training_file": "../x"}, "training_file", "not_found"),
        ({"validation_file": "file-none"}, "validation_file", "not_found"),
        ({"suffix": "a" * 65}, "suffix", None),
        ({"suffix": "a:b"}, "suffix", None),
        ({"suffix": "../x"}, "suffix", None),
        ({"seed": -1}, "seed", None),
        ({"seed": "1"}, "seed", None),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", None),
        ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 65, None),
        ({"metadata": {"k": "x" * 513}}, "metadata.k", None),
        ({"integrations": [{"type": "mlflow"}]}, "integrations.0.type", "unsupported_parameter"),
        (
            {"hyperparameters": {"config": {"optim.foo": 1}}},
            "hyperparameters.config.optim.foo",
            "unknown_parameter",
        ),
        (
            {"hyperparameters": {"config": {"optim.weight_decay": "a lot"}}},
            "hyperparameters.config.optim.weight_decay",
            None,
        ),
        (
            {"hyperparameters": {"config": {"optim.learning_rate": 1e-4}}},
            "hyperparameters.config.optim.learning_rate",
            None,
        ),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", None),
        ({"hyperparameters": {"n_epochs": "three"}}, "hyperparameters.n_epochs", None),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", None),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "unknown_parameter"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", None),
        (
            {"hyperparameters": {"config": {"train.workdir": "/tmp"}}},
            "hyperparameters.config.train.workdir",
            "unknown_parameter",
        ),
        (
            {"hyperparameters": {"config": {"objective.name": "os"}}},
            "hyperparameters.config.objective.name",
            "unknown_parameter",
        ),
        (
            {"hyperparameters": {"config": {"strategy": "evil.module"}}},
            "hyperparameters.config.strategy",
            None,
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_method"),
        ({"method": {"type": "ppo"}}, "method.type", None),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", None),
        (
            {"method": {"type": "supervised", "supervised": {}}, "hyperparameters": {}},
            "hyperparameters",
            None,
        ),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_a_wrong_field_is_named(
    client: OpenAI, url: str, file: str, change: dict, param: str, code: str | None
):
    body = {"model": "base", "training_file": file} | change
    answer = httpx.post(f"{url}/v1/fine_tuning/jobs", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert (error["param"], error["code"]) == (param, code)
    assert not client.fine_tuning.jobs.list().data


def test_a_body_that_is_no_object_is_refused(url: str):
    post = lambda **kw: httpx.post(f"{url}/v1/fine_tuning/jobs", **kw).status_code  # noqa: E731
    json = {"content-type": "application/json"}
    assert post(content=b"{", headers=json) == 400
    assert post(content=b"[]", headers=json) == 400
    assert post(content=b'{"seed": NaN}', headers=json) == 400
    assert post(content=b"\xff\xfe", headers=json) == 400
    assert post(content=b"[" * 100_000, headers=json) == 400
    assert post(content=b"model=base", headers={"content-type": "text/plain"}) == 415


def test_jobs_are_paged_and_chosen_by_metadata(client: OpenAI, file: str):
    made = [
        client.fine_tuning.jobs.create(
            model="base", training_file=file, metadata={"n": str(i % 3), "a.b": "c'd"}
        ).id
        for i in range(45)
    ]
    first = client.fine_tuning.jobs.list()
    assert len(first.data) == 20 and first.has_more
    assert [job.id for job in client.fine_tuning.jobs.list()] == made[::-1]
    found = client.fine_tuning.jobs.list(metadata={"n": "1"}, limit=4)
    assert [job.id for job in found] == made[::-1][1::3]
    assert not client.fine_tuning.jobs.list(metadata={"n": "1' OR '1'='1"}).data
    assert len(list(client.fine_tuning.jobs.list(metadata={"a.b": "c'd"}))) == 45


def test_a_job_is_cancelled_paused_and_resumed(client: OpenAI, service: Service, file: str):
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="base", training_file=file).id
    with pytest.raises(openai.BadRequestError, match="validating_files"):
        jobs.pause(job)
    with service.database.write() as connection:
        change(connection, schema.jobs, {"id": job}, status="queued")
    assert jobs.pause(job).status == "paused"
    assert jobs.resume(job).status == "queued"
    done = jobs.cancel(job)
    assert done.status == "cancelled" and done.finished_at is not None
    with pytest.raises(openai.BadRequestError) as error:  # 400: asking again changes nothing
        jobs.cancel(job)
    assert error.value.code == "invalid_job_status"
    for call in (jobs.cancel, jobs.retrieve, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            call("ftjob-none")


def test_a_file_of_a_job_that_is_not_over_is_kept(client: OpenAI, file: str):
    job = client.fine_tuning.jobs.create(model="base", training_file=file)
    with pytest.raises(openai.BadRequestError, match=job.id):
        client.files.delete(file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(file).deleted


def test_events_are_paged_and_streamed_as_they_happen(
    client: OpenAI, service: Service, url: str, file: str
):
    job = client.fine_tuning.jobs.create(model="base", training_file=file).id
    with service.database.write() as connection:
        for i in range(30):
            add_event(connection, job, f"step {i}", data={"step": i})
    found = list(client.fine_tuning.jobs.list_events(job, limit=7))
    assert len(found) == 32 and found[0].message == "step 29"
    assert found[0].type == "metrics" and found[0].data == {"step": 29}
    lines = []
    path = f"{url}/v1/fine_tuning/jobs/{job}/events?stream=true"
    with httpx.stream("GET", path, timeout=20) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if "step 29" in line:
                client.fine_tuning.jobs.cancel(job)
    data = [line for line in lines if line.startswith("data:")]
    assert len(data) == 34 and "cancelled" in data[-2] and data[-1] == "data: [DONE]"


def test_the_oldest_form_of_the_calls_works(url: str, file: str):
    with OldClient(base_url=f"{url}/v1", api_key="none") as client:
        job = client.fine_tunes.create(training_file=file, model="base", n_epochs=4)
        assert job.id.startswith("ft-") and job.status == "pending"
        assert job.organization_id == "org-lab"
        assert job.hyperparams["n_epochs"] == 4 and job.training_files[0]["id"] == file
        assert [item.id for item in client.fine_tunes.list().data] == [job.id]
        assert not client.fine_tuning.jobs.list().data
        assert client.fine_tunes.cancel(job.id).status == "cancelled"
        messages = [event["message"] for event in client.fine_tunes.list_events(job.id).data]
        assert messages[-1] == "The job was cancelled"
        assert client.fine_tunes.retrieve(job.id).events[-1]["message"] == messages[-1]
        with pytest.raises(openai.BadRequestError, match="n_epoch"):
            client.fine_tunes.create(training_file=file, model="base", n_epoch=4)


def test_models_are_listed_and_base_models_are_kept(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["base"]
    assert client.models.retrieve("base").owned_by == "jaxft"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'base'"):
        client.models.retrieve("bases")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("base")


def test_times_are_those_of_the_clock(client: OpenAI, file: str):
    job = client.fine_tuning.jobs.create(model="base", training_file=file)
    assert abs(job.created_at - time.time()) < 10
