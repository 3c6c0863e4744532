"""Text generation: one jitted program reads the prompts and decodes with a key/value cache."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import ConfigError
from jaxft.models.module import Params, merge

# Prompts are padded to a multiple of this, so that few lengths are ever compiled.
_BUCKET = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """The choice of the next token.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Only the k most likely tokens; 0 for all.
      top_p: Only the most likely tokens whose probabilities together reach p, after `top_k`
        (nucleus sampling, Holtzman et al., arXiv:1904.09751).
      seed: Row i draws from `fold_in(key(seed), i)`: its text does not depend on the other rows.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        problems = []
        if not self.temperature >= 0:
            problems.append(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; expected 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if problems:
            raise ConfigError(problems)


class Draw(NamedTuple):
    """`Sampling` as arrays of a program.

    Attributes:
      seed: Seed as in `Sampling`, modulo 2^32.
      temperature: Temperature as in `Sampling`.
      top_k: Number of tokens as in `Sampling`.
      top_p: Share of probability as in `Sampling`.
      has_token: bool `[V]`; ids where it is False are never chosen. None for no such ids.
    """

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    has_token: Any


def make_draw(sampling: Sampling, has_token: np.ndarray | None) -> Draw:
    """Returns `sampling` and the ids that may be chosen in the form that programs take."""
    return Draw(
        np.uint32(sampling.seed % 2**32),
        np.float32(sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        has_token,
    )


def choose_tokens(
    draw: Draw, logits: Float[Array, "B V"], step: Int[Array, ""], *, greedy: bool
) -> Int[Array, " B"]:
    """Returns the next token of each row; `step` counts the new tokens before it."""
    if draw.has_token is not None:
        logits = jnp.where(draw.has_token[None], logits, -jnp.inf)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = _filter(logits / draw.temperature, draw.top_k, draw.top_p)
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(draw.seed), rows)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def generate_tokens(
    graphdef: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    has_token: np.ndarray | None = None,
) -> list[list[int]]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Where processes share the parameters, all of them call this with the same arguments.

    Args:
      graphdef: Structure of the decoder.
      params: Its parameters, in any placement.
      prompts: Token ids, at least one in each.
      max_new_tokens: Longest continuation.
      stop_ids: Tokens that end a row; not part of the result.
      sampling: Greedy if absent.
      has_token: bool `[V]`; ids where it is False, such as rows that pad the embedding, are never
        chosen. All are allowed if absent.

    Returns:
      The new ids of each row.

    Raises:
      ConfigError: If `max_new_tokens` is not positive.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    sampling = sampling or Sampling()
    longest = max(map(len, prompts))
    width = -(-longest // _BUCKET) * _BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        # Right-aligned: every row's next token then goes into the same slot of the cache.
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    new = _generate(
        graphdef,
        params,
        tokens,
        segments,
        np.asarray(sorted(stop_ids) or [-1], np.int32),
        make_draw(sampling, has_token),
        max_new_tokens=max_new_tokens,
        greedy=sampling.temperature == 0,
    )
    if not new.is_fully_replicated and not new.is_fully_addressable:
        new = jax.jit(_same, out_shardings=NamedSharding(new.sharding.mesh, PartitionSpec()))(new)
    stops = set(stop_ids)
    return [_until_stop(row, stops) for row in np.asarray(new).tolist()]


def _same(x: jax.Array) -> jax.Array:
    return x


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "greedy"))
def _generate(
    graphdef: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    stop_ids: Int[Array, " stops"],
    draw: Draw,
    *,
    max_new_tokens: int,
    greedy: bool,
) -> Int[Array, "B new"]:
    model = merge(graphdef, params)
    rows, width = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    limits = jnp.sum(segments, axis=1, dtype=jnp.int32) + max_new_tokens
    cache = model.init_cache(limits, width + max_new_tokens)
    hidden, cache = model.extend(tokens, positions, segments, cache)
    first = choose_tokens(draw, model.logits(hidden[:, -1:])[:, 0], jnp.int32(0), greedy=greedy)
    new = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def running(carry: tuple) -> Bool[Array, ""]:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(carry: tuple) -> tuple:
        step, last, done, position, cache, new = carry
        ones = jnp.ones((rows, 1), jnp.int32)
        hidden, cache = model.extend(last[:, None], position[:, None], ones, cache)
        token = choose_tokens(draw, model.logits(hidden)[:, 0], step, greedy=greedy)
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], step, 1)
        return step + 1, token, done | jnp.isin(token, stop_ids), position + 1, cache, new

    done = jnp.isin(first, stop_ids)
    start = (jnp.int32(1), first, done, positions[:, -1] + 1, cache, new)
    # What follows a row's stop token is cut off: it went on beside rows that had not ended.
    return jax.lax.while_loop(running, decode, start)[-1]


def _filter(
    logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Sets to -inf what `top_k` and `top_p` leave out; the most likely token always stays."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranks = jnp.arange(logits.shape[-1])[None]
    ranked = jnp.where((top_k == 0) | (ranks < top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((before < top_p) | (ranks == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
