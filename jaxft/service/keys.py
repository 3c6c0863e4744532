"""The keys of a run that a job may set beside its hyperparameters."""

from collections.abc import Mapping
from typing import Any

from jaxft.config import from_dict, walk
from jaxft.errors import ConfigError, nearest
from jaxft.service.errors import ApiError

# Whole groups, and single keys: none that names a path, a module to import or a place to write to.
_GROUPS = ("optim.", "objective.dpo.")
_KEYS = (
    *(f"adapter.{key}" for key in "alpha targets ranks alphas dropout scaling dora start".split()),
    *(f"data.{key}" for key in "format columns packing overlength thinking train_on".split()),
    *(f"data.{key}" for key in "bad_rows bad_share".split()),
    *(f"eval.{key}" for key in "batch_size max_rows patience minimum_change".split()),
    *(f"mesh.{key}" for key in "stage data fsdp context expert tensor".split()),
    *(f"model.{key}" for key in "dtypes quantise matmul attention remat offload".split()),
    "objective.chunk",
    "objective.reference",
    "strategy",
    "train.accumulation",
    "train.eval_every",
    "train.steps",
)


# Keys of those groups that have a hyperparameter of their own.
_HYPERPARAMETERS = {
    "optim.learning_rate": "learning_rate_multiplier",
    "objective.dpo.beta": "beta",
}


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuses keys that a job may not set; values are checked with the job's files.

    Raises:
      ApiError: For the first such key.
    """
    for key, value in config.items():
        param = f"hyperparameters.config.{key}"
        if key in _HYPERPARAMETERS:
            raise ApiError(f"{key} is set by hyperparameters.{_HYPERPARAMETERS[key]}.", param=param)
        if not (key.startswith(_GROUPS) or key in _KEYS):
            raise ApiError(
                f"A job cannot set {key!r}.{nearest(key, _KEYS)} It may set "
                f"{', '.join(f'{group}*' for group in _GROUPS)}, {', '.join(_KEYS)}.",
                param=param,
                code="unknown_parameter",
            )
        if key == "strategy" and "." in str(value):
            raise ApiError("strategy names one of jaxft's own, no module.", param=param)
        _check_value(key, value, param)


def _check_value(key: str, value: Any, param: str) -> None:
    """Refuses a key that there is not, or a value that it cannot have.

    Those of an objective are checked with the job's files: they need jax.
    """
    if key.startswith("objective."):
        return
    try:
        config = from_dict({key: value})
    except ConfigError as error:
        raise ApiError(str(error), param=param, code="unknown_parameter") from error
    for item in walk(config):
        if item.path == key and (problems := list(item.problems())):
            raise ApiError(" ".join(problems), param=param)
