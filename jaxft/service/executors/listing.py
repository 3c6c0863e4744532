"""Answers of a scheduler about all of our jobs, which are used for a while."""

import time
from collections.abc import Callable

from jaxft.service.executors import ExecutorError

# Seconds up to which an answer is used again.
AGE = 5.0


class Listing[T]:
    """An answer about all jobs, for a worker that looks at each of them twice a second.

    Args:
      ask: Asks the scheduler; may raise ExecutorError, which counts as its answer.
    """

    def __init__(self, ask: Callable[[], T]):
        self._ask, self._until = ask, 0.0
        self._answer: T | ExecutorError

    def recent(self) -> T:
        """Returns the last answer, or a new one if that is too old."""
        if time.monotonic() >= self._until:
            try:
                self._answer = self._ask()
            except ExecutorError as error:
                self._answer = error
            self._until = time.monotonic() + AGE
        if isinstance(self._answer, ExecutorError):
            raise self._answer
        return self._answer

    def new(self) -> T:
        """Returns a new answer."""
        self.forget()
        return self.recent()

    def forget(self) -> None:
        """Lets the next look ask, as after a change of ours."""
        self._until = 0.0
