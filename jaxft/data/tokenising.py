"""Reads, checks and tokenises the rows of sources, and writes them as documents."""

import functools
import hashlib
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
from jaxft.data.formats import Conversation, Document, Format, read_items
from jaxft.data.loader import LIMITED, sample_numbers
from jaxft.data.problems import IgnoredProblems, Problems, RowError, describe_kinds
from jaxft.data.sources import Row, Source
from jaxft.data.template import Template, check_can_stop
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
) -> None:
    """Writes all documents of the sources to a folder.

    Raises:
      DataError: For rows that cannot be trained on, the first 20 at once, and if none are left.
    """
    skipped = skipped_file(folder) if config.bad_rows == "skip" else None
    problems = Problems(name, skipped=skipped)
    chosen = _sample_rows(sources, seed, say)
    separated = is_separated(config, tokenizer)
    tokenise = Tokeniser(tokenizer, config, template, problems)
    last_said = time.monotonic()
    with DocumentWriter(folder) as writer:
        writer.statistics.control_policy = config.control_tokens
        for number, source in enumerate(sources):
            writer.statistics.sources.append(source.origin(0).rpartition(":")[0])
            on_format = functools.partial(
                _note_format,
                where=source.name,
                template=template,
                tokenizer=tokenizer,
                statistics=writer.statistics,
            )
            items = read_items(source, problems, on_format=on_format, chosen=chosen[number])
            items = _noted(items, writer.statistics)
            separator = _SEPARATORS[source.spec.text_split] if separated else ""
            for row, content_hash, example in tokenise(items, separator=separator):
                writer.add(
                    example,
                    source=number,
                    line=row.line,
                    row=row.number,
                    content_hash=content_hash,
                )
                if time.monotonic() - last_said > _SECONDS_BETWEEN_LOGS:
                    last_said = time.monotonic()
                    say(f"tokenised {writer.statistics.documents:,} documents so far")
        problems.check()
        writer.statistics.skipped = problems.count
        writer.statistics.skipped_kinds = dict(problems.kinds)
        _check_statistics(writer.statistics, tokenise, config, name)


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


def _noted(
    items: Iterator[tuple[Row, Conversation | Document]], statistics: DocumentStatistics
) -> Iterator[tuple[Row, Conversation | Document]]:
    """Passes items on and counts the keys of messages that nobody reads."""
    for row, item in items:
        if isinstance(item, Conversation):
            add_counts(statistics.unused_keys, dict.fromkeys(item.unused, 1))
        yield row, item


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
    """Turns items into examples, many at a time."""

    def __init__(self, tokenizer: Any, config: DataConfig, template: Template, problems: Problems):
        self._tokenizer = tokenizer
        self._config = config
        self._template = template
        self._problems = problems
        self.trained_chat_tokens = 0

    def __call__(
        self, items: Iterator[tuple[Row, Conversation | Document]], *, separator: str
    ) -> Iterator[tuple[Row, int, Example]]:
        """Yields (row, hash of the content, example); texts end with the separator."""
        chunk: list[tuple[Row, Conversation | Document]] = []
        for item in items:
            chunk.append(item)
            if len(chunk) == _TOKENISED_TOGETHER:
                yield from self._examples(chunk, separator)
                chunk = []
        yield from self._examples(chunk, separator)

    def _examples(
        self, chunk: list[tuple[Row, Conversation | Document]], separator: str
    ) -> Iterator[tuple[Row, int, Example]]:
        refuse = self._config.control_tokens == "refuse"
        documents = text_examples(
            self._tokenizer,
            [item.text + separator for _, item in chunk if isinstance(item, Document)],
            control=self._template.control,
            end=True,
            refuse=refuse,
        )
        talks = chat_examples(
            self._tokenizer,
            [item for _, item in chunk if isinstance(item, Conversation)],
            template=self._template,
            train_on=self._config.train_on,
            thinking=self._config.thinking,
            refuse_control=refuse,
        )
        for row, item in chunk:
            is_document = isinstance(item, Document)
            result = next(documents) if is_document else next(talks)
            if isinstance(result, RowError):
                self._problems.add(item.origin, str(result), raw=row.value)
                continue
            if isinstance(result, Example):
                yield row, content_hash(item.text), result
                continue
            for example in result:
                self.trained_chat_tokens += int(example.trained.sum())
                yield row, content_hash(item.text), example


def content_hash(text: str) -> int:
    """Returns 64 bits that agree for texts which differ in case and white space alone."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest())


def _check_statistics(
    statistics: DocumentStatistics, tokenise: Tokeniser, config: DataConfig, name: str
) -> None:
    if not statistics.documents:
        bad = describe_kinds(statistics.skipped_kinds)
        raise DataError(
            f"{name}: there are no rows in {', '.join(statistics.sources)}"
            + (f" but {statistics.skipped:,} bad ones: {'; '.join(bad)}." if bad else ".")
        )
    if not statistics.chat or config.train_on == "all":
        return
    if not tokenise.trained_chat_tokens:
        raise DataError(
            f"{name}: no token of the conversations would be trained, as data.train_on is "
            f"{config.train_on!r}. Check the weights of the messages."
        )


def is_separated(config: DataConfig, tokenizer: Any) -> bool:
    """Whether what separates documents is kept, for want of a token that ends them."""
    return config.packing == "stream" and tokenizer.eos_token_id is None
