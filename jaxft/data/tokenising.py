"""Reads, checks and tokenises the rows of sources, and writes them as documents."""

import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.chat import Example, chat_examples, text_examples
from jaxft.data.documents import (
    DocumentStatistics,
    DocumentWriter,
    add_counts,
    skipped_file,
)
from jaxft.data.formats import Conversation, Document, Format, Item, Preference, read_items
from jaxft.data.loader import LIMITED, sample_numbers
from jaxft.data.problems import IgnoredProblems, Problems, RowError, describe_kinds
from jaxft.data.sources import Row, Source
from jaxft.data.template import Template, check_can_stop
from jaxft.data.unit_tokenising import Unit, UnitTokeniser
from jaxft.data.units import DOCUMENTS_IN, counted_units
from jaxft.errors import DataError

Log = Callable[[str], Any]
_TOKENISED_TOGETHER = 256
_SECONDS_BETWEEN_LOGS = 10.0
_SEPARATORS = {"paragraph": "\n\n", "line": "\n", "file": ""}


def write_documents(
    folder: Path,
    sources: list[Source],
    config: DataConfig,
    tokenizer: Any,
    template: Template,
    name: str,
    say: Log,
    *,
    seed: int,
    units: str = "documents",
) -> None:
    """Writes all documents of the sources to a folder.

    Raises:
      DataError: For rows that cannot be trained on, the first 20 at once, and if none are left.
    """
    skipped = skipped_file(folder) if config.bad_rows == "skip" else None
    problems = Problems(name, skipped=skipped)
    chosen = _sample_rows(sources, seed, say)
    last_said = time.monotonic()
    trained = 0
    with DocumentWriter(folder, units) as writer:
        statistics = writer.statistics
        statistics.control_policy = config.control_tokens
        statistics.sources = [source.origin(0).rpartition(":")[0] for source in sources]
        items = _items(sources, chosen, problems, statistics, template, tokenizer, units)
        for unit in _tokenised(items, sources, config, tokenizer, template, problems, name, units):
            _write(writer, unit)
            if unit.is_chat:
                trained += sum(int(example.trained.sum()) for example in unit.examples)
            if time.monotonic() - last_said > _SECONDS_BETWEEN_LOGS:
                last_said = time.monotonic()
                count = counted_units(statistics.documents // DOCUMENTS_IN[units], units)
                say(f"tokenised {count} so far")
        problems.check()
        statistics.skipped = problems.count
        statistics.skipped_kinds = dict(problems.kinds)
        _check_statistics(statistics, trained, config, name)


def _items(
    sources: list[Source],
    chosen: list[Collection[int] | None],
    problems: Problems,
    statistics: DocumentStatistics,
    template: Template,
    tokenizer: Any,
    units: str,
) -> Iterator[tuple[int, Row, Item]]:
    """Yields (source, row, item) of all sources, and notes formats and keys that nobody reads."""
    for number, source in enumerate(sources):
        on_format = functools.partial(
            _note_format,
            where=source.name,
            template=template,
            tokenizer=tokenizer,
            statistics=statistics,
        )
        found = read_items(
            source, problems, on_format=on_format, chosen=chosen[number], units=units
        )
        for row, item in found:
            if not isinstance(item, Document):
                add_counts(statistics.unused_keys, dict.fromkeys(item.unused, 1))
            if isinstance(item, Preference):
                _note_scores(row, statistics)
            yield number, row, item


def _note_scores(row: Row, statistics: DocumentStatistics) -> None:
    """Counts the pairs that come with scores, and those whose scores do not agree."""
    try:
        better, worse = (float(row.value[f"score_{side}"]) for side in ("chosen", "rejected"))
    except (KeyError, TypeError, ValueError, OverflowError):
        return  # no scores, or none that are numbers
    if not (math.isnan(better) or math.isnan(worse)):
        statistics.scores += 1
        statistics.unordered_scores += better <= worse


def _tokenised(
    items: Iterator[tuple[int, Row, Item]],
    sources: list[Source],
    config: DataConfig,
    tokenizer: Any,
    template: Template,
    problems: Problems,
    name: str,
    units: str,
) -> Iterator[Unit]:
    if units == "documents":
        separated = is_separated(config, tokenizer)
        separators = [_SEPARATORS[s.spec.text_split] if separated else "" for s in sources]
        tokenise = Tokeniser(tokenizer, config, template, problems, separators)
        return tokenise(items)
    tokenise = UnitTokeniser(tokenizer, config, template, problems, name)
    return tokenise.pairs(items) if units == "pairs" else tokenise.labelled(items)


def _write(writer: DocumentWriter, unit: Unit) -> None:
    hashed = content_hash(unit.text)
    labels = unit.labels or (0,) * len(unit.examples)
    for example, label in zip(unit.examples, labels, strict=True):
        writer.add(
            example,
            source=unit.source,
            line=unit.row.line,
            row=unit.row.number,
            content_hash=hashed,
            label=label,
        )


def _sample_rows(sources: list[Source], seed: int, say: Log) -> list[Collection[int] | None]:
    """Returns for each source the numbers of the rows that are read; None: all of them.

    A sample needs the number of all rows, so these are counted first. What is streamed is not read
    to its end for that: its first rows are taken.
    """
    chosen: list[Collection[int] | None] = [None] * len(sources)
    for spec in dict.fromkeys(source.spec for source in sources if source.spec.limit):
        numbers = [i for i, source in enumerate(sources) if source.spec == spec]
        if any(sources[number].is_streamed for number in numbers):
            assert len(numbers) == 1
            chosen[numbers[0]] = range(spec.limit)
            continue
        say(f"counting the rows of {spec.name}, of which {spec.limit:,} are taken")
        ignored = IgnoredProblems(spec.name)
        counts = [sum(1 for _ in sources[number].rows(ignored)) for number in numbers]
        total = sum(counts)
        if total <= spec.limit:
            continue
        places = sample_numbers(total, spec.limit, seed=seed, permutation=LIMITED)
        start = 0
        for number, count in zip(numbers, counts, strict=True):
            chosen[number] = {place - start for place in places if start <= place < start + count}
            start += count
    return chosen


def _note_format(
    row_format: Format,
    *,
    where: str,
    template: Template,
    tokenizer: Any,
    statistics: DocumentStatistics,
) -> None:
    statistics.formats.append(f"{where}: format {row_format.name}, {row_format.description}")
    if row_format.is_chat:
        check_can_stop(template, tokenizer)
        statistics.chat = True
        statistics.template = template.origin
        statistics.stops = list(template.stops)


class Tokeniser:
    """Turns conversations and texts into documents, many at a time.

    Args:
      tokenizer: A Hugging Face tokenizer.
      config: How to render and mask, and what becomes of control tokens.
      template: From `resolve_template`.
      problems: Takes the rows that cannot be trained on.
      separators: Text that texts of each source end with.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: DataConfig,
        template: Template,
        problems: Problems,
        separators: list[str],
    ):
        self._tokenizer = tokenizer
        self._config = config
        self._template = template
        self._problems = problems
        self._separators = separators

    def __call__(self, items: Iterator[tuple[int, Row, Item]]) -> Iterator[Unit]:
        """Yields each document as a unit of its own."""
        for chunk in itertools.batched(items, _TOKENISED_TOGETHER):
            yield from self._documents(chunk)

    def _documents(self, chunk: tuple[tuple[int, Row, Item], ...]) -> Iterator[Unit]:
        refuse = self._config.control_tokens == "refuse"
        texts = text_examples(
            self._tokenizer,
            [i.text + self._separators[s] for s, _, i in chunk if isinstance(i, Document)],
            control=self._template.control,
            end=True,
            refuse=refuse,
        )
        talks = chat_examples(
            self._tokenizer,
            [item for _, _, item in chunk if isinstance(item, Conversation)],
            template=self._template,
            train_on=self._config.train_on,
            thinking=self._config.thinking,
            refuse_control=refuse,
        )
        for source, row, item in chunk:
            result = next(texts) if isinstance(item, Document) else next(talks)
            if isinstance(result, RowError):
                self._problems.add(item.origin, str(result), raw=row.value)
                continue
            is_chat = isinstance(item, Conversation)
            for example in [result] if isinstance(result, Example) else result:
                yield Unit(source, row, item.text, [example], is_chat=is_chat)


def content_hash(text: str) -> int:
    """Returns 64 bits that agree for texts which differ in case and white space alone."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest())


def _check_statistics(
    statistics: DocumentStatistics, trained: int, config: DataConfig, name: str
) -> None:
    if not statistics.documents:
        bad = describe_kinds(statistics.skipped_kinds)
        raise DataError(
            f"{name}: there are no rows in {', '.join(statistics.sources)}"
            + (f" but {statistics.skipped:,} bad ones: {'; '.join(bad)}." if bad else ".")
        )
    if not statistics.chat or config.train_on == "all":
        return
    if not trained:
        raise DataError(
            f"{name}: no token of the conversations would be trained, as data.train_on is "
            f"{config.train_on!r}. Check the weights of the messages."
        )


def is_separated(config: DataConfig, tokenizer: Any) -> bool:
    """Whether what separates documents is kept, for want of a token that ends them."""
    return config.packing == "stream" and tokenizer.eos_token_id is None
