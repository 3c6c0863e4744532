"""The errors that jaxft raises on purpose: at the command line they print without a traceback.

Problems of one kind are collected and raised once, so that a user fixes them in one go.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence


class JaxftError(Exception):
    """Something the user can act on. The message says what, why and what to do.

    Args:
      problems: One text, or several that are shown together, each a paragraph of its own.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(JaxftError):
    """The configuration or the command line is wrong; nothing was started."""

    exit_code = 2


class DataError(JaxftError):
    """Rows that cannot be trained on; each problem names file, line and key."""


class ModelError(JaxftError):
    """A model folder that cannot be loaded or exported as it is."""


class CheckpointError(JaxftError):
    """A checkpoint or workdir that cannot be used as asked."""


class OutOfMemoryError(JaxftError):
    """The memory of the devices or of the host is too small for what was asked for."""


class TrainingError(JaxftError):
    """The run cannot go on, such as a loss that is not finite."""


@contextlib.contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Adds the problems of a `JaxftError` to a list, to be raised with others later."""
    try:
        yield
    except JaxftError as error:
        problems += error.problems


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.7) -> str:
    """Returns " Did you mean 'x'?" for the candidate closest to `name`, or an empty string.

    Args:
      name: What was written.
      candidates: What might have been meant.
      cutoff: How alike they are at least, from 0 to 1; less for short names.
    """
    match = nearest_of(name, candidates, cutoff=cutoff)
    return f" Did you mean {match!r}?" if match else ""


def searched(path: str) -> str:
    """Returns where a path was looked for, as " Relative paths start at …", if it is relative."""
    if os.path.isabs(os.path.expanduser(path)):
        return ""
    return f" Relative paths start at the current folder, {os.getcwd()}."


def nearest_of(name: str, candidates: Iterable[str], *, cutoff: float = 0.7) -> str:
    """Returns the candidate closest to `name`, whatever their case, or an empty string."""
    written = {candidate.casefold(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.casefold(), list(written), n=1, cutoff=cutoff)
    return written[matches[0]] if matches else ""
