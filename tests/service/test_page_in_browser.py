"""The page in a real browser: what it shows, asks for and does."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from jaxft.files import write_json
from jaxft.service import gate
from jaxft.service.app import make_app
from jaxft.service.bodies import JobCreate
from jaxft.service.gate import new_token
from jaxft.service.history import add_event
from jaxft.service.jobs import make_job
from jaxft.service.server import prepare
from jaxft.service.settings import Settings
from jaxft.service.store import schema
from jaxft.service.store.database import add, change, now, one
from tests.service.serving import serving
from tests.tiny_run import write_base, write_chats

EVIL = "<img src=x onerror=pwned()>'\"&${1}{{2}}"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install '.[page-test]'"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # Without its sandbox, which needs more rights than a container has: pages are ours.
        yield started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    """A page on which nothing may go wrong: no error of a script, nothing that its policy refuses.

    What the server refuses is told to the console too, and is no error.
    """
    found, problems = browser.new_page(viewport={"width": 1280, "height": 900}), []
    found.set_default_timeout(20_000)
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    yield found
    found.close()
    assert [said for said in problems if "Failed to load resource" not in said] == []


@pytest.fixture
def service(tmp_path):
    """A service that holds a job and whose users wrote markup wherever they could."""
    settings = Settings(workdir=tmp_path / "service", models={"base": str(tmp_path / "base")})
    found = prepare(settings)
    with found.database.write() as connection:
        add(
            connection,
            schema.files,
            id="file-a",
            created_at=now(),
            bytes=9,
            filename=EVIL + ".jsonl",
            purpose="fine-tune",
            status="processed",
            status_details=None,
            expires_at=None,
        )
    body = JobCreate(model="base", training_file="file-a", metadata={EVIL: EVIL})
    job = make_job(found, body)["id"]
    settings.job(job).mkdir()
    write_json(settings.config(job), {"adapter.rank": 16})
    with found.database.write() as connection:
        change(
            connection,
            schema.jobs,
            {"id": job},
            suffix=EVIL,
            status="running",
            steps=8,
            seen_step=4,
        )
        add_event(connection, job, EVIL, level="error")
        values = {"id": "ftckpt_a", "job_id": job, "created_at": now(), "step": 4, "metrics": {}}
        add(connection, schema.checkpoints, **values)
        add(connection, schema.models, name="ft:" + EVIL, created_at=now(), job_id=job, step=4)
    yield found
    found.database.close()


@contextlib.contextmanager
def served(service):
    """Serves the page, with models that answer by rule: `base` ends, others do not."""
    app = make_app(service)

    async def answer(scope, receive, send):
        if scope["path"] != "/v1/chat/completions":
            await app(scope, receive, send)
            return
        asked = await Request(scope, receive).json()

        async def pieces():
            for piece in ("You said ", asked["messages"][-1]["content"], "!"):
                yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
            while asked["model"] != "base":
                yield 'data: {"choices": [{"delta": {"content": " on"}}]}\n\n'
                await asyncio.sleep(0.02)
            yield "data: [DONE]\n\n"

        await StreamingResponse(pieces())(scope, receive, send)

    with serving(answer, host="127.0.0.1", port=0) as server:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextlib.contextmanager
def run(command):
    """Runs a command during the block, whose lines can be read."""
    started = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    with started:
        try:
            yield started
        finally:
            started.terminate()


def job_of(service):
    with service.database.read() as connection:
        return one(connection, schema.jobs, suffix=EVIL)


@pytest.mark.slow(seconds=8)
def test_what_users_wrote_is_text_in_every_view_and_fits_a_phone(service, page):
    sample = {"origin": EVIL, "label": "", "runs": [{"text": EVIL, "trained": True}]}
    counts = {"formats": [EVIL], "documents": 9, "tokens": 90, "trained_tokens": 40, "longest": 12}
    counts |= {
        "skipped": 0,
        "duplicates": 1,
        "also_in_training": None,
        "refusal": EVIL,
        "name": "train",
    }
    counts["histogram"] = [{"from": 1, "to": 12, "count": 9}]
    result = {"examples": 9, "rows": 9, "tokens": 90, "trained_tokens": 40, "steps": 3}
    result |= {"step_seconds": 2.0, "takes": EVIL, "hyperparameters": {"n_epochs": 3}}
    result |= {"data": {"tokenizer": EVIL, "template": EVIL, "sets": [counts], "samples": [sample]}}
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    job = job_of(service)["id"]
    page.add_init_script("window.pwned = () => { window.wasPwned = true; };")
    with served(service) as url:
        page.goto(url)
        for view in ("jobs", f"jobs/{job}", "new/file-a", "compare", "models", "%", "jobs/none"):
            page.goto(f"{url}/#{view}")
            if view == "new/file-a":
                page.wait_for_selector(".busy")
                with service.database.write() as connection:
                    connection.execute(
                        schema.previews.update().values(status="done", result=result)
                    )
                page.wait_for_selector(".sample .trained")
                assert page.inner_text(".sample .trained") == EVIL
            if view == f"jobs/{job}":
                page.get_by_text(EVIL, exact=True).nth(2).wait_for()
            page.locator("#view").filter(has_not_text="Loading").wait_for()
            assert page.evaluate("document.querySelectorAll('#view img, #view script').length") == 0
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= PHONE["width"], view
        assert page.evaluate("window.wasPwned") is None
        assert "No such fine-tuning job" in page.inner_text("#view")


@pytest.mark.slow(seconds=4)
def test_a_job_is_followed_paused_resumed_and_cancelled(service, page):
    job = job_of(service)["id"]
    with served(service) as url:
        page.goto(f"{url}/#jobs")
        page.click(f"text={EVIL}")  # its name
        page.wait_for_url(f"**/#jobs/{job}")
        assert page.get_attribute(".progress progress", "value") == "4"
        with service.database.write() as connection:
            change(connection, schema.jobs, {"id": job}, seen_step=6)
            add_event(connection, job, "Step 6/8: training loss=1.5", data={"step": 6})
        page.wait_for_selector("progress[value='6']")
        assert not page.is_visible("text=training loss=1.5")
        page.check("text=with the figures of steps")
        page.wait_for_selector("text=training loss=1.5")
        page.click("button:text('Pause')")
        page.wait_for_selector(".chip.paused")
        page.click("button:text('Resume')")
        page.wait_for_selector(".chip.queued")
        page.click("button:text('Cancel')")
        page.click("dialog button:text('Keep')")
        assert job_of(service)["status"] == "queued"
        page.click("button:text('Cancel')")
        page.click("dialog button:text('Cancel the job')")
        page.wait_for_selector(".chip.cancelled")
        assert job_of(service)["status"] == "cancelled"
        assert page.locator(".job-head button").count() == 0


@pytest.mark.slow(seconds=4)
def test_two_models_answer_side_by_side_until_they_are_stopped(service, page):
    with served(service) as url:
        page.goto(f"{url}/#compare")
        page.wait_for_selector(".pane select")
        page.select_option(".pane:nth-child(1) select", "base")
        page.select_option(".pane:nth-child(2) select", "ft:" + EVIL)
        page.fill("textarea[aria-label=Prompt]", "<b>hello</b>")
        page.press("textarea[aria-label=Prompt]", "Enter")
        first, second = (page.locator(".turn.assistant").nth(number) for number in range(2))
        page.locator(".turns small:not(:empty)").wait_for()
        assert first.inner_text() == "You said <b>hello</b>!"
        second.filter(has_text="on on on").wait_for()
        assert page.is_disabled("button:text('Send')")
        page.click("button:text('Stop')")
        page.wait_for_selector("text=stopped")
        page.wait_for_selector("button:text('Send'):enabled")
        said = second.inner_text()
        page.fill("textarea[aria-label=Prompt]", "more")
        page.select_option(".pane:nth-child(2) select", "base")  # begins anew
        page.click("button:text('Send')")
        page.locator(".turn.assistant").nth(2).wait_for()
        assert said.startswith("You said <b>hello</b>! on on")


@pytest.mark.slow(seconds=6)
def test_the_newest_tuned_model_is_compared_with_its_own_base_and_names_are_whole(service, page):
    service.settings.models.update(other="other", last="last")
    name = "ft:other:local:a-name-that-is-longer-than-a-phone-is-wide:12345678"
    job = make_job(service, JobCreate(model="other", training_file="file-a"))["id"]
    with service.database.write() as connection:
        for tuned in (name, name + ":ckpt-step-9"):
            add(connection, schema.models, name=tuned, created_at=now(), job_id=job, step=9)

    def chosen():
        page.wait_for_selector(".pane select")
        return [item.input_value() for item in page.locator(".pane select").all()]

    with served(service) as url:
        page.goto(f"{url}/#compare")
        assert chosen() == ["other", name]
        assert not page.is_visible(".whole-name")
        page.goto("about:blank")
        page.goto(f"{url}/#compare/last")  # as 'Try' of a base model does
        assert chosen() == ["last", name]
        page.set_viewport_size(PHONE)
        assert page.locator(".whole-name").nth(1).inner_text() == name
        assert page.evaluate(
            "[...document.querySelectorAll('.whole-name')]"
            ".every(shown => shown.scrollWidth <= shown.clientWidth)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.slow(seconds=4)
def test_a_key_is_asked_for_and_is_forgotten_with_the_tab(service, page, browser, monkeypatch):
    monkeypatch.setattr(gate, "_KNOWN_FOR", -1.0)  # tokens are read for each request
    token = new_token(service, "a")
    with served(service) as url:
        page.goto(url)
        page.fill("dialog input", "sk-wrong")
        page.click("text=Go on")
        page.wait_for_selector("text=does not know this API key")
        page.fill("dialog input", token)
        page.press("dialog input", "Enter")
        page.wait_for_selector(".cards")
        page.click("nav >> text=Models and files")
        page.wait_for_selector(".cards code")
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        page.reload()
        page.wait_for_selector(".cards code")
        other = browser.new_page()
        other.goto(url)
        other.wait_for_selector("dialog[open] input")
        other.close()


@pytest.mark.slow(seconds=60)
def test_three_clicks_from_a_file_to_a_tuned_model(tmp_path, page):
    write_base(tmp_path / "base")
    file = write_chats(tmp_path / "train.jsonl", 40)
    command = [sys.executable, "-m", "jaxft", "serve", f"--models={tmp_path / 'base'}"]
    command += [f"--workdir={tmp_path / 'service'}", "--port=0"]
    with run(command) as server:
        assert server.stdout is not None
        while not (found := re.search(r"The page: (\S+)", server.stdout.readline())):
            assert server.poll() is None
        page.goto(found[1])
        page.click("nav >> text=New job")
        with page.expect_file_chooser() as chooser:
            page.click("[aria-label='Training file']")
        chooser.value.set_files(file)
        page.wait_for_selector(".new-form button.main:enabled", timeout=90_000)
        assert page.inner_text(".tile.lead strong") == "40"
        assert page.get_attribute("input[name=lora_rank]", "placeholder") == "auto: 16"
        assert "<user>say " in page.inner_text(".sample .masked >> nth=0")
        assert page.inner_text(".sample .trained >> nth=0").endswith("<end>")
        page.click(".new-form button.main")
        page.wait_for_selector(".chip.succeeded", timeout=180_000)
        page.wait_for_selector("figure.wide .plot path.line")
        page.wait_for_selector(".job-checkpoints code")
        with page.expect_download(timeout=60_000) as download:
            page.click("text=Download adapter")
        assert re.fullmatch(r"ft-base-local-\w{8}-adapter.tar", download.value.suggested_filename)
        with page.context.expect_page() as opened:
            page.click("button:text('Report')")
        opened.value.hover(".plot >> nth=0")
        opened.value.wait_for_selector(".tip")  # its script runs,
        with pytest.raises(Exception, match="sessionStorage"):  # without reach of this server
            opened.value.evaluate("sessionStorage.length")
