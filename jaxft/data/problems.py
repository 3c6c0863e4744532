"""Collects what is wrong with rows, so that a user sees the first problems of a file at once."""

from jaxft.errors import DataError

MAXIMUM_PROBLEMS = 20


class Problems:
    """The bad rows met so far; raises by itself when there are enough to stop reading.

    Args:
      name: What is being read, for the headline: a file, or the training data as a whole.
    """

    def __init__(self, name: str):
        self.name = name
        self._texts: list[str] = []
        self._examples: dict[str, None] = {}

    def add(self, origin: str, text: str, *, example: str = "") -> None:
        """Notes one problem.

        Args:
          origin: `file:line`.
          text: The key, what it holds and what was expected.
          example: A right row of that format; shown once, below all problems.

        Raises:
          DataError: When `MAXIMUM_PROBLEMS` are reached.
        """
        self._texts.append(f"{origin}: {text}")
        if example:
            self._examples[example] = None
        if len(self._texts) >= MAXIMUM_PROBLEMS:
            self._raise(f"The first {len(self._texts)} bad rows of {self.name}:")

    def check(self) -> None:
        """Raises what was collected.

        Raises:
          DataError: If there was any problem.
        """
        if self._texts:
            count = len(self._texts)
            noun = "bad row" if count == 1 else "bad rows"
            self._raise(f"{count} {noun} in {self.name}:")

    def _raise(self, headline: str) -> None:
        examples = [f"A right row: {example}" for example in self._examples]
        raise DataError([headline, *self._texts, *examples, "Nothing was trained."])
