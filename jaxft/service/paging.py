"""Lists that clients page through: newest first, `after` the last id of the page before."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jaxft.service.errors import ApiError
from jaxft.service.state import Service, in_thread
from jaxft.service.store.database import Row


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list.

    Attributes:
      after: Id that the page begins behind; empty: at the start.
      limit: Most objects.
      ascending: Whether the oldest come first.
    """

    after: str
    limit: int
    ascending: bool = False


def page_of(query: Mapping[str, str], *, limit: int, most: int) -> Page:
    """Reads the parameters of a list.

    Args:
      query: Of the request.
      limit: Objects of a page that asks for no number.
      most: Most that may be asked for.

    Raises:
      ApiError: If they cannot be understood.
    """
    text = query.get("limit", str(limit))
    if not (re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= most):
        raise ApiError(f"limit is {text!r}; expected a number from 1 to {most}.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise ApiError(f"order is {order!r}; expected 'asc' or 'desc'.", param="order")
    return Page(query.get("after", ""), int(text), order == "asc")


def find_page(
    connection: sa.Connection, table: sa.Table, page: Page, *where: Any
) -> tuple[list[Row], bool]:
    """Returns the rows of a page, and whether there are more.

    Raises:
      ApiError: If `after` is no id of the list.
    """
    query = sa.select(table).where(*where)
    if page.after:
        known = sa.select(table.c.number).where(table.c.id == page.after, *where)
        number = connection.execute(known).scalar()
        if number is None:
            raise ApiError(f"after is {page.after!r}, which is not in this list.", param="after")
        beyond = table.c.number > number if page.ascending else table.c.number < number
        query = query.where(beyond)
    order = table.c.number.asc() if page.ascending else table.c.number.desc()
    rows = connection.execute(query.order_by(order).limit(page.limit + 1)).mappings().all()
    return [dict(row) for row in rows[: page.limit]], len(rows) > page.limit


async def read_page(
    service: Service, table: sa.Table, page: Page, *where: Any
) -> tuple[list[Row], bool]:
    """Returns what `find_page` does, in a transaction of its own."""

    def find() -> tuple[list[Row], bool]:
        with service.database.read() as connection:
            return find_page(connection, table, page, *where)

    return await in_thread(find)


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Returns the object of a list."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": first,
        "last_id": last,
    }
