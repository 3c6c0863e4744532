"""A loaded model: logits and text, from a Hugging Face folder, a repository id or a checkpoint."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxft.data import chat
from jaxft.data.template import Template
from jaxft.errors import ConfigError, ModelError, OutOfMemoryError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import room, shortage
from jaxft.hf.tokenizer import (
    decode_continuation,
    without_appended,
)
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel, Params, merge
from jaxft.models.quantised import parameter_count
from jaxft.programs.description import default_template, grown, stop_ids_of
from jaxft.programs.generate import MOST_ROWS, generate_tokens
from jaxft.programs.sampling import Sampling
from jaxft.programs.streaming import Session, text_pieces
from jaxft.programs.weights import load_weights, refuse_what_does_not_fit
from jaxft.sharding.rules import Placement
from jaxft.training.adaptation import quantised
from jaxft.workdir.source import Source, find_source

type Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Model:
    """A model for a notebook. Immutable; `params` is a flat dict of arrays.

    Attributes:
      architecture: Shape and naming of the model.
      abstract: Structure, with shapes, dtypes and axes.
      params: `{dotted path: array}`.
      tokenizer: Tokenizer of transformers; None if the folder has none, which leaves `__call__`
        alone.
      source: Origin of the weights.
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
        return parameter_count(self.abstract.params)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: of the chat template, the tokenizer and both config files."""
        return stop_ids_of(self.source.described, self.tokenizer)

    @functools.cached_property
    def has_token(self) -> np.ndarray:
        """Ids that the tokenizer knows, bool `[V]`: an embedding often has rows beyond them."""
        self._require_tokenizer()
        known = np.zeros(self.architecture.config.vocab, bool)
        known[list(self.tokenizer.get_vocab().values())] = True
        return known

    @functools.cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, or the built-in default."""
        return default_template(self.tokenizer)

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
          seed: Prompt i of a batch draws from this and i alone.
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
        """Returns what `generate` does, for prompts of token ids; each result stands alone."""
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
        with self._explained(min(len(prompts), MOST_ROWS), max(map(len, prompts)) + max_new_tokens):
            return generate_tokens(
                self.architecture.config,
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
            c, embedding = self.architecture.config, self.params["embed.w"]
            width = embedding.dtype.itemsize
            cache = rows * length * c.cached * width
            weights = sum(array.nbytes for array in self.params.values())
            fewer = f"at most {rows // 2} prompts, " if rows > 1 else ""
            narrow = ", or weights of half the size (--dtypes=bfloat16)" if width > 2 else ""
            raise OutOfMemoryError(
                f"{said} Prompts at a time: {rows}, of up to {length} tokens with their answers; "
                f"what is kept of them takes {format_bytes(cache)}, the weights "
                f"{format_bytes(weights)}; {room(list(embedding.devices()))}. It takes less with "
                f"{fewer}a smaller --max_new_tokens{narrow}."
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
    base: str | Path = "",
    dtypes: str = "float32",
    quantise: str = "",
    placement: Placement | None = None,
    device: Any = None,
) -> Model:
    """Loads a model for inference, evaluation or export.

    Args:
      path_or_repo_id: Hugging Face folder or repository id of a model or of an adapter in PEFT's
        format, or a run's workdir or checkpoint.
      revision: Branch, tag or commit of a repository id.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.
      base: Model that an adapter is made for, where it is not the one that the adapter names.
      dtypes: `float32`, `mixed` or `bfloat16` (half the memory of float32).
      quantise: Codes that hold the weights of the layers, as `model.quantise`; empty: none.
      placement: Shards the weights; one device holds them if absent.
      device: That one device; the first one by default.

    Raises:
      ConfigError: If `quantise` is none of the kinds, or for weights that an adapter trained whole.
      ModelError: If it cannot be found, is not supported or does not fit its config.json.
      CheckpointError: If a checkpoint cannot be read.
    """
    source = find_source(path_or_repo_id, revision=revision, step=step, base=str(base))
    return load_source(source, dtypes=dtypes, quantise=quantise, placement=placement, device=device)


def load_source(
    source: Source,
    *,
    dtypes: str = "float32",
    quantise: str = "",
    placement: Placement | None = None,
    device: Any = None,
) -> Model:
    """Does what `load` does, for a model that has been found."""
    stored = source.architecture
    tokenizer = source.described.load_tokenizer()
    architecture = quantised(grown(stored, tokenizer), quantise)
    abstract = architecture.abstract(make_numerics(dtypes))
    if placement is not None:
        shardings = placement.shardings(abstract.params, abstract.axes)
    else:
        single = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
        shardings = dict.fromkeys(abstract.params, single)
    refuse_what_does_not_fit(abstract, shardings, dtypes)
    params = load_weights(source, architecture, abstract, shardings, tokenizer=tokenizer)
    return Model(architecture, abstract, params, tokenizer, source)
