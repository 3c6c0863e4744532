"""`jaxft serve` on a real SLURM cluster of one node, as a client of OpenAI uses it."""

import os
import signal
from pathlib import Path

import pytest
from openai import OpenAI

from jaxft.service.following import RunFolder
from jaxft.service.settings import Settings
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import change
from tests.service.process import Server, client_of, server, upload, wait
from tests.service.slurm_cluster import SMALL, SlurmCluster, wait_until
from tests.test_launch import ROOT
from tests.tiny_run import read_metrics

OPTIONS = (
    "--executor=slurm",
    "--generate_on=cpu",
    *(f"--executor_option={option}" for option in (f"script={ROOT}/launch/slurm.sbatch", *SMALL)),
)


@pytest.mark.slow(seconds=100)
def test_jobs_of_a_service_that_dies_run_once_on_the_cluster(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with server(tmp_path, *OPTIONS) as found, client_of(found, max_retries=10) as client:
        file, valid = upload(client, found), upload(client, found, "valid.jsonl")
        made = [
            client.fine_tuning.jobs.create(
                model="base",
                training_file=file,
                validation_file=valid,
                hyperparameters={"n_epochs": 50, "batch_size": 1},
            ).id
            for _ in range(2)
        ]
        # The node is taken by the one that was checked first; the other waits in SLURM's queue.
        wait_until(lambda: all(jobs_of(cluster, job) for job in made), 300)
        wait_until(lambda: any(jobs_of(cluster, job)[0][1] == "RUNNING" for job in made), 300)
        first, second = sorted(made, key=lambda job: jobs_of(cluster, job)[0][1], reverse=True)
        wait(client, first, "running", seconds=300)
        before = {job: jobs_of(cluster, job) for job in (first, second)}
        assert [jobs[0][1] for jobs in before.values()] == ["RUNNING", "PENDING"], before

        kill_with_worker(found)
        forget_handle(found, second)  # as if it had died before it noted what it had submitted
        assert jobs_of(cluster, first) == before[first], "runs go on without the service"
        found.start()
        done = wait(client, first, "succeeded", seconds=300)
        assert {job: numbers(cluster, job) for job in before} == {
            job: [number for number, _ in jobs] for job, jobs in before.items()
        }
        steps = [record["step"] for record in read_metrics(found.workdir / "jobs" / first / "run")]
        assert steps and steps == sorted(set(steps)), "each step counts once"
        said = messages(client, first)
        assert said.count("Job started") == 1 and "Job runs again" not in said

        rows = client.files.content(done.result_files[0]).text.splitlines()
        assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
        assert [int(row.partition(",")[0]) for row in rows[1:] if row.split(",")[1]] == steps
        assert done.fine_tuned_model is not None
        answer = client.chat.completions.create(
            model=done.fine_tuned_model,
            messages=[{"role": "user", "content": "say abc 1"}],
            max_tokens=20,
        )
        assert answer.model == done.fine_tuned_model and answer.choices[0].message.content

        wait(client, second, "running", seconds=300)
        run = found.workdir / "jobs" / second / "run"
        wait_until(lambda: "training loss" in messages(client, second)[0], 300)
        assert client.fine_tuning.jobs.cancel(second).status == "cancelled"
        wait_until(lambda: jobs_of(cluster, second)[0][1] not in ("RUNNING", "COMPLETING"), 120)
        result = RunFolder(run).result()
        assert result is not None and result["status"] == "stopped", "it has saved and ended"
        assert result["step"] >= read_metrics(run)[-1]["step"] > 0  # a line for every other step
        assert numbers(cluster, second) == [number for number, _ in before[second]]
        assert client.fine_tuning.jobs.retrieve(second).status == "cancelled"


def messages(client: OpenAI, job: str) -> list[str]:
    """Returns what the events of a job say, the newest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job)]


def jobs_of(cluster: SlurmCluster, job: str) -> list[tuple[str, str]]:
    """Returns number and state of each job of SLURM for a job of the service."""
    return [(number, state) for number, state, name in cluster.jobs() if name.startswith(job)]


def numbers(cluster: SlurmCluster, job: str) -> list[str]:
    return [number for number, _ in jobs_of(cluster, job)]


def kill_with_worker(found: Server) -> None:
    """Kills the server and its worker; neither gets to say a word."""
    workers = found.processes("jaxft.service.worker", str(found.workdir))
    assert found.process is not None and len(workers) == 1
    for process in (found.process.pid, *workers):
        os.kill(process, signal.SIGKILL)
    found.process.wait()


def forget_handle(found: Server, job: str) -> None:
    """Takes from the database that a job was submitted."""
    service = Service.open(Settings(workdir=found.workdir, models={"base": ""}))
    with service.database.write() as connection:
        assert change(connection, schema.jobs, {"id": job, "status": "queued"}, handle=None)
    service.database.close()
