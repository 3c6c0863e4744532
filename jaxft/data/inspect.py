"""The report of `jaxft data`: what the rows of a run hold, before anything is trained."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jaxft.config import DataConfig, RunConfig
from jaxft.data.chat import resolve_template
from jaxft.data.documents import Documents, Overlap, find_overlap
from jaxft.data.packing import PackingError
from jaxft.data.preparation import describe_losses, prepare
from jaxft.data.rows import TokenRows
from jaxft.errors import ConfigError

_BINS = 12
_BAR_WIDTH = 40
_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 400
_TRAINED_STYLE = "bold green"
_MASKED_STYLE = "dim"
_ALARM_STYLE = "bold red"


@dataclass(frozen=True, slots=True)
class SetReport:
    """One data set.

    Attributes:
      name: 'train', 'validation' or as evaluation calls it.
      rows: The packed rows, with their statistics; of a refused set, what `data.overlength=split`
        would make of it.
      refusal: Why training or evaluation would refuse the set, such as over-length documents; empty
        if it would not.
      edges: Token lengths that bound the bins of the histogram, int64 `[bins + 1]`.
      counts: Documents in each bin, int64 `[bins]`.
      duplicates: Documents whose content, but for case and white space, came before.
      overlap: Documents that are in the training set too; None for that set itself, and without it.
    """

    name: str
    rows: TokenRows
    edges: np.ndarray
    counts: np.ndarray
    duplicates: int
    overlap: Overlap | None
    refusal: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A document as runs of tokens that are all trained or all masked."""

    origin: str
    runs: list[tuple[str, bool]]
    more_tokens: int


@dataclass(frozen=True)
class Report:
    """What `jaxft data` shows; a rich console can print it.

    Attributes:
      config: How the data was read.
      tokenizer: One line on the tokenizer.
      template: Origin of the chat template, and its stop tokens.
      sets: The training set if there is one, and the held-out sets.
      samples: The first documents.
    """

    config: DataConfig
    tokenizer: str
    template: str
    sets: list[SetReport]
    samples: list[Sample]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders all sections for a terminal."""
        yield _heading("What was detected")
        for item in self.sets:
            for line in item.rows.statistics.read.formats:
                yield Text(f"{item.name}: {line}")
        yield Text(f"tokenizer: {self.tokenizer}")
        yield Text(f"chat template: {self.template}")
        yield _heading("Counts")
        yield _counts_table(self.sets)
        for item in self.sets:
            yield from _notes(item, self.config)
        for item in self.sets:
            yield _heading(f"Tokens in a document: {item.name}")
            yield _histogram(item)
        yield _heading("The first documents")
        marks = _marks(console, options)
        legend = ("trained tokens".join(marks), _TRAINED_STYLE)
        yield Text.assemble(legend, ", ", ("masked", _MASKED_STYLE))
        for sample in self.samples:
            yield _sample_panel(sample, marks)


def inspect(
    config: RunConfig,
    tokenizer: Any,
    *,
    sources: Mapping[str, str] | None = None,
    on_log: Callable[[str], Any] = lambda text: None,
) -> Report:
    """Reads the data of a run just as training does, and describes it.

    Documents that training would refuse to pack, such as over-length ones, are described too.

    Args:
      config: Its `data` and `train.seed` are used.
      tokenizer: A Hugging Face tokenizer.
      sources: Held-out sets by name; by default `data.validation`.
      on_log: Called with lines of text while data is read.

    Raises:
      ConfigError: If no data is named.
      DataError: For rows that cannot be read, as training would.
    """
    if sources is None:
        sources = {"validation": config.data.validation}
    named = [("train", config.data.train, True)]
    named += [(name, source, False) for name, source in sources.items()]
    named = [item for item in named if item[1]]
    if not named:
        raise ConfigError(
            "There is no data to look at: set data.train, data.validation or both to files, globs "
            "or hub ids."
        )
    sets: list[SetReport] = []
    train = None
    for name, source, training in named:
        rows, refusal = _rows(name, source, training, config, tokenizer, on_log)
        sets.append(_set_report(name, rows, refusal, train))
        train = rows if training else train
    template = resolve_template(tokenizer, config.data)
    return Report(
        config=config.data,
        tokenizer=_describe_tokenizer(tokenizer),
        template=f"{template.origin}; answers end with {', '.join(template.stops) or 'nothing'}",
        sets=sets,
        samples=list(_samples(sets[0].rows.documents, tokenizer)),
    )


def _rows(
    name: str,
    source: str,
    training: bool,
    config: RunConfig,
    tokenizer: Any,
    on_log: Callable[[str], Any],
) -> tuple[TokenRows, str]:
    """Returns the rows, and why a run would refuse them."""

    def read(data: DataConfig, on_log: Callable[[str], Any]) -> TokenRows:
        seed = config.train.seed
        return prepare(
            source, data, tokenizer, seed=seed, training=training, name=name, on_log=on_log
        )

    try:
        return read(config.data, on_log), ""
    except PackingError as error:
        split = dataclasses.replace(config.data, overlength="split")
        return read(split, lambda text: None), str(error)


def _set_report(name: str, rows: TokenRows, refusal: str, train: TokenRows | None) -> SetReport:
    index = rows.documents.index
    counts, edges = np.histogram(index["length"], bins=_bin_edges(index["length"]))
    # A conversation that gave several examples is one document of the source, not a duplicate.
    places = np.stack([index["source"], index["line"]])
    first = np.ones(len(index), bool)
    first[1:] = (places[:, 1:] != places[:, :-1]).any(axis=0)
    duplicates = int(first.sum()) - len(np.unique(index["hash"][first]))
    overlap = None
    if train is not None:
        overlap = find_overlap(rows.documents, train.documents)
    return SetReport(name, rows, edges, counts, duplicates, overlap, refusal)


def _bin_edges(lengths: np.ndarray) -> np.ndarray:
    """Returns whole numbers; the last bin ends above the longest document."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    return np.unique(np.linspace(low, high, min(_BINS, high - low) + 1).astype(np.int64))


def _samples(documents: Documents, tokenizer: Any) -> Iterator[Sample]:
    for number in range(min(_SHOWN_DOCUMENTS, len(documents.index))):
        record = documents.index[number]
        begin, length = int(record["start"]), int(record["length"])
        end = begin + min(length, _SHOWN_TOKENS)
        trained = documents.trained[begin:end].astype(bool)
        trained[:1] = False  # nothing predicts the first token
        cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
        runs = [
            (tokenizer.decode(documents.tokens[begin + first : begin + last]), bool(trained[first]))
            for first, last in itertools.pairwise(cuts)
        ]
        yield Sample(documents.origin(number), runs, length - (end - begin))


def _describe_tokenizer(tokenizer: Any) -> str:
    special = ", ".join(
        f"{name} {token!r}" if token else f"no {name}"
        for name, token in (
            ("BOS", tokenizer.bos_token),
            ("EOS", tokenizer.eos_token),
            ("padding", tokenizer.pad_token),
        )
    )
    return f"{len(tokenizer):,} tokens; {special}"


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _counts_table(sets: list[SetReport]) -> Table:
    table = Table("", *(item.name for item in sets), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"

    def packed(item: SetReport, value: str) -> str:
        return "–" if item.refusal else value

    rows: list[tuple[str, Callable[[SetReport], str]]] = [
        ("documents", lambda item: f"{item.rows.statistics.documents:,}"),
        ("exact duplicates", lambda item: f"{item.duplicates:,}"),
        ("tokens", lambda item: f"{item.rows.statistics.read.tokens:,}"),
        ("trained tokens", lambda item: f"{item.rows.statistics.read.trained_tokens:,}"),
        ("masked share", lambda item: f"{_masked_share(item):.1%}"),
        ("over max_length", lambda item: f"{item.rows.statistics.packed.over_length:,}"),
        (
            "trained tokens lost",
            lambda item: packed(item, f"{item.rows.statistics.lost_share:.1%}"),
        ),
        ("rows", lambda item: packed(item, f"{item.rows.statistics.rows:,}")),
        ("padding share", lambda item: packed(item, f"{item.rows.statistics.padding_share:.1%}")),
    ]
    for label, show in rows:
        table.add_row(label, *(show(item) for item in sets))
    return table


def _masked_share(item: SetReport) -> float:
    read = item.rows.statistics.read
    return 1 - read.trained_tokens / max(read.tokens, 1)


def _notes(item: SetReport, config: DataConfig) -> Iterator[Text | Panel]:
    read = item.rows.statistics.read
    if item.refusal:
        yield Panel(Text(item.refusal), title="Refused as it is", style=_ALARM_STYLE)
    else:
        for line in describe_losses(item.rows.statistics, config):
            yield Text(f"{item.name}: {line}")
    if read.thinking_blocks:
        yield Text(
            f"{item.name}: {read.thinking_blocks:,} <think> blocks in trained turns, "
            f"{read.lost_blocks:,} left out by the chat template"
        )
    if read.rewritten_turns:
        yield Text(
            f"{item.name}: {read.rewritten_turns:,} trained turns stand in the history otherwise "
            "than they are generated"
        )
    if item.overlap is not None:
        yield _overlap_note(item, item.overlap)


def _overlap_note(item: SetReport, overlap: Overlap) -> Text | Panel:
    documents = item.rows.statistics.documents
    if not overlap.count:
        return Text(f"overlap: none of {documents:,} {item.name} documents is in the training set")
    share = f"{overlap.count / documents:.1%}"
    text = (
        f"{overlap.count:,} of {documents:,} {item.name} documents ({share}) are in the training "
        f"set, such as {'; '.join(overlap.examples)}. Figures on {item.name} "
        "are then better than on new data: take them out of one of the two."
    )
    return Panel(Text(text), title=f"{item.name} is trained on", style=_ALARM_STYLE)


def _histogram(item: SetReport) -> Group:
    largest = max(int(item.counts.max()), 1)
    width = len(f"{item.edges[-1]:,}")
    lines = []
    for low, high, count in zip(item.edges, item.edges[1:], item.counts, strict=False):
        bar = "█" * max(round(_BAR_WIDTH * count / largest), int(count > 0))
        over = low > item.rows.max_length
        label = f"{low:>{width},} – {high - 1:>{width},}"
        lines.append(Text(f"{label}  {bar} {count:,}", style="red" if over else ""))
    return Group(*lines)


def _marks(console: Console, options: ConsoleOptions) -> tuple[str, str]:
    """Returns what stands around trained tokens where colour cannot tell them apart."""
    if console.color_system and not console.no_color:
        return "", ""
    return ("[[", "]]") if options.ascii_only else ("⟦", "⟧")


def _sample_panel(sample: Sample, marks: tuple[str, str]) -> Panel:
    text = Text()
    for run, trained in sample.runs:
        if trained:
            text.append(run.join(marks), style=_TRAINED_STYLE)
        else:
            text.append(run, style=_MASKED_STYLE)
    if sample.more_tokens:
        text.append(f" … {sample.more_tokens:,} more tokens")
    return Panel(text, title=Text(sample.origin), title_align="left")
