"""Tables and their migrations, transactions, and contents of files."""

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from jaxft.errors import ConfigError
from jaxft.service.store import schema
from jaxft.service.store.blobs import Blobs
from jaxft.service.store.database import Database, add, change, now, one, remove


@pytest.fixture
def opened(tmp_path: Path, database: str) -> Database:
    found = Database(database or f"sqlite:///{tmp_path / 'a.db'}")
    found.migrate()
    return found


def test_migrations_make_the_tables_of_the_schema(opened: Database):
    opened.migrate()  # once more changes nothing
    with opened.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    opened.close()


def test_a_database_of_a_later_version_is_refused(opened: Database):
    with opened.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="this version of jaxft"):
        opened.migrate()
    opened.close()


def test_a_transaction_is_done_as_a_whole_or_not_at_all(opened: Database):
    with pytest.raises(ZeroDivisionError), opened.write() as connection:
        add(connection, schema.tokens, name="a", created_at=now(), digest="x")
        raise ZeroDivisionError
    with opened.write() as connection:
        assert one(connection, schema.tokens, name="a") is None
        assert not change(connection, schema.tokens, {"name": ("a", "b")}, digest="y")
        assert not remove(connection, schema.tokens, name="a")
    opened.close()


def test_commits_of_anyone_are_noticed(opened: Database):
    def write(database: Database) -> None:
        with database.write() as connection:
            add(connection, schema.tokens, name=str(time.time_ns()), created_at=0, digest="x")

    other = Database(opened._engine.url.render_as_string(hide_password=False))
    seen = [opened.commits()]
    if not opened.is_sqlite:
        assert seen == [None]
    else:
        for database in (opened, other, opened):
            write(database)
            assert opened.commits() not in seen
            seen.append(opened.commits())
            with other.read() as connection:
                one(connection, schema.tokens, name="a")
            assert opened.commits() == seen[-1]
    for database in (opened, other):
        database.close()


def test_writers_wait_for_one_another(opened: Database):
    """Each reads and then writes, which two at a time must not do."""
    with opened.write() as connection:
        add(connection, schema.tokens, name="a", created_at=0, digest="x")

    def count() -> None:
        for _ in range(20):
            with opened.write() as connection:
                query = sa.select(schema.tokens).where(schema.tokens.c.name == "a")
                row = connection.execute(query.with_for_update()).mappings().one()
                change(connection, schema.tokens, {"name": "a"}, created_at=row["created_at"] + 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened.read() as connection:
        assert one(connection, schema.tokens, name="a")["created_at"] == 80  # pyright: ignore
    opened.close()


@pytest.mark.parametrize("url", ["mysql://a/b", "nonsense", "postgresql://test@127.0.0.1:9/none"])
def test_a_database_that_cannot_be_used_is_named(url: str):
    with pytest.raises(ConfigError, match=url.partition(":")[0] if ":" in url else "--database"):
        Database(url).migrate()


def test_a_password_is_not_shown():
    with pytest.raises(ConfigError) as error:
        Database("postgresql://test:secret@127.0.0.1:9/none").migrate()
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        Database("mysql://test:secret@127.0.0.1/none")
    assert "secret" not in str(error.value)


def test_contents_are_whole_or_absent(tmp_path: Path):
    blobs = Blobs(tmp_path / "files")
    with pytest.raises(ZeroDivisionError), blobs.writer() as writer:
        writer.write(b"half")
        raise ZeroDivisionError
    assert not list(blobs.names())
    assert blobs.write("file-a", b"abc") == 3
    assert blobs.join("file-b", ["file-a", "file-a"], blobs) == 6
    assert blobs.path("file-b").read_bytes() == b"abcabc"
    blobs.remove("file-a")
    blobs.remove("file-a")
    assert [name for name, _ in blobs.names()] == ["file-b"]


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "/etc/passwd", "file-a/../b", "a" * 90, "a\n-b"]
)
def test_only_ids_become_paths(tmp_path: Path, name: str):
    blobs = Blobs(tmp_path)
    with pytest.raises(ValueError, match="no id"):
        blobs.path(name)
    (tmp_path / "kept").touch()
    blobs.sweep([name, "kept"])
    assert (tmp_path / "kept").exists()
