"""Lines and tables for a person: results on standard output, progress on standard error.

On a terminal one live area at the bottom holds the bar and the phases under way. Elsewhere (a file,
a job's log) the same is written as plain lines. All goes to standard error.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jaxft.formatting import format_duration

# Results go to stdout; progress goes to stderr.
stdout = Console()
# Set `console.stderr.quiet = True` on processes other than the first.
stderr = Console(stderr=True, highlight=False)


class Phase:
    """A named piece of work under way; `detail` says how far it is."""

    def __init__(self, name: str, depth: int):
        self.name = name
        self._depth = depth
        self._detail = ""
        self._start = time.monotonic()
        self._spinner = Spinner("dots")

    def detail(self, text: str) -> None:
        """Shows `text` beside the phase while it lasts and on its last line."""
        self._detail = text

    def __rich__(self) -> Table:
        row = Table.grid(padding=(0, 1))
        row.add_row(Text(self._indent), self._spinner, self._text(dim_detail=True))
        return row

    @property
    def _indent(self) -> str:
        return "  " * self._depth

    def _text(self, *, dim_detail: bool) -> Text:
        elapsed = format_duration(time.monotonic() - self._start)
        text = Text.assemble(self.name, ("  " + elapsed, "cyan"))
        if self._detail:
            text.append("  " + self._detail, style="dim" if dim_detail else "")
        return text

    def _announce(self) -> None:
        if not stderr.is_terminal:
            write(Text(f"{self._indent}{self.name} …"))

    def _finish(self, *, failed: bool) -> None:
        mark = ("✗ ", "bold red") if failed else ("✓ ", "green")
        write(Text.assemble(self._indent, mark, self._text(dim_detail=True)))


class Screen:
    """The live area: the bar of a training run, then the phases, innermost last."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.phases: list[Phase] = []
        self._live: Live | None = None

    def refresh(self) -> None:
        """Starts or stops the live area as there is something to show or not."""
        parts = [part for part in (self.bar, *self.phases) if part is not None]
        if not parts or not stderr.is_terminal or stderr.quiet:
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            self._live = Live(console=stderr, refresh_per_second=8, transient=True)
            self._live.start()
        self._live.update(Group(*parts), refresh=True)


screen = Screen()


def log(text: str, *, style: str = "") -> None:
    """Prints a line, above the bar if there is one. `text` is shown as it is, without markup."""
    write(Text(text, style=style))


@contextmanager
def phase(name: str) -> Iterator[Phase]:
    """Shows that `name` is under way, and how long it took once it ends. Phases may nest."""
    item = Phase(name, len(screen.phases))
    screen.phases.append(item)
    item._announce()
    screen.refresh()
    failed = True
    try:
        yield item
        failed = False
    finally:
        screen.phases.remove(item)
        screen.refresh()
        item._finish(failed=failed)


def write(text: Text) -> None:
    """Prints a text on standard error, above what is live."""
    # A pipe has no width to wrap at; a wrapped line could not be searched for.
    stderr.print(text, soft_wrap=True)


def make_table(columns: Iterable[str], *, left: int) -> Table:
    """Returns a table without rows, of which the first `left` columns are of text."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        # A name that is cut in two cannot be searched for; the other columns give way.
        justify = "left" if i < left else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=i == 0)
    return table
