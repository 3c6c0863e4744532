"""A loaded model: logits and text, from a Hugging Face folder, a repository id or a checkpoint."""

import contextlib
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxft import console
from jaxft.config import DataConfig, ModelConfig, RunConfig
from jaxft.data import chat
from jaxft.data.template import Template, resolve_template
from jaxft.errors import ConfigError, ModelError, OutOfMemoryError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import room, shortage
from jaxft.hf.hub import resolve
from jaxft.hf.load import load_params, read_config, read_json, tensor_dtypes
from jaxft.hf.rules import expand
from jaxft.hf.tokenizer import (
    add_special_tokens,
    decode_continuation,
    has_tokenizer,
    load_tokenizer,
    stop_ids,
    without_appended,
)
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.module import AbstractModel, Params, merge
from jaxft.models.vocabulary import grow, tokens_beyond, with_rows_for, with_vocab_size
from jaxft.programs.generate import Sampling, generate_tokens
from jaxft.programs.streaming import Session, text_pieces
from jaxft.sharding.rules import Placement
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source, find_source

# A tokenizer that shares fewer of its ids with the model's own is taken for another model's.
_SAME_IDS = 0.9

type Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Model:
    """What a notebook uses. Immutable; `params` is a flat dict of arrays.

    Attributes:
      architecture: Shape and naming of the model.
      abstract: Its structure, with shapes, dtypes and axes.
      params: `{dotted path: array}`.
      tokenizer: Of transformers; None if the folder has none, which leaves `__call__` alone.
      source: Where it was loaded from.
    """

    architecture: Architecture
    abstract: AbstractModel
    params: Params
    tokenizer: Any
    source: Source

    def __call__(self, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T V"]:
        """Returns float32 logits for rows that are one document each."""
        ids = np.asarray(tokens)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {ids.dtype} of shape {ids.shape}; expected integers [B, T]."
            )
        config = self.architecture.config
        if config.learned_positions and ids.shape[-1] > config.max_length:
            raise ConfigError(
                f"A row has {ids.shape[-1]} tokens, but the model has a table of "
                f"{config.max_length} positions and knows none beyond."
            )
        vocab = config.vocab
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
            raise ValueError(
                f"tokens range from {ids.min()} to {ids.max()}; the vocabulary has {vocab}."
            )
        return _forward(self.abstract.graphdef, self.params, ids)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied table counts once."""
        return sum(array.size for array in self.params.values())

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: of the chat template, the tokenizer and both config files."""
        file = self.source.folder / "generation_config.json"
        generation = read_json(file) if file.is_file() else {}
        known = stop_ids(self.tokenizer, generation, read_config(self.source.folder))
        own = self.tokenizer is not None and self.tokenizer.chat_template
        turn_ends = self.template.stops.values() if own else ()
        return tuple(sorted({*known, *turn_ends}))

    @functools.cached_property
    def has_token(self) -> np.ndarray:
        """Which ids the tokenizer knows, bool `[V]`: an embedding often has rows beyond them."""
        self._require_tokenizer()
        known = np.zeros(self.architecture.config.vocab, bool)
        known[list(self.tokenizer.get_vocab().values())] = True
        return known

    @functools.cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, or the built-in default."""
        return resolve_template(self.tokenizer, DataConfig())

    def prompt_ids(self, prompt: Prompt, *, tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a text that goes on, or of a conversation through the chat template.

        Control tokens that it spells are plain text.

        Args:
          prompt: A text, or messages; the last one is not from the assistant.
          tools: Function descriptions offered to the model, in a conversation.
        """
        self._require_tokenizer()
        if isinstance(prompt, str):
            ids = chat.text_ids(prompt, self.template.control)
            return without_appended(self.tokenizer, ids)
        return chat.prompt_ids(self.tokenizer, prompt, template=self.template, tools=tools)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> Any:
        """Continues a prompt, or a batch of them; the result has the prompt's shape.

        A text is continued as it stands. A list of messages, each a dict of role and content, is
        answered through the chat template.

        Args:
          prompt: A text, a conversation, or a list of these.
          max_new_tokens: Longest answer.
          temperature: 0 is greedy.
          top_k: Only the k most likely tokens; 0 for all.
          top_p: Only the most likely tokens that together reach this probability.
          seed: Row i of a batch draws from this and i alone.
          tools: Function descriptions offered to the model in every conversation.

        Returns:
          The new text, special tokens left out; a list for a batch.
        """
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
        prompts = [prompt] if single else list(prompt)
        if not prompts:
            return []
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ids = [self.prompt_ids(p, tools=tools) for p in prompts]  # pyright: ignore[reportArgumentType]
        new = self.complete(ids, max_new_tokens=max_new_tokens, sampling=sampling)
        texts = [
            decode_continuation(self.tokenizer, before, after)
            if isinstance(prompt, str)
            else self._decode(after)
            for prompt, before, after in zip(prompts, ids, new, strict=True)
        ]
        return texts[0] if single else texts

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
        session: Session | None = None,
    ) -> Iterator[str]:
        """Continues one prompt; yields the text that `generate` returns, piece by piece.

        Args:
          prompt: A text or a conversation.
          max_new_tokens: As for `generate`, like the others that are not listed here.
          session: From `session()`; what it has read of the prompt before is not read again.

        Raises:
          ConfigError: At once, if the prompt does not fit the context.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ids = self.prompt_ids(prompt, tools=tools)
        self._check_fits([ids], max_new_tokens)
        new = (session or self.session()).generate(
            ids, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids, sampling=sampling
        )
        return text_pieces(self.tokenizer, new, after=ids if isinstance(prompt, str) else ())

    def session(self) -> Session:
        """Returns an empty memory for `stream`, for a conversation of many turns."""
        return Session(
            self.architecture.config,
            self.abstract.graphdef,
            self.params,
            has_token=self.has_token,
        )

    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """As `generate`, for prompts that are token ids already; each result stands alone."""
        new = self.complete(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        return [self._decode(ids) for ids in new]

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ModelError(
                f"{self.source.folder} has no tokenizer, so the model reads and writes no text. "
                "Put the files of its tokenizer there; its logits of token ids need none."
            )

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Returns the new token ids of each prompt, without the one that ends it.

        Raises:
          ConfigError: If a prompt is empty, or the context too short.
        """
        self._check_fits(prompts, max_new_tokens)
        with self._explained(len(prompts), max(map(len, prompts)) + max_new_tokens):
            return generate_tokens(
                self.abstract.graphdef,
                self.params,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_ids=self.stop_ids,
                sampling=sampling,
                has_token=self.has_token,
            )

    @contextlib.contextmanager
    def _explained(self, rows: int, length: int) -> Iterator[None]:
        """Says of a lack of memory what took it, and what would take less."""
        try:
            yield
        except Exception as error:
            if not (said := shortage(error)):
                raise
            c, some = self.architecture.config, next(iter(self.params.values()))
            cache = 2 * c.layers * rows * length * c.kv_heads * c.head_dim * some.dtype.itemsize
            weights = sum(array.nbytes for array in self.params.values())
            fewer = f"at most {rows // 2} prompts at a time, " if rows > 1 else ""
            wide = some.dtype.itemsize > 2
            narrow = ", or weights of half the size (--dtypes=bfloat16)" if wide else ""
            raise OutOfMemoryError(
                f"{said} Prompts: {rows}, of up to {length} tokens with their answers; their keys "
                f"and values take {format_bytes(cache)}, the weights {format_bytes(weights)}; "
                f"{room(list(some.devices()))}. It takes less with {fewer}a smaller "
                f"--max_new_tokens{narrow}."
            ) from error

    def _check_fits(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        empty = [i for i, ids in enumerate(prompts) if not ids]
        if empty:
            raise ConfigError(f"prompt {empty[0]} has no tokens; write at least one character.")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
        limit = self.architecture.config.max_length
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > limit:
            raise ConfigError(
                f"A prompt of {longest - max_new_tokens} tokens and {max_new_tokens} new ones make "
                f"{longest}, and the model's context has {limit}. Shorten the prompt or "
                "max_new_tokens."
            )


@jax.jit(static_argnums=0)
def _forward(graphdef: Any, params: Params, tokens: Any) -> Float[Array, "B T V"]:
    return merge(graphdef, params)(tokens)


def load(
    path_or_repo_id: str | Path,
    *,
    revision: str = "",
    step: str = "best",
    dtypes: str = "float32",
    placement: Placement | None = None,
    device: Any = None,
) -> Model:
    """Loads a model for inference, evaluation or export.

    Args:
      path_or_repo_id: Hugging Face folder or repository id, or a run's workdir or checkpoint.
      revision: Branch, tag or commit of a repository id.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      dtypes: `float32`, `mixed` or `bfloat16` (half the memory of float32).
      placement: Shards the weights; one device holds them if absent.
      device: That one device; the first one by default.

    Raises:
      ModelError: If it cannot be found, is not supported or does not fit its config.json.
      CheckpointError: If a checkpoint cannot be read.
    """
    source = find_source(path_or_repo_id, revision=revision, step=step)
    stored = architecture_from_hf(read_config(source.folder))
    tokenizer = load_tokenizer(source.folder) if has_tokenizer(source.folder) else None
    architecture = _grown(stored, tokenizer)
    abstract = architecture.abstract(make_numerics(dtypes))
    if placement is not None:
        shardings = placement.shardings(abstract.params, abstract.axes)
    else:
        single = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        shardings = dict.fromkeys(abstract.params, single)
    _refuse_what_does_not_fit(abstract, shardings, dtypes)
    params = load_weights(source, architecture, abstract, shardings, tokenizer=tokenizer)
    return Model(architecture, abstract, params, tokenizer, source)


def _refuse_what_does_not_fit(
    abstract: AbstractModel, shardings: Mapping[str, jax.sharding.Sharding], dtypes: str
) -> None:
    """Raises OutOfMemoryError, before they are read, for weights that no device here can hold."""
    held = sum(
        math.prod(shardings[path].shard_shape(spec.shape)) * spec.dtype.itemsize
        for path, spec in abstract.params.items()
    )
    found = room(list(next(iter(shardings.values())).addressable_devices))
    if found.limit and held > found.limit:
        narrow = (
            f" As bfloat16 they take {format_bytes(held / 2)}: --dtypes=bfloat16."
            if dtypes != "bfloat16"
            else " jaxft.load takes a placement that splits them over several devices."
        )
        raise OutOfMemoryError(
            f"The weights take {format_bytes(held)} as {dtypes}, and {found}.{narrow}"
        )


def load_weights(
    source: Source,
    architecture: Architecture,
    abstract: AbstractModel,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    tokenizer: Any = None,
    new_tokens: Collection[int] = (),
) -> Params:
    """Reads weights from safetensors or from a checkpoint, each device its own part.

    Tables that are smaller in the files than the architecture says grow by mean rows.

    Args:
      source: Where they are.
      architecture: What they are to fit.
      abstract: Its structure.
      shardings: Placement of each.
      tokenizer: Means are those of the rows of its tokens; of all rows if absent.
      new_tokens: Ids of tokens that were just added: they get mean rows, too, where the files have
        rows for them, which no training has touched.

    Raises:
      ModelError: If they cannot be read, or hold values that are not finite.
      CheckpointError: If a checkpoint cannot be read.
    """
    params = _read_weights(source, architecture, abstract, shardings, tokenizer, new_tokens)
    _refuse_not_finite(params, architecture, source)
    return params


def _read_weights(
    source: Source,
    architecture: Architecture,
    abstract: AbstractModel,
    shardings: Mapping[str, jax.sharding.Sharding],
    tokenizer: Any,
    new_tokens: Collection[int],
) -> Params:
    target = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[path])
        for path, spec in abstract.params.items()
    }
    if source.checkpoints is None:
        stored = architecture_from_hf(read_config(source.folder)).config.vocab
        params = load_params(
            source.folder,
            architecture.rules,
            with_vocab_size(target, abstract.axes, stored),
            ignore=architecture.ignored,
            copies=architecture.copies,
            prefix=architecture.prefix,
        )
        known = None
        if tokenizer is not None:
            known = set(tokenizer.get_vocab().values()).difference(new_tokens)
        return grow(params, target, abstract.axes, known=known, new=new_tokens)
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    try:
        return checkpoints.restore_params(target, source.step)
    finally:
        checkpoints.close()


def _refuse_not_finite(params: Params, architecture: Architecture, source: Source) -> None:
    """Raises ModelError with the tensors, by their names in files, that hold NaN or infinities."""
    bad = {path: flags for path, flags in _not_finite(params).items() if flags.any()}
    if not bad:
        return
    names = [
        tensor.name
        for tensor in expand(architecture.rules, {path: x.shape for path, x in params.items()})
        if any(
            part.rule.ours in bad and bad[part.rule.ours][part.index[:1]].any()
            for part in tensor.parts
        )
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    raise ModelError(
        f"{source.name} holds weights that are not finite (NaN or infinite), with which no loss "
        f"can be computed: {shown}. The file is damaged, or training diverged before it was "
        "written; take another copy, or an earlier checkpoint."
    )


def _not_finite(params: Params) -> dict[str, np.ndarray]:
    """Returns whether each layer of a parameter, or all of one without layers, has such values."""

    def find(params: Params) -> dict[str, Array]:
        return {
            path: ~jnp.isfinite(x).all(axis=tuple(range(path.startswith("layers."), x.ndim)))
            for path, x in params.items()
        }

    sharding = next(iter(params.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    flags = jax.jit(find, out_shardings=sharding)(params)
    return {path: np.asarray(value) for path, value in flags.items()}


def tensor_dtypes_of(source: Source) -> dict[str, str]:
    """Type of each tensor in the files that the weights once came from; empty if from none."""
    if source.checkpoints is None:
        return tensor_dtypes(source.folder)
    return read_json(source.folder / "tensor_dtypes.json")


def load_model_tokenizer(source: Source, config: ModelConfig) -> tuple[Any, list[int]]:
    """Loads the tokenizer of a model as a run changes it; a checkpoint has its own already.

    Args:
      source: Its folder holds the tokenizer.
      config: `tokenizer` takes its place, and `add_tokens` are added.

    Returns:
      The tokenizer, and the ids of the tokens that were added.
    """
    if source.checkpoints is not None:
        return load_tokenizer(source.folder), []
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
    """What is known of a run's model before its weights are read.

    Attributes:
      architecture: Its shape, with a row of the embedding for each token.
      tokenizer: With the tokens and the chat template of the run.
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
    stored = architecture_from_hf(read_config(source.folder))
    tokenizer, added = load_model_tokenizer(source, config.model)
    spare = tuple(number for number in added if number < stored.config.vocab)
    if spare and not config.model.random_init:
        console.log(
            f"Added tokens that take a row of padding in the embedding: {len(spare)}. Each of "
            "these rows becomes the mean of the others."
        )
    architecture = _grown(stored, tokenizer, random_init=config.model.random_init)
    if config.data.template:
        tokenizer.chat_template = resolve_template(tokenizer, config.data).text
    return Description(architecture, tokenizer, spare)


def _grown(stored: Architecture, tokenizer: Any, *, random_init: bool = False) -> Architecture:
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
        return architecture_from_hf(read_config(source.folder)).config.max_length
    except ModelError:
        return 0


def hf_config(source: Source, architecture: Architecture) -> dict[str, Any]:
    """Returns the content of config.json for an architecture that may have grown since."""
    config = read_config(source.folder) | {"vocab_size": architecture.config.vocab}
    # Weights that were quantised in the files are so no more.
    return {name: value for name, value in config.items() if name != "quantization_config"}
