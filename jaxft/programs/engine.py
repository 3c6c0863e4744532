"""Generation with continuous batching: rows that end make room for texts that wait.

The host knows each row's text, and a device holds keys and values of all its tokens but the last.
Two programs, compiled for few sizes, work on one cache that they overwrite in place: one reads a
block of tokens into some rows, the other decodes up to `BLOCK` tokens in all rows.

Rows may have adapters of their own, each some of the columns of one wide adapter; see
`side_by_side.py`.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxft.errors import ConfigError
from jaxft.models.cache import Cache
from jaxft.models.config import DecoderConfig
from jaxft.models.module import Params, apart
from jaxft.models.rope import LongScaling
from jaxft.programs.decoding import (
    BLOCK,
    State,
    decode_tokens,
    make_cache,
    moved,
    read_tokens,
    shardings_of,
    with_slots,
)
from jaxft.programs.sampling import Draws, Scores
from jaxft.programs.texts import Piece, Request

# Tokens of a row, and rows, that are read at once. A prompt is cut into such parts, so that no more
# than these few programs are compiled, whatever the lengths of prompts.
_PARTS = (256, 64, 16)
_GROUPS = (16, 4, 1)
# Bytes that the scores of attention may take while tokens are read.
_SCORES = 2**29
_STOPS = 8  # stop tokens are padded to a multiple of this
_CALM = 32  # steps that need fewer rows, or far fewer slots, before there are fewer
_MUCH = 4  # times as many slots as are needed are too many: each step looks at all of them
_FEWER = 4  # an engine has all of its rows, or this many times fewer, or that once more


@dataclass(slots=True)
class _Text:
    ticket: int
    request: Request
    ids: list[int]  # the prompt and what has been added
    read: list[Scores] = field(default_factory=list)  # of what has been read, part by part

    @property
    def new(self) -> int:
        return len(self.ids) - len(self.request.prompt)


@dataclass(slots=True)
class _Row:
    """A row of the cache.

    Attributes:
      number: Place in the cache.
      held: Ids whose keys and values its first slots hold.
      regime: The other things that these depend on; see `Engine._regime`.
      text: The text that is being written in it, if any.
    """

    number: int
    held: list[int] = field(default_factory=list)
    regime: tuple[int, ...] = ()
    text: _Text | None = None


class Engine:
    """Continues any number of texts, `rows` at a time.

    Where processes share the parameters, all of them make the same calls.

    Args:
      config: Shape of the decoder.
      graphdef: Its structure.
      params: Its parameters, in any placement.
      rows: Texts that are written at the same time.
      elastic: Whether there are fewer rows while there are few texts; a step takes less time then,
        and another program.
      slots: Tokens that a row has room for at least; the cache grows as texts need it, and gets
        smaller again after a long one.
      has_token: bool `[V]`; ids where it is False, such as rows that pad the embedding, are never
        chosen. All are allowed if absent.
    """

    def __init__(
        self,
        config: DecoderConfig,
        graphdef: Any,
        params: Params,
        *,
        rows: int,
        elastic: bool = False,
        slots: int = 0,
        has_token: np.ndarray | None = None,
    ):
        self.config, self._has_token = config, has_token
        self._graphdef: Any = None
        self.replace(graphdef, params)
        self._shardings = shardings_of(params)
        self._slots, self._cache = slots, None
        self._least, self._roomy = slots, 0
        fewer = (max(1, rows // _FEWER**2), max(1, rows // _FEWER)) if elastic else ()
        self._sizes, self._calm = (*fewer, rows), 0
        self._rows = [_Row(number) for number in range(self._sizes[0])]
        self._waiting: deque[_Text] = deque()
        self._tickets = 0

    @property
    def slots(self) -> int:
        """Tokens that a row has room for; 0 before the first use."""
        return 0 if self._cache is None else self._cache.slots

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._active()

    def replace(self, graphdef: Any, params: Params, *, columns: int = 0) -> None:
        """Puts parameters in the place of those so far; texts under way go on with them.

        Args:
          graphdef: Structure of the same model, perhaps with a wide adapter.
          params: Of the model and the adapter. What texts under way are written with is unchanged.
          columns: Width of the adapter.
        """
        self._graphdef, self._params, self._columns = graphdef, params, columns
        self._layers = apart(params, self.config.parts)

    def submit(self, request: Request) -> int:
        """Puts a text behind those that wait; returns the ticket that its pieces carry.

        Raises:
          ConfigError: If the prompt is empty, or it and `max_new_tokens` exceed the context.
        """
        self.check(request)
        self._tickets += 1
        self._waiting.append(_Text(self._tickets, request, list(request.prompt)))
        return self._tickets

    def check(self, request: Request) -> None:
        """Refuses what `submit` would refuse."""
        size = len(request.prompt)
        if not size or request.max_new_tokens < 1 or request.limit > self.config.max_length:
            raise ConfigError(
                f"A prompt of {size} tokens and {request.max_new_tokens} new ones do not fit; "
                f"expected at least one of each, and {self.config.max_length} in all."
            )

    def cancel(self, ticket: int) -> None:
        """Drops a text; one that has ended, or was never there, is no error."""
        self._waiting = deque(text for text in self._waiting if text.ticket != ticket)
        for row in self._active():
            if row.text is not None and row.text.ticket == ticket:
                row.text = None

    def step(self, most: int = BLOCK, *, parts: int = 0) -> list[Piece]:
        """Fills free rows with waiting texts and decodes up to `most` tokens in each row.

        It returns as soon as a row ends while texts wait. After an interrupt the next step reads
        the texts anew.

        Args:
          most: Tokens.
          parts: Parts of prompts that are read at most while other texts are being written, so that
            these do not wait for a long one; 0 for all. A text gets tokens once its prompt is read.
        """
        self._fit_rows()
        self._admit()
        rows = self._active()
        if not rows:
            return []
        self._make_room(max(_needed(row.text) for row in rows if row.text is not None))
        self._read(rows, parts)
        ready = [row for row in rows if not _missing(row)]
        return self._decode(ready, min(most, BLOCK)) if ready else []

    def _active(self) -> list[_Row]:
        return [row for row in self._rows if row.text is not None]

    def _fit_rows(self) -> None:
        """Brings the number of rows to that of the texts, those with texts first."""
        wanted, now = len(self._waiting) + len(self._active()), len(self._rows)
        size = next((size for size in self._sizes if size >= wanted), self._sizes[-1])
        self._calm = self._calm + 1 if size < now else 0
        # Not at once to fewer: texts that end together are often followed by others.
        if size == now or (size < now and self._calm < _CALM):
            return
        self._calm = 0
        kept = sorted(self._rows, key=lambda row: (row.text is None, -len(row.held)))[:size]
        if self._cache is not None:
            places = [row.number for row in kept] + [0] * (size - len(kept))
            numbers = np.asarray(places, np.int32)
            self._cache = moved(self._take_cache(), numbers, shardings=self._shardings)
        for number, row in enumerate(kept):
            row.number = number
        self._rows = kept + [_Row(number) for number in range(len(kept), size)]

    def _admit(self) -> None:
        free = [row for row in self._rows if row.text is None]
        while self._waiting and free:
            text = self._waiting.popleft()
            regime = self._regime(text.request)
            shared = [self._shared(row, text, regime) for row in free]
            best = shared.index(max(shared))
            row = free.pop(best)
            row.held, row.regime, row.text = row.held[: shared[best]], regime, text

    def _shared(self, row: _Row, text: _Text, regime: tuple[int, ...]) -> int:
        """Returns how many of a text's first tokens need not be read again in a row."""
        if row.regime != regime or text.request.prompt_scored:
            return 0
        count = _common(row.held, text.ids[:-1])
        # What a recurrent layer keeps is of all that it read, and cannot be cut.
        return 0 if self.config.is_recurrent and count < len(row.held) else count

    def _regime(self, request: Request) -> tuple[int, ...]:
        """Returns what keys and values depend on beside the tokens.

        It is the adapter, and whether a text counts as a long one, whose keys are turned otherwise.
        """
        return request.columns.number, *(
            request.limit > kind.rope.scaling.original_length
            for kind in self.config.kinds
            if kind.rope is not None and isinstance(kind.rope.scaling, LongScaling)
        )

    def _make_room(self, limit: int) -> None:
        if self._cache is None:  # new, or an interrupt has left none
            for row in self._rows:
                row.held = []
            self._slots = min(_size(max(limit, self._slots)), self.config.max_length)
            cache = make_cache(
                self._graphdef,
                self._params,
                rows=len(self._rows),
                slots=self._slots,
                shardings=self._shardings,
            )
            if self._shardings is None:
                # Bound to the device as what programs return is, which would be compiled again.
                cache = jax.device_put(cache, *next(iter(self._params.values())).devices())
            self._cache = cache
            return
        size = min(_size(max(limit, self._least)), self.config.max_length)
        self._roomy = self._roomy + 1 if _MUCH * size <= self._slots else 0
        if self._slots < limit or self._roomy > _CALM:
            self._slots, self._roomy = size, 0
            for row in self._rows:
                fits = len(row.held) <= size
                row.held = row.held if fits else [] if self.config.is_recurrent else row.held[:size]
            self._cache = with_slots(self._take_cache(), slots=size, shardings=self._shardings)

    def _take_cache(self) -> Cache:
        """Returns the cache, which its next program overwrites: an interrupt leaves none."""
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache

    def _read(self, rows: Sequence[_Row], parts: int) -> None:
        """Brings the cache to hold all tokens of the texts but their last, or nearer to it."""
        written = any(row.text is not None and row.text.new for row in rows)
        left = parts if parts and written else -1
        while left and (missing := [(row, n) for row in rows if (n := _missing(row))]):
            left -= 1
            part = max(_part(n) for _, n in missing)
            scored = any(
                row.text is not None and row.text.request.prompt_scored for row, _ in missing
            )
            scores = 4 * (self.config.heads * self.slots + self.config.vocab * scored)
            part = next((p for p in _PARTS if p <= part and p * scores <= _SCORES), _PARTS[-1])
            alike = [row for row, n in missing if _part(n) >= part]
            most = min(len(alike), max(1, _SCORES // (part * scores)))
            group = next(g for g in _GROUPS if g <= most)
            self._read_part(alike[:group], part)

    def _read_part(self, rows: Sequence[_Row], part: int) -> None:
        tokens = np.zeros((len(rows), part), np.int32)
        starts, counts, limits = np.zeros((3, len(rows)), np.int32)
        for i, row in enumerate(rows):
            assert row.text is not None
            ids = row.text.ids[len(row.held) : -1][:part]
            tokens[i, : len(ids)] = ids
            starts[i], counts[i], limits[i] = len(row.held), len(ids), row.text.request.limit
        numbers = np.asarray([row.number for row in rows], np.int32)
        cache, scores = read_tokens(
            self._graphdef,
            self._params,
            self._layers,
            self._take_cache(),
            tokens,
            numbers,
            starts,
            counts,
            limits,
            self._columns_of(rows, range(len(rows)), len(rows)),
            self._targets(rows, tokens, starts),
            shardings=self._shardings,
        )
        self._keep_scores(rows, starts, counts, scores)
        for row, ids, count in zip(rows, tokens.tolist(), counts.tolist(), strict=True):
            row.held += ids[:count]
        self._cache = cache

    def _targets(
        self, rows: Sequence[_Row], tokens: np.ndarray, starts: np.ndarray
    ) -> np.ndarray | None:
        """Returns the token behind each that is read, if one of the rows wants to know of them."""
        if not any(row.text is not None and row.text.request.prompt_scored for row in rows):
            return None
        targets = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            assert row.text is not None
            ids = row.text.ids[starts[i] + 1 :][: tokens.shape[1]]
            targets[i, : len(ids)] = ids
        return targets

    def _keep_scores(
        self, rows: Sequence[_Row], starts: np.ndarray, counts: np.ndarray, scores: Scores | None
    ) -> None:
        """Keeps what was found of the texts that want to know."""
        if scores is None:
            return
        scores = jax.tree.map(np.asarray, scores)
        for i, row in enumerate(rows):
            text = row.text
            if text is not None and text.request.prompt_scored:
                text.read = [] if starts[i] == 0 else text.read
                text.read.append(jax.tree.map(lambda x, i=i: x[i, : counts[i]], scores))

    def _decode(self, rows: Sequence[_Row], most: int) -> list[Piece]:
        tokens, scores, cache = decode_tokens(
            self._graphdef,
            self._params,
            self._layers,
            self._take_cache(),
            self._state(rows),
            self._has_token,
            np.int32(most),
            np.bool_(bool(self._waiting)),
            self._columns_of(rows, [row.number for row in rows], len(self._rows)),
            scored=any(row.text is not None and row.text.request.scored for row in rows),
            shardings=self._shardings,
        )
        found, scores = np.asarray(tokens), jax.tree.map(np.asarray, scores)
        self._cache = cache
        return [self._piece(row, found[row.number], scores) for row in rows]

    def _columns_of(
        self, rows: Sequence[_Row], places: Iterable[int], count: int
    ) -> np.ndarray | None:
        """Returns which columns of the wide adapter each row takes, if there is one."""
        if not self._columns:
            return None
        taken = np.zeros((count, self._columns), bool)
        for row, place in zip(rows, places, strict=True):
            assert row.text is not None
            _, start, end = row.text.request.columns
            taken[place, start:end] = True
        return taken

    def _piece(self, row: _Row, found: np.ndarray, scores: Scores | None) -> Piece:
        """Adds what was decoded to a row's text, and frees the row if that has ended."""
        text = row.text
        assert text is not None
        new, first = found[found >= 0].tolist(), not text.new
        text.ids += new
        row.held = text.ids[:-1]
        ended = "stop" if new[-1] in text.request.stop_ids else ""
        if ended:
            new = new[:-1]
        elif len(text.ids) == text.request.limit:
            ended = "length"
        if ended:
            row.text = None
        of_row = of_prompt = None
        if text.request.prompt_scored and first:
            nothing = Scores(np.zeros(0, "f4"), np.zeros((0, 0), "i4"), np.zeros((0, 0), "f4"))
            count, parts = len(text.request.prompt) - 1, text.read or [nothing]
            of_prompt = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *parts)
            text.read = []
        if text.request.scored:
            of_row = jax.tree.map(lambda x: x[row.number, : len(new)], scores)
        return Piece(text.ticket, new, ended, of_row, of_prompt)

    def _state(self, rows: Sequence[_Row]) -> State:
        texts = {row.number: row.text for row in rows if row.text is not None}
        most = max(len(text.request.stop_ids) for text in texts.values())
        width = max(1, -(-most // _STOPS)) * _STOPS
        ints = np.zeros((4, len(self._rows)), np.int32)
        stops = np.full((len(self._rows), width), -1, np.int32)
        draws = Draws(*(np.zeros(len(self._rows), d) for d in ("u4", "u4", "f4", "i4", "f4")))
        for number, text in texts.items():
            request, sampling = text.request, text.request.sampling
            ints[:, number] = text.ids[-1], len(text.ids) - 1, request.limit, text.new
            stops[number, : len(request.stop_ids)] = sorted(request.stop_ids)
            draws.seed[number] = sampling.seed % 2**32
            draws.number[number] = request.number
            draws.temperature[number] = sampling.temperature
            draws.top_k[number] = min(sampling.top_k, self.config.vocab)
            draws.top_p[number] = sampling.top_p
        active = np.asarray([number in texts for number in range(len(self._rows))])
        last, position, limit, new = ints
        return State(
            last, position, limit, new, active, stops, draws if draws.temperature.any() else None
        )


def _missing(row: _Row) -> int:
    """Returns how many tokens of its text are to be read before it can be decoded."""
    return 0 if row.text is None else len(row.text.ids) - 1 - len(row.held)


def _needed(text: _Text) -> int:
    """Returns how many slots a text may fill in a step."""
    return min(text.request.limit, len(text.ids) + BLOCK)


def _part(tokens: int) -> int:
    """Returns the size of the part in which tokens are read first; a quarter may be padding."""
    return next((part for part in _PARTS if 4 * tokens >= 3 * part), _PARTS[-1])


def _size(tokens: int) -> int:
    """Returns the next of 64, 96, 128, 192, 256 and so on."""
    size = 64
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
