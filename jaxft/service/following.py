"""Reads what a run has written, as events, checkpoints and the file of results of its job."""

import csv
import functools
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.files import read_jsonl

KEPT_EPOCHS = 3
"""Ends of epochs whose checkpoints are kept, the last ones."""

_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's workdir, read without jax.

    Attributes:
      path: The folder.
    """

    path: Path

    def result(self) -> dict[str, Any] | None:
        """Returns how the run ended; None if it is under way, or was killed."""
        try:
            return json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def forget_result(self) -> None:
        """Deletes what an earlier start said of its end."""
        (self.path / "result.json").unlink(missing_ok=True)

    def metrics(self, *, after: int = 0) -> list[dict[str, Any]]:
        """Returns the figures of training steps."""
        return [r for r in _records(self.path / "metrics.jsonl") if r["step"] > after]

    def evaluations(self, *, after: int = -1) -> list[dict[str, Any]]:
        """Returns the figures of validation data."""
        return [
            record
            for record in _records(self.path / "eval.jsonl")
            if record["step"] > after and record.get("dataset", "validation") == "validation"
        ]

    def checkpoints(self) -> list[int]:
        """Returns the steps of complete checkpoints, the earliest first."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        # Orbax gives a checkpoint its name of digits alone when it is complete.
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _records(path: Path) -> Sequence[dict[str, Any]]:
    """Returns the objects of a file, which may be absent and is read again once it has changed."""
    return _file(path).read()


@functools.lru_cache(maxsize=16)
def _file(path: Path) -> "_File":
    return _File(path)


class _File:
    """A file of which the last version that was read is kept, and no earlier one."""

    def __init__(self, path: Path):
        self._path = path
        self._kept: tuple[tuple[int, int], Sequence[dict[str, Any]]] = (-1, -1), ()

    def read(self) -> Sequence[dict[str, Any]]:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return ()
        kept, version = self._kept, (found.st_size, found.st_mtime_ns)
        if kept[0] != version:
            kept = self._kept = version, tuple(read_jsonl(self._path))
        return kept[1]


def trained(record: dict[str, Any], steps: int) -> tuple[str, dict[str, Any]]:
    """Returns message and data of the event for a training step."""
    loss = record.get("loss")
    figures = {
        "step": record["step"],
        "total_steps": steps,
        "train_loss": _number(loss),
        "train_mean_token_accuracy": _number(_accuracy(record)),
    }
    message = f"Step {record['step']}/{steps}: training loss={_text(loss)}"
    return message, figures


def evaluated(record: dict[str, Any], steps: int) -> tuple[str, dict[str, Any]]:
    """Returns message and data of the event for an evaluation."""
    loss, accuracy = _number(record.get("loss")), _number(_accuracy(record))
    figures = {
        "step": record["step"],
        "total_steps": steps,
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }
    message = f"Step {record['step']}/{steps}: validation loss={_text(loss)}"
    return message, figures


def checkpoint_metrics(folder: RunFolder, step: int) -> dict[str, Any]:
    """Returns the figures of a checkpoint: of its step, or the last ones before."""
    found: dict[str, Any] = {"step": step}
    for record in folder.metrics():
        if record["step"] <= step:
            found |= trained(record, 0)[1]
    for record in folder.evaluations():
        if record["step"] == step:
            found |= evaluated(record, 0)[1]
    found.pop("total_steps", None)
    return {**found, "step": step}


def results_csv(folder: RunFolder) -> bytes:
    """Returns the figures of all steps as a table; a cell is empty where a step has none."""
    rows: dict[int, dict[str, Any]] = {}
    for record in folder.metrics():
        row = rows.setdefault(record["step"], {})
        row |= {"train_loss": record.get("loss"), "train_accuracy": _accuracy(record)}
    for record in folder.evaluations():
        row = rows.setdefault(record["step"], {})
        row["valid_loss"] = record.get("loss")
        row["valid_mean_token_accuracy"] = _accuracy(record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_cells(step, rows[step]) for step in sorted(rows))
    return text.getvalue().encode()


def _cells(step: int, row: dict[str, Any]) -> Iterator[Any]:
    yield step
    for name in _COLUMNS[1:]:
        value = _number(row.get(name))
        yield "" if value is None else f"{value:.6g}"


def _accuracy(record: dict[str, Any]) -> Any:
    """Returns the share of right tokens, or of pairs whose chosen answer is preferred."""
    return record.get("token_accuracy", record.get("accuracy"))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not finite"
