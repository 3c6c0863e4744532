"""Differences between the keys of a checkpoint's run and those that it is evaluated with."""

from typing import Any

from jaxft import console
from jaxft.config import RunConfig, held_out_share, to_dict
from jaxft.errors import ConfigError
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source

# Keys on which it depends which rows a part of the training data holds out: they say which rows
# there are, and what the content is by which they are chosen.
_DECIDE_WHAT_IS_HELD_OUT = (
    "data.validation",
    "data.train",
    "data.format",
    "data.columns",
    "data.text_split",
    "data.bad_rows",
    "data.control_tokens",
    "train.seed",
)
_DECIDE_HOW_ROWS_ARE_READ = (
    "format",
    "columns",
    "text_split",
    "template",
    "thinking",
    "control_tokens",
    "train_on",
)


# Keys of the objective that change no figure.
_NOT_OF_A_LOSS = ("objective.chunk", "objective.balance", "objective.reference")


def say_differences(config: RunConfig, source: Source) -> None:
    """Logs where a checkpoint was trained on other weights or rows than it is evaluated with.

    Raises:
      ConfigError: If what is held out here is not what was held out in training.
    """
    if source.checkpoints is None:
        return
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    trained = checkpoints.restore_config(source.step)
    checkpoints.close()
    here = to_dict(config)
    _check_held_out(here, trained)
    learnt = [n for n in here if n.startswith("objective.") and n not in _NOT_OF_A_LOSS]
    how = ["model.quantise", *(f"data.{key}" for key in _DECIDE_HOW_ROWS_ARE_READ)]
    for name in [*how, *learnt]:
        if trained.get(name, here[name]) != here[name]:
            console.log(
                f"{name} is {here[name]!r} here; the run was trained with {trained[name]!r}.",
                style="yellow",
            )


def _check_held_out(here: dict[str, Any], trained: dict[str, Any]) -> None:
    """Refuses a part of the training data that a run was, by other keys, trained on."""
    if not held_out_share(here["data.validation"]):
        return
    changed = [
        f"--config.{key}={trained[key]}"
        for key in _DECIDE_WHAT_IS_HELD_OUT
        if trained.get(key, here[key]) != here[key]
    ]
    if changed:
        raise ConfigError(
            f"The part {here['data.validation']} was held out of training only with the keys of "
            f"the run. Evaluate it with {' '.join(changed)}, or on a file of its own."
        )
