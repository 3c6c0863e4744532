"""The thread that drives the engines: texts come and go between their steps."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxft.programs.decoding import BLOCK
from jaxft.programs.engine import Engine
from jaxft.programs.texts import Piece, Request

_SECONDS = 0.05  # that a step shall take: texts arrive, and are let in, as often


@dataclass(eq=False, slots=True)
class Text:
    """A text under way.

    Attributes:
      engine: The engine that continues it.
      request: The way to continue it.
      give: A function that is called with each piece, or with the error that ended it, in the
        driver's thread.
      ticket: The engine's number for it; 0 while it has none.
    """

    engine: Engine
    request: Request
    give: Callable[[Piece | Exception], None]
    ticket: int = 0


class Driver(threading.Thread):
    """Steps every engine that has something to do, one after the other."""

    def __init__(self) -> None:
        super().__init__(name="driver", daemon=True)
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._texts: dict[Engine, dict[int, Text]] = {}
        self._most: dict[Engine, int] = {}  # tokens of the next step
        self._ends = False

    def submit(self, text: Text) -> None:
        """Lets a text in before the next step."""
        self._orders.put(lambda: self._let_in(text))

    def cancel(self, text: Text) -> None:
        """Drops a text before the next step; one that has ended is no error."""
        self._orders.put(lambda: self._drop(text))

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Calls a function between two steps, such as one that changes an engine."""
        future: Future[Any] = Future()

        def order() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._orders.put(order)
        return future

    def end(self) -> None:
        """Makes the thread return after the step that it is in."""
        self._ends = True
        self._orders.put(lambda: None)

    def run(self) -> None:
        """Works until `end`."""
        while not self._ends:
            self._obey()
            for engine in list(self._texts):
                self._step(engine)

    def _obey(self) -> None:
        """Carries out what was ordered; waits for it where there is nothing else to do."""
        waits = not self._texts
        while not self._ends:
            try:
                order = self._orders.get(block=waits)
            except queue.Empty:
                return
            order()
            waits = False

    def _let_in(self, text: Text) -> None:
        try:
            text.ticket = text.engine.submit(text.request)
        except Exception as error:
            text.give(error)
            return
        self._texts.setdefault(text.engine, {})[text.ticket] = text

    def _drop(self, text: Text) -> None:
        texts = self._texts.get(text.engine, {})
        if texts.pop(text.ticket, None) is not None:
            text.engine.cancel(text.ticket)
        if not texts:
            self._texts.pop(text.engine, None)

    def _step(self, engine: Engine) -> None:
        texts, most = self._texts[engine], self._most.pop(engine, 1)
        started = time.monotonic()
        try:
            pieces = engine.step(most, parts=1)
        except Exception as error:
            # Nothing is known of what the engine's rows hold: their texts end here.
            for text in list(texts.values()):
                self._drop(text)
                text.give(error)
            return
        took = time.monotonic() - started
        for piece in pieces:
            texts[piece.ticket].give(piece)
            if piece.ended:
                del texts[piece.ticket]
        if not texts:
            del self._texts[engine]
        else:
            self._most[engine] = _next(most, took)


def _next(most: int, took: float) -> int:
    """Returns how many tokens the next step decodes, from the time that this one took."""
    if took > _SECONDS:
        return max(1, most // 2)
    return min(BLOCK, 2 * most) if 2 * took < _SECONDS else most
