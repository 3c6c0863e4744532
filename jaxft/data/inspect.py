"""The report of `jaxft data`: what the rows of a run hold, before anything is trained."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxft.config import DataConfig, RunConfig
from jaxft.data.description import DATED
from jaxft.data.inspect_report import Report, Sample, SetReport
from jaxft.data.overlap import find_overlap
from jaxft.data.packing import PackingError
from jaxft.data.preparation import prepare
from jaxft.data.rows import TokenRows
from jaxft.data.template import resolve_template
from jaxft.data.unit_findings import count_known_prompts, find_units
from jaxft.data.units import CHOSEN, MISMATCHED, REJECTED, SIDES, units_of
from jaxft.errors import ConfigError

_BINS = 12
# Documents longer than so many times almost all others stand apart in the histogram.
_FAR = 2
_SHOWN_UNITS = 3
_LABELS = {
    units: {CHOSEN: better, REJECTED: worse, MISMATCHED: "with an answer to another prompt"}
    for units, (better, worse) in SIDES.items()
}
"""What documents are called by their label, in units of each kind."""
_SHOWN_TOKENS = 240
_SHOWN_RUNS = 8


def inspect(
    config: RunConfig,
    tokenizer: Any,
    *,
    sources: Mapping[str, str] | None = None,
    context: int = 0,
    units: str = "documents",
    on_progress: Callable[[str], Any] = lambda text: None,
) -> Report:
    """Reads the data of a run just as training does, and describes it.

    Documents that training would refuse to pack, such as over-length ones, are described too.

    Args:
      config: Its `data` and `train.seed` are used.
      tokenizer: A Hugging Face tokenizer.
      sources: Held-out sets by name; by default `data.validation`.
      context: Tokens that the model was made for; 0: not known.
      units: What the objective takes, as `prepare` has it.
      on_progress: Called with lines of text while long work is under way.

    Raises:
      ConfigError: If no data is named, or units would be torn apart.
      DataError: For rows that cannot be read, as training would.
    """
    if sources is None:
        sources = {"validation": config.data.validation}
    named = [("train", config.data.train, True)]
    named += [(name, source, False) for name, source in sources.items()]
    named = [item for item in named if item[1]]
    if not named:
        raise ConfigError(
            "There is no data to look at: set --config.data.train, "
            "--config.data.validation or both to files, globs or hub ids."
        )
    sets: list[SetReport] = []
    train = None
    for name, source, training in named:
        rows, refusal = _rows(name, source, training, config, tokenizer, units, on_progress)
        sets.append(_set_report(name, rows, refusal, train))
        train = sets[-1] if training else train
    template = resolve_template(tokenizer, config.data)
    stops = ", ".join(template.stops) or "nothing"
    dated = f"; {DATED.partition(', ')[0]}" if template.is_dated else ""
    return Report(
        config=config.data,
        context=context,
        tokenizer=_describe_tokenizer(tokenizer),
        template=f"{template.origin}; answers end with {stops}{dated}",
        sets=sets,
        samples=list(_samples(sets[0].rows, tokenizer)),
    )


def _rows(
    name: str,
    source: str,
    training: bool,
    config: RunConfig,
    tokenizer: Any,
    units: str,
    on_progress: Callable[[str], Any],
) -> tuple[TokenRows, str]:
    """Returns the rows, and why a run would refuse them."""
    units = units_of(name, units)

    def read(data: DataConfig, *, may_be_empty: bool = False) -> TokenRows:
        return prepare(
            source,
            data,
            tokenizer,
            seed=config.train.seed,
            training=training,
            name=name,
            units=units,
            on_log=lambda text: None,  # the report says all that is to be said
            on_progress=on_progress,
            may_be_empty=may_be_empty,
        )

    try:
        return read(config.data), ""
    except PackingError as error:
        data = dataclasses.replace(config.data, overlength="drop")
        return read(data, may_be_empty=True), str(error)


def _set_report(name: str, rows: TokenRows, refusal: str, train: SetReport | None) -> SetReport:
    units = rows.documents.index[rows.numbers].reshape(-1, rows.unit_size)
    lengths = units["length"].sum(axis=1)
    counts, edges = np.histogram(lengths, bins=_bin_edges(lengths))
    index = units[:, 0]
    # A conversation that gave several examples is one document of the source, not a duplicate.
    places = np.stack([index["source"], index["row"]])
    first = np.ones(len(index), bool)
    first[1:] = (places[:, 1:] != places[:, :-1]).any(axis=0)
    contents = [index["hash"]]
    if rows.documents.labels is not None:  # an answer with another label is no duplicate
        contents.append(rows.documents.labels[rows.numbers[:: rows.unit_size]].astype(np.uint64))
    distinct = np.unique(np.stack(contents)[:, first], axis=1).shape[1]
    overlap = None
    if train is not None:
        overlap = find_overlap(rows, train.rows)
    findings = None if rows.documents.labels is None else find_units(rows)
    known = None
    if findings is not None and train is not None and train.findings is not None:
        known = count_known_prompts(findings, train.findings)
    return SetReport(
        name=name,
        rows=rows,
        edges=edges,
        counts=counts,
        duplicates=int(first.sum()) - distinct,
        overlap=overlap,
        refusal=refusal,
        findings=findings,
        known_prompts=known,
    )


def _bin_edges(lengths: np.ndarray) -> np.ndarray:
    """Returns whole numbers; the last bin ends above the longest document.

    A few documents that are far longer than the others have the last bin to themselves: bins of one
    width would put all others into the first.
    """
    low, high = int(lengths.min()), int(lengths.max()) + 1
    usual = lengths <= _FAR * np.quantile(lengths, 0.99, method="lower")
    top = int(lengths[usual].max()) + 1
    edges = np.linspace(low, top, min(_BINS, top - low) + 1).astype(np.int64)
    return np.unique(np.append(edges, high))


def _samples(rows: TokenRows, tokenizer: Any) -> Iterator[Sample]:
    documents = rows.documents
    for number in rows.numbers[: _SHOWN_UNITS * rows.unit_size]:
        label = ""
        if documents.labels is not None:
            label = _LABELS[documents.units][int(documents.labels[number])]
        yield Sample(documents.origin(number), label, _runs(rows, number, tokenizer))


def _runs(rows: TokenRows, number: int, tokenizer: Any) -> list[tuple[str, bool | None]]:
    """Returns the texts of a document by whether they are trained, long ones shortened."""
    documents = rows.documents
    record = documents.index[number]
    begin, end = int(record["start"]), int(record["start"] + record["length"])
    trained = documents.trained[begin:end].astype(bool)
    trained[:1] = False  # nothing predicts the first token
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    bounds = list(itertools.pairwise(cuts))
    shown = _shown_tokens([last - first for first, last in bounds])
    runs: list[tuple[str, bool | None]] = []
    for (first, last), room in zip(bounds, shown, strict=True):
        tokens = documents.tokens[begin + first : begin + last]
        if not room:  # one note for all runs that are left out
            left_out = sum(b - a for (a, b), r in zip(bounds, shown, strict=True) if not r)
            note = f" … {left_out:,} tokens in {shown.count(0):,} parts … "
            runs += [] if runs[-1][1] is None else [(note, None)]
        elif room < len(tokens):
            runs += [
                (tokenizer.decode(tokens[: room // 2]), bool(trained[first])),
                (f" … {len(tokens) - room:,} tokens … ", None),
                (tokenizer.decode(tokens[-((room + 1) // 2) :]), bool(trained[first])),
            ]
        else:
            runs.append((tokenizer.decode(tokens), bool(trained[first])))
    return runs


def _shown_tokens(lengths: list[int]) -> list[int]:
    """Returns how many tokens of each run are shown: of long ones fewer, of many the outer ones."""
    half = _SHOWN_RUNS // 2
    places = [i for i in range(len(lengths)) if i < half or i >= len(lengths) - half]
    shown, left = [0] * len(lengths), _SHOWN_TOKENS
    for rank, place in enumerate(sorted(places, key=lambda i: lengths[i])):
        shown[place] = min(lengths[place], left // (len(places) - rank))
        left -= shown[place]
    return shown


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
