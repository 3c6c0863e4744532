"""Files and uploads: /v1/files, /v1/uploads."""

import hashlib
import re
import shutil
from typing import Any

import sqlalchemy as sa
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jaxft.formatting import format_bytes
from jaxft.service.answers import reused
from jaxft.service.bodies import ExpiresAfter, UploadComplete, UploadCreate, read_body, read_values
from jaxft.service.errors import ApiError, not_found
from jaxft.service.history import ACTIVE
from jaxft.service.ids import new_id
from jaxft.service.objects import file_object, part_object, upload_object
from jaxft.service.paging import listed, page_of, read_page
from jaxft.service.state import Service, in_thread, service_of
from jaxft.service.store import schema
from jaxft.service.store.database import Row, add, change, now, one, remove

_GIVEN = ("fine-tune", "batch", "assistants", "user_data")  # those that a client may name
_MOST_FILES = 10_000
_MOST_FIELDS = 8
_UPLOAD_SECONDS = 3600


async def create_file(request: Request) -> Response:
    """Stores a file that comes as a form."""
    service = service_of(request)
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        file, name = _file_of(form, "file")
        purpose = _checked_purpose(form.get("purpose"))
        seconds = _seconds(form)
        unknown = set(form) - {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
        if unknown:
            raise ApiError(f"Unknown field {min(unknown)!r}.", param=min(unknown))
        row = await in_thread(_store, service, file, name, purpose, seconds)
    return JSONResponse(file_object(row))


def _store(service: Service, file: UploadFile, name: str, purpose: str, seconds: int | None) -> Row:
    number = new_id("file-")
    with service.files.writer() as writer:
        shutil.copyfileobj(file.file, writer, 1 << 20)
        if not writer.size:
            raise ApiError("The file is empty.", param="file", code="empty_file")
        size = writer.keep(service.files.path(number))
    return add_file(service, number, name=name, purpose=purpose, size=size, seconds=seconds)


def add_file(
    service: Service,
    number: str,
    *,
    name: str,
    purpose: str,
    size: int,
    seconds: int | None = None,
    connection: sa.Connection | None = None,
) -> Row:
    """Notes a file whose content is stored already; without that it would be half there."""
    time = now()
    values: dict[str, Any] = {
        "id": number,
        "created_at": time,
        "bytes": size,
        "filename": name,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None if seconds is None else time + seconds,
    }
    if connection is not None:
        return add(connection, schema.files, **values)
    with service.database.write() as connection:
        return add(connection, schema.files, **values)


def _file_of(form: FormData, field: str) -> tuple[UploadFile, str]:
    file = form.get(field)
    if not isinstance(file, UploadFile):
        raise ApiError(
            f"{field} is missing: send the file as a part of a form, with a file name.",
            param=field,
            code="missing_required_parameter",
        )
    return file, _checked_name(file.filename or field)


def _checked_name(name: str) -> str:
    """Returns a name as it is shown; it never becomes a path."""
    shown = "".join(c for c in name.replace("\\", "/").rpartition("/")[2] if c.isprintable())
    return shown[:512] or "file"


def _checked_purpose(purpose: Any) -> str:
    if purpose not in _GIVEN:
        raise ApiError(
            f"purpose is {purpose!r}; expected {', '.join(_GIVEN)}. Data to train or validate on "
            "has the purpose 'fine-tune'.",
            param="purpose",
            code=None if purpose else "missing_required_parameter",
        )
    return purpose


def _seconds(form: FormData) -> int | None:
    anchor, text = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and text is None:
        return None
    seconds = int(text) if isinstance(text, str) and re.fullmatch(r"\d{1,9}", text) else text
    try:
        return read_values({"anchor": anchor, "seconds": seconds}, ExpiresAfter).seconds
    except ApiError as error:
        error.param = f"expires_after.{error.param}"
        raise


def find_file(connection: sa.Connection, number: str, *, param: str | None = None) -> Row:
    """Returns a file that has not expired.

    Raises:
      ApiError: If there is none.
    """
    row = one(connection, schema.files, id=number)
    if row is None or (row["expires_at"] is not None and row["expires_at"] <= now()):
        raise not_found("file", number, param=param)
    return row


async def list_files(request: Request) -> Response:
    """Lists files."""
    service, query = service_of(request), request.query_params
    page = page_of(query, limit=_MOST_FILES, most=_MOST_FILES)
    table = schema.files
    where = [sa.or_(table.c.expires_at.is_(None), table.c.expires_at > now())]
    if purpose := query.get("purpose"):
        where.append(table.c.purpose == purpose)
    rows, has_more = await read_page(service, table, page, *where)
    return JSONResponse(listed([file_object(row) for row in rows], has_more))


async def retrieve_file(request: Request) -> Response:
    """Describes a file."""
    return JSONResponse(file_object(await _found(request)))


async def file_content(request: Request) -> Response:
    """Sends a file."""
    row = await _found(request)
    path = service_of(request).files.path(row["id"])
    # As a download: a browser must not show what others have sent as a page of this server.
    return FileResponse(path, media_type="application/octet-stream", filename=row["filename"])


async def delete_file(request: Request) -> Response:
    """Deletes a file, unless a job that is not over needs it."""
    row, service = await _found(request), service_of(request)

    def delete() -> None:
        jobs = schema.jobs
        with service.database.write() as connection:
            used = sa.select(jobs.c.id).where(
                jobs.c.status.in_(ACTIVE),
                sa.or_(jobs.c.training_file == row["id"], jobs.c.validation_file == row["id"]),
            )
            if job := connection.execute(used).scalar():
                raise ApiError(
                    f"{row['id']} is needed by {job}. Cancel that job first, or wait for its end.",
                    code="file_in_use",
                )
            remove(connection, schema.files, id=row["id"])
        _remove_content(service, row["id"])

    await in_thread(delete)
    return JSONResponse({"id": row["id"], "object": "file", "deleted": True})


def _remove_content(service: Service, number: str) -> None:
    """Deletes a file, and the tokens that were made of it."""
    service.files.remove(number)
    for folder in (service.settings.workdir / "cache").glob(f"*{number}*"):
        shutil.rmtree(folder, ignore_errors=True)


async def _found(request: Request) -> Row:
    service, number = service_of(request), request.path_params["file"]

    def find() -> Row:
        with service.database.read() as connection:
            return find_file(connection, number)

    return await in_thread(find)


async def create_upload(request: Request) -> Response:
    """Begins a file that comes in parts."""
    service, body = service_of(request), await read_body(request, UploadCreate)
    _checked_purpose(body.purpose)
    most = service.settings.max_upload_bytes
    if body.bytes > most:
        raise ApiError(
            f"bytes is {body.bytes:,}; this server takes up to {format_bytes(most)}.", param="bytes"
        )
    time = now()

    def begin() -> Row:
        with service.database.write() as connection:
            return add(
                connection,
                schema.uploads,
                id=new_id("upload_"),
                created_at=time,
                bytes=body.bytes,
                filename=_checked_name(body.filename),
                purpose=body.purpose,
                mime_type=body.mime_type,
                status="pending",
                expires_at=time + _UPLOAD_SECONDS,
                file_seconds=body.expires_after.seconds if body.expires_after else None,
                file_id=None,
            )

    return JSONResponse(upload_object(await in_thread(begin)))


async def add_part(request: Request) -> Response:
    """Stores a part of an upload."""
    service, number = service_of(request), request.path_params["upload"]
    await in_thread(_pending, service, number)
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        file, _ = _file_of(form, "data")
        row = await in_thread(_store_part, service, number, file)
    return JSONResponse(part_object(row))


def _store_part(service: Service, upload: str, file: UploadFile) -> Row:
    part = new_id("part_")
    with service.parts.writer() as writer:
        shutil.copyfileobj(file.file, writer, 1 << 20)
        size = writer.keep(service.parts.path(part))
    with service.database.write() as connection:
        row = one(connection, schema.uploads, id=upload)
        held = sa.select(sa.func.coalesce(sa.func.sum(schema.parts.c.bytes), 0)).where(
            schema.parts.c.upload_id == upload
        )
        total = connection.execute(held).scalar_one() + size
        if row is None or row["status"] != "pending" or total > row["bytes"]:
            service.parts.remove(part)
            raise ApiError(
                f"The parts would have {total:,} bytes; the upload was begun with fewer, or is "
                "over.",
                param="data",
            )
        return add(
            connection, schema.parts, id=part, upload_id=upload, created_at=now(), bytes=size
        )


async def complete_upload(request: Request) -> Response:
    """Makes a file of the parts of an upload."""
    service, number = service_of(request), request.path_params["upload"]
    body = await read_body(request, UploadComplete)
    upload, file = await in_thread(_complete, service, number, body)
    return JSONResponse(upload_object(upload, file))


def _complete(service: Service, number: str, body: UploadComplete) -> tuple[Row, Row]:
    upload = _pending(service, number)
    with service.database.read() as connection:
        query = sa.select(schema.parts).where(schema.parts.c.upload_id == number)
        parts = {row["id"]: row["bytes"] for row in connection.execute(query).mappings()}
    if unknown := [part for part in body.part_ids if part not in parts]:
        raise ApiError(f"{unknown[0]!r} is no part of this upload.", param="part_ids")
    if len(set(body.part_ids)) < len(body.part_ids):
        raise ApiError("A part is named twice.", param="part_ids")
    total = sum(parts[part] for part in body.part_ids)
    if total != upload["bytes"]:
        raise ApiError(
            f"These parts have {total:,} bytes, and the upload was begun with {upload['bytes']:,}.",
            param="part_ids",
        )
    file = new_id("file-")
    size = service.files.join(file, body.part_ids, service.parts)
    try:
        _check_md5(service, file, body.md5)
        with service.database.write() as connection:
            if not change(
                connection,
                schema.uploads,
                {"id": number, "status": "pending"},
                status="completed",
                file_id=file,
            ):
                raise ApiError("The upload was completed or cancelled meanwhile.")
            row = add_file(
                service,
                file,
                name=upload["filename"],
                purpose=upload["purpose"],
                size=size,
                seconds=upload["file_seconds"],
                connection=connection,
            )
            remove(connection, schema.parts, upload_id=number)
    except ApiError:
        service.files.remove(file)
        raise
    for part in parts:
        service.parts.remove(part)
    return {**upload, "status": "completed"}, row


def _check_md5(service: Service, file: str, expected: str | None) -> None:
    if expected is None:
        return
    with service.files.path(file).open("rb") as opened:
        found = hashlib.file_digest(opened, "md5").hexdigest()
    if found != expected.lower():
        raise ApiError(f"The file's MD5 is {found}, not {expected}.", param="md5")


async def cancel_upload(request: Request) -> Response:
    """Drops an upload and its parts."""
    service, number = service_of(request), request.path_params["upload"]

    def cancel() -> Row:
        upload = _pending(service, number)
        parts = schema.parts
        with service.database.write() as connection:
            if not change(
                connection, schema.uploads, {"id": number, "status": "pending"}, status="cancelled"
            ):
                raise ApiError("The upload was completed or cancelled meanwhile.")
            query = sa.select(parts.c.id).where(parts.c.upload_id == number)
            names = connection.execute(query).scalars().all()
            remove(connection, parts, upload_id=number)
        for name in names:
            service.parts.remove(name)
        return {**upload, "status": "cancelled"}

    return JSONResponse(upload_object(await in_thread(cancel)))


def _pending(service: Service, number: str) -> Row:
    with service.database.read() as connection:
        upload = one(connection, schema.uploads, id=number)
    if upload is None:
        raise not_found("upload", number)
    status = upload["status"]
    if status == "pending" and upload["expires_at"] <= now():
        status = "expired"
    if status != "pending":
        raise ApiError(f"The upload {number} is {status}: begin another one.", code=status)
    return upload


def drop_expired(service: Service) -> None:
    """Deletes expired files and uploads, and contents that a killed server left without a row."""
    time = now()
    with service.database.write() as connection:
        files, uploads, parts = schema.files, schema.uploads, schema.parts
        old = (
            connection.execute(
                sa.select(uploads.c.id).where(
                    uploads.c.status == "pending", uploads.c.expires_at <= time
                )
            )
            .scalars()
            .all()
        )
        if old:
            change(connection, uploads, {"id": tuple(old)}, status="expired")
            remove(connection, parts, upload_id=tuple(old))
        jobs = schema.jobs
        is_needed = sa.exists().where(
            jobs.c.status.in_(ACTIVE),
            sa.or_(jobs.c.training_file == files.c.id, jobs.c.validation_file == files.c.id),
        )
        over = (files.c.expires_at <= time, ~is_needed)
        expired = connection.execute(sa.select(files.c.id).where(*over)).scalars().all()
        connection.execute(sa.delete(files).where(*over))
        known = {*connection.execute(sa.select(files.c.id)).scalars()}
        known_parts = {*connection.execute(sa.select(parts.c.id)).scalars()}
    for number in expired:
        _remove_content(service, number)
    for blobs, names in ((service.files, known), (service.parts, known_parts)):
        # What is being written has no row yet.
        young = time - _UPLOAD_SECONDS
        blobs.sweep([n for n, written in blobs.names() if n not in names and written < young])


ROUTES = [
    Route("/files", create_file, methods=["POST"]),
    Route("/files", reused(list_files)),
    Route("/files/{file}", reused(retrieve_file)),
    Route("/files/{file}", delete_file, methods=["DELETE"]),
    Route("/files/{file}/content", file_content),
    Route("/uploads", create_upload, methods=["POST"]),
    Route("/uploads/{upload}/parts", add_part, methods=["POST"]),
    Route("/uploads/{upload}/complete", complete_upload, methods=["POST"]),
    Route("/uploads/{upload}/cancel", cancel_upload, methods=["POST"]),
]
