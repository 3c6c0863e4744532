"""Two hundred requests that no client should send: each gets an error in the known shape."""

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jaxft.service.state import Service
from tests.service.test_files import stored

NUMBERS = [
    "none", "%2e%2e", "..%2f..%2fservice.db", "file-", "file-a/../b", "a" * 5000, "%00",
    "file-%00", "' OR 1=1 --", "file-JhX1DehIePhWlAmBeDeg576Q", "ftjob-none", "%ff%fe", "null",
]  # fmt: skip
WITH_ID = [
    ("GET", "/files/{}"),
    ("GET", "/files/{}/content"),
    ("DELETE", "/files/{}"),
    ("POST", "/uploads/{}/cancel"),
    ("GET", "/fine_tuning/jobs/{}"),
    ("POST", "/fine_tuning/jobs/{}/cancel"),
    ("GET", "/fine_tuning/jobs/{}/events"),
    ("GET", "/models/{}"),
    ("DELETE", "/models/{}"),
]
VALUES: list[Any] = [None, 3, -1, 1e400, True, [], {}, "", "\x00", "x" * 100_000, [[]], {"a": {}}]
FIELDS = ["model", "training_file", "hyperparameters", "method", "suffix", "metadata"]


def requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for (method, path), number in itertools.product(WITH_ID, NUMBERS):
        yield method, path.format(number), {}
    for field, value in itertools.product(FIELDS, VALUES):
        if value is None and field in ("suffix", "metadata", "method", "hyperparameters"):
            continue  # which says no more than leaving it out
        body = {"model": "base", "training_file": "file-none"} | {field: value}
        if value == 1e400:
            text = f'{{"model": "base", "training_file": "a", "{field}": 1e400}}'
            yield "POST", "/fine_tuning/jobs", {"content": text, "headers": _JSON}
        else:
            yield "POST", "/fine_tuning/jobs", {"json": body}
    for text in (b"", b"{", b"[1", b"\xff", b'"a"', b"1", b"null", b"{}{}", b"{'a': 1}"):
        for path in ("/fine_tuning/jobs", "/uploads", "/fine-tunes"):
            yield "POST", path, {"content": text, "headers": _JSON}
    for content in (b"", b"--x", b"--x\r\n\r\n", b"--x--", b"--y\r\n", b"--x\r\n" * 1000):
        yield "POST", "/files", {"content": content, "headers": _FORM}
    for query in ("limit=0", "limit=-1", "limit=1e9", "limit=", "after=x", "order=up", "limit=²"):
        for path in ("/files", "/fine_tuning/jobs"):
            yield "GET", f"{path}?{query}", {}


_JSON = {"content-type": "application/json"}
_FORM = {"content-type": "multipart/form-data; boundary=x"}


def test_bad_requests_get_the_documented_error_and_leave_nothing(url: str, service: Service):
    count = 0
    with httpx.Client(base_url=f"{url}/v1") as client:
        for method, path, options in requests():
            answer = client.request(method, path, **options)
            where = f"{method} {path[:80]} {str(options)[:80]}: {answer.text[:200]}"
            if "file-none" in str(options) and answer.status_code == 404:
                assert answer.json()["error"]["param"] in ("training_file", "model"), where
            assert 400 <= answer.status_code < 500, where
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"], where
            assert "Traceback" not in answer.text and "site-packages" not in answer.text, where
            count += 1
        assert count > 200
        for path in ("/files", "/fine_tuning/jobs"):
            assert client.get(path).json()["data"] == []
    assert not stored(service)
    assert not list((service.settings.workdir / "tmp").iterdir())


@pytest.mark.parametrize("purpose", ["fine-tune"])
def test_a_form_of_many_parts_is_refused(url: str, purpose: str):
    files = [("file", (f"{i}", b"x")) for i in range(50)]
    answer = httpx.post(f"{url}/v1/files", files=files, data={"purpose": purpose})
    assert answer.status_code == 400
