"""From the name of a data set to packed rows on disk, with a log of what was found and lost."""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxft.config import DataConfig, held_out_share
from jaxft.data import cache
from jaxft.data.chat import Example, chat_examples, text_examples
from jaxft.data.discovery import find_sources
from jaxft.data.documents import (
    Documents,
    DocumentStatistics,
    DocumentWriter,
    add_counts,
    skipped_file,
)
from jaxft.data.formats import Conversation, Document, Format, read_items
from jaxft.data.loader import LIMITED, PACKED, sample_numbers, shuffled
from jaxft.data.packing import PackingError, PackingStatistics, pack
from jaxft.data.problems import IgnoredProblems, Problems, RowError, describe_kinds
from jaxft.data.rows import Statistics, TokenRows, write_rows
from jaxft.data.selection import Part, Selection, select
from jaxft.data.sources import Row, Source
from jaxft.data.template import DATE, Template, check_can_stop, resolve_template
from jaxft.errors import DataError
from jaxft.formatting import counted

VERSION = 7
"""Part of every cache key: raise it when the same input would give other tokens or rows."""

DATED = (
    f"the chat template writes the date of the day: here it is always {DATE:%d %b %Y}, so that "
    "rows do not change from day to day"
)
_TOKENISED_TOGETHER = 256
_SECONDS_BETWEEN_LOGS = 10.0
_SEPARATORS = {"paragraph": "\n\n", "line": "\n", "file": ""}

_CONTROL_TOKENS = {
    "text": "which are encoded as plain text; --config.data.control_tokens=refuse refuses such "
    "rows, keep takes them at their word",
    "keep": "which are real ones, as --config.data.control_tokens=keep says",
}

Log = Callable[[str], Any]


def prepare(
    source: str,
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    training: bool,
    name: str = "",
    listed: Path | None = None,
    on_log: Log = print,
    on_progress: Log | None = None,
) -> TokenRows:
    """Reads, checks, tokenises and packs a data set, or finds the result of doing so before.

    Args:
      source: Files, globs or hub ids, as `data.train` takes them; or '5%', the part of `data.train`
        that is held out.
      config: How to read, render, mask, cut and pack. Of training data it leaves out what
        `data.validation` holds out.
      tokenizer: A Hugging Face tokenizer.
      seed: Decides what is held out, which rows a source with a limit or a weight gives, and which
        documents share a row when training with shuffling.
      training: Whether the rows are trained on; evaluation keeps the order of the source.
      name: How the data set is called in the log.
      listed: The file that the caller copies the list of bad rows to, for the log; by default the
        one in the cache.
      on_log: Called with lines of text on what was found.
      on_progress: Called with lines on how far long work is; by default `on_log`.

    Returns:
      Memory-mapped rows with their statistics.

    Raises:
      ConfigError: For options that cannot be understood.
      DataError: For rows that cannot be trained on, the first 20 at once, and if none are left.
    """
    name = name or ("train" if training else "validation")

    def say(text: str) -> None:
        on_log(f"{name}: {text}")

    def say_progress(text: str) -> None:
        (on_progress or on_log)(f"{name}: {text}")

    sources = _find(source, config, training)
    template = resolve_template(tokenizer, config)
    folder = cache_folder(config)
    key = document_key(sources, config, tokenizer, template, seed=seed)

    def build(target: Path) -> None:
        _write_documents(
            target, sources, config, tokenizer, template, name, say_progress, seed=seed
        )

    found, reused = cache.find_or_build(folder, f"documents-{key}", build)
    documents = Documents(found)
    for line in _describe_documents(documents, template, listed):
        say(line)
    _check_skipped(documents, config, name)
    if config.packing == "stream" and tokenizer.eos_token_id is None:
        say(
            "the tokenizer has no EOS: documents of the stream end with the line ends that "
            "separated them"
        )
    selection = _select(documents, sources, source, config, training, seed, name)
    say(_describe_counts(documents, selection, reused))
    for line in _describe_parts(selection.parts):
        say(line)
    rows = _packed(documents, selection, key, config, tokenizer, folder, seed, training, name)
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
    rows: TokenRows | None = None,
    training: bool = False,
    maximum: int = 0,
    on_log: Log = print,
) -> Iterator[Conversation]:
    """Yields conversations in order, for answers to be generated and compared.

    Args:
      source: As for `prepare`.
      config: How to read them.
      rows: What `prepare` made of this source: conversations that are not in it, such as bad rows
        or those of the other side of a held-out part, are passed over. Needed for such a part.
      training: Which split a hub id without one means.
      maximum: Stop after this many; 0: all.
      on_log: Called with lines of text.

    Raises:
      DataError: For bad rows, unless `rows` or the configuration leave them out; and for plain
        text, which holds no answers.
    """
    assert rows is not None or not held_out_share(source), "only the rows tell the held-out part"
    count = 0
    judged = rows is not None or config.bad_rows == "skip"
    problems = IgnoredProblems(source) if judged else Problems(source)
    for number, item_source in enumerate(_find(source, config, training)):
        say_format = functools.partial(_say_format, where=item_source.name, on_log=on_log)
        chosen = None if rows is None else _row_numbers(rows, number)
        for _, item in read_items(item_source, problems, on_format=say_format, chosen=chosen):
            if isinstance(item, Document):
                raise DataError(
                    f"{item.origin}: plain text has no answers to compare with. Set "
                    "--config.eval.answers=none, or use data in a conversation format."
                )
            yield item
            count += 1
            if count == maximum:
                return
    problems.check()


def _row_numbers(rows: TokenRows, source: int) -> set[int]:
    index = rows.documents.index[rows.numbers]
    return set(index["row"][index["source"] == source].tolist())


def skipped_rows(rows: TokenRows) -> Iterator[dict[str, Any]]:
    """Yields the bad rows that were left out, with origin, problem and the row itself."""
    if not rows.documents.statistics.skipped:
        return
    with rows.documents.skipped.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def document_key(
    sources: list[Source], config: DataConfig, tokenizer: Any, template: Template, *, seed: int
) -> str:
    """Names the tokens of these sources under these options; packing is named separately."""
    return cache.make_key(
        {
            "version": VERSION,
            "sources": [_source_key(source, seed) for source in sources],
            "tokenizer": cache.tokenizer_fingerprint(tokenizer),
            "template": [template.text, template.tool_text],
            "stops": dict(template.stops),
            "control_tokens": config.control_tokens,
            "thinking": config.thinking,
            "train_on": config.train_on,
            "separated": _is_separated(config, tokenizer),
            "bad_rows": config.bad_rows,
        }
    )


def _source_key(source: Source, seed: int) -> list[Any]:
    spec = source.spec
    # Files of a glob share its limit; named one by one, each has a limit of its own.
    limit = [spec.limit, spec.name, seed] if spec.limit else []
    return [
        source.origin(0),
        source.fingerprint(),
        spec.format,
        spec.columns,
        spec.text_split,
        *limit,
    ]


def _is_separated(config: DataConfig, tokenizer: Any) -> bool:
    """Whether what separates documents is kept, for want of a token that ends them."""
    return config.packing == "stream" and tokenizer.eos_token_id is None


def _find(source: str, config: DataConfig, training: bool) -> list[Source]:
    if held_out_share(source):
        return find_sources(config.train, config, training=True)
    return find_sources(source, config, training=training)


def _select(
    documents: Documents,
    sources: list[Source],
    source: str,
    config: DataConfig,
    training: bool,
    seed: int,
    name: str,
) -> Selection:
    held_out = held_out_share(source)
    share = held_out or (held_out_share(config.validation) if training else 0.0)
    return select(
        documents,
        [item.spec for item in sources],
        share=share,
        held_out=bool(held_out),
        seed=seed,
        name=name,
    )


def _packed(
    documents: Documents,
    selection: Selection,
    key: str,
    config: DataConfig,
    tokenizer: Any,
    folder: Path,
    seed: int,
    training: bool,
    name: str,
) -> TokenRows:
    mixed = config.shuffle and config.packing == "documents" and training
    pad = tokenizer.pad_token_id or 0
    count = len(selection.numbers)
    partial = count < len(documents.index)
    ingredients = {
        "documents": key,
        "numbers": hashlib.sha256(selection.numbers.tobytes()).hexdigest() if partial else "all",
        "parts": [dataclasses.asdict(part) for part in selection.parts],
        "packing": config.packing,
        "overlength": config.overlength,
        "max_length": config.max_length,
        "seed": seed if mixed else None,
        "pad": pad,
        "begin": tokenizer.bos_token_id,
    }

    def order(place: int) -> int:
        # Sorted sources would otherwise put like beside like into the same rows.
        return shuffled(place, count, seed=seed, epoch=PACKED) if mixed else place

    def build(target: Path) -> None:
        statistics = PackingStatistics(parts=selection.parts)
        rows = pack(
            documents,
            packing=config.packing,
            overlength=config.overlength,
            max_length=config.max_length,
            order=order,
            statistics=statistics,
            numbers=selection.numbers,
            begin_token=tokenizer.bos_token_id,
            name=name,
        )
        numbers = selection.numbers if partial else None
        write_rows(target, rows, statistics, pad=pad, numbers=numbers)

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
    *,
    seed: int,
) -> None:
    skipped = skipped_file(folder) if config.bad_rows == "skip" else None
    problems = Problems(name, skipped=skipped)
    chosen = _sample_rows(sources, seed, say)
    separated = _is_separated(config, tokenizer)
    tokenise = _Tokeniser(tokenizer, config, template, problems)
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
    statistics: DocumentStatistics, tokenise: _Tokeniser, config: DataConfig, name: str
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


def _check_skipped(documents: Documents, config: DataConfig, name: str) -> None:
    """Raises if more rows were left out than may be.

    Raises:
      DataError: With how many there are of which kind.
    """
    statistics = documents.statistics
    total = statistics.rows + statistics.skipped
    if statistics.skipped <= config.bad_share * total:
        return
    needed = math.ceil(10_000 * statistics.skipped / total) / 10_000
    raise DataError(
        [
            f"{name}: {statistics.skipped:,} of {total:,} rows ({statistics.skipped / total:.2%}) "
            f"are bad, more than the share of {config.bad_share:g} that may be left out:",
            *describe_kinds(statistics.skipped_kinds),
            f"They are listed in {documents.skipped}. Correct them, or if the rest is worth "
            f"training on, set --config.data.bad_share={needed:g}",
        ]
    )


def _describe_parts(parts: list[Part]) -> Iterator[str]:
    """Yields a line for each source of a mixture, and where a pass does not hold all documents."""
    if len(parts) == 1 and parts[0].taken == parts[0].documents:
        return
    taken = sum(part.taken for part in parts)
    trained = sum(part.trained_tokens for part in parts)
    for part in parts:
        yield (
            f"{part.name}: {part.taken:,} of {part.documents:,} documents in a pass, "
            f"{part.taken / taken:.1%} of its documents and "
            f"{part.trained_tokens / max(trained, 1):.1%} of its trained tokens"
        )


def _describe_documents(
    documents: Documents, template: Template, listed: Path | None
) -> Iterator[str]:
    statistics = documents.statistics
    yield from statistics.formats
    if statistics.chat:
        stops = ", ".join(map(repr, statistics.stops))
        yield f"chat template: {statistics.template}; answers end with {stops}"
        if template.is_dated:
            yield DATED
    yield from describe_findings(documents, listed)


def _describe_counts(documents: Documents, selection: Selection, reused: bool) -> str:
    """Says how large the set is, and of how many documents it is a part."""
    index = documents.index[selection.numbers]
    tokens, trained = int(index["length"].sum()), int(index["trained"].sum())
    count = counted(len(documents.index), "document")
    if len(index) < len(documents.index):
        count = f"{len(index):,} of {count}"
    return (
        f"{count}, {tokens:,} tokens, {trained:,} trained "
        f"({trained / max(tokens, 1):.1%}){', from the cache' if reused else ''}"
    )


def describe_findings(documents: Documents, listed: Path | None = None) -> Iterator[str]:
    """Yields a line for each thing about the documents that its owner should know."""
    statistics = documents.statistics
    if statistics.skipped:
        noun = "row is" if statistics.skipped == 1 else "rows are"
        yield (
            f"{statistics.skipped:,} bad {noun} left out: "
            f"{'; '.join(describe_kinds(statistics.skipped_kinds))}; listed in "
            f"{listed or documents.skipped}"
        )
    if statistics.lost_blocks:
        yield (
            f"{statistics.lost_blocks:,} of {statistics.thinking_blocks:,} <think> blocks are left "
            "out by the chat template; --config.data.thinking=keep trains on all of them"
        )
    if statistics.rewritten_turns:
        yield (
            f"{statistics.rewritten_turns:,} trained turns are written by the chat template "
            "otherwise in the history than when they are generated; --config.data.thinking=keep "
            "trains each as it is generated, at the price of more tokens"
        )
    if statistics.unused_keys:
        keys = ", ".join(f"{key!r} in {n:,}" for key, n in sorted(statistics.unused_keys.items()))
        yield f"keys of messages that are not used: {keys} conversations"
    if statistics.control_rows:
        found = sorted(statistics.control_tokens.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{token!r} {count:,} times" for token, count in found[:5])
        yield (
            f"{statistics.control_rows:,} rows spell control tokens ({shown}"
            f"{', …' if len(found) > 5 else ''}), {_CONTROL_TOKENS[statistics.control_policy]}"
        )


def describe_losses(statistics: Statistics, config: DataConfig) -> Iterator[str]:
    """Yields lines on rows, padding, and what was cut or dropped."""
    packed = statistics.packed
    yield (
        f"{counted(packed.rows, 'row')} of {packed.max_length:,} tokens, "
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
            "data.overlength is 'drop'"
        )
    if untrained := statistics.documents - dropped:
        cut = " within data.max_length" if packed.over_length > dropped else ""
        reasons.append(f"{untrained:,} have no token to train{cut}")
    if packed.over_length:
        remedies.append(f"set --config.data.max_length={packed.longest} to keep all of them")
    if untrained > packed.over_length - dropped:
        remedies.append("give rows with more text, or check data.train_on")
    return (
        f"{name}: none of {statistics.documents:,} documents is left in a row: "
        f"{', '.join(reasons)}. {' and '.join(remedies).capitalize()}."
    )
