"""The cells of a row: what is in them, as text, and how messages show them."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.data.json_text import loads as load_json
from jaxft.data.problems import RowError
from jaxft.errors import nearest_of


def as_row(value: Any) -> dict[str, Any]:
    """Returns a row of named columns; anything else is an error."""
    if not isinstance(value, dict):
        raise RowError(f"the row is {show(value)}; expected an object with named columns.")
    return value


def cell_text(row: dict[str, Any], key: str) -> str:
    """Returns a cell as text, numbers included; an absent, empty or missing one is an error."""
    if key not in row:
        raise missing(key, row)
    value = row[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{key!r} is {value}, a missing number; expected text.")
    if isinstance(value, bool | int | float):
        return _number_text(value, key)
    if not isinstance(value, str):
        raise RowError(f"{key!r} is {show(value)}; expected a string.")
    if not value.strip():
        raise RowError(f"{key!r} is empty; expected text.")
    return value


def missing(key: str, row: Mapping[str, Any]) -> RowError:
    """Returns the error of a row that lacks a key, which may have been mistyped."""
    has = ", ".join(row) or "no columns"
    return RowError(f"key {key!r} is missing; the row has {has}.{mistyped(row, key)}")


def mistyped(row: Any, *keys: str) -> str:
    """Returns " Did you mean 'x'?" for keys that an object lacks and has others alike; mostly ''.

    Each key of the object is taken for one at most.
    """
    rest = [key for key in row if key not in keys] if isinstance(row, Mapping) else []
    meant = []
    for key in keys:
        if rest and key not in row and (written := nearest_of(key, rest)):
            rest.remove(written)
            meant.append(key)
    return f" Did you mean {quoted(meant)}?" if meant else ""


def _number_text(value: bool | int | float, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        raise RowError(f"{key!r} is an integer of too many digits; expected text.") from None


def optional_text(row: dict[str, Any], key: str) -> str:
    """Returns a cell as text, or '' where it is absent, empty or missing."""
    value = row.get(key)
    is_missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return "" if is_missing else cell_text(row, key)


def describe_numbers(value: Any, columns: Iterable[str]) -> str:
    """Returns what a log should say of cells that are no text but become one; mostly ''."""
    row, found = as_row(value) if columns else {}, ""
    for column in columns:
        if isinstance(row.get(column), bool | int | float):
            with contextlib.suppress(RowError):  # which is told with the row
                kind = "true or false" if isinstance(row[column], bool) else "numbers"
                text = cell_text(row, column)
                found += f"; {column!r} holds {kind}, which become text such as {text!r}"
    return found


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or value == "" or value == [] or value == {}


def check_one_of(row: dict[str, Any], one: str, other: str) -> None:
    """Raises RowError for two columns of which one alone would be read."""
    if row.get(one) not in (None, "", []) and row.get(other) not in (None, "", [], row[one]):
        raise RowError(f"the row has both {one!r} and {other!r}; expected one of them.")


def parsed(text: str, where: str) -> Any:
    """Returns what a cell with JSON text holds."""
    try:
        return load_json(text)
    except ValueError as error:
        raise RowError(f"{where!r} is {show(text)}; expected JSON: {error}.") from error


def quoted(names: Iterable[str]) -> str:
    """Returns names in quotes, joined by 'and'."""
    return " and ".join(map(repr, names))


def show(value: Any) -> str:
    """Returns a value as JSON for a message, cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):
        text = "(a value that cannot be written)"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}…"
