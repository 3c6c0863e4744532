"""Tokens, names, bounds and the shape of errors."""

import httpx
import openai
import pytest
from openai import OpenAI

from jaxft.errors import ConfigError
from jaxft.service import gate
from jaxft.service.app import make_app
from jaxft.service.gate import drop_token, new_token, read_digests
from jaxft.service.server import is_loopback, serve
from jaxft.service.settings import Settings
from jaxft.service.state import Service
from tests.service.conftest import serving


def test_a_token_is_required_once_there_is_one(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "_KNOWN_FOR", -1.0)  # look at each request
    with serving(make_app(service)) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        token = new_token(service, "ci")
        assert token not in str(read_digests(service))
        with OpenAI(base_url=f"{url}/v1", api_key=token) as client:
            assert [m.id for m in client.models.list()] == ["base"]
        for wrong in ("", "x", token[:-1], token.upper(), f"{token} x"):
            headers = {"authorization": f"Bearer {wrong}"} if wrong else {}
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health").status_code == 200
        assert drop_token(service, "ci") and not drop_token(service, "ci")
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_no_header_gets_past_the_token_and_without_one_an_open_address_is_shut(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gate, "_KNOWN_FOR", -1.0)
    new_token(service, "ci")
    with serving(make_app(service, needs_token=True)) as url:
        for host in ("127.0.0.1/health?", "127.0.0.1/?", "x/open/"):
            answer = httpx.get(f"{url}/v1/files", headers={"host": host})
            assert answer.status_code in (400, 401), host
        drop_token(service, "ci")
        assert httpx.get(f"{url}/v1/files").status_code == 401


def test_an_error_does_not_say_where_things_lie(service: Service, url: str):
    workdir = str(service.settings.workdir)
    answer = httpx.get(f"{url}/v1/models/{workdir}")
    assert answer.status_code == 404 and workdir not in answer.text


def test_every_error_has_the_shape_that_clients_know(url: str):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/elsewhere", 404),
        ("PATCH", "/v1/files", 405),
        ("GET", "/v1/files/../../etc/passwd", 404),
        ("GET", "/v1/files/..%2F..%2Fservice.db", 404),
        ("GET", "/v1/models/..%2F..%2Fetc", 404),
        ("GET", "/v1/fine_tuning/jobs?limit=0", 400),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 400),
        ("POST", "/v1/fine_tuning/jobs", 400),
    ):
        answer = httpx.request(method, f"{url}{path}")
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"].startswith("req_")


def test_a_fault_of_the_server_tells_nothing_but_its_number(
    service: Service, url: str, caplog: pytest.LogCaptureFixture
):
    service.database.close()
    with service.database.write() as connection:
        connection.exec_driver_sql("DROP TABLE files")
    answer = httpx.get(f"{url}/v1/files")
    assert answer.status_code == 500 and answer.headers["x-request-id"] in answer.text
    assert "SELECT" not in answer.text and "SELECT" in caplog.text


def test_pages_of_other_sites_and_other_names_are_refused(service: Service):
    with serving(make_app(service, hosts=("127.0.0.1", "localhost"))) as url:
        host = url.removeprefix("http://")
        get = lambda **headers: httpx.get(f"{url}/v1/models", headers=headers).status_code  # noqa: E731
        assert get(origin=url) == 200
        assert get(origin="https://evil.example") == 403
        assert get(origin="null") == 403
        for other, status in (
            (f"evil.example:{host.partition(':')[2]}", 421),
            ("localhost", 200),
            ("[::1]:80", 421),
            ("[", 421),
            ("", 421),
        ):
            assert get(host=other) == status, other


def test_rates_are_bounded(tmp_path):
    settings = Settings(workdir=tmp_path, models={"base": "x"}, requests_per_minute=3)
    from jaxft.service.server import prepare

    service = prepare(settings)
    with serving(make_app(service)) as url:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for _ in range(3):
                client.models.list()
            with pytest.raises(openai.RateLimitError) as error:
                client.models.list()
        assert 0 < int(error.value.response.headers["retry-after"]) <= 60
    service.database.close()


def test_a_body_beyond_its_bound_is_refused(url: str):
    answer = httpx.post(f"{url}/v1/fine_tuning/jobs", json={"model": "x" * (9 << 20)})
    assert answer.status_code == 413

    def pieces():
        for _ in range(10):
            yield b" " * (1 << 20)

    answer = httpx.post(
        f"{url}/v1/fine_tuning/jobs",
        content=pieces(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413


def test_an_address_open_to_others_needs_a_token(tmp_path):
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    settings = Settings(workdir=tmp_path, models={"base": "x"})
    with pytest.raises(ConfigError, match="new_token"):
        serve(settings, host="0.0.0.0", port=0)
