"""Errors of the API, in the shape that clients of OpenAI know."""

from typing import Any


class ApiError(Exception):
    """An answer other than the one asked for.

    Args:
      message: What is wrong, and what to do.
      status: HTTP status. A client asks again after 408, 409, 429 and from 500 on: what asking
        again does not change is 400.
      param: Field of the request that is wrong, dotted.
      code: Word that programs know the error by.
      kind: Class of the error.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.code, self.kind, self.headers = code, kind, headers or {}

    def body(self) -> dict[str, Any]:
        """Returns the object that clients read."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def not_found(kind: str, number: str, *, param: str | None = None) -> ApiError:
    """Returns the error for an id that nothing has; `kind` is such as 'file'."""
    hint = "It may have been deleted; list what there is to see."
    if kind == "file" and not number.startswith("file-"):
        hint = "That is no id: upload the file by client.files.create, and pass the id it gets."
    return ApiError(
        f"No such {kind}: {number!r}. {hint}",
        status=404,
        param=param or "id",
        code="not_found",
    )
