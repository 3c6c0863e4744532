"""Objects as clients read them, made of rows of the database."""

from typing import Any

from jaxft.service.store.database import Row


def file_object(row: Row) -> dict[str, Any]:
    """Returns a file."""
    names = "id bytes created_at filename purpose status status_details expires_at".split()
    return {"object": "file", **{name: row[name] for name in names}}


def upload_object(row: Row, file: Row | None = None) -> dict[str, Any]:
    """Returns an upload, with the file that it became."""
    names = "id bytes created_at filename purpose status expires_at".split()
    made = None if file is None else file_object(file)
    return {"object": "upload", **{name: row[name] for name in names}, "file": made}


def part_object(row: Row) -> dict[str, Any]:
    """Returns a part of an upload."""
    names = ("id", "created_at", "upload_id")
    return {"object": "upload.part", **{name: row[name] for name in names}}


def job_object(row: Row, organization: str) -> dict[str, Any]:
    """Returns a job of an organization, which has an id."""
    names = (
        "id created_at finished_at estimated_finish status model training_file "
        "validation_file seed trained_tokens error result_files integrations metadata"
    ).split()
    shown = row["hyperparameters"]
    return {
        "object": "fine_tuning.job",
        **{name: row[name] for name in names},
        "fine_tuned_model": _tuned_model(row),
        "organization_id": organization,
        "user_provided_suffix": row["suffix"],
        "hyperparameters": shown,
        "method": {"type": row["method"], row["method"]: {"hyperparameters": shown}},
    }


def _tuned_model(row: Row) -> str | None:
    return row["tuned_name"] if row["status"] == "succeeded" else None


def event_object(row: Row) -> dict[str, Any]:
    """Returns an event of a job."""
    names = ("id", "created_at", "level", "message", "type", "data")
    return {"object": "fine_tuning.job.event", **{name: row[name] for name in names}}


def checkpoint_object(row: Row, model: str) -> dict[str, Any]:
    """Returns a checkpoint; `model` is the name of what its job makes."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": row["id"],
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": checkpoint_model(model, row["step"]),
        "fine_tuning_job_id": row["job_id"],
        "metrics": row["metrics"],
        "step_number": row["step"],
    }


def checkpoint_model(model: str, step: int) -> str:
    """Returns the name of a model as it was after a step."""
    return f"{model}:ckpt-step-{step}"


def model_object(name: str, created_at: int, owner: str) -> dict[str, Any]:
    """Returns a model."""
    return {"id": name, "object": "model", "created": created_at, "owned_by": owner}


_OLDEST_STATUS = {"validating_files": "pending", "queued": "pending", "paused": "pending"}


def oldest_object(
    row: Row, organization: str, files: dict[str, Row], events: list[Row]
) -> dict[str, Any]:
    """Returns a job in the form of the first scripts."""

    def listed(*numbers: str | None) -> list[dict[str, Any]]:
        return [file_object(files[number]) for number in numbers if number in files]

    shown = dict(row["hyperparameters"])
    return {
        "object": "fine-tune",
        "id": row["id"],
        "created_at": row["created_at"],
        "updated_at": row["finished_at"] or row["started_at"] or row["created_at"],
        "model": row["model"],
        "fine_tuned_model": _tuned_model(row),
        "organization_id": organization,
        "status": _OLDEST_STATUS.get(row["status"], row["status"]),
        "hyperparams": shown | {"prompt_loss_weight": 0.0},
        "training_files": listed(row["training_file"]),
        "validation_files": listed(row["validation_file"]),
        "result_files": listed(*row["result_files"]),
        "events": [
            {
                "object": "fine-tune-event",
                "created_at": event["created_at"],
                "level": event["level"],
                "message": event["message"],
            }
            for event in events
        ],
    }
