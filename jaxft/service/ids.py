"""Ids of objects: a prefix that says what it is, and letters and digits of chance."""

import re
import secrets
import string

_LETTERS = string.ascii_letters + string.digits
_FORM = re.compile(r"[a-z]+(-[a-z]+)*[-_][A-Za-z0-9]+")


def new_id(prefix: str, length: int = 24) -> str:
    """Returns an id such as `file-…`, which nobody can guess."""
    return prefix + letters(length)


def letters(length: int) -> str:
    """Returns letters and digits of chance."""
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def is_id(text: str) -> bool:
    """Returns whether a text can be an id. Only such texts become parts of paths."""
    return bool(_FORM.fullmatch(text)) and len(text) < 80
