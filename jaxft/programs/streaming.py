"""Text as it is generated: a session keeps what it has read, so that a chat reads only what is new.

Two small programs, one that reads a block of a prompt and one that decodes a few tokens, are
compiled once for each size of the cache, whatever the lengths of prompts and answers.
"""

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.errors import ConfigError
from jaxft.hf.tokenizer import decode_continuation
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import KVCache
from jaxft.models.module import Params, merge
from jaxft.models.rope import LongScaling
from jaxft.programs.generate import Draw, Sampling, choose_tokens, make_draw

_READ = 64  # tokens of a prompt in one call
_DECODE = 4  # tokens in one call, and as many arrive together
_SLOTS = 1024  # of the smallest cache; it doubles as often as it must


class Session:
    """A key/value cache for one text that grows, such as a conversation.

    Args:
      config: Shape of the decoder.
      graphdef: Its structure.
      params: Its parameters, in any placement.
      has_token: As `generate_tokens` takes it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        graphdef: Any,
        params: Params,
        *,
        has_token: np.ndarray | None = None,
    ):
        self.config = config
        self._graphdef, self._params, self._has_token = graphdef, params, has_token
        self._cache: KVCache | None = None
        self._known: list[int] = []  # the ids whose keys and values the cache holds, in order
        self._regime: tuple[bool, ...] = ()
        self.ended = False
        """Whether the last answer came to a stop token."""

    @property
    def slots(self) -> int:
        """Tokens that the cache has room for; 0 before the first use."""
        return 0 if self._cache is None else self._cache.segments.shape[1] - _READ

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        sampling: Sampling | None = None,
    ) -> Iterator[list[int]]:
        """Yields the ids that `generate_tokens` returns for this prompt, a few at a time.

        What the prompt has in common with the text so far is not read again. The iterator may be
        left at any time.

        Raises:
          ConfigError: If the prompt is empty, or it and `max_new_tokens` exceed the context.
        """
        limit = len(prompt) + max_new_tokens
        if not prompt or max_new_tokens < 1 or limit > self.config.max_length:
            raise ConfigError(
                f"A prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit; "
                f"expected at least one of each, and {self.config.max_length} in all."
            )
        return self._generate(list(prompt), max_new_tokens, stop_ids, sampling or Sampling())

    def _generate(
        self, prompt: list[int], most: int, stop_ids: Collection[int], sampling: Sampling
    ) -> Iterator[list[int]]:
        hidden = self._read(prompt, limit=len(prompt) + most)
        draw = make_draw(sampling, self._has_token)
        stops = np.asarray(sorted(stop_ids) or [-1], np.int32)
        self.ended = False
        step = 0
        while step < most and not self.ended:
            tokens, hidden = self._decode(hidden, draw, stops, step, most, sampling)
            step += len(tokens)
            self.ended = tokens[-1] in stop_ids
            new = tokens[:-1] if self.ended else tokens
            if new:
                yield new

    def _read(self, prompt: list[int], *, limit: int) -> Array:
        """Brings the cache to hold the prompt; returns the last hidden state, `[1, 1, D]`."""
        self._make_room(limit)
        known = _common(self._known, prompt[:-1])  # the last token is read for what follows it
        self._known = self._known[:known]
        hidden = None
        for start in range(known, len(prompt), _READ):
            block = prompt[start : start + _READ]
            tokens = np.zeros((1, _READ), np.int32)
            tokens[0, : len(block)] = block
            count, first = np.int32(len(block)), np.int32(start)
            cache = self._take_cache(limit)
            hidden, cache = _read_block(self._graphdef, self._params, cache, tokens, first, count)
            self._keep(cache, block)
        assert hidden is not None
        return hidden

    def _decode(
        self,
        hidden: Array,
        draw: Draw,
        stops: np.ndarray,
        step: int,
        most: int,
        sampling: Sampling,
    ) -> tuple[list[int], Array]:
        assert self._cache is not None
        cache, self._cache = self._cache, None
        tokens, count, hidden, cache = _decode_block(
            self._graphdef,
            self._params,
            cache,
            hidden,
            draw,
            stops,
            np.int32(step),
            np.int32(min(step + _DECODE, most)),
            greedy=sampling.temperature == 0,
        )
        new = np.asarray(tokens)[: int(count)].tolist()
        self._keep(cache, new)
        return new, hidden

    def _make_room(self, limit: int) -> None:
        """Allocates a new cache where this is too small, or holds keys turned for shorter texts."""
        regime = tuple(
            limit > kind.rope.scaling.original_length
            for kind in self.config.kinds
            if kind.rope is not None and isinstance(kind.rope.scaling, LongScaling)
        )
        if self._cache is None or self.slots < limit or regime != self._regime:
            slots = _SLOTS
            while slots < limit:
                slots *= 2
            slots = min(slots, self.config.max_length)
            self._cache = None  # the old one is freed first
            self._cache = _init_cache(self._graphdef, self._params, slots=slots + _READ)
            self._known, self._regime = [], regime

    def _take_cache(self, limit: int) -> KVCache:
        """Returns the cache, which its next program overwrites: an interrupt leaves none."""
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache._replace(limits=np.full(1, limit, np.int32))

    def _keep(self, cache: KVCache, read: Sequence[int]) -> None:
        self._known += read
        self._cache = cache


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def _init_cache(graphdef: Any, params: Params, *, slots: int) -> KVCache:
    return merge(graphdef, params).init_cache(jnp.zeros(1, jnp.int32), slots)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _read_block(
    graphdef: Any,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "1 T"],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Float[Array, "1 1 D"], KVCache]:
    """Reads `count` tokens into the slots from `start` on; what was there is overwritten."""
    model = merge(graphdef, params)
    places = jnp.arange(tokens.shape[1])[None]
    held = (places < count).astype(jnp.int32)
    cache = cache._replace(used=start)
    hidden, cache = model.extend(tokens, (start + places) * held, held, cache)
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return last, cache._replace(used=start + count)


@functools.partial(jax.jit, static_argnames=("graphdef", "greedy"), donate_argnames="cache")
def _decode_block(
    graphdef: Any,
    params: Params,
    cache: KVCache,
    hidden: Float[Array, "1 1 D"],
    draw: Draw,
    stop_ids: Int[Array, " stops"],
    step: Int[Array, ""],
    end: Int[Array, ""],
    *,
    greedy: bool,
) -> tuple[Int[Array, " new"], Int[Array, ""], Float[Array, "1 1 D"], KVCache]:
    """Chooses and reads tokens `step` to `end`, or to a stop token; returns them and how many."""
    model = merge(graphdef, params)

    def running(carry: tuple) -> Array:
        place, last, *_ = carry
        return (step + place < end) & ~jnp.isin(last, stop_ids)

    def decode(carry: tuple) -> tuple:
        place, _, hidden, cache, new = carry
        token = choose_tokens(draw, model.logits(hidden)[:, 0], step + place, greedy=greedy)[0]
        one = jnp.ones((1, 1), jnp.int32)
        hidden, cache = model.extend(one * token, one * cache.used, one, cache)
        return place + 1, token, hidden, cache, new.at[place].set(token)

    new = jnp.zeros(_DECODE, jnp.int32)
    carry = (jnp.int32(0), jnp.int32(-2), hidden, cache, new)
    place, _, hidden, cache, new = jax.lax.while_loop(running, decode, carry)
    return new, place, hidden, cache


def text_pieces(
    tokenizer: Any, ids: Iterable[Sequence[int]], *, after: Sequence[int] = ()
) -> Iterator[str]:
    """Yields text as tokens arrive; joined, it is what decoding all of them at once gives.

    Held back is what more tokens may change: bytes of a character that is not complete, and, where
    the tokenizer tidies spaces before punctuation, the last word.

    Args:
      tokenizer: Decodes them.
      ids: New tokens, a few at a time.
      after: The tokens of a text that they continue.
    """
    tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    known: list[int] = []
    shown = text = ""
    for new in ids:
        known += new
        if after:
            text = decode_continuation(tokenizer, after, known)
        else:
            text = tokenizer.decode(known, skip_special_tokens=True)
        ready = text.rstrip("\ufffd")
        if tidies:
            ready = ready.rpartition(" ")[0]
        if len(ready) > len(shown) and ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
    if len(text) > len(shown):
        yield text[len(shown) :]
