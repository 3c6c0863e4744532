"""The database: connections, transactions, and its migration to the present tables."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from jaxft.errors import ConfigError

# Seconds that a writer of SQLite waits for another one.
_PATIENCE = 30
_CONNECTIONS = 20

type Row = dict[str, Any]


class Database:
    """SQLite or PostgreSQL. Its methods block: a server calls them in threads.

    Args:
      url: As SQLAlchemy has it: `sqlite:////path/service.db`, `postgresql+psycopg://user@host/name`.
    """

    def __init__(self, url: str):
        try:
            parsed = sa.make_url(url.replace("postgres://", "postgresql://", 1))
            if parsed.get_backend_name() == "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            elif parsed.get_backend_name() != "sqlite":
                raise ConfigError(
                    f"--database={parsed.render_as_string()}: expected sqlite:////folder/file.db or postgresql://…."
                )
            self.is_sqlite = parsed.get_backend_name() == "sqlite"
            # Connections to a server break while they rest.
            self._engine = sa.create_engine(
                parsed,
                pool_size=_CONNECTIONS,
                max_overflow=0,
                pool_pre_ping=not self.is_sqlite,
            )
        except (ArgumentError, ImportError) as error:
            raise ConfigError(
                f"--database: {error}. For PostgreSQL install 'psycopg[binary]'."
            ) from error
        if self.is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._writing = self._engine.execution_options(writes=True)
        self._counting: Any = None  # a connection of SQLite that sees the commits of all others

    def migrate(self) -> None:
        """Makes the tables, or brings those of an earlier version up to date.

        Raises:
          ConfigError: If the database cannot be reached, or is of a later version.
        """
        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self._writing.begin() as connection:
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
        except (SQLAlchemyError, CommandError) as error:
            raise ConfigError(
                f"The database {self._engine.url.render_as_string()} cannot be used: {error}. "
                "Check that it is there and writable, and was made by this version of jaxft."
            ) from error

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database."""
        with self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is done as a whole, or not at all. SQLite has one at a time."""
        with self._writing.begin() as connection:
            yield connection

    def commits(self) -> int | None:
        """Returns a number that every commit of any process changes; None where none is known.

        It takes microseconds and waits for nobody. One thread alone may ask.
        """
        if not self.is_sqlite:
            return None
        if self._counting is None:
            opened = self._engine.raw_connection()
            self._counting = opened.driver_connection
            opened.detach()
            self._counting.execute("PRAGMA busy_timeout=0")
        try:
            return self._counting.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.OperationalError:  # another one repairs the database
            return None

    def close(self) -> None:
        """Ends all connections."""
        if self._counting is not None:
            self._counting.close()
            self._counting = None
        self._engine.dispose()


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    cursor = connection.cursor()
    # With a write-ahead log readers do not wait for writers; a commit is on disk when it returns.
    for setting in (
        "journal_mode=WAL",
        "synchronous=FULL",
        f"busy_timeout={_PATIENCE * 1000}",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    # A transaction that began by reading could not become a writer once another one has written.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def now() -> int:
    """Returns the time as columns hold it."""
    return int(time.time())


def one(
    connection: sa.Connection, table: sa.Table, *, locks: bool = False, **values: Any
) -> Row | None:
    """Returns the row in which columns have these values, if there is one.

    Args:
      connection: In a transaction.
      table: The table.
      locks: Whether no other transaction may change the row before this one ends: what is read of
        it holds when it is written. SQLite has one writer at a time anyway.
      values: Of columns.
    """
    query = sa.select(table).where(*_equal(table, values))
    found = connection.execute(query.with_for_update() if locks else query).mappings().first()
    return None if found is None else dict(found)


def add(connection: sa.Connection, table: sa.Table, **values: Any) -> Row:
    """Adds a row; returns it."""
    connection.execute(sa.insert(table).values(**values))
    return values


def change(connection: sa.Connection, table: sa.Table, where: Row, **values: Any) -> bool:
    """Changes the rows in which columns have the values of `where`; a tuple is one of several.

    Returns:
      Whether there were any.
    """
    found = connection.execute(sa.update(table).where(*_equal(table, where)).values(**values))
    return bool(found.rowcount)


def remove(connection: sa.Connection, table: sa.Table, **values: Any) -> bool:
    """Deletes the rows in which columns have these values; returns whether there were any."""
    return bool(connection.execute(sa.delete(table).where(*_equal(table, values))).rowcount)


def _equal(table: sa.Table, values: Row) -> list[Any]:
    return [
        table.c[name].in_(value) if isinstance(value, tuple) else table.c[name] == value
        for name, value in values.items()
    ]
