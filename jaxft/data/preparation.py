"""From the name of a data set to packed rows on disk, with a log of what was found and lost."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxft.config import DataConfig
from jaxft.data import cache
from jaxft.data.chat import (
    DATE,
    Example,
    Template,
    chat_examples,
    check_can_stop,
    resolve_template,
    text_examples,
)
from jaxft.data.documents import Documents, DocumentStatistics, DocumentWriter
from jaxft.data.formats import Conversation, Document, Format, RowError, read_items
from jaxft.data.loader import shuffled
from jaxft.data.packing import PackingError, PackingStatistics, pack
from jaxft.data.problems import Problems
from jaxft.data.rows import Statistics, TokenRows, write_rows
from jaxft.data.sources import Source, find_sources
from jaxft.errors import DataError

VERSION = 3
"""Part of every cache key: raise it when the same input would give other tokens or rows."""

_TOKENISED_TOGETHER = 256
_SECONDS_BETWEEN_LOGS = 10.0

Log = Callable[[str], Any]


def prepare(
    source: str,
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    training: bool,
    name: str = "",
    on_log: Log = print,
) -> TokenRows:
    """Reads, checks, tokenises and packs a data set, or finds the result of doing so before.

    Args:
      source: Files, globs or hub ids, comma-separated.
      config: How to read, render, mask, cut and pack.
      tokenizer: A Hugging Face tokenizer.
      seed: Decides which documents share a row, when training with shuffling.
      training: Whether the rows are trained on; evaluation keeps the order of the source.
      name: How the data set is called in the log.
      on_log: Called with lines of text.

    Returns:
      Memory-mapped rows with their statistics.

    Raises:
      ConfigError: For options that cannot be understood.
      DataError: For rows that cannot be trained on, the first 20 at once, and if none are left.
    """
    name = name or ("train" if training else "validation")

    def say(text: str) -> None:
        on_log(f"{name}: {text}")

    sources = _find(source, config, training)
    template = resolve_template(tokenizer, config)
    folder = cache_folder(config)
    key = document_key(sources, config, tokenizer, template)
    found, reused = cache.find_or_build(
        folder,
        f"documents-{key}",
        lambda target: _write_documents(target, sources, config, tokenizer, template, name, say),
    )
    documents = Documents(found)
    for line in _describe_documents(documents.statistics, template, reused):
        say(line)
    rows = _packed(documents, key, config, tokenizer, folder, seed if training else None, name)
    for line in describe_losses(rows.statistics, config):
        say(line)
    if not len(rows):
        raise PackingError(_no_rows_report(rows.statistics, config, name))
    return rows


def cache_folder(config: DataConfig) -> Path:
    """Returns where tokenised rows are kept."""
    return Path(config.cache or cache.DEFAULT_FOLDER).expanduser()


def conversations(
    source: str,
    config: DataConfig,
    *,
    training: bool = False,
    maximum: int = 0,
    on_log: Log = print,
) -> Iterator[Conversation]:
    """Yields conversations in order, for answers to be generated and compared.

    Args:
      source: Files, globs or hub ids, comma-separated.
      config: How to read them.
      training: Which split a hub id without one means.
      maximum: Stop after this many; 0: all.
      on_log: Called with lines of text.

    Raises:
      DataError: For bad rows, or for plain text, which holds no answers.
    """
    count = 0
    problems = Problems(source)
    for item_source in _find(source, config, training):
        say_format = functools.partial(_say_format, where=item_source.name, on_log=on_log)
        for _, item in read_items(item_source, config, problems, on_format=say_format):
            if isinstance(item, Document):
                raise DataError(
                    f"{item.origin}: plain text has no answers to compare with. Set eval.answers="
                    "none, or use data in a conversation format."
                )
            yield item
            count += 1
            if count == maximum:
                return
    problems.check()


def document_key(
    sources: list[Source], config: DataConfig, tokenizer: Any, template: Template
) -> str:
    """Names the tokens of these sources under these options; packing is named separately."""
    return cache.make_key(
        {
            "version": VERSION,
            "sources": [(source.origin(0), source.fingerprint()) for source in sources],
            "tokenizer": cache.tokenizer_fingerprint(tokenizer),
            "template": template.text,
            "stops": template.stops,
            "format": config.format,
            "columns": config.columns,
            "text_split": config.text_split,
            "thinking": config.thinking,
            "train_on": config.train_on,
            "documents_end": config.packing != "stream",
        }
    )


def _find(source: str, config: DataConfig, training: bool) -> list[Source]:
    return find_sources(
        source, text_split=config.text_split, streaming=config.streaming, training=training
    )


def _packed(
    documents: Documents,
    key: str,
    config: DataConfig,
    tokenizer: Any,
    folder: Path,
    seed: int | None,
    name: str,
) -> TokenRows:
    mixed = config.shuffle and config.packing == "documents" and seed is not None
    pad = tokenizer.pad_token_id or 0
    ingredients = {
        "documents": key,
        "packing": config.packing,
        "overlength": config.overlength,
        "max_length": config.max_length,
        "seed": seed if mixed else None,
        "pad": pad,
    }
    count = len(documents.index)

    def order(place: int) -> int:
        # Sorted sources would otherwise put like beside like into the same rows.
        return shuffled(place, count, seed=seed or 0, epoch=-1) if mixed else place

    def build(target: Path) -> None:
        statistics = PackingStatistics()
        rows = pack(
            documents,
            packing=config.packing,
            overlength=config.overlength,
            max_length=config.max_length,
            order=order,
            statistics=statistics,
            name=name,
        )
        write_rows(target, rows, statistics, pad=pad)

    found, _ = cache.find_or_build(folder, f"rows-{cache.make_key(ingredients)}", build)
    return TokenRows(documents, found)


def _write_documents(
    folder: Path,
    sources: list[Source],
    config: DataConfig,
    tokenizer: Any,
    template: Template,
    name: str,
    say: Log,
) -> None:
    problems = Problems(name)
    tokenise = _Tokeniser(tokenizer, config, template, problems)
    last_said = time.monotonic()
    with DocumentWriter(folder) as writer:
        for number, source in enumerate(sources):
            writer.statistics.sources.append(source.origin(0).rpartition(":")[0])
            on_format = functools.partial(
                _note_format,
                where=source.name,
                template=template,
                tokenizer=tokenizer,
                statistics=writer.statistics,
            )
            items = read_items(source, config, problems, on_format=on_format)
            for line, content_hash, example in tokenise(items):
                writer.add(example, source=number, line=line, content_hash=content_hash)
                if time.monotonic() - last_said > _SECONDS_BETWEEN_LOGS:
                    last_said = time.monotonic()
                    say(f"tokenised {writer.statistics.documents:,} documents so far")
        problems.check()
        _check_statistics(writer.statistics, tokenise, config, name)


def _say_format(row_format: Format, *, where: str, on_log: Log) -> None:
    on_log(f"{where}: format {row_format.name}, {row_format.description}")


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


class _Tokeniser:
    """Turns items into examples, many at a time."""

    def __init__(self, tokenizer: Any, config: DataConfig, template: Template, problems: Problems):
        self._tokenizer = tokenizer
        self._config = config
        self._template = template
        self._problems = problems
        self.chat_tokens = 0
        self.trained_chat_tokens = 0

    def __call__(
        self, items: Iterator[tuple[int, Conversation | Document]]
    ) -> Iterator[tuple[int, int, Example]]:
        """Yields (line, hash of the content, example)."""
        chunk: list[tuple[int, Conversation | Document]] = []
        for item in items:
            chunk.append(item)
            if len(chunk) == _TOKENISED_TOGETHER:
                yield from self._examples(chunk)
                chunk = []
        yield from self._examples(chunk)

    def _examples(
        self, chunk: list[tuple[int, Conversation | Document]]
    ) -> Iterator[tuple[int, int, Example]]:
        texts = [item.text for _, item in chunk if isinstance(item, Document)]
        end = self._config.packing != "stream"
        documents = iter(text_examples(self._tokenizer, texts, end=end))
        talks = chat_examples(
            self._tokenizer,
            [item for _, item in chunk if isinstance(item, Conversation)],
            template=self._template,
            train_on=self._config.train_on,
            thinking=self._config.thinking,
        )
        for line, item in chunk:
            if isinstance(item, Document):
                yield line, content_hash(item.text), next(documents)
                continue
            result = next(talks)
            if isinstance(result, RowError):
                self._problems.add(item.origin, str(result))
                continue
            for example in result:
                self.chat_tokens += len(example.ids)
                self.trained_chat_tokens += int(example.trained.sum())
                yield line, content_hash(item.text), example


def content_hash(text: str) -> int:
    """Returns 64 bits that agree for texts which differ in case and white space alone."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest())


def _check_statistics(
    statistics: DocumentStatistics, tokenise: _Tokeniser, config: DataConfig, name: str
) -> None:
    if not statistics.documents:
        raise DataError(f"{name}: there are no rows in {', '.join(statistics.sources)}.")
    if not statistics.chat or config.train_on == "all":
        return
    if tokenise.trained_chat_tokens in (0, tokenise.chat_tokens):
        every = "Every" if tokenise.trained_chat_tokens else "No"
        raise DataError(
            f"{name}: {every} token of the conversations would be trained, with data.train_on="
            f"{config.train_on!r}. Check the weights of the messages and the chat template, or set "
            "data.train_on=all if that is meant."
        )


def _describe_documents(
    statistics: DocumentStatistics, template: Template, reused: bool
) -> Iterator[str]:
    yield from statistics.formats
    if statistics.chat:
        stops = ", ".join(map(repr, statistics.stops))
        yield f"chat template: {statistics.template}; answers end with {stops}"
        if template.is_dated:
            yield (
                f"the chat template writes the date of the day: here it is always {DATE:%d %b %Y}, "
                "so that rows do not change from day to day"
            )
    share = statistics.trained_tokens / max(statistics.tokens, 1)
    yield (
        f"{statistics.documents:,} documents, {statistics.tokens:,} tokens, "
        f"{statistics.trained_tokens:,} trained ({share:.1%})"
        f"{', from the cache' if reused else ''}"
    )
    if statistics.lost_blocks:
        yield (
            f"{statistics.lost_blocks:,} of {statistics.thinking_blocks:,} <think> blocks are left "
            "out by the chat template; data.thinking=keep trains on all of them"
        )
    if statistics.rewritten_turns:
        yield (
            f"{statistics.rewritten_turns:,} trained turns are written by the chat template "
            "otherwise in the history than when they are generated"
        )


def describe_losses(statistics: Statistics, config: DataConfig) -> Iterator[str]:
    """Yields lines on rows, padding, and what was cut or dropped."""
    packed = statistics.packed
    yield (
        f"{packed.rows:,} rows of {packed.max_length:,} tokens, "
        f"{statistics.padding_share:.1%} padding, packing {config.packing!r}"
    )
    if packed.over_length:
        yield (
            f"{packed.over_length:,} of {statistics.documents:,} documents are over the limit of "
            f"{packed.max_length:,} tokens (longest {packed.longest:,}); overlength="
            f"{config.overlength!r} loses {statistics.lost_share:.1%} of the trained tokens"
        )
    if packed.dropped:
        yield f"{packed.dropped:,} documents are in no row: over the limit, or nothing to train"


def _no_rows_report(statistics: Statistics, config: DataConfig, name: str) -> str:
    packed = statistics.packed
    dropped = packed.over_length if config.overlength == "drop" else 0
    reasons, remedies = [], []
    if dropped:
        reasons.append(
            f"{dropped:,} are longer than data.max_length {packed.max_length:,} and "
            "data.overlength=drop leaves them out"
        )
    if untrained := statistics.documents - dropped:
        cut = " within data.max_length" if packed.over_length > dropped else ""
        reasons.append(f"{untrained:,} have no token to train{cut}")
    if packed.over_length:
        remedies.append(f"set data.max_length to {packed.longest} to keep all of them")
    if untrained > packed.over_length - dropped:
        remedies.append("give rows with more text, or check data.train_on")
    return (
        f"{name}: none of {statistics.documents:,} documents is left in a row: "
        f"{', '.join(reasons)}. {' and '.join(remedies).capitalize()}."
    )
