"""A model before its weights are read: shape, tokenizer, template, and what ends answers."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft import console
from jaxft.config import DataConfig, ModelConfig, RunConfig
from jaxft.data.template import Template, resolve_template
from jaxft.errors import ModelError
from jaxft.hf.folder import ModelFolder, read_json
from jaxft.hf.hub import resolve
from jaxft.hf.stored import tensor_dtypes
from jaxft.hf.tokenizer import add_special_tokens, has_tokenizer, load_tokenizer
from jaxft.models.families import Architecture
from jaxft.models.vocabulary import tokens_beyond, with_rows_for
from jaxft.training.adaptation import as_run, with_dropout
from jaxft.workdir.source import Source

# A tokenizer that shares fewer of its ids with the model's own is taken for another model's.
_SAME_IDS = 0.9


def load_model_tokenizer(source: Source, config: ModelConfig) -> tuple[Any, list[int]]:
    """Loads the tokenizer of a model as a run changes it; checkpoints and adapters have their own.

    Args:
      source: Its folder holds the tokenizer.
      config: `tokenizer` takes its place, and `add_tokens` are added.

    Returns:
      The tokenizer, and the ids of the tokens that were added.
    """
    if source.checkpoints is not None or source.is_adapter:
        return load_tokenizer(source.described.tokenizer_path), []
    other = config.tokenizer
    tokenizer = load_tokenizer(resolve(other, weights=False) if other else source.folder)
    if other and not config.random_init:
        _warn_of_other_ids(tokenizer, source.folder, other)
    if not config.added_tokens:
        return tokenizer, []
    known = [token for token in config.added_tokens if token in tokenizer.get_vocab()]
    new = add_special_tokens(tokenizer, config.added_tokens)
    console.log(f"Special tokens added to the tokenizer: {len(new)}.")
    if known:
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        console.log(
            f"Tokens of model.add_tokens that the tokenizer has already: {', '.join(known[:5])}"
            f"{more}. They keep their ids and what the model knows of them."
        )
    return tokenizer, new


def _warn_of_other_ids(tokenizer: Any, folder: Path, name: str) -> None:
    """Says so if a tokenizer gives other ids than the one that the weights were trained with."""
    if not has_tokenizer(folder):
        return
    with contextlib.suppress(ModelError):  # a broken one is a good reason to name another
        own, other = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
        same, comparable = len(own.items() & other.items()), min(len(own), len(other))
        if same < _SAME_IDS * comparable:
            console.log(
                f"The tokenizer of --config.model.tokenizer={name} has {same:,} of {comparable:,} "
                "tokens under the ids that the model's own tokenizer gives them: the weights were "
                "trained with other ids. Leave the key out, unless that is meant.",
                style="yellow",
            )


@dataclass(frozen=True, slots=True)
class Description:
    """The facts that are known of a run's model before its weights are read.

    Attributes:
      architecture: Shape of the model, with a row of the embedding for each token.
      tokenizer: Tokenizer with the tokens and the chat template of the run.
      new_tokens: Ids of tokens that the run adds and that have a row of padding in the files.
    """

    architecture: Architecture
    tokenizer: Any
    new_tokens: tuple[int, ...]


def read_description(source: Source, config: RunConfig) -> Description:
    """Returns the shape of a model and its tokenizer, which then has the template of the run.

    Args:
      source: Its folder holds config.json and, unless another is named, the tokenizer.
      config: `model.tokenizer` replaces the tokenizer, `data.template` its chat template.

    Raises:
      ModelError: If either cannot be read, or they do not belong together.
    """
    stored = source.architecture
    tokenizer, added = load_model_tokenizer(source, config.model)
    spare = tuple(number for number in added if number < stored.config.vocab)
    if spare and not config.model.random_init:
        console.log(
            f"Added tokens that take a row of padding in the embedding: {len(spare)}. Each of "
            "these rows becomes the mean of the others."
        )
    architecture = grown(stored, tokenizer, random_init=config.model.random_init)
    if config.data.template:
        tokenizer.chat_template = resolve_template(tokenizer, config.data).text
    if source.note is not None:
        spare = source.note.new_tokens
    if source.is_adapter:
        architecture = with_dropout(architecture, config.adapter.dropout)
    named = tokenizer.convert_tokens_to_ids(config.model.added_tokens) if tokenizer else ()
    return Description(as_run(architecture, config, named), tokenizer, spare)


def grown(stored: Architecture, tokenizer: Any, *, random_init: bool = False) -> Architecture:
    """Returns the shape of a model with a row for each token; says so if it has to grow."""
    architecture = with_rows_for(stored, tokenizer)
    if architecture is not stored:
        rows = stored.config.vocab
        console.log(
            f"Added tokens without a row in the embedding: {len(tokens_beyond(tokenizer, rows))}. "
            f"It grows from {rows} to {architecture.config.vocab} rows"
            + ("." if random_init else ", each new one the mean of the old ones.")
        )
    return architecture


def context_of(source: Source) -> int:
    """Returns how many tokens a model was made for; 0 if its family is not known."""
    try:
        return source.architecture.config.max_length
    except ModelError:
        return 0


def hf_config(source: Source, architecture: Architecture) -> dict[str, Any]:
    """Returns the content of config.json for an architecture that may have grown since."""
    rows = architecture.config.vocab
    vocab, config = {"vocab_size": rows}, source.described.config
    # A table of inputs of layers has a row for each token, too.
    tables = vocab | ({"vocab_size_per_layer_input": rows} if architecture.config.per_layer else {})
    if architecture.naming.alone is not None:
        inner = {"text_config": config["text_config"] | tables}
        config = config | inner | (vocab if "vocab_size" in config else {})
    else:
        config = config | tables
    # Weights that were quantised in the files are so no more.
    return {name: value for name, value in config.items() if name != "quantization_config"}


def tensor_dtypes_of(source: Source) -> dict[str, str]:
    """Returns the type of each tensor in the files the weights came from; empty if from none."""
    if source.is_peft and source.base is not None:
        return tensor_dtypes_of(source.base)
    if source.checkpoints is None:
        return tensor_dtypes(source.folder)
    return read_json(source.folder / "tensor_dtypes.json")


def default_template(tokenizer: Any) -> Template:
    """Returns the tokenizer's chat template, or the built-in default."""
    return resolve_template(tokenizer, DataConfig())


def stop_ids_of(folder: ModelFolder, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end an answer: of chat template, tokenizer and both config files."""
    chats = tokenizer is not None and tokenizer.chat_template
    turn_ends = default_template(tokenizer).stops.values() if chats else ()
    return tuple(sorted({*folder.stop_ids(tokenizer), *turn_ends}))
