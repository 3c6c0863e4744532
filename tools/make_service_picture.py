"""Makes the picture of the service's page: docs/images/service-page.png.

    pip install '.[page-test,test]' && python tools/make_service_picture.py

It serves the demo's base model, tunes it on the demo's complaints, and looks at the job. Needs
Chromium, which draws the page without a window; takes about two minutes.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from pictures import ROOT, begin, check_size
from playwright.sync_api import sync_playwright

from jaxft.demo import BASE
from jaxft.demo.cases import held_out_cases, train_cases, write_cases

SIZE = {"width": 1280, "height": 900}
LARGEST = 200_000  # bytes
HYPERPARAMETERS = {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 10.0}


def main() -> int:
    """Draws the picture."""
    chromium, output = begin(__doc__, ROOT / "docs/images/service-page.png")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxft", "serve", f"--models=demo={BASE}", "--port=0"]
        command += [f"--workdir={folder}/service"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            try:
                url = address(server)
                job = tune(url, Path(folder))
                draw(chromium, f"{url}#jobs/{job}", output)
            finally:
                server.terminate()
    check_size(output, LARGEST)
    return 0


def address(server: subprocess.Popen[str]) -> str:
    """Returns the address of the page, once the server says it."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"The page: (\S+)", line):
            return found[1]
    sys.exit("The server did not start.")


def tune(url: str, folder: Path) -> str:
    """Returns the id of a job that has succeeded."""
    client = OpenAI(base_url=f"{url}v1", api_key="none")
    sets = {"complaints": train_cases(400), "complaints-held-out": held_out_cases(80)}
    train, valid = (
        client.files.create(file=write_cases(folder / f"{name}.jsonl", cases), purpose="fine-tune")
        for name, cases in sets.items()
    )
    job = client.fine_tuning.jobs.create(
        model="demo",
        training_file=train.id,
        validation_file=valid.id,
        suffix="departments",
        seed=0,
        hyperparameters=HYPERPARAMETERS,
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        sys.exit(f"The job is {job.status}: {job.error}")
    return job.id


def draw(chromium: str, url: str, output: Path) -> None:
    """Writes the top of a page as it is after a moment."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(url)
        page.wait_for_selector(".plot path.line")
        page.screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
