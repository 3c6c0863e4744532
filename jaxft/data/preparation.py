"""Preparation of a data set: from its name to packed rows on disk, with a log of what was found."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.config import DataConfig, held_out_share
from jaxft.data import cache
from jaxft.data.description import (
    check_skipped,
    describe_counts,
    describe_documents,
    describe_losses,
    describe_parts,
    no_rows_report,
)
from jaxft.data.discovery import find_sources
from jaxft.data.documents import (
    Documents,
)
from jaxft.data.formats import (
    Conversation,
    Document,
    Format,
    Labelled,
    conversations_of,
    read_items,
)
from jaxft.data.loader import PACKED, shuffled
from jaxft.data.packing import PackingError, PackingStatistics, pack
from jaxft.data.problems import IgnoredProblems, Problems
from jaxft.data.rows import TokenRows, write_rows
from jaxft.data.selection import Selection, select
from jaxft.data.sources import Source
from jaxft.data.template import Template, resolve_template
from jaxft.data.tokenising import Log, is_separated, write_documents
from jaxft.data.units import check_units
from jaxft.errors import DataError

VERSION = 7
"""Part of every cache key: raise it when the same input would give other tokens or rows."""


def prepare(
    source: str,
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    training: bool,
    name: str = "",
    units: str = "documents",
    listed: Path | None = None,
    may_be_empty: bool = False,
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
      units: What the objective takes, which is packed as one: 'documents', 'pairs' of a chosen and
        a rejected answer, or 'labelled' answers, each with an answer to another prompt beside it.
      listed: The file that the caller copies the list of bad rows to, for the log; by default the
        one in the cache.
      may_be_empty: Return no rows where the policies leave none, and do not raise.
      on_log: Called with lines of text on what was found.
      on_progress: Called with lines on how far long work is; by default `on_log`.

    Returns:
      Memory-mapped rows with their statistics.

    Raises:
      ConfigError: For options that cannot be understood, or that would tear units apart.
      DataError: For rows that cannot be trained on, the first 20 at once, and if none are left.
    """
    check_units(units, config)
    name = name or ("train" if training else "validation")

    def say(text: str) -> None:
        on_log(f"{name}: {text}")

    def say_progress(text: str) -> None:
        (on_progress or on_log)(f"{name}: {text}")

    sources = _find(source, config, training)
    template = resolve_template(tokenizer, config)
    folder = cache_folder(config)
    key = document_key(sources, config, tokenizer, template, seed=seed, units=units)

    def build(target: Path) -> None:
        write_documents(
            target,
            sources,
            config,
            tokenizer,
            template,
            name,
            say_progress,
            seed=seed,
            units=units,
        )

    found, reused = cache.find_or_build(folder, f"documents-{key}", build)
    documents = Documents(found)
    for line in describe_documents(documents, template, listed):
        say(line)
    check_skipped(documents, config, name)
    if config.packing == "stream" and tokenizer.eos_token_id is None:
        say(
            "the tokenizer has no EOS: documents of the stream end with the line ends that "
            "separated them"
        )
    selection = _select(documents, sources, source, config, training, seed, name)
    say(describe_counts(documents, selection, reused))
    for line in describe_parts(selection.parts, units):
        say(line)
    rows = _packed(documents, selection, key, config, tokenizer, folder, seed, training, name)
    for line in describe_losses(rows.statistics, config):
        say(line)
    if not len(rows) and not may_be_empty:
        raise PackingError(no_rows_report(rows.statistics, config, name))
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

    Of a pair it is the one with the chosen answer, and of labelled answers those that are good.

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
    units = "documents" if rows is None else rows.documents.units
    judged = rows is not None or config.bad_rows == "skip"
    problems = IgnoredProblems(source) if judged else Problems(source)
    for number, item_source in enumerate(_find(source, config, training)):
        say_format = functools.partial(_say_format, where=item_source.name, on_log=on_log)
        chosen = None if rows is None else _row_numbers(rows, number)
        items = read_items(item_source, problems, on_format=say_format, chosen=chosen, units=units)
        for _, item in items:
            if isinstance(item, Document):
                raise DataError(
                    f"{item.origin}: plain text has no answers to compare with. Set "
                    "--config.eval.answers=none, or use data in a conversation format."
                )
            if isinstance(item, Labelled) and not item.desirable:
                continue  # no answer to be compared with
            yield conversations_of(item)[0]
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
    sources: list[Source],
    config: DataConfig,
    tokenizer: Any,
    template: Template,
    *,
    seed: int,
    units: str = "documents",
) -> str:
    """Names the tokens of these sources under these options; packing is named separately."""
    only_last = units != "documents"
    return cache.make_key(
        {
            **({"units": units} if only_last else {}),
            "version": VERSION,
            "sources": [_source_key(source, seed) for source in sources],
            "tokenizer": cache.tokenizer_fingerprint(tokenizer),
            "template": [template.text, template.tool_text],
            "stops": dict(template.stops),
            "control_tokens": config.control_tokens,
            "thinking": config.thinking,
            "train_on": "completion" if only_last else config.train_on,
            "separated": is_separated(config, tokenizer),
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
    partial = len(selection.numbers) < len(documents.index)
    count = len(selection.numbers) // documents.unit_size
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


def _say_format(row_format: Format, *, where: str, on_log: Log) -> None:
    on_log(f"{where}: format {row_format.name}, {row_format.description}")
