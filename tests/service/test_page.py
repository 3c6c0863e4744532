"""The routes that the page has beside OpenAI's, without a browser."""

import io
import json
import re
import subprocess
import sys
import tarfile
import time

import httpx
import pytest

from jaxft.files import write_json
from jaxft.service import gate
from jaxft.service.app import make_app
from jaxft.service.bodies import JobCreate
from jaxft.service.checks import Checks
from jaxft.service.gate import new_token
from jaxft.service.jobs import make_job
from jaxft.service.page import archives, exports
from jaxft.service.server import prepare
from jaxft.service.settings import Settings
from jaxft.service.store import schema
from jaxft.service.store.database import add, now
from tests.service.serving import serving


def port_of(server):
    return server.servers[0].sockets[0].getsockname()[1]


BODY = {"model": "base", "training_file": "file-a"}


@pytest.fixture
def service(tmp_path):
    settings = Settings(workdir=tmp_path / "service", models={"base": str(tmp_path / "base")})
    found = prepare(settings)
    with found.database.write() as connection:
        values = {"bytes": 1, "status": "processed", "status_details": None, "expires_at": None}
        for number, purpose in (("file-a", "fine-tune"), ("file-b", "user_data")):
            add(
                connection,
                schema.files,
                **{"id": number, "created_at": now(), "filename": "<b>.jsonl"} | values,
                purpose=purpose,
            )
    yield found
    found.database.close()


@pytest.fixture
def client(service):
    with (
        serving(make_app(service), host="127.0.0.1", port=0) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port_of(server)}") as found,
    ):
        yield found


@pytest.fixture
def tuned(service):
    """The name of a tuned model, of a job whose run wrote a report and figures."""
    job = make_job(service, JobCreate(**BODY))["id"]
    run = service.settings.run(job)
    run.mkdir(parents=True)
    write_json(service.settings.config(job), {"adapter.rank": 16})
    (run / "report.html").write_text("<h1>report</h1>")
    lines = [{"step": n, "loss": 3 / n, "trained_tokens": 9 * n} for n in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "eval.jsonl").write_text('{"step": 4, "loss": 2.5, "dataset": "validation"}\n')
    with service.database.write() as connection:
        add(connection, schema.models, name="ft:base:x", created_at=now(), job_id=job, step=4)
        connection.execute(schema.jobs.update().values(status="succeeded", seen_step=4, steps=4))
    return "ft:base:x"


def test_the_page_runs_only_its_own_script_and_holds_no_data(service, client, monkeypatch):
    monkeypatch.setattr(gate, "_KNOWN_FOR", -1.0)  # tokens are read for each request
    token = new_token(service, "a")
    first, second = client.get("/"), client.get("/")
    policy = first.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert nonce not in second.text
    tags = re.findall(r"<(?:script|style)[^>]*>", first.text)
    assert tags == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|innerHTML|\sstyle=""", first.text)
    assert client.get("/v1/jaxft/jobs").status_code == 401
    assert client.get("/").status_code == 200
    known = {"Authorization": f"Bearer {token}"}
    assert client.get("/v1/jaxft/jobs", headers=known).status_code == 200


def test_a_preview_is_checked_as_a_job_would_be_and_is_answered_by_the_worker(service, client):
    asked = client.post("/v1/jaxft/previews", json=BODY).json()
    assert asked["status"] == "waiting"
    checks, seen = Checks(service), []
    checks._ask = lambda _, request: seen.append(request) or {"config": {"secret": 1}, "steps": 3}
    checks.look_at_previews()
    checks._pool.shutdown(wait=True)
    checks.look_at_previews()
    found = client.get(f"/v1/jaxft/previews/{asked['id']}").json()
    assert found["status"] == "done" and found["result"] == {"steps": 3}
    assert seen[0]["training_name"] == "<b>.jsonl" and seen[0]["shown"]
    for change, param in (
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": "file-b"}, "training_file"),
        ({"model": "nothing"}, "model"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"surplus": 1}, "surplus"),
    ):
        refused = client.post("/v1/jaxft/previews", json=BODY | change)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == param
    assert client.get("/v1/jaxft/previews/preview-none").status_code == 404
    for _ in range(20):
        last = client.post("/v1/jaxft/previews", json=BODY)
    assert last.status_code == 200
    assert client.post("/v1/jaxft/previews", json=BODY).status_code == 429


def test_a_job_is_shown_with_its_progress_its_charts_and_its_report(client, service, tuned):
    [job] = client.get("/v1/jaxft/jobs").json()["data"]
    assert (job["step"], job["steps"], job["training_name"]) == (4, 4, "<b>.jsonl")
    one = client.get(f"/v1/jaxft/jobs/{job['id']}").json()
    assert one["forms"] == ["adapter", "merged"] and one["has_report"]
    [loss, *_] = client.get(f"/v1/jaxft/jobs/{job['id']}/charts").json()["data"]
    assert [item["name"] for item in loss["series"]] == ["training", "validation"]
    assert len(loss["hover"][0]["points"]) == 4 and loss["shapes"] and loss["up"]
    with (service.settings.run(job["id"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.5, "trained_tokens": 45}\n')
    [loss, *_] = client.get(f"/v1/jaxft/jobs/{job['id']}/charts").json()["data"]
    assert len(loss["hover"][0]["points"]) == 5
    url = client.post(f"/v1/jaxft/jobs/{job['id']}/report").json()["url"]
    report = client.get(url)
    assert report.text == "<h1>report</h1>"
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in report.headers["content-security-policy"]
    assert client.get("/open/guess").status_code == 404
    assert client.get("/v1/jaxft/jobs/ftjob-none/charts").status_code == 404
    models = client.get("/v1/jaxft/models").json()["data"]
    assert [(item["name"], item.get("base")) for item in models] == [
        (tuned, "base"),
        ("base", None),
    ]


def test_an_export_is_made_once_and_sent_as_an_archive(client, service, tuned, monkeypatch):
    asked, commands = {"model": tuned, "form": "merged"}, []
    where = {"params": asked}

    def wait(command, log):
        commands.append(command)
        time.sleep(0.1)
        if len(commands) == 1:
            raise RuntimeError(f"no room in {service.settings.workdir}/x")
        folder = log.parent / "model"
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "deep/weights").write_bytes(b"w" * 1500)

    def answer():
        client.post("/v1/jaxft/exports", json=asked)
        again = client.post("/v1/jaxft/exports", json=asked).json()
        assert again["status"] == "making" and again["url"] is None
        while (found := client.get("/v1/jaxft/exports", **where).json())["status"] == "making":
            time.sleep(0.01)
        return found

    monkeypatch.setattr(exports, "_wait_for", wait)
    assert client.get("/v1/jaxft/exports", **where).status_code == 404  # nobody asked for it
    failed = answer()
    assert (failed["status"], failed["message"]) == ("failed", "no room in …/x")
    made = answer()
    assert len(commands) == 2 and commands[0][-2:] == ["--step=4", "--merge"]
    assert client.post("/v1/jaxft/exports", json=asked).json()["status"] == "ready"
    sent = client.get(made["url"])
    assert sent.headers["content-disposition"] == 'attachment; filename="ft-base-x-merged.tar"'
    assert len(sent.content) == made["bytes"] == int(sent.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(sent.content)) as archive:
        names = archive.getnames()
        assert names == ["ft-base-x-merged/config.json", "ft-base-x-merged/deep/weights"]
        member = archive.extractfile(names[1])
        assert member is not None and member.read() == b"w" * 1500
    for refused in ({"form": "model"}, {"model": "base"}, {"model": "none"}, {"form": "../x"}):
        assert client.post("/v1/jaxft/exports", json=asked | refused).status_code in (400, 404)
    assert client.delete(f"/v1/models/{tuned}").status_code == 200
    assert client.get(made["url"]).status_code == 404
    assert not list(service.settings.workdir.rglob("deep"))


def test_a_command_that_fails_is_told_in_its_own_words(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no such step'); sys.exit(2)"]
    with pytest.raises(RuntimeError, match="no such step"):
        exports._wait_for(command, tmp_path / "log.txt")


def test_an_archive_says_its_size_whatever_names_and_sizes_are(tmp_path):
    (tmp_path / "deep").mkdir()
    with (tmp_path / "deep" / "weights").open("wb") as file:
        file.truncate(9 << 30)  # a hole: nothing is written
    entries = archives.entries_of(tmp_path, "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 120)
    head = next(archives.pieces_of(entries))
    assert archives.size_of(entries) == len(head) + (9 << 30) + 1024
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024)), mode="r|") as archive:
        member = archive.next()
        assert member is not None and member.size == 9 << 30
        assert member.name.endswith("/deep/weights")


def test_charts_are_drawn_without_jax():
    code = "import sys, jaxft.reporting.curves; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
