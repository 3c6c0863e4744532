"""What a person sees while a run goes on: phases with elapsed time, a bar, lines above it.

On a terminal one live area at the bottom holds the bar and the phases under way. Elsewhere (a file,
a job's log) the same is written as plain lines. All goes to standard error.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# Results go to stdout; progress goes to stderr.
output = Console()
# Set `console.quiet = True` on processes other than the first.
console = Console(stderr=True, highlight=False)


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
        if not console.is_terminal:
            _print(Text(f"{self._indent}{self.name} …"))

    def _finish(self, *, failed: bool) -> None:
        mark = ("✗ ", "bold red") if failed else ("✓ ", "green")
        _print(Text.assemble(self._indent, mark, self._text(dim_detail=True)))


class _Screen:
    """The live area: the training bar, then the phases, innermost last."""

    def __init__(self) -> None:
        self.bar: TrainProgress | None = None
        self.phases: list[Phase] = []
        self._live: Live | None = None

    def refresh(self) -> None:
        """Starts or stops the live area as there is something to show or not."""
        parts = [part for part in (self.bar, *self.phases) if part is not None]
        if not parts or not console.is_terminal or console.quiet:
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            self._live = Live(console=console, refresh_per_second=8, transient=True)
            self._live.start()
        self._live.update(Group(*parts), refresh=True)


_screen = _Screen()


def log(text: str, *, style: str = "") -> None:
    """Prints a line, above the bar if there is one. `text` is shown as it is, without markup."""
    _print(Text(text, style=style))


@contextmanager
def phase(name: str) -> Iterator[Phase]:
    """Shows that `name` is under way, and how long it took once it ends. Phases may nest."""
    item = Phase(name, len(_screen.phases))
    _screen.phases.append(item)
    item._announce()
    _screen.refresh()
    failed = True
    try:
        yield item
        failed = False
    finally:
        _screen.phases.remove(item)
        _screen.refresh()
        item._finish(failed=failed)


class TrainProgress:
    """The bar of a training run: steps, time left and the figures of the last record.

    Use it as a context manager. The time left is judged by the steps since the first one of this
    process, which compiles.
    """

    def __init__(self, total_steps: int, start_step: int = 0):
        self._total = total_steps
        self._step = self._first = start_step
        self._since: float | None = None  # when the first step was done
        self._last: float | None = None
        self._record: dict[str, Any] = {}

    def __enter__(self) -> "TrainProgress":
        _screen.bar = self
        _screen.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        _screen.bar = None
        _screen.refresh()

    def update(self, step: int) -> None:
        """Moves the bar to `step` steps done; call it for every step."""
        self._last = time.monotonic()
        if self._since is None:
            self._since, self._first = self._last, step
        self._step = step

    def write(self, record: dict[str, Any]) -> None:
        """Shows the figures of a `train_record`; off a terminal, prints them as one line."""
        self._record = record
        if not console.is_terminal:
            _print(Text(self._line(record)))

    def eta(self) -> float | None:
        """Returns the seconds left, or None until two steps are done."""
        done = self._step - self._first
        if self._since is None or self._last is None or not done:
            return None
        return (self._last - self._since) / done * (self._total - self._step)

    def _line(self, record: dict[str, Any]) -> str:
        step, eta = record["step"], self.eta()
        parts = [f"step {step:,}/{self._total:,}", *format_record(record)]
        if eta is not None:
            parts.append(f"eta {format_duration(eta)}")
        return "  ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        eta = self.eta()
        head = f"{self._step:,}/{self._total:,}"
        share = f"{100 * self._step // max(self._total, 1)} %"
        figures = [f"eta {format_duration(eta)}" if eta is not None else "eta …"]
        figures += format_record(self._record)
        # Figures that do not fit are left out from the end; the bar takes what is left over.
        room = options.max_width - len(head) - len(share) - 4 - 12
        while figures and len("  ".join(figures)) > room:
            figures.pop()
        tail = "  ".join(figures)
        width = min(40, max(4, room + 12 - len(tail) - 2))
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=width)
        row.add_row(Text(head), bar, Text(share, style="cyan"), Text(" " + tail))
        yield row


def format_record(record: dict[str, Any]) -> list[str]:
    """Returns the figures of a train or evaluation record that a person watches."""
    formats = {
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.4g}",
        "token_accuracy": "token accuracy {:.1%}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
    }
    return [
        text.format(record[name] if record[name] is not None else math.nan).replace("%", " %")
        for name, text in formats.items()
        if name in record
    ]


def format_duration(seconds: float) -> str:
    """Returns '0.4 s', '12 s', '3:05' or '1:02:03'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def counted(number: int, noun: str) -> str:
    """Returns '1 step' or '1,200 steps'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _print(text: Text) -> None:
    # A pipe has no width to wrap at; a wrapped line could not be searched for.
    console.print(text, soft_wrap=True)
