"""The programs of `engine.py`: they read tokens into a cache, decode, and overwrite it in place."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxft.models.cache import Cache
from jaxft.models.module import Params, merge
from jaxft.models.weights import columns_of
from jaxft.programs.sampling import LIKELY, Draws, Scores, choose_tokens, score_tokens
from jaxft.sharding.rules import place

BLOCK = 32
"""Most tokens of a row that are decoded at once."""


class State(NamedTuple):
    """The rows' texts as a program takes them, `[B]`.

    Attributes:
      last: int32, last token, which the cache does not hold.
      position: int32, its position.
      limit: int32, the length that the text may reach.
      new: int32, number of new tokens so far.
      active: bool, False in rows without a text.
      stops: int32 `[B, stops]`, the tokens that end it; -1 for none.
      draws: The way to choose tokens; None if all rows take the most likely.
    """

    last: Any
    position: Any
    limit: Any
    new: Any
    active: Any
    stops: Any
    draws: Draws | None


class Shardings(NamedTuple):
    """Placement of what programs return, where several devices hold the parameters."""

    cache: NamedSharding
    tokens: NamedSharding


def shardings_of(params: Params) -> Shardings | None:
    """Lays heads of keys and values on the devices that make them, and the tokens on all.

    Latents are of no head: every device has them.
    """
    sharding = next(iter(params.values())).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    keys = (w for path, w in params.items() if path.startswith("layers.") and ".k." in path)
    mesh, of_cache = sharding.mesh, PartitionSpec()
    if (stored := next(keys, None)) is not None:
        assert isinstance(stored.sharding, NamedSharding)
        _, heads, *_ = *stored.sharding.spec, None, None
        of_cache = PartitionSpec(None, heads)
    return Shardings(NamedSharding(mesh, of_cache), NamedSharding(mesh, PartitionSpec()))


def _placed(cache: Cache, shardings: Shardings | None) -> Cache:
    if shardings is None:
        return cache
    return place(cache, jax.tree.map(lambda _: shardings.cache, cache))


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "slots", "shardings"))
def make_cache(
    graphdef: Any, params: Params, *, rows: int, slots: int, shardings: Shardings | None
) -> Cache:
    """Allocates an empty cache."""
    return _placed(merge(graphdef, params).init_cache(rows, slots), shardings)


@functools.partial(jax.jit, static_argnames=("slots", "shardings"))
def with_slots(cache: Cache, *, slots: int, shardings: Shardings | None) -> Cache:
    """Returns the cache with room for `slots` tokens a row."""
    return _placed(cache.with_slots(slots), shardings)


@functools.partial(jax.jit, static_argnames="shardings")
def moved(cache: Cache, rows: Int[Array, " R"], *, shardings: Shardings | None) -> Cache:
    """Returns the cache of some of its rows, in another order or number."""
    return _placed(jax.tree.map(lambda x: x[rows], cache), shardings)


@functools.partial(jax.jit, static_argnames=("graphdef", "shardings"), donate_argnames="cache")
def read_tokens(
    graphdef: Any,
    params: Params,
    layers: Sequence[Params],
    cache: Cache,
    tokens: Int[Array, "R T"],
    rows: Int[Array, " R"],
    starts: Int[Array, " R"],
    counts: Int[Array, " R"],
    limits: Int[Array, " R"],
    columns: Bool[Array, "R C"] | None,
    targets: Int[Array, "R T"] | None,
    *,
    shardings: Shardings | None,
) -> tuple[Cache, Scores | None]:
    """Reads `counts` tokens into some rows, from the slots `starts` on.

    With `columns` each row has those of the ranks of all adapters: see `models.weights.columns_of`.

    Returns:
      The cache; and how likely the tokens were to be followed by `targets`, if there are some.
    """
    places = jnp.arange(tokens.shape[1])[None]
    real = places < counts[:, None]
    positions = (starts[:, None] + places) * real
    model = merge(graphdef, params)
    with columns_of(columns):
        hidden, cache = model.extend(
            tokens, positions, real, limits, cache, rows=rows, layers=layers
        )
    scores = None
    if targets is not None:
        flat = model.logits(hidden).reshape(-1, model.config.vocab)
        found = score_tokens(flat, targets.reshape(-1))
        scores = jax.tree.map(lambda x: x.reshape(*targets.shape, *x.shape[1:]), found)
        if shardings is not None:
            scores = place(scores, jax.tree.map(lambda _: shardings.tokens, scores))
    return _placed(cache, shardings), scores


@functools.partial(
    jax.jit, static_argnames=("graphdef", "scored", "shardings"), donate_argnames="cache"
)
def decode_tokens(
    graphdef: Any,
    params: Params,
    layers: Sequence[Params],
    cache: Cache,
    state: State,
    has_token: Bool[Array, " V"] | None,
    most: Int[Array, ""],
    leave: Bool[Array, ""],
    columns: Bool[Array, "B C"] | None,
    *,
    scored: bool,
    shardings: Shardings | None,
) -> tuple[Int[Array, "B block"], Scores | None, Cache]:
    """Adds up to `most` tokens to each active row, or with `leave` until the first of them ends.

    Returns:
      The new tokens with the one that ends a row, and -1 where there is none; with `scored` their
      log-probabilities and those of the most likely ones; and the cache.
    """
    model, start = merge(graphdef, params), state.active

    def running(carry: tuple) -> Bool[Array, ""]:
        step, _, _, active, *_ = carry
        return (step < most) & jnp.any(active) & ~(leave & jnp.any(active != start))

    def decode(carry: tuple) -> tuple:
        step, last, position, active, cache, tokens, scores = carry
        with columns_of(columns):
            hidden, cache = model.extend(
                last[:, None], position[:, None], active[:, None], state.limit, cache, layers=layers
            )
        logits = model.logits(hidden)[:, 0]
        token = choose_tokens(state.draws, logits, state.new + step, has_token)
        tokens = tokens.at[:, step].set(jnp.where(active, token, -1))
        if scores is not None:
            found = score_tokens(logits, token, has_token)
            scores = jax.tree.map(lambda all, new: all.at[:, step].set(new), scores, found)
        stopped = jnp.any(token[:, None] == state.stops, axis=-1)
        active = active & ~stopped & (position + 2 < state.limit)
        return step + 1, token, position + 1, active, cache, tokens, scores

    rows = state.last.shape[0]
    tokens = jnp.full((rows, BLOCK), -1, jnp.int32)
    scores = None
    if scored:
        likely = (rows, BLOCK, min(LIKELY, model.config.vocab))
        floats = jnp.zeros((rows, BLOCK)), jnp.zeros(likely)
        scores = Scores(floats[0], jnp.zeros(likely, jnp.int32), floats[1])
    carry = (jnp.int32(0), state.last, state.position, start, cache, tokens, scores)
    *_, cache, tokens, scores = jax.lax.while_loop(running, decode, carry)
    if shardings is not None:
        found = tokens, scores
        tokens, scores = place(found, jax.tree.map(lambda _: shardings.tokens, found))
    return tokens, scores, _placed(cache, shardings)
