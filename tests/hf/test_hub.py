"""Folders and repositories; the repositories are served by a real HTTP server on this machine."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxft.errors import ModelError
from jaxft.hf.hub import resolve

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"another layout",
    "README.md": b"text",
}
REPOS = {
    "org/tiny": FILES,
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "org/empty": {"config.json": b"{}"},
    "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"},
    "org/gated_files": FILES,
}


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the Hub that a download asks for."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")  # pyright: ignore
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            org, name, *rest = path.removeprefix("api/models/").split("/")
            self.answer_api(f"{org}/{name}", rest)
        elif "/resolve/" in path:
            repo, _, file = path.partition("/resolve/")
            if repo == "org/gated_files":
                return self.answer(401, b"{}", "GatedRepo", "Access to this model is restricted")
            content = REPOS[repo].get(file.partition("/")[2])
            if content is None:
                return self.answer(404, b"{}", "EntryNotFound", "Entry not found")
            self.answer(200, content)
        else:
            self.answer(404, b"{}")

    def answer_api(self, repo: str, rest: list[str]):
        if repo == "org/gated":
            self.answer(403, b"{}", "GatedRepo", "Access to model org/gated is restricted")
        elif repo == "org/private":
            self.answer(401, b"{}", "RepoNotFound", "Invalid username or password.")
        elif repo == "org/stale_token":
            self.answer(401, b"{}", "", "Invalid credentials in Authorization header")
        elif repo not in REPOS:
            self.answer(404, b"{}", "RepoNotFound", "Repository not found")
        elif rest[1:] and rest[1] not in ("main", COMMIT):
            self.answer(404, b"{}", "RevisionNotFound", "Invalid rev id")
        elif rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                for name, content in REPOS[repo].items()
            ]
            self.answer(200, json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": name} for name in REPOS[repo]]
            body = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(body).encode())

    def answer(self, status: int, body: bytes, code: str = "", message: str = ""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.asked: list[str] = []


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Fetch = Callable[..., str]


def run_resolve(cache: Path, endpoint: str, repo: str, **options) -> str:
    """Runs `resolve` in a process of its own: the Hub's client reads its settings once."""
    environment = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_OFFLINE="0")
    environment |= options.pop("environment", {})
    program = (
        "import sys, json; from jaxft.hf.hub import resolve; from jaxft.errors import ModelError\n"
        "try: print(resolve(sys.argv[1], **json.loads(sys.argv[2])))\n"
        "except ModelError as error: print('ModelError:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, repo, json.dumps(options)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Fetch:
    return functools.partial(run_resolve, tmp_path, f"http://127.0.0.1:{server.server_port}")


def test_a_folder_is_returned_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny") == Path("org/tiny")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match=r"There is no folder .*(nowhere|a/b/c)"):
        resolve(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; name the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_repository_arrives_without_what_is_not_used(fetch):
    folder = Path(fetch("org/tiny"))
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {file.name for file in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_without_weights_no_safetensors_are_downloaded(fetch):
    names = {file.name for file in Path(fetch("org/tiny", weights=False)).iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja"}


def test_offline_uses_the_cache_and_no_network(fetch, server):
    folder = fetch("org/tiny")
    asked = len(server.asked)
    assert fetch("org/tiny", environment={"HF_HUB_OFFLINE": "1"}) == folder
    assert len(server.asked) == asked


def test_offline_without_cache_says_how_to_get_it(fetch, server):
    asked = len(server.asked)
    answer = fetch("org/tiny", environment={"HF_HUB_OFFLINE": "1"})
    assert answer.startswith("ModelError: There is no folder org/tiny. As a repository, org/tiny")
    assert "HF_HUB_OFFLINE is set" in answer
    assert "hf download org/tiny" in answer
    assert len(server.asked) == asked


def test_offline_with_configs_alone_in_the_cache_is_not_taken_for_a_model(fetch):
    fetch("org/tiny", weights=False)
    answer = fetch("org/tiny", environment={"HF_HUB_OFFLINE": "1"})
    assert "org/tiny is not in the cache" in answer
    assert "HF_HUB_OFFLINE is set" in answer


@pytest.mark.parametrize("repo", ["org/tinny", "org/private"])
def test_a_missing_repository_is_explained(fetch, repo):
    answer = fetch(repo)
    assert f"There is no folder {repo}. There is no repository {repo!r} either" in answer
    assert "hf auth login" in answer


@pytest.mark.parametrize("repo", ["org/gated", "org/gated_files"])
def test_a_gated_repository_names_page_and_token(fetch, server, repo):
    answer = fetch(repo)
    page = f"http://127.0.0.1:{server.server_port}/{repo}"
    assert answer.startswith(f"ModelError: {repo} is gated. Accept its terms at {page}")
    assert "hf auth login" in answer
    assert "HF_TOKEN" in answer


def test_a_token_that_is_not_accepted_is_explained(fetch):
    answer = fetch("org/stale_token")
    assert "refused access to org/stale_token (401)" in answer
    assert "hf auth login" in answer


def test_a_missing_revision_is_named(fetch):
    assert "org/tiny has no revision 'v9'" in fetch("org/tiny", revision="v9")


def test_a_name_that_is_no_repository_id_is_explained(fetch):
    answer = fetch("a tiny model")
    assert "no folder a tiny model. 'a tiny model' is no repository id" in answer


def test_no_network_is_explained(tmp_path):
    answer = run_resolve(tmp_path, "http://127.0.0.1:9", "org/tiny")
    assert "no folder org/tiny. It is no repository in the cache either" in answer
    assert "http://127.0.0.1:9 is out of reach" in answer
    assert "Check the network" in answer


def test_an_adapter_is_fetched_with_its_weights(fetch):
    assert (Path(fetch("org/adapter")) / "adapter_model.safetensors").is_file()


def test_pickled_weights_are_refused_with_the_conversion(fetch):
    answer = fetch("org/pickled")
    assert "org/pickled holds PyTorch's pickled weights" in answer
    assert "M.from_pretrained('org/pickled', dtype='auto')" in answer


def test_a_repository_without_weights_is_refused(fetch):
    assert "org/empty has no weights in safetensors" in fetch("org/empty")
