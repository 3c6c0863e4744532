"""Exports of tuned models for download: each is made once, and kept until its model is deleted."""

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.service.bodies import Body, read_body
from jaxft.service.errors import ApiError
from jaxft.service.models import find_tuned
from jaxft.service.page import archives
from jaxft.service.page.links import Links
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store.database import Row

_SHOWN = 1500  # characters of what a failed export said

Form = Literal["adapter", "merged", "model"]


class ExportCreate(Body):
    """A tuned model to be exported.

    Attributes:
      model: Name of the model.
      form: `adapter` alone, the base `merged` with it, or a `model` trained whole.
    """

    model: str
    form: Form


@dataclass(slots=True)
class Export:
    """An export of one form.

    Attributes:
      folder: Path that it has once it is made.
      status: `making`, `ready` or `failed`.
      message: The reason why it failed.
    """

    folder: Path
    status: Literal["making", "ready", "failed"]
    message: str = ""


class Exports:
    """Makes exports one after another, each by `jaxft export` in a process of its own.

    Args:
      service: Whose models they are of.
    """

    def __init__(self, service: Service):
        self._settings = service.settings
        self._known: dict[Path, Export] = {}
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def find(self, model: Row, form: Form, *, begin: bool) -> Export | None:
        """Returns an export, begun if it was asked for and is not there; a failed one is again."""
        folder = self._settings.exports(model["job_id"]) / str(model["step"]) / form
        with self._lock:
            if folder.is_dir():
                self._known.pop(folder, None)
                return Export(folder, "ready")
            found = self._known.get(folder)
            if begin and (found is None or found.status != "making"):
                found = self._known[folder] = Export(folder, "making")
                # A daemon: the server does not wait for it when it ends.
                threading.Thread(target=self._make, args=(found, model, form), daemon=True).start()
            return found

    def _make(self, export: Export, model: Row, form: Form) -> None:
        try:
            with self._turn:
                self._run(export, model, form)
            export.status = "ready"
        except (OSError, RuntimeError) as error:
            shown = str(error).replace(str(self._settings.workdir), "…")
            export.status, export.message = "failed", shown

    def _run(self, export: Export, model: Row, form: Form) -> None:
        parent = export.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{form}-*"):  # by a server that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{form}-", dir=parent) as folder:
            made = Path(folder) / "model"
            command = [sys.executable, "-m", "jaxft", "export", f"--output={made}"]
            command += [f"--checkpoint={self._settings.run(model['job_id'])}"]
            command += [f"--step={model['step']}", *(["--merge"] if form == "merged" else [])]
            _wait_for(command, Path(folder) / "log.txt")
            made.rename(export.folder)


def _wait_for(command: list[str], log: Path) -> None:
    """Runs a command on CPU; raises RuntimeError with what it said if it fails."""
    # Devices are for jobs; an export is a matter of files.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    atexit.register(process.kill)
    try:
        status = process.wait()
    finally:
        atexit.unregister(process.kill)
    if status:
        said = log.read_text(errors="replace").strip()[-_SHOWN:]
        raise RuntimeError(said or f"jaxft export ended with {status}")


def forms_of(service: Service, job: str) -> list[Form]:
    """Returns the forms that the model of a job has; none before it is checked."""
    try:
        config = json.loads(service.settings.config(job).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    is_adapter = config.get("adapter.rank") or config.get("adapter.path")
    return ["adapter", "merged"] if is_adapter else ["model"]


async def create_export(request: Request) -> Response:
    """Begins an export, or finds the one that is made already."""
    body = await read_body(request, ExportCreate)
    return await _answer(request, body.model, body.form, begin=True)


async def retrieve_export(request: Request) -> Response:
    """Says how far an export is; one that is made has an address to be downloaded from."""
    query = request.query_params
    return await _answer(request, query.get("model", ""), query.get("form", ""), begin=False)


async def _answer(request: Request, name: str, form: str, *, begin: bool) -> Response:
    service, exports = service_of(request), request.app.state.exports
    found = await in_thread(_find, service, exports, name, form, begin)
    shown: dict[str, Any] = {
        "object": "jaxft.export",
        "model": name,
        "form": form,
        "status": found.status,
        "message": found.message,
        "bytes": None,
        "url": None,
    }
    if found.status == "ready":
        links: Links = request.app.state.links
        title = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{form}").strip(".-")
        entries = await in_thread(archives.entries_of, found.folder, title)
        shown |= {"bytes": archives.size_of(entries), "url": links.open(found.folder, title)}
    return JSONResponse(shown)


def _find(service: Service, exports: Exports, name: str, form: str, begin: bool) -> Export:
    with service.database.read() as connection:
        model = find_tuned(service, connection, name)
    known = forms_of(service, model["job_id"])
    if form not in known:
        raise ApiError(f"form is {form!r}; {name} has {', '.join(known) or 'none'}.", param="form")
    found = exports.find(model, form, begin=begin)  # pyright: ignore[reportArgumentType]
    if found is None:
        raise ApiError("Nobody has asked for this export; POST begins it.", status=404)
    return found
