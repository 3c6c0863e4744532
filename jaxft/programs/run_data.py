"""The data of a training run: rows that are trained on, and what is evaluated."""

from typing import Any

from jaxft import console, data, distributed
from jaxft.config import RunConfig
from jaxft.data import TokenRows
from jaxft.data.units import units_of
from jaxft.errors import ConfigError
from jaxft.programs.answers import Prompts, has_answers, read_prompts
from jaxft.programs.held_out import HeldOut, take_rows
from jaxft.workdir.workdir import Workdir


def read_data(
    config: RunConfig, tokenizer: Any, workdir: Workdir
) -> tuple[TokenRows, dict[str, HeldOut]]:
    """Returns the training rows, and what is evaluated by name."""
    sources = {"validation": config.data.validation, "retention": config.eval.retention}
    units = config.objective.objective.units

    def prepare(source: str, name: str) -> TokenRows:
        return data.prepare(
            source,
            config.data,
            tokenizer,
            seed=config.train.seed,
            training=name == "train",
            units=units_of(name, units),
            name=name,
            listed=workdir.skipped,
            on_log=console.log,
        )

    with distributed.first_host_first("data", data.cache_folder(config.data)):
        found = {name: prepare(source, name) for name, source in sources.items() if source}
        rows = prepare(config.data.train, "train")
    # Hosts with other rows would evaluate in other numbers of batches, and wait for each other.
    distributed.check_same("held-out data", {name: held.digest for name, held in found.items()})
    maximum, seed = config.eval.max_rows, config.train.seed
    return rows, {
        name: take_rows(held_out, tokenizer, maximum=maximum, seed=seed)
        for name, held_out in found.items()
    }


def read_questions(config: RunConfig, tokenizer: Any, validation: HeldOut | None) -> Prompts | None:
    """Returns what each evaluation answers; None if no answers are wanted.

    Raises:
      ConfigError: If answers are wanted and the validation data asks nothing.
    """
    if validation is not None and has_answers(config, "validation", validation.rows):
        source = config.data.validation
        return read_prompts(config, tokenizer, source, validation.rows, name="validation")
    if config.eval.answers != "none":
        also = " and --config.eval.best=loss" if config.eval.best == "answers" else ""
        raise ConfigError(
            f"eval.answers is {config.eval.answers!r}, but data.validation "
            f"{config.data.validation} is plain text, which asks nothing. Set "
            f"--config.eval.answers=none{also}, or name conversations with "
            "--config.data.validation=…."
        )
    return None
