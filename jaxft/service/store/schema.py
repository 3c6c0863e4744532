"""Tables of the database. A change here needs a migration; a test compares the two."""

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)


def _order() -> sa.Column:
    """Returns the column that tells what came first; ids are of chance."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("number", number, primary_key=True, autoincrement=True)


def _time(name: str = "created_at", *, nullable: bool = False) -> sa.Column:
    """Returns a column of whole seconds since 1970, as clients get them."""
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _text(name: str, length: int, *, nullable: bool = False, **options: Any) -> sa.Column:
    return sa.Column(name, sa.String(length), nullable=nullable, **options)


def _json(name: str, *, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


files = sa.Table(
    "files",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _time(),
    sa.Column("bytes", sa.BigInteger(), nullable=False),
    _text("filename", 512),
    _text("purpose", 40),
    _text("status", 20),
    sa.Column("status_details", sa.Text()),
    _time("expires_at", nullable=True),
)

uploads = sa.Table(
    "uploads",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _time(),
    sa.Column("bytes", sa.BigInteger(), nullable=False),
    _text("filename", 512),
    _text("purpose", 40),
    _text("mime_type", 200),
    _text("status", 20),
    _time("expires_at"),
    sa.Column("file_seconds", sa.BigInteger()),  # time that the file made of it is kept
    _text("file_id", 80, nullable=True),
)

parts = sa.Table(
    "parts",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _text("upload_id", 80, index=True),
    _time(),
    sa.Column("bytes", sa.BigInteger(), nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _time(),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    _time("estimated_finish", nullable=True),
    _text("status", 24, index=True),
    _text("model", 512),
    _text("tuned_name", 700),  # of what it makes, shown once that is there
    _text("training_file", 80),
    _text("validation_file", 80, nullable=True),
    _text("suffix", 64, nullable=True),
    sa.Column("seed", sa.BigInteger(), nullable=False),
    _text("method", 24),
    _json("asked"),  # hyperparameters as the request has them
    _json("hyperparameters"),  # as they are resolved
    _json("integrations"),
    _json("metadata"),
    sa.Column("trained_tokens", sa.BigInteger()),
    _json("error", nullable=True),
    _json("result_files"),
    sa.Column("legacy", sa.Boolean(), nullable=False),  # made by the oldest form of the call
    # Of the worker: which start of the run it is, what runs it and where, and what was read of it.
    sa.Column("attempt", sa.Integer(), nullable=False),
    sa.Column("failures", sa.Integer(), nullable=False),
    _text("handle", 300, nullable=True),
    _text("devices", 200, nullable=True),
    _text("taken_by", 200, nullable=True),
    _time("taken_until", nullable=True),
    sa.Column("seen_step", sa.Integer(), nullable=False),
    sa.Column("seen_evaluation", sa.Integer(), nullable=False),
    sa.Column("steps", sa.Integer()),
    sa.Column("epoch_steps", sa.Float()),
)

events = sa.Table(
    "events",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _text("job_id", 80, index=True),
    _time(),
    _text("level", 8),
    sa.Column("message", sa.Text(), nullable=False),
    _text("type", 8),
    _json("data", nullable=True),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _text("job_id", 80, index=True),
    _time(),
    sa.Column("step", sa.Integer(), nullable=False),
    _json("metrics"),
    sa.UniqueConstraint("job_id", "step"),
)

models = sa.Table(
    "models",
    metadata,
    _order(),
    _text("name", 750, unique=True),
    _time(),
    _text("job_id", 80, index=True),
    sa.Column("step", sa.Integer(), nullable=False),
)

previews = sa.Table(
    "previews",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _time(),
    _text("status", 16),
    _json("request"),
    _json("result", nullable=True),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    _order(),
    _text("id", 80, unique=True),
    _time(),
    _json("body"),
    sa.Column("attempts", sa.Integer(), nullable=False),
    _time("next_at"),
    _time("done_at", nullable=True),
)

tokens = sa.Table(
    "tokens",
    metadata,
    _order(),
    _text("name", 80, unique=True),
    _time(),
    _text("digest", 64),  # SHA-256 of the token
)
