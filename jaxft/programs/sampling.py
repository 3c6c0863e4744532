"""The choice of the next token: greedy, or drawn without sorting the vocabulary."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.errors import ConfigError

LIKELY = 20
"""Most likely tokens whose log-probabilities are given."""
# The most likely tokens among which `top_k` and `top_p` choose; more are sorted where they must be.
_CANDIDATES = 256
# Tokens of a block in a draw from the whole vocabulary.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """The choice of the next token.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Only the k most likely tokens; 0 for all.
      top_p: Only the most likely tokens whose probabilities together reach p, after `top_k`
        (nucleus sampling, Holtzman et al., arXiv:1904.09751).
      seed: Text number i draws its token n from `fold_in(fold_in(key(seed), i), n)`: it does not
        depend on the texts beside it.
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


class Draws(NamedTuple):
    """`Sampling` of each row as arrays of a program, `[B]`.

    Attributes:
      seed: uint32, seed as in `Sampling`, modulo 2^32.
      number: uint32, number of the text among those of its seed.
      temperature: float32.
      top_k: int32.
      top_p: float32.
    """

    seed: Any
    number: Any
    temperature: Any
    top_k: Any
    top_p: Any


class Scores(NamedTuple):
    """The model's own log-probabilities, in nats, whatever the way to choose: `[…]` of tokens.

    Attributes:
      chosen: float32, of the token that was chosen.
      ids: int32 `[…, k]`, the most likely tokens, the most likely first.
      likely: float32 `[…, k]`, their log-probabilities.
    """

    chosen: Any
    ids: Any
    likely: Any


class _Ranked(NamedTuple):
    """The most likely tokens of each row, `[B, C]`, the most likely first.

    Attributes:
      ids: Ids.
      weights: Unnormalised probabilities; 0 for those that `top_k` and `top_p` leave out.
      complete: Whether all tokens that these allow are among them, `[B]`.
    """

    ids: Int[Array, "B C"]
    weights: Float[Array, "B C"]
    complete: Bool[Array, " B"]


def choose_tokens(
    draws: Draws | None,
    logits: Float[Array, "B V"],
    steps: Int[Array, " B"],
    has_token: Bool[Array, " V"] | None = None,
) -> Int[Array, " B"]:
    """Returns the next token of each row.

    Args:
      draws: How each row chooses; absent if all take the most likely token.
      logits: float32.
      steps: Number of the token among the new ones of its row.
      has_token: Ids where it is False are never chosen; all may be if absent.
    """
    if has_token is not None:
        logits = jnp.where(has_token[None], logits, -jnp.inf)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if draws is None:
        return best
    return jnp.where(draws.temperature > 0, _draw(draws, logits, steps), best)


def score_tokens(
    logits: Float[Array, "B V"],
    tokens: Int[Array, " B"],
    has_token: Bool[Array, " V"] | None = None,
) -> Scores:
    """Returns the log-probabilities of chosen tokens and of the `LIKELY` most likely ones.

    They are of all logits; ids where `has_token` is False are not among the most likely.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0]
    if has_token is not None:
        logs = jnp.where(has_token[None], logs, -jnp.inf)
    likely, ids = jax.lax.top_k(logs, min(LIKELY, logs.shape[-1]))
    return Scores(chosen, ids.astype(jnp.int32), likely)


def _draw(draws: Draws, logits: Float[Array, "B V"], steps: Int[Array, " B"]) -> Int[Array, " B"]:
    """Inverts the distribution function of each row at one uniform number.

    A row's token is made by the same operations whatever the other rows ask for: what one row needs
    is computed for all, and taken by that row alone.
    """
    drawn = draws.temperature > 0
    scaled = logits / jnp.where(drawn, draws.temperature, 1.0)[:, None]
    filtered = (draws.top_k > 0) | (draws.top_p < 1)
    uniform = _uniform(draws, steps)

    def of_all() -> Array:
        return _invert_in_blocks(jnp.exp(scaled - jnp.max(scaled, -1, keepdims=True)), uniform)

    def of_candidates() -> Array:
        few = rank(draws, scaled, min(_CANDIDATES, scaled.shape[-1]))
        missing = drawn & filtered & ~few.complete
        found = _invert_ranked(few, uniform)

        def of_sorted() -> Array:
            whole = rank(draws, scaled, scaled.shape[-1])
            return jnp.where(missing, _invert_ranked(whole, uniform), found)

        return jax.lax.cond(jnp.any(missing), of_sorted, lambda: found)

    none = jnp.zeros(logits.shape[0], jnp.int32)
    free = jax.lax.cond(jnp.any(drawn & ~filtered), of_all, lambda: none)
    bound = jax.lax.cond(jnp.any(drawn & filtered), of_candidates, lambda: none)
    return jnp.where(filtered, bound, free)


def rank(draws: Draws, scaled: Float[Array, "B V"], count: int) -> _Ranked:
    """Finds the `count` most likely tokens and weighs those that `top_k` and `top_p` keep.

    The most likely token always stays. Of equally likely ones the first comes first.
    """
    values, ids = jax.lax.top_k(scaled, count)
    highest = values[:, :1]
    ranks = jnp.arange(count)[None]
    by_k, top_k = draws.top_k > 0, draws.top_k[:, None]
    weights = jnp.exp(values - highest)
    weights = jnp.where((top_k == 0) | (ranks < top_k), weights, 0.0)
    reached = jnp.cumsum(weights, axis=-1)
    # The whole is that of the k most likely, or of all tokens, of which others may be unlisted.
    whole = jnp.where(by_k, reached[:, -1], jnp.sum(jnp.exp(scaled - highest), axis=-1))
    wanted = draws.top_p[:, None] * whole[:, None]
    kept = ((reached - weights) < wanted) | (ranks == 0)
    has_all = by_k & (draws.top_k <= count)
    # Without `top_k` the mass must be reached within the list, and with a longer one its whole.
    complete = has_all | (~by_k & (reached[:, -1] >= wanted[:, 0])) | (count == scaled.shape[-1])
    return _Ranked(ids.astype(jnp.int32), jnp.where(kept, weights, 0.0), complete)


def _uniform(draws: Draws, steps: Int[Array, " B"]) -> Float[Array, " B"]:
    def one(seed: UInt32[Array, ""], number: UInt32[Array, ""], step: Int[Array, ""]) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
        return jax.random.uniform(key)

    return jax.vmap(one)(draws.seed, draws.number, steps)


def _invert_ranked(ranked: _Ranked, uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    reached = jnp.cumsum(ranked.weights, axis=-1)
    place = _place(ranked.weights, reached, uniform * reached[:, -1])
    return jnp.take_along_axis(ranked.ids, place[:, None], axis=-1)[:, 0]


def _invert_in_blocks(
    weights: Float[Array, "B V"], uniform: Float[Array, " B"]
) -> Int[Array, " B"]:
    """Finds the block of neighbouring tokens first, so that no long sum runs through all."""
    rows, vocab = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK)))
    blocks = padded.reshape(rows, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    reached = jnp.cumsum(sums, axis=-1)
    target = uniform * reached[:, -1]
    block = _place(sums, reached, target)
    before = jnp.take_along_axis(reached - sums, block[:, None], axis=-1)[:, 0]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = _place(inside, jnp.cumsum(inside, axis=-1), target - before)
    return (block * _BLOCK + place).astype(jnp.int32)


def _place(
    weights: Float[Array, "B C"], reached: Float[Array, "B C"], target: Float[Array, " B"]
) -> Int[Array, " B"]:
    """Returns the first place whose sum exceeds a target; rounding never leads to a weight of 0."""
    places = jnp.arange(weights.shape[-1])[None]
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    return jnp.minimum(jnp.sum(reached <= target[:, None], axis=-1), last)
