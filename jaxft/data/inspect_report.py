"""The report of `jaxft data` as a terminal shows it."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxft.config import DataConfig
from jaxft.data.description import describe_findings
from jaxft.data.overlap import Overlap
from jaxft.data.preparation import skipped_rows
from jaxft.data.rows import TokenRows
from jaxft.data.unit_findings import UnitFindings, describe_doubts, describe_known_prompts
from jaxft.data.units import NOUNS, SIDES

_BAR_WIDTH = 40
_SHOWN_SKIPPED = 3
_WIDEST_NAME = 26
_TRAINED_STYLE = "bold green"
_MASKED_STYLE = "dim"
_ALARM_STYLE = "bold red"
_NOTE_STYLE = "italic cyan"
# Rows of the table that are left out where they say nothing.
_SELDOM = ("bad rows left out", "in no row", "contradictions", "prompts also in training")


@dataclass(frozen=True, slots=True)
class SetReport:
    """One data set.

    Attributes:
      name: 'train', 'validation' or as evaluation calls it.
      rows: The packed rows, with their statistics; of a refused set, what `data.overlength=drop`
        would leave of it.
      findings: Findings on its preferences; None for documents.
      known_prompts: Units whose prompt is in the training set too, with whatever answers; None
        for that set itself, without it, and for documents.
      refusal: Reason for which training or evaluation would refuse the set, such as over-length
        documents; empty if it would not.
      edges: Token lengths of documents, or of units of preferences, that bound the bins of the
        histogram, int64 `[bins + 1]`; the last bin is wider where few are far longer than all
        others.
      counts: Documents in each bin, int64 `[bins]`.
      duplicates: Documents or units whose content, but for case and white space, came before.
      overlap: Documents that are in the training set too; None for that set itself, and without it.
    """

    name: str
    rows: TokenRows
    edges: np.ndarray
    counts: np.ndarray
    duplicates: int
    overlap: Overlap | None
    refusal: str
    findings: UnitFindings | None = None
    known_prompts: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A document, or what is worth seeing of a long one.

    Attributes:
      origin: `file:line`.
      label: Role in its unit, such as 'chosen'; empty for documents alone.
      runs: Texts of runs of tokens that are all trained (True) or all masked (False), and what
        stands for tokens that are not shown (None).
    """

    origin: str
    label: str
    runs: list[tuple[str, bool | None]]


@dataclass(frozen=True)
class Report:
    """The findings of `jaxft data`; a rich console can print them.

    Attributes:
      config: The run whose data they are.
      context: Tokens that the model was made for; 0: not known.
      tokenizer: One line on the tokenizer.
      template: Origin of the chat template, and its stop tokens.
      sets: The training set if there is one, and the held-out sets.
      samples: The first documents.
    """

    config: DataConfig
    context: int
    tokenizer: str
    template: str
    sets: list[SetReport]
    samples: list[Sample]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders all sections for a terminal."""
        yield _heading("What was detected")
        for item, others in self._with_those_of_the_same_data():
            for line in item.rows.statistics.read.formats:
                yield Text(f"{item.name}: {line}")
            for other in others:
                yield Text(f"{other.name}: {_relation(other, item)}")
        yield Text(f"tokenizer: {self.tokenizer}")
        yield Text(f"chat template: {self.template}")
        yield _heading("Counts")
        yield _counts_table(self.sets)
        yield Text(
            f"\nRows have {self.config.max_length:,} tokens; packing {self.config.packing!r}, "
            f"overlength {self.config.overlength!r}."
        )
        for table in _parts_table(self.sets):
            yield Text()
            yield table
            yield Text()
        for item, _ in self._with_those_of_the_same_data():
            for line in describe_findings(item.rows.documents):
                yield Text(f"{item.name}: {line}")
            for record in itertools.islice(skipped_rows(item.rows), _SHOWN_SKIPPED):
                yield Text(f"  {record['origin']}: {record['problem']}")
        for item in self.sets:
            yield from _notes(item, self.config, self.context)
        for item in self.sets:
            yield _heading(f"Tokens in a {_noun(item)}: {item.name}")
            yield _histogram(item)
        yield _heading(f"The first {_noun(self.sets[0])}s")
        marks = _marks(console, options)
        legend = ("trained tokens".join(marks), _TRAINED_STYLE)
        yield Text.assemble(legend, ", ", ("masked", _MASKED_STYLE))
        for sample in self.samples:
            yield _sample_panel(sample, marks)

    def _with_those_of_the_same_data(self) -> Iterator[tuple[SetReport, list[SetReport]]]:
        """Yields sets that were read by themselves, each with the others that came of it."""
        groups: dict[Path, list[SetReport]] = {}
        for item in self.sets:
            groups.setdefault(item.rows.documents.skipped, []).append(item)
        for first, *others in groups.values():
            yield first, others


def _relation(item: SetReport, first: SetReport) -> str:
    if np.array_equal(item.rows.numbers, first.rows.numbers):
        return f"the same data as {first.name}"
    return f"a part of the same data as {first.name}"


def _noun(item: SetReport) -> str:
    return NOUNS[item.rows.documents.units]


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _counts_table(sets: list[SetReport]) -> Table:
    table = Table("", *(item.name for item in sets), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def packed(item: SetReport, value: str) -> str:
        return "–" if item.refusal else value

    noun = " or ".join(dict.fromkeys(_noun(item) for item in sets))
    nouns = " or ".join(dict.fromkeys(f"{_noun(item)}s" for item in sets))
    rows: list[tuple[str, Callable[[SetReport], str]]] = [
        ("bad rows left out", lambda item: f"{item.rows.statistics.read.skipped:,}"),
        (nouns, lambda item: f"{item.rows.statistics.documents:,}"),
        ("exact duplicates", lambda item: f"{item.duplicates:,}"),
        (
            "also in training",
            lambda item: "–" if item.overlap is None else f"{item.overlap.count:,}",
        ),
        (
            "prompts also in training",
            lambda item: "–" if item.known_prompts is None else f"{item.known_prompts:,}",
        ),
        (
            "contradictions",
            lambda item: "–" if item.findings is None else f"{item.findings.contradictions:,}",
        ),
        *_side_rows(sets),
        ("tokens", lambda item: f"{item.rows.statistics.packed.document_tokens:,}"),
        ("trained tokens", lambda item: f"{item.rows.statistics.packed.document_trained_tokens:,}"),
        ("masked share", lambda item: f"{_masked_share(item):.1%}"),
        (f"longest {noun}", lambda item: f"{item.rows.statistics.packed.longest:,}"),
        ("over max_length", lambda item: f"{item.rows.statistics.packed.over_length:,}"),
        ("in no row", lambda item: packed(item, f"{item.rows.statistics.dropped:,}")),
        (
            "trained tokens lost",
            lambda item: packed(item, f"{item.rows.statistics.lost_share:.1%}"),
        ),
        ("rows", lambda item: packed(item, f"{item.rows.statistics.rows:,}")),
        ("padding share", lambda item: packed(item, f"{item.rows.statistics.padding_share:.1%}")),
    ]
    for label, show in rows:
        values = [show(item) for item in sets]
        if label not in _SELDOM or any(value not in ("0", "–") for value in values):
            table.add_row(label, *values)
    return table


def _side_rows(sets: list[SetReport]) -> Iterator[tuple[str, Callable[[SetReport], str]]]:
    """Yields the rows of the table on either side of preferences; none for documents."""
    kinds = [item.rows.documents.units for item in sets if item.findings is not None]
    if not kinds:
        return

    def show(item: SetReport, value: Callable[[UnitFindings], str]) -> str:
        return "–" if item.findings is None else value(item.findings)

    for side, name in enumerate(SIDES[kinds[0]]):
        if kinds[0] == "labelled":
            yield (
                f"{name} answers",
                lambda item, side=side: show(item, lambda found: f"{found.counts[side]:,}"),
            )
        yield (
            f"mean tokens, {name}",
            lambda item, side=side: show(
                item, lambda found: f"{found.lengths[side]:,.1f}" if found.counts[side] else "–"
            ),
        )


def _parts_table(sets: list[SetReport]) -> Iterator[Table]:
    """Yields a table of what each source gives to a pass, unless there is one source, whole."""
    parts = [(item.name, part) for item in sets for part in item.rows.statistics.packed.parts]
    if len(parts) == len(sets) and all(part.taken == part.documents for _, part in parts):
        return
    many = f"{NOUNS[sets[0].rows.documents.units].rpartition(' ')[2]}s"
    column = "docu-\nments" if many == "documents" else f"\n{many}"
    headings = ("\nset", "\nsource", column, "in a\npass", f"share of\n{many}")
    table = Table(*headings, "of trained\ntokens", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, part in parts:
        of_set = [other for set_name, other in parts if set_name == name]
        taken = sum(other.taken for other in of_set)
        trained = max(sum(other.trained_tokens for other in of_set), 1)
        shares = (f"{part.taken / taken:.1%}", f"{part.trained_tokens / trained:.1%}")
        source = part.name if len(part.name) <= _WIDEST_NAME else f"…{part.name[-_WIDEST_NAME:]}"
        table.add_row(name, source, f"{part.documents:,}", f"{part.taken:,}", *shares)
    yield table


def _masked_share(item: SetReport) -> float:
    packed = item.rows.statistics.packed
    return 1 - packed.document_trained_tokens / max(packed.document_tokens, 1)


def _notes(item: SetReport, config: DataConfig, context: int) -> Iterator[Text | Panel]:
    if item.refusal:
        yield Panel(Text(item.refusal), title="Refused as it is", style=_ALARM_STYLE)
    if context and config.max_length > context:
        yield _context_note(item, config, context)
    if item.overlap is not None and item.overlap.count:
        yield _overlap_note(item, item.overlap)
    if item.findings is not None:
        for doubt in describe_doubts(item.rows, item.findings):
            yield Text(f"{item.name}: {doubt}", style=_ALARM_STYLE)
    if item.known_prompts:
        text = describe_known_prompts(item.known_prompts, item.rows, item.name)
        yield Text(f"{item.name}: {text}.", style=_ALARM_STYLE)


def _overlap_note(item: SetReport, overlap: Overlap) -> Panel:
    count, noun = item.rows.statistics.documents, _noun(item)
    text = (
        f"{overlap.count:,} of {count:,} {item.name} {noun}s ({overlap.count / count:.1%}) are in "
        f"the training set, such as {'; '.join(overlap.examples)}. Figures on {item.name} "
        "are then better than on new data: take them out of one of the two."
    )
    return Panel(Text(text), title=f"{item.name} is trained on", style=_ALARM_STYLE)


def _context_note(item: SetReport, config: DataConfig, context: int) -> Text:
    said = f"{item.name}: data.max_length {config.max_length:,} is beyond the model's context of "
    said += f"{context:,} tokens"
    longest = min(item.rows.longest_document, config.max_length)
    longest = config.max_length if config.packing == "stream" else longest
    if longest <= context:
        return Text(f"{said}; no document is longer than that, so that rows only hold more of them")
    return Text(
        f"{said}, and documents have up to {longest:,}: they would be trained on positions that "
        f"the model has never seen. Set --config.data.max_length={context}",
        style=_ALARM_STYLE,
    )


def _histogram(item: SetReport) -> Group:
    largest = max(int(item.counts.max()), 1)
    width = len(f"{item.edges[-1]:,}")
    widest = max(int(np.diff(item.edges[:-1]).max(initial=1)), 1)
    lines = []
    for low, high, count in zip(item.edges, item.edges[1:], item.counts, strict=False):
        bar = "█" * max(round(_BAR_WIDTH * count / largest), int(count > 0))
        over = low > item.rows.max_length
        label = f"{low:>{width},} – {high - 1:>{width},}"
        far = " far beyond the others" if high - low > 2 * widest else ""
        long = " over max_length" if over and count else ""
        style = "red" if over else ""
        lines.append(Text(f"{label}  {bar} {count:,}{far or long}", style=style))
    return Group(*lines)


def _marks(console: Console, options: ConsoleOptions) -> tuple[str, str]:
    """Returns what stands around trained tokens where colour cannot tell them apart."""
    if console.color_system and not console.no_color:
        return "", ""
    return ("[[", "]]") if options.ascii_only else ("⟦", "⟧")


def _sample_panel(sample: Sample, marks: tuple[str, str]) -> Panel:
    text = Text()
    for run, trained in sample.runs:
        if trained is None:
            text.append(run, style=_NOTE_STYLE)
        elif trained:
            text.append(run.join(marks), style=_TRAINED_STYLE)
        else:
            text.append(run, style=_MASKED_STYLE)
    title = f"{sample.origin}: {sample.label}" if sample.label else sample.origin
    return Panel(text, title=Text(title), title_align="left")
