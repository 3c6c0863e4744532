"""The wall time of a run, as a bar of the page and as a line of the log."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.formatting import format_duration
from jaxft.workdir.goodput import KINDS, shares


@dataclass(frozen=True, slots=True)
class Spent:
    """A part of the bar of wall time.

    Attributes:
      name: Name of what took the time.
      classes: Style of the part.
      percent: Share of all wall time.
      size: Time as text.
      part: Share as text.
    """

    name: str
    classes: str
    percent: float
    size: str
    part: str


def spent(seconds: dict[str, float]) -> Iterator[Spent]:
    """Yields the parts of the bar; nothing if no time is known."""
    for kind, share in shares(seconds):
        if seconds[kind] > 0:
            size = format_duration(seconds[kind])
            yield Spent(KINDS[kind], f"k k-{kind}", 100 * share, size, _percent(share))


def line(seconds: dict[str, float]) -> str:
    """Returns `12 s of wall time: 61.3 % training steps, 20.1 % compiling, …`."""
    parts = [f"{_percent(share)} {KINDS[kind]}" for kind, share in shares(seconds) if seconds[kind]]
    return f"{format_duration(sum(seconds.values()))} of wall time: {', '.join(parts)}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
