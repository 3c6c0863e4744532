"""Bodies of requests, read strictly: what is not understood is refused by name."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from jaxft.errors import nearest
from jaxft.service.errors import ApiError

Auto = Literal["auto"]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class Body(BaseModel):
    """An object of a request; fields that it does not name are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(Body):
    """Settings of a job; `auto` leaves one to documented rules.

    Attributes:
      n_epochs: Passes over the training data.
      batch_size: Examples in a step.
      learning_rate_multiplier: Factor of the base rate.
      beta: Weight of staying near the answers of the start, in DPO.
      lora_rank: Width of the adapter; 0 trains all of the model.
      max_length: Tokens of the longest example.
      config: Further keys of a run, such as `optim.weight_decay`.
    """

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"
    beta: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    lora_rank: Auto | Annotated[int, Field(ge=0, le=1024)] = "auto"
    max_length: Auto | Annotated[int, Field(ge=8, le=1 << 20)] = "auto"
    config: dict[str, str | int | float | bool] = {}


class Tuning(Body):
    """The settings of one method."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Body):
    """The objective of a job."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Tuning | None = None
    dpo: Tuning | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(Body):
    """The project that figures go to as well."""

    project: Annotated[str, Field(min_length=1, max_length=128)]


class Integration(Body):
    """Another service that a job tells of itself."""

    type: Literal["wandb"]
    wandb: Wandb


class JobCreate(Body):
    """A job to be made."""

    model: Annotated[str, Field(min_length=1, max_length=700)]
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None


class OldestCreate(Body):
    """A job to be made, in the form of the first scripts: `fine_tunes.create`."""

    model: str | None = None
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    n_epochs: Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | None = None
    prompt_loss_weight: Annotated[float, Field(ge=0, le=0)] | None = None


class ExpiresAfter(Body):
    """The end of an object's life."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class UploadCreate(Body):
    """A file to be sent in parts."""

    bytes: Annotated[int, Field(ge=1)]
    filename: Annotated[str, Field(min_length=1, max_length=512)]
    mime_type: Annotated[str, Field(max_length=200)]
    purpose: str
    expires_after: ExpiresAfter | None = None


class UploadComplete(Body):
    """The order of the parts."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


async def read_body[Read: BaseModel](request: Request, kind: type[Read]) -> Read:
    """Reads the JSON body of a request.

    Raises:
      ApiError: For what is no JSON object of this kind; `param` names the first field that is
        wrong.
    """
    content = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if content != "application/json":
        raise ApiError(f"The body is {content!r}; expected application/json.", status=415)
    text = await request.body()
    try:
        values = json.loads(text or b"{}", parse_constant=_refuse_constant)
    except ValueError as error:
        raise ApiError(f"The body is no JSON: {error}.", code="invalid_json") from error
    except RecursionError as error:
        raise ApiError("The body is nested too deeply.", code="invalid_json") from error
    _check_text(values)
    return read_values(values, kind)


def _check_text(value: Any) -> None:
    """Refuses texts that no file or database can hold: NUL, and halves of characters."""
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ApiError("The body holds a NUL or half a character (a lone surrogate).")
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
    elif isinstance(value, dict):
        _check_text(list(value))
        _check_text(list(value.values()))


def read_values[Read: BaseModel](values: Any, kind: type[Read]) -> Read:
    """Reads an object, as `read_body` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _described(error, kind) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _described(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    # Of a value that may be several things one error stands for all: the last, the most exact.
    details = error.errors(include_url=False)
    first = details[0]
    same = [d for d in details if _param(d) == _param(first)]
    worst = same[-1]
    param = ".".join(_param(worst))
    if worst["type"] == "extra_forbidden":
        return _unknown(param, kind)
    if worst["type"] == "missing":
        return ApiError(f"{param} is missing.", param=param, code="missing_required_parameter")
    if not param:  # of several fields together
        return ApiError(f"{worst['msg'].removeprefix('Value error, ').rstrip('.')}.")
    shown = json.dumps(worst["input"], default=str)
    shown = shown if len(shown) < 80 else shown[:80] + "…"
    if _asks_for_nothing_else(worst):
        text = f"{param} is {shown}, which is not supported: leave it out."
        return ApiError(text, param=param, code="unsupported_parameter")
    message = worst["msg"]
    if worst["type"] == "string_pattern_mismatch":
        message = "expected letters, digits, '_', '.' and '-', 64 at most, no sign at the start"
    if any(d.get("ctx", {}).get("expected") == "'auto'" for d in same):
        message += ", or 'auto'"
    return ApiError(f"{param} is {shown}: {message}.", param=param)


def _unknown(param: str, kind: type[BaseModel]) -> ApiError:
    """Returns the error for a field that there is not, with those that may be meant."""
    *path, name = param.split(".")
    fields = list(Hyperparameters.model_fields if path[-1:] == ["hyperparameters"] else ())
    known = fields or list(kind.model_fields if not path else ())
    hint = nearest(name, known, cutoff=0.5)
    listed = f" It may have {', '.join(fields)}." if fields else ""
    return ApiError(
        f"Unknown field {param!r}.{hint}{listed}", param=param, code="unknown_parameter"
    )


def _asks_for_nothing_else(details: ErrorDetails) -> bool:
    """Returns whether the only value that a field may have is the one that changes nothing."""
    kind, bounds = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        return " or " not in str(bounds.get("expected")) and bounds.get("expected") != "'auto'"
    return (kind == "less_than_equal" and bounds.get("le") == 0) or (
        kind == "too_long" and bounds.get("max_length") == 0
    )


def _param(details: ErrorDetails) -> list[str]:
    """Returns the path of a field, without what pydantic adds to tell the parts of a union."""
    return [str(part) for part in details["loc"] if not _is_of_union(part)]


def _is_of_union(part: int | str) -> bool:
    is_kind = part in ("int", "float", "str", "bool", "[key]")
    return is_kind or str(part).startswith(("literal[", "constrained-"))
