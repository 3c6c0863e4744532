"""Files and uploads by the real client."""

import hashlib
import os
import time
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from jaxft.service.files import drop_expired
from jaxft.service.state import Service
from jaxft.service.store import schema
from jaxft.service.store.database import change

LINES = b'{"messages": []}\n' * 20


def stored(service: Service) -> set[str]:
    return {name for name, _ in service.files.names()} | {n for n, _ in service.parts.names()}


def test_a_file_is_stored_listed_read_and_deleted(client: OpenAI, service: Service):
    file = client.files.create(file=("a b.jsonl", LINES), purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (len(LINES), "a b.jsonl", "processed")
    assert file.id.startswith("file-") and file.expires_at is None
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINES
    assert [f.id for f in client.files.list()] == [file.id]
    assert client.files.delete(file.id).deleted
    assert not stored(service)
    with pytest.raises(openai.NotFoundError) as error:
        client.files.retrieve(file.id)
    assert error.value.code == "not_found" and error.value.param == "id"


def test_files_are_paged_newest_first_and_chosen_by_purpose(client: OpenAI):
    numbers = [
        client.files.create(file=(f"{i}.jsonl", LINES), purpose="fine-tune").id for i in range(5)
    ]
    other = client.files.create(file=("x.txt", b"x"), purpose="user_data").id
    page = client.files.list(limit=2, purpose="fine-tune")
    assert [f.id for f in page.data] == [numbers[4], numbers[3]] and page.has_more
    assert [f.id for f in client.files.list(limit=2, purpose="fine-tune")] == numbers[::-1]
    assert [f.id for f in client.files.list(order="asc")] == [*numbers, other]
    with pytest.raises(openai.BadRequestError, match="not in this list") as error:
        client.files.list(after="file-abc")
    assert error.value.param == "after"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/abs/olute.jsonl", "olute.jsonl"),
        ("a" * 600, "a" * 512),
        ("..", ".."),
        ("tab\tnew\nline\x00.jsonl", "tab%09new%0Aline%00.jsonl"),
        ("Zoë – 数据.jsonl", "Zoë – 数据.jsonl"),
    ],
)
def test_names_are_shown_and_never_become_paths(
    client: OpenAI, service: Service, name: str, shown: str
):
    file = client.files.create(file=(name, LINES), purpose="fine-tune")
    assert file.filename == shown
    assert stored(service) == {file.id}


def test_a_file_expires(client: OpenAI, service: Service):
    file = client.files.create(
        file=("a", LINES),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    with service.database.write() as connection:
        change(connection, schema.files, {"id": file.id}, expires_at=int(time.time()) - 1)
    assert not list(client.files.list())
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    old = time.time() - 10_000
    os.utime(service.files.path(file.id), (old, old))
    drop_expired(service)
    assert not stored(service)


def test_a_file_that_a_job_needs_outlives_its_time(client: OpenAI, service: Service):
    file = client.files.create(file=("a", LINES), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="base", training_file=file).id
    with service.database.write() as connection:
        change(connection, schema.files, {"id": file}, expires_at=1)
    os.utime(service.files.path(file), (1, 1))
    drop_expired(service)
    assert stored(service) == {file}
    client.fine_tuning.jobs.cancel(job)
    drop_expired(service)
    assert not stored(service)


def test_the_tokens_of_a_file_go_with_it(client: OpenAI, service: Service):
    one, two = (client.files.create(file=("a", LINES), purpose="fine-tune").id for _ in range(2))
    for training, validation in ((one, None), (one, two), (two, None)):
        service.settings.cache(training, validation).mkdir(parents=True)
    client.files.delete(one)
    assert [p.name for p in (service.settings.workdir / "cache").iterdir()] == [f"{two}_"]


def test_wrong_forms_say_which_field_is_wrong(url: str, service: Service):
    def post(**parts: object) -> tuple[int, str | None]:
        answer = httpx.post(f"{url}/v1/files", **parts)  # pyright: ignore
        return answer.status_code, answer.json()["error"]["param"]

    form = {"purpose": "fine-tune"}
    assert post(data=form) == (400, "file")
    assert post(data={**form, "file": "text"}, files={}) == (400, "file")
    assert post(files={"file": ("a", b"x")}) == (400, "purpose")
    assert post(data={"purpose": "vision"}, files={"file": ("a", b"x")}) == (400, "purpose")
    assert post(data=form, files={"file": ("a", b"")}) == (400, "file")
    assert post(data={**form, "colour": "red"}, files={"file": ("a", b"x")}) == (400, "colour")
    expires = {**form, "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}
    assert post(data=expires, files={"file": ("a", b"x")}) == (400, "expires_after.seconds")
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert post(content=b"--x\r\nbroken", headers=broken)[0] == 400
    assert not stored(service)


def test_a_file_beyond_the_bound_is_refused_and_leaves_nothing(client: OpenAI, service: Service):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("a", b"x" * (4 << 20)), purpose="fine-tune")
    assert error.value.status_code == 413 and "client.uploads" in error.value.message
    assert not stored(service)
    assert not list((service.settings.workdir / "tmp").iterdir())


def test_an_upload_becomes_a_file(client: OpenAI, service: Service, tmp_path: Path):
    data = os.urandom(1_500_000)
    path = tmp_path / "big.jsonl"
    path.write_bytes(data)
    upload = client.uploads.upload_file_chunked(
        file=path,
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=400_000,
        md5=hashlib.md5(data).hexdigest(),
    )
    assert upload.status == "completed" and upload.file is not None
    assert client.files.content(upload.file.id).read() == data
    assert client.files.retrieve(upload.file.id).filename == "big.jsonl"
    assert stored(service) == {upload.file.id}
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.complete(upload.id, part_ids=["part_x"])


def test_parts_keep_the_order_that_is_asked_for(client: OpenAI):
    upload = client.uploads.create(
        bytes=6, filename="a", mime_type="text/plain", purpose="fine-tune"
    )
    b = client.uploads.parts.create(upload.id, data=b"def").id
    a = client.uploads.parts.create(upload.id, data=b"abc").id
    done = client.uploads.complete(upload.id, part_ids=[a, b])
    assert done.file is not None and client.files.content(done.file.id).read() == b"abcdef"


def test_wrong_uploads_say_why_and_leave_no_file(client: OpenAI, service: Service):
    def begin(size: int) -> str:
        return client.uploads.create(
            bytes=size, filename="a", mime_type="text/plain", purpose="fine-tune"
        ).id

    with pytest.raises(openai.BadRequestError, match="takes up to"):
        begin(5 << 20)
    upload = begin(3)
    with pytest.raises(openai.BadRequestError, match="begun with fewer"):
        client.uploads.parts.create(upload, data=b"abcd")
    part = client.uploads.parts.create(upload, data=b"ab").id
    for parts, match in (
        (["part_other"], "no part of this upload"),
        ([part, part], "named twice"),
        ([part], "have 2 bytes"),
    ):
        with pytest.raises(openai.BadRequestError, match=match):
            client.uploads.complete(upload, part_ids=parts)
    whole = begin(2)
    part = client.uploads.parts.create(whole, data=b"ab").id
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(whole, part_ids=[part], md5="0" * 32)
    assert client.uploads.cancel(whole).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.parts.create(whole, data=b"ab")
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")
    client.uploads.cancel(upload)
    assert not stored(service) and not list(client.files.list())


def test_an_upload_that_nobody_completes_expires_with_its_parts(client: OpenAI, service: Service):
    upload = client.uploads.create(
        bytes=3, filename="a", mime_type="text/plain", purpose="fine-tune"
    )
    part = client.uploads.parts.create(upload.id, data=b"abc").id
    with service.database.write() as connection:
        change(connection, schema.uploads, {"id": upload.id}, expires_at=1)
    with pytest.raises(openai.BadRequestError, match="is expired"):
        client.uploads.complete(upload.id, part_ids=[part])
    os.utime(service.parts.path(part), (1, 1))
    drop_expired(service)
    assert not stored(service)
