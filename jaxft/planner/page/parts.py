"""What a page of plans is made of: sections, tables, stacked bars, figures in words."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner import timeline as lanes
from jaxft.planner.plan import Plan, StepTime
from jaxft.reporting.report import short_name


def section(title: str, text: str, content: str, *, estimate: bool = False) -> str:
    """Returns a part of a page; `text` and `content` are HTML."""
    mark = ' <span class="estimate">estimate</span>' if estimate else ""
    note = f'<p class="dim">{text}</p>' if text else ""
    return f'<section><h3 class="part">{escape(title)}{mark}</h3>{note}{content}</section>'


def model_name(plan: Plan) -> str:
    """Returns the short name of a plan's model, as HTML."""
    return escape(short_name(plan.model))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, marks: str = "") -> str:
    """Returns a table of cells of HTML; columns that begin with `>` are of numbers.

    Args:
      columns: Their heads.
      rows: Of the body.
      marks: Classes of the table.
    """
    classes = [' class="n"' if column.startswith(">") else "" for column in columns]
    head = "".join(
        f"<th{name}>{escape(column.removeprefix('>'))}"
        for name, column in zip(classes, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{name}>{cell}" for name, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{marks}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def percent(share: float, digits: int = 0) -> str:
    """Returns a share in percent."""
    return f"{100 * share:.{digits}f} %"


def some_percent(share: float) -> str:
    """Returns a share in percent; what rounds to nothing is "< 1 %"."""
    return "< 1 %" if 0 < share < 0.005 else percent(share)


def interval(time: StepTime) -> str:
    """Returns the interval of a step's time, its unit once where both ends share it."""
    low, high = format_seconds(time.low), format_seconds(time.high)
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"


def fit_words(plan: Plan) -> str:
    """Returns by how much a plan fits, or does not, in words."""
    memory = plan.memory
    if not memory.limit:
        return "limit not known"
    size = format_bytes(abs(memory.headroom))
    return f"fits, {size} left" if memory.fits else f"does not fit, by {size}"


def mesh_words(plan: Plan) -> str:
    """Returns the axes of a plan's mesh that are larger than 1."""
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    return " × ".join(axes) or "one device"


class Share(NamedTuple):
    """A part of a bar."""

    name: str
    size: float


def stacked_bar(shares: Sequence[Share], whole: float, form: Any, *, over: str = "") -> str:
    """Returns a stacked bar whose widths are shares of `whole`.

    Args:
      shares: From left to right.
      whole: What the full width stands for.
      form: Turns a size into words.
      over: HTML that lies over it.
    """
    parts = "".join(
        f'<i class="{css_class(share.name)}" style="width:{css_number(100 * share.size / whole)}%" '
        f'title="{escape(share.name)} {form(share.size)}"></i>'
        for share in shares
        if share.size > 0
    )
    return f'<div class="bar">{parts}{over}</div>'


def legend(shares: Iterable[Share], whole: float, form: Any) -> str:
    """Returns what each part of a bar is, its size by `form`, and its share of `whole`."""
    keys = "".join(
        f'<span><i class="{css_class(share.name)}"></i>{escape(share.name)} '
        f"<b>{form(share.size)}</b> {some_percent(share.size / whole)}</span>"
        for share in shares
        if share.size > 0
    )
    return f'<div class="keys">{keys}</div>'


def css_class(kind: str) -> str:
    """Returns the class that colours a kind; all waits look alike."""
    return "k wait" if kind.startswith(lanes.WAIT) else f"k k-{_slug(kind)}"


def _slug(kind: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in kind)


def css_number(value: float) -> str:
    """Returns a number as a style takes it."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
