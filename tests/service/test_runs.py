"""Real jobs of a tiny model through a real server: the script of the documentation, and kills."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from jaxft.service.settings import Settings
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import one
from tests.service.process import Server, client_of, server, upload, wait
from tests.tiny_run import read_records

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(seconds=90)
def test_the_script_of_the_documentation_and_all_else_that_clients_do(tmp_path: Path):
    with server(tmp_path) as found, client_of(found) as client:
        script = [sys.executable, str(ROOT / "docs/finetune_by_api.py"), "base"]
        script += [str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl")]
        done = subprocess.run(
            script, env=found.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr + found.log
        assert "Step 23/23: validation loss=" in done.stdout, done.stdout
        assert "ft:base:local:demo:" in done.stdout.splitlines()[-1]
        [job] = client.fine_tuning.jobs.list().data
        last = client.files.content(job.result_files[0]).text.splitlines()[-1]
        assert re.fullmatch(r"23(,[0-9.e-]+){4}", last), last  # no cell is empty
        # A run like any other, exported like any other.
        run = found.workdir / "jobs" / job.id / "run"
        export = ["export", f"--checkpoint={run}", f"--output={tmp_path / 'adapter'}", "--verify"]
        subprocess.run([sys.executable, "-m", "jaxft", *export], check=True, env=found.environment)
        # Trained further, and cancelled under way.
        file = upload(client, found)
        assert job.fine_tuned_model is not None
        more = client.fine_tuning.jobs.create(
            model=job.fine_tuned_model,
            training_file=file,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}},
            },
        )
        wait(client, more.id, "running")
        assert client.fine_tuning.jobs.pause(more.id).status == "paused"
        client.fine_tuning.jobs.resume(more.id)
        wait(client, more.id, "running")
        assert client.fine_tuning.jobs.cancel(more.id).status == "cancelled"
        # 120 jobs in pages.
        made = [
            client.fine_tuning.jobs.create(model="base", training_file=file).id for _ in range(118)
        ]
        every = [item.id for item in client.fine_tuning.jobs.list()]
        assert every == [*reversed(made), more.id, job.id] and len(every) == 120
        for number in made:
            client.fine_tuning.jobs.cancel(number)
        # Every class of error.
        for error, call in (
            (openai.BadRequestError, lambda: client.fine_tuning.jobs.cancel(more.id)),
            (openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-none")),
            (openai.PermissionDeniedError, lambda: client.models.delete("base")),
            (openai.APIConnectionError, lambda: _elsewhere().models.list()),
        ):
            with pytest.raises(error):
                call()
        found.stop()
        assert found.process is not None and found.process.returncode == 143
        assert not found.processes(str(found.workdir)), "the worker ends with the server"


def _elsewhere() -> OpenAI:
    return OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)


def test_the_readme_shows_the_script():
    script = (ROOT / "docs/finetune_by_api.py").read_text()
    assert len(script.splitlines()) <= 30
    assert script in (ROOT / "README.md").read_text()


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()
    found.end_runs()


@pytest.mark.slow(seconds=150)
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(killed: Server):
    """50 kills of server, worker, run and check, at random; then all jobs have ended once."""
    chance, found = random.Random(7), killed
    client = client_of(found, max_retries=20, timeout=30)
    file = upload(client, found)
    valid = upload(client, found, "valid.jsonl")
    jobs = [
        client.fine_tuning.jobs.create(
            model="base", training_file=file, validation_file=valid, seed=seed, suffix=f"s{seed}"
        ).id
        for seed in range(3)
    ]
    service = Service.open(Settings(workdir=found.workdir, models={"base": ""}))
    content = b'{"messages": []}\n' * 100_000
    kills = {"server": 0, "worker": 0, "run": 0, "check": 0}
    while sum(kills.values()) < 50:
        time.sleep(chance.uniform(0.05, 2.0))
        kind = chance.choice(["server", "worker", "run", "check"])
        words = {"worker": "jaxft.service.worker", "run": "train", "check": "jaxft.service.checker"}
        if kind == "server":
            thread = subprocess.Popen(  # an upload is under way when it dies
                [sys.executable, "-c", _UPLOAD, found.url], stdin=subprocess.PIPE, stderr=-3
            )
            assert thread.stdin is not None
            thread.stdin.write(content[:100])
            time.sleep(0.3)
            found.kill()
            found.start()
            thread.kill()
            thread.communicate()
        else:
            place = [] if kind == "check" else [str(found.workdir)]
            running = found.processes(words[kind], *place)
            # What dies five times without getting anywhere has failed, as it should.
            if kind == "check" and kills[kind] == 4:
                continue
            if kind == "run" and _has_died_often(service, jobs):
                continue
            if not running:
                continue
            os.kill(chance.choice(running), signal.SIGKILL)
        kills[kind] += 1
    for job in jobs:
        wait(client, job, "succeeded", seconds=300)
    names = set()
    for seed, job in enumerate(jobs):
        records = read_records(found.workdir / "jobs" / job / "run" / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, 24)), "each step counts once"
        events = list(client.fine_tuning.jobs.list_events(job))
        steps = [e.message for e in events if "training loss" in e.message]
        assert len(steps) == len(set(steps)) == 23
        assert sum("New fine-tuned model" in e.message for e in events) == 1
        names.add(client.fine_tuning.jobs.retrieve(job).fine_tuned_model)
        assert f":s{seed}:" in max(names)
    assert len(names) == 3
    for item in client.files.list():  # whole or absent
        assert len(client.files.content(item.id).read()) == item.bytes
    service.database.close()


_UPLOAD = """
import sys, httpx
def pieces():
    yield b'--x\\r\\ncontent-disposition: form-data; name="purpose"\\r\\n\\r\\nfine-tune\\r\\n'
    yield b'--x\\r\\ncontent-disposition: form-data; name="file"; filename="a"\\r\\n\\r\\n'
    while True:
        yield b"{}" * 5000
        import time; time.sleep(0.01)
httpx.post(sys.argv[1] + "/files", content=pieces(),
           headers={"content-type": "multipart/form-data; boundary=x"})
"""


def _has_died_often(service: Service, jobs: list[str]) -> bool:
    with service.database.read() as connection:
        rows = [one(connection, schema.jobs, id=job) for job in jobs]
    return any(row is not None and row["failures"] >= 3 for row in rows)
