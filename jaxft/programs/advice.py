"""Warnings before a run starts: what is allowed and is seldom meant."""

import math
from collections.abc import Iterator, Mapping

from jaxft import console
from jaxft.config import OptimConfig, RunConfig
from jaxft.data import TokenRows
from jaxft.data.overlap import find_overlap
from jaxft.data.unit_findings import (
    count_known_prompts,
    describe_doubts,
    describe_known_prompts,
    find_units,
)
from jaxft.data.units import NOUNS, counted_units
from jaxft.formatting import counted
from jaxft.hf.peft.write import warning_of_experts
from jaxft.models.adapter_files import format_problems
from jaxft.models.families import Architecture
from jaxft.programs.held_out import HeldOut

# A run of fewer steps is taken for an accident, unless it is asked for.
_FEW_STEPS = 50
# Largest learning rate of preferences in models beyond some size; docs/tuning.md has the sources.
_MANY_PARAMETERS, _LARGEST_RATE = 100_000_000, 1e-6
_LARGEST_RATES = {"orpo": 5e-6}
# Of text, by optimizers with steps like AdamW's: the largest rate, and those that are usual.
_LIKE_ADAMW = ("adamw", "adafactor", "muon")
_RATES_OF_TEXT = {"full tuning": (3e-4, "1e-5 to 2e-5"), "LoRA": (2e-3, "1e-4 to 2e-4")}
_SMALLEST_RATE_OF_LORA = 2e-5


def warn(
    config: RunConfig,
    rows: TokenRows,
    held_out: Mapping[str, HeldOut],
    *,
    steps: int,
    context: int,
    row_multiple: int,
    parameters: int,
) -> None:
    """Logs each thing that a run should not be started with unawares.

    Args:
      config: The run.
      rows: Training data.
      held_out: What is evaluated, by name.
      steps: Of the whole run.
      context: Tokens that the model can hold.
      row_multiple: What `train.batch_size` is a multiple of.
      parameters: Number of the model's.
    """
    _warn_of_length(config, [rows, *(found.rows for found in held_out.values())], context)
    if config.model.dtypes == "bfloat16":
        _say(
            "Parameters are bfloat16, which has 8 bits: updates under 1/256 of a weight are lost. "
            "Small learning rates need --config.model.dtypes=mixed."
        )
    _warn_of_learning_rate(config, parameters)
    _warn_of_overlap(rows, held_out)
    _warn_of_doubts(rows, held_out)
    _warn_of_few_steps(config, rows, steps, row_multiple)


def warn_of_format(architecture: Architecture) -> None:
    """Logs what becomes of a run's adapter where others read it, before any time goes into it."""
    adaptation = architecture.adaptation
    if not adaptation or adaptation.whole:
        return
    if problems := format_problems(architecture):
        _say("\n".join(["jaxft export will refuse this run's adapter alone:", *problems]))
    if warning := warning_of_experts(adaptation.sites, architecture.naming):
        _say(warning)


def _say(text: str) -> None:
    console.log(text, style="yellow")


def _warn_of_length(config: RunConfig, sets: list[TokenRows], context: int) -> None:
    longest = max(min(r.longest_document, r.max_length) for r in sets)
    longest = config.data.max_length if config.data.packing == "stream" else longest
    if longest > context:
        _say(
            f"Documents have up to {longest} tokens and the model's context is {context}: it is "
            f"trained on positions that it has never seen. Set --config.data.max_length={context}."
        )


def _warn_of_learning_rate(config: RunConfig, parameters: int) -> None:
    objective = config.objective.objective
    if objective.reference or objective.units != "documents":
        _warn_of_rate_of_preferences(config, parameters)
    elif config.optim.name in _LIKE_ADAMW and not config.model.random_init:
        _warn_of_rate_of_text(config, parameters)


def _warn_of_rate_of_text(config: RunConfig, parameters: int) -> None:
    """Says what text is learnt at if the rate is one of tiny models, or of another way to tune."""
    optim, adapter = config.optim, config.adapter
    way = "LoRA" if adapter.rank or adapter.ranks or adapter.path else "full tuning"
    largest, usual = _RATES_OF_TEXT[way]
    if parameters >= _MANY_PARAMETERS and optim.learning_rate > largest:
        told = "models of this size are mostly broken by it"
    elif way == "LoRA" and optim.learning_rate * optim.lora_plus < _SMALLEST_RATE_OF_LORA:
        told = "an adapter hardly moves at it"
    else:
        return
    default = ", the default" if optim.learning_rate == OptimConfig().learning_rate else ""
    _say(
        f"optim.learning_rate is {optim.learning_rate:g}{default}: {told}. Usual for {way} of "
        f"large models is {usual}: set --config.optim.learning_rate; docs/tuning.md has ranges."
    )


def _warn_of_rate_of_preferences(config: RunConfig, parameters: int) -> None:
    """Says what preferences are learnt at if the rate is one of supervised fine-tuning."""
    rate = config.optim.learning_rate
    largest = _LARGEST_RATES.get(config.objective.name, _LARGEST_RATE)
    if parameters > _MANY_PARAMETERS and rate > largest:
        default = ", the default" if rate == OptimConfig().learning_rate else ""
        _say(
            f"optim.learning_rate is {rate:g}{default}: models of this size mostly learn by "
            f"{config.objective.name} at no more than {largest:g}, and larger rates can break "
            f"them. Set --config.optim.learning_rate={largest / 2:g}; docs/tuning.md has ranges."
        )


def _warn_of_overlap(rows: TokenRows, held_out: Mapping[str, HeldOut]) -> None:
    for name, found in held_out.items():
        overlap = find_overlap(found.rows, rows)
        if overlap.count:
            noun = NOUNS[found.rows.documents.units]
            _say(
                f"{overlap.count:,} of {found.rows.statistics.documents:,} {name} {noun}s are in "
                f"the training data too, such as {'; '.join(overlap.examples)}: figures on {name} "
                "are then better than on new data. Take them out of one of the two."
            )


def _warn_of_doubts(rows: TokenRows, held_out: Mapping[str, HeldOut]) -> None:
    """Says what speaks against the labels of preferences, and which prompts are trained on."""
    if rows.documents.labels is None:
        return
    train = find_units(rows)
    for doubt in describe_doubts(rows, train):
        _say(f"train: {doubt}")
    for name, found in held_out.items():
        if found.rows.documents.labels is not None:
            findings = find_units(found.rows)
            for doubt in describe_doubts(found.rows, findings):
                _say(f"{name}: {doubt}")
            if known := count_known_prompts(findings, train):
                _say(f"{name}: {describe_known_prompts(known, found.rows, name)}.")


def _warn_of_few_steps(config: RunConfig, rows: TokenRows, steps: int, row_multiple: int) -> None:
    """Says what to change if whole epochs make hardly a step; `train.steps` is what was meant."""
    if config.train.steps or steps >= _FEW_STEPS:
        return
    remedies = [
        f"{flag} ({count:,} steps)"
        for flag, count in _more_steps(config, rows, row_multiple)
        if count >= _FEW_STEPS
    ]
    choice = "one of " if len(remedies) > 1 else ""
    _say(
        f"The run has {counted(steps, 'step')}, too few for most models to learn from: "
        f"{counted_units(rows.statistics.documents, rows.documents.units)} packed into "
        f"{counted(len(rows), 'row')} of {rows.max_length:,} tokens, "
        f"{counted(config.train.batch_size, 'row')} a step. For more, set {choice}"
        f"{', '.join(remedies)}."
    )


def _more_steps(config: RunConfig, rows: TokenRows, row_multiple: int) -> Iterator[tuple[str, int]]:
    """Yields flags that make a run longer, with the steps that it would have."""
    train, packed = config.train, rows.statistics.packed

    def steps(count: float, *, size: int = train.batch_size, epochs: float = train.epochs) -> int:
        return math.ceil(round(epochs * count) / size)

    fitting = int(train.epochs * len(rows) / _FEW_STEPS) // row_multiple * row_multiple
    size = max(fitting, row_multiple)
    yield f"--config.train.batch_size={size}", steps(len(rows), size=size)
    epochs = math.ceil(_FEW_STEPS * train.batch_size / len(rows))
    yield f"--config.train.epochs={epochs}", steps(len(rows), epochs=epochs)
    if config.data.packing == "documents":
        yield "--config.data.packing=none", steps(rows.statistics.documents - packed.dropped)
        shorter = -(-packed.longest // 64) * 64
        if shorter < rows.max_length:
            # As full as the rows are now.
            count = len(rows) * rows.max_length / shorter
            yield f"--config.data.max_length={shorter}", steps(count)
