"""The worker beside an executor that writes what runs write; real runs are in test_runs.py."""

import base64
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from jaxft.files import append_jsonl, write_json
from jaxft.service import jobs, progress, webhooks, worker
from jaxft.service.executors import ExecutorError, Launch, State
from jaxft.service.settings import Settings
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import change, one
from jaxft.service.target import Target
from jaxft.service.worker import Worker

CHECKED = {
    "config": {"train.steps": 0},
    "hyperparameters": {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0},
    "examples": 40,
    "tokens": 900,
    "rows": 15,
    "left_out": 2,
    "bad_rows": 0,
    "steps": 23,
    "epoch_steps": 7.5,
    "step_seconds": 2.0,
    "takes": "1 GiB",
}


class Runs:
    """An executor whose runs a test writes by hand."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.launches: dict[str, Launch] = {}
        self.states: dict[str, State] = {}
        self.stopped: list[str] = []
        self.lost = False  # whether the worker dies before it notes a handle

    def submit(self, launch: Launch) -> str:
        assert launch.name not in self.launches, "a launch is submitted once"
        self.launches[launch.name] = launch
        self.states[launch.name] = State.RUNNING
        if self.lost:
            raise KeyboardInterrupt
        return launch.name

    def find(self, launch: Launch) -> str | None:
        return launch.name if launch.name in self.launches else None

    def state(self, handle: str) -> State:
        return self.states[handle]

    def stop(self, handle: str) -> None:
        self.stopped.append(handle)

    def write(self, job: str, file: str, **record: Any) -> None:
        append_jsonl(self.settings.run(job) / file, record)

    def step(self, job: str, step: int) -> None:
        self.write(
            job, "metrics.jsonl", step=step, loss=2.0 / step, trained_tokens=9 * step, seconds=step
        )

    def save(self, job: str, step: int) -> None:
        (self.settings.run(job) / "checkpoints" / str(step)).mkdir(parents=True)

    def end(self, job: str, attempt: int = 0, **result: Any) -> None:
        if result:
            write_json(self.settings.run(job) / "result.json", result)
        self.states[f"{job}-{attempt}"] = State.ENDED


@pytest.fixture
def runs(settings: Settings) -> Runs:
    return Runs(settings)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the checker is asked; it answers at once, with `CHECKED`."""
    found: list[dict[str, Any]] = []

    class Checker:
        def __init__(self, target: Target):
            self.given_up, self.is_given_up = threading.Event(), False

        def check(self, request: dict[str, Any]) -> dict[str, Any]:
            found.append(request)
            if request["seed"] == 13:  # a check that takes its time
                self.given_up.wait(20)
            return dict(CHECKED)

        def stop(self) -> None:
            pass

        def give_up(self) -> None:
            self.is_given_up = True
            self.given_up.set()

    monkeypatch.setattr("jaxft.service.checker.Checker", Checker)
    target = Target("cpu", "cpu", 1, 0, "")
    monkeypatch.setattr("jaxft.service.checks.find_target", lambda *_: target)
    return found


@pytest.fixture
def working(
    service: Service, runs: Runs, asked: list, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = Worker(service.settings, executor=runs)
    yield found
    found.close()


@pytest.fixture
def make(client: OpenAI) -> Callable[[], str]:
    file = client.files.create(file=("train.jsonl", b"{}\n"), purpose="fine-tune").id

    def make_job() -> str:
        return client.fine_tuning.jobs.create(model="base", training_file=file, suffix="s").id

    return make_job


def until(working: Worker, client: OpenAI, job: str, status: str) -> Any:
    for _ in range(100):
        working.tick()
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status == status:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{job} is {found.status}, not {status}")


def messages(client: OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job)][::-1]


SUCCEEDED = {"status": "succeeded", "reason": "end", "step": 23, "trained_tokens": 207}


def test_a_job_goes_from_its_check_to_a_tuned_model(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str], asked: list
):
    job = make()
    found = until(working, client, job, "queued")
    assert asked[0]["name"].startswith("ft:base:lab:s:")
    assert asked[0]["training_name"] == "train.jsonl" and asked[0]["path"].endswith("/base")
    assert found.hyperparameters.n_epochs == 3
    [warning] = [e for e in client.fine_tuning.jobs.list_events(job) if e.level == "warn"]
    assert "2 of 40 examples are left out" in warning.message
    assert 40 < found.estimated_finish - time.time() < 120
    until(working, client, job, "running")
    for step in range(1, 9):
        runs.step(job, step)
    runs.write(job, "eval.jsonl", step=8, loss=0.5, token_accuracy=0.75)
    runs.write(job, "eval.jsonl", step=8, dataset="retention", loss=9.0)
    runs.save(job, 8)
    working.tick()
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job).data
    assert checkpoint.step_number == 8 and checkpoint.metrics.valid_loss == 0.5
    assert checkpoint.metrics.full_valid_mean_token_accuracy == 0.75
    assert checkpoint.metrics.train_loss == 0.25
    name = checkpoint.fine_tuned_model_checkpoint
    assert name.startswith("ft:base:lab:s:") and name.endswith(":ckpt-step-8")
    found = client.fine_tuning.jobs.retrieve(job)
    assert found.trained_tokens == 72 and found.fine_tuned_model is None
    assert 10 < found.estimated_finish - time.time() < 20  # 15 steps, each a second
    for step in range(9, 24):
        runs.step(job, step)
    runs.save(job, 15)
    runs.save(job, 20)  # within an epoch: kept for a crash, and not shown
    runs.save(job, 23)
    runs.end(job, **SUCCEEDED)
    done = until(working, client, job, "succeeded")
    assert done.trained_tokens == 207 and done.estimated_finish is None
    steps = [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job)]
    assert steps == [23, 15, 8]
    tuned = done.fine_tuned_model
    assert {tuned, f"{tuned}:ckpt-step-8", "base"} <= {m.id for m in client.models.list()}
    lines = client.files.content(done.result_files[0]).text.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines[8] == "8,0.25,,0.5,0.75" and len(lines) == 24
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    said = messages(client, job)
    assert said[-2:] == [
        f"New fine-tuned model created: {tuned}",
        "The job has successfully completed",
    ]
    assert len([m for m in said if "training loss" in m]) == 23


def test_a_deleted_model_takes_its_checkpoints_with_it(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    job = make()
    until(working, client, job, "running")
    runs.save(job, 8)
    runs.save(job, 23)
    working.tick()
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job).data[0].fine_tuned_model_checkpoint
    with pytest.raises(openai.BadRequestError, match=job):
        client.models.delete(checkpoint)
    runs.end(job, **SUCCEEDED)
    tuned = until(working, client, job, "succeeded").fine_tuned_model
    assert (
        client.models.retrieve(checkpoint).owned_by
        == client.fine_tuning.jobs.retrieve(job).organization_id
    )
    client.models.delete(f"{tuned}:ckpt-step-8")
    assert [c.step_number for c in client.fine_tuning.jobs.checkpoints.list(job)] == [23]
    assert [p.name for p in (runs.settings.run(job) / "checkpoints").iterdir()] == ["23"]
    assert client.models.delete(tuned).deleted
    assert [m.id for m in client.models.list()] == ["base"]
    assert not list((runs.settings.run(job) / "checkpoints").iterdir())


def test_a_run_that_fails_says_why(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    job = make()
    until(working, client, job, "running")
    runs.end(job, status="failed", reason="TrainingError", problems=["Step 3: the loss is nan."])
    found = until(working, client, job, "failed")
    assert found.error.code == "training_failed" and "Step 3" in found.error.message
    assert client.fine_tuning.jobs.list_events(job).data[0].level == "error"
    assert not client.models.list().data[1:]


def test_a_refused_check_names_its_field(
    client: OpenAI,
    working: Worker,
    make: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
):
    error = {"code": "invalid_n_examples", "message": "has 3 examples", "param": "training_file"}
    monkeypatch.setitem(CHECKED, "error", error)
    found = until(working, client, make(), "failed")
    assert found.error.model_dump() == error


def test_a_killed_run_goes_on_and_one_that_never_gets_anywhere_fails(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    job = make()
    until(working, client, job, "running")
    runs.step(job, 1)
    runs.end(job)  # killed: no result.json
    until(working, client, job, "queued")
    until(working, client, job, "running")
    assert list(runs.launches) == [f"{job}-0", f"{job}-1"]
    runs.step(job, 2)
    runs.end(job, 1, status="stopped", reason="SIGTERM", problems=[])  # by its machine
    until(working, client, job, "queued")
    (runs.settings.run(job) / "result.json").unlink()
    for attempt in range(2, 7):
        until(working, client, job, "running")
        runs.end(job, attempt)
        working.tick()
    found = until(working, client, job, "failed")
    assert found.error.code == "run_died" and "5 times" in found.error.message
    assert messages(client, job).count("Job started") == 1


def test_one_job_at_a_time_has_the_devices_and_they_keep_their_order(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    made = [make() for _ in range(3)]
    until(working, client, made[0], "running")
    until(working, client, made[2], "queued")
    working.tick()
    assert list(runs.launches) == [f"{made[0]}-0"]
    client.fine_tuning.jobs.cancel(made[0])
    working.tick()
    assert runs.stopped == [f"{made[0]}-0"]  # and has the devices until it has ended
    assert list(runs.launches) == [f"{made[0]}-0"]
    runs.end(made[0])
    until(working, client, made[1], "running")
    assert list(runs.launches) == [f"{made[0]}-0", f"{made[1]}-0"]


def test_sets_of_devices_run_a_job_each(
    client: OpenAI, service: Service, runs: Runs, make: Callable[[], str], asked: list
):
    settings = dataclasses.replace(service.settings, device_sets=("0,1", "2,3"))
    found = Worker(settings, executor=runs)
    made = [make() for _ in range(3)]
    until(found, client, made[1], "running")
    assert {launch.devices for launch in runs.launches.values()} == {"0,1", "2,3"}
    assert client.fine_tuning.jobs.retrieve(made[2]).status in ("validating_files", "queued")
    found.close()


def test_a_paused_job_frees_its_devices_and_goes_on_later(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    job = make()
    until(working, client, job, "running")
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    working.tick()
    assert runs.stopped == [f"{job}-0"]
    runs.end(job, status="stopped", reason="SIGTERM", step=5)
    working.tick()
    assert "Step 5 is saved" in messages(client, job)
    other = make()
    until(working, client, other, "running")
    client.fine_tuning.jobs.cancel(other)
    runs.end(other)
    client.fine_tuning.jobs.resume(job)
    until(working, client, job, "running")
    assert f"{job}-1" in runs.launches


def submit_and_die(client: OpenAI, service: Service, runs: Runs, job: str) -> None:
    """Lets a worker die when it has submitted the run of a job and has not noted that yet."""
    dying = Worker(service.settings, executor=runs)
    until(dying, client, job, "queued")
    runs.lost = True
    with pytest.raises(KeyboardInterrupt):
        dying.tick()
    runs.lost = False
    dying._service.database.close()


def test_a_worker_that_dies_loses_no_launch_and_starts_none_twice(
    client: OpenAI, service: Service, runs: Runs, make: Callable[[], str], asked: list
):
    job = make()
    submit_and_die(client, service, runs, job)
    second = Worker(service.settings, executor=runs)
    second._name = "elsewhere:1"
    second.tick()  # the first one's lease has not ended
    with service.database.read() as connection:
        assert one(connection, schema.jobs, id=job)["handle"] is None  # pyright: ignore
    with service.database.write() as connection:
        change(connection, schema.jobs, {"id": job}, taken_until=1)
    until(second, client, job, "running")
    assert list(runs.launches) == [f"{job}-0"]
    second.close()


def test_a_run_whose_worker_died_before_it_noted_it_is_stopped_when_its_job_is_cancelled(
    client: OpenAI, service: Service, runs: Runs, make: Callable[[], str], asked: list
):
    job, other = make(), make()
    submit_and_die(client, service, runs, job)
    client.fine_tuning.jobs.cancel(job)
    second = Worker(service.settings, executor=runs)
    second._release_all()
    for _ in range(20):
        second.tick()
    assert runs.stopped and set(runs.stopped) == {f"{job}-0"}
    assert list(runs.launches) == [f"{job}-0"], "its devices are not free before it has ended"
    runs.end(job)
    until(second, client, other, "running")
    second.close()


def test_a_job_that_is_cancelled_meanwhile_stays_cancelled(
    client: OpenAI,
    service: Service,
    working: Worker,
    runs: Runs,
    make: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
):
    """A cancellation that comes while the worker writes waits for it, and comes after it."""
    job = make()
    until(working, client, job, "queued")
    in_order, threads = progress._in_order, []

    def cancel_now(*args: Any) -> Any:
        threads.append(threading.Thread(target=jobs.cancel, args=(service, job)))
        threads[-1].start()
        threads[-1].join(0.3)
        return in_order(*args)

    monkeypatch.setattr(progress, "_in_order", cancel_now)
    working.tick()
    working.tick()
    threads[0].join()
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
    said = messages(client, job)
    assert said.index("Job started") < said.index("The job was cancelled")


def test_what_an_earlier_start_said_is_not_the_end_of_a_later_one(
    client: OpenAI, working: Worker, runs: Runs, make: Callable[[], str]
):
    job = make()
    until(working, client, job, "running")
    client.fine_tuning.jobs.pause(job)
    runs.end(job, status="stopped", reason="SIGTERM", step=5)
    working.tick()
    client.fine_tuning.jobs.resume(job)
    for attempt in range(1, 6):
        until(working, client, job, "running")
        runs.end(job, attempt)  # killed, each time before it could say a word
        working.tick()
    assert until(working, client, job, "failed").error.code == "run_died"


@pytest.fixture
def make_slow(client: OpenAI) -> Callable[[], str]:
    """Makes a job whose check takes 20 seconds."""
    file = client.files.create(file=("train.jsonl", b"{}\n"), purpose="fine-tune").id
    jobs = client.fine_tuning.jobs
    return lambda: jobs.create(model="base", training_file=file, seed=13).id


def test_a_long_check_keeps_no_other_waiting(
    client: OpenAI, working: Worker, make: Callable[[], str], make_slow: Callable[[], str]
):
    slow = make_slow()
    working.tick()
    for _ in range(3):
        until(working, client, make(), "queued")
    assert client.fine_tuning.jobs.retrieve(slow).status == "validating_files"


def test_the_check_of_a_cancelled_job_keeps_no_other_waiting(
    client: OpenAI, working: Worker, make: Callable[[], str], make_slow: Callable[[], str]
):
    """There are as many checks at a time as cores."""
    slow = [make_slow(), make_slow()]
    working.tick()
    other = make()
    time.sleep(0.1)
    working.tick()
    assert client.fine_tuning.jobs.retrieve(other).status == "validating_files"
    client.fine_tuning.jobs.cancel(slow[1])
    start = time.monotonic()
    until(working, client, other, "queued")
    assert time.monotonic() - start < 10
    assert client.fine_tuning.jobs.retrieve(slow[0]).status == "validating_files"


def test_a_scheduler_that_does_not_answer_is_asked_again(
    client: OpenAI,
    working: Worker,
    runs: Runs,
    make: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
):
    job = make()
    until(working, client, job, "running")
    with monkeypatch.context() as context:

        def refuse(handle: str) -> State:
            raise ExecutorError("slurmctld does not answer")

        context.setattr(runs, "state", refuse)
        working.tick()
    assert client.fine_tuning.jobs.retrieve(job).status == "running"
    runs.end(job, **SUCCEEDED)
    runs.save(job, 23)
    until(working, client, job, "succeeded")


def test_a_job_that_a_scheduler_refuses_is_offered_again_after_a_while(
    client: OpenAI,
    working: Worker,
    runs: Runs,
    make: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    job, offered = make(), []

    def refuse(launch: Launch) -> str:
        offered.append(launch.name)
        raise ExecutorError("sbatch failed: invalid partition")

    with monkeypatch.context() as context:
        context.setattr(runs, "submit", refuse)
        until(working, client, job, "queued")
        for _ in range(3):
            working.tick()
        assert len(offered) == 1
        context.setattr("jaxft.service.worker._REFUSED", 0)
        working.tick()
    assert len(offered) == 2 and caplog.text.count("invalid partition") == 1
    monkeypatch.setattr("jaxft.service.worker._REFUSED", 0)
    until(working, client, job, "running")


def test_a_fault_on_one_job_keeps_no_other_waiting(
    client: OpenAI,
    working: Worker,
    runs: Runs,
    make: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
):
    bad, good = make(), make()
    until(working, client, bad, "running")
    with monkeypatch.context() as context:
        context.setattr(runs, "state", lambda handle: 1 / 0)
        working.tick()
    found = client.fine_tuning.jobs.retrieve(bad)
    assert found.status == "failed" and found.error is not None
    assert found.error.code == "server_error"
    working.tick()
    assert runs.stopped == [f"{bad}-0"]  # and it has the devices until it has ended
    runs.end(bad)
    until(working, client, good, "running")


@pytest.fixture
def hook() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A server that refuses the first delivery; its URL and what it got."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((dict(self.headers), body))
            self.send_response(500 if len(got) == 1 else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhooks_are_signed_and_tried_again_until_they_answer(
    client: OpenAI,
    service: Service,
    runs: Runs,
    make: Callable[[], str],
    asked: list,
    hook: tuple[str, list],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(webhooks, "_WAITS", (0, 0, 0))
    url, got = hook
    secret = "whsec_" + base64.b64encode(b"k" * 24).decode()
    (tmp_path / "secret").write_text(secret + "\n")
    settings = dataclasses.replace(
        service.settings, webhooks=(url,), webhook_secret=str(tmp_path / "secret")
    )
    working = Worker(settings, executor=runs)
    job = make()
    client.fine_tuning.jobs.cancel(job)
    for _ in range(200):
        working.tick()
        if len(got) == 2:
            break
        time.sleep(0.02)
    headers, body = got[1]
    event = client.webhooks.unwrap(body.decode(), headers, secret=secret)
    assert event.type == "fine_tuning.job.cancelled" and event.data.id == job
    assert json.loads(got[0][1])["id"] == json.loads(body)["id"]  # so that it counts once
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.decode() + " ", headers, secret=secret)
    for _ in range(50):
        working.tick()
    assert len(got) == 2
    working.close()


def test_a_second_worker_of_a_machine_waits(settings: Settings, tmp_path: Path):
    settings.workdir.mkdir(parents=True)
    entered, stop = threading.Event(), threading.Event()

    def wait() -> None:
        with worker._alone(settings.workdir, stop):
            entered.set()

    with worker._alone(settings.workdir, stop):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(5)
    thread.join()
