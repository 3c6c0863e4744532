"""The bar of a training run, with the figures of its last record."""

import math
import time
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxft import console
from jaxft.formatting import format_duration


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
        console.screen.bar = self
        console.screen.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        console.screen.bar = None
        console.screen.refresh()

    def update(self, step: int) -> None:
        """Moves the bar to `step` steps done; call it for every step."""
        self._last = time.monotonic()
        if self._since is None:
            self._since, self._first = self._last, step
        self._step = step

    def write(self, record: dict[str, Any]) -> None:
        """Shows the figures of a `train_record`; off a terminal, prints them as one line."""
        self._record = record
        if not console.stderr.is_terminal:
            console.write(Text(self._line(record)))

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

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
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
        "accuracy": "accuracy {:.1%}",
        "margin": "margin {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "token_accuracy": "token accuracy {:.1%}",
    }
    values = {
        name: math.nan if record[name] is None else record[name]
        for name in formats
        if name in record
    }
    return [
        formats[name].format(value).replace("%", " %")
        for name, value in values.items()
        # Where no step was timed there is no speed.
        if not (name in ("tokens_per_second", "mfu") and math.isnan(value))
    ]
