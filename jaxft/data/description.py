"""The log's words on a data set: what was found, taken, cut and left out."""

import math
from collections.abc import Iterator
from pathlib import Path

from jaxft.config import DataConfig
from jaxft.data.documents import Documents
from jaxft.data.problems import describe_kinds
from jaxft.data.rows import Statistics
from jaxft.data.selection import Part, Selection
from jaxft.data.template import DATE, Template
from jaxft.data.units import NOUNS, counted_units
from jaxft.errors import DataError
from jaxft.formatting import counted

DATED = (
    f"the chat template writes the date of the day: here it is always {DATE:%d %b %Y}, so that "
    "rows do not change from day to day"
)
_CONTROL_TOKENS = {
    "text": "which are encoded as plain text; --config.data.control_tokens=refuse refuses such "
    "rows, keep takes them at their word",
    "keep": "which are real ones, as --config.data.control_tokens=keep says",
}


def describe_parts(parts: list[Part], units: str) -> Iterator[str]:
    """Yields a line for each source of a mixture, and where a pass does not hold all of it."""
    if len(parts) == 1 and parts[0].taken == parts[0].documents:
        return
    plural = f"{NOUNS[units]}s"
    taken = sum(part.taken for part in parts)
    trained = sum(part.trained_tokens for part in parts)
    for part in parts:
        yield (
            f"{part.name}: {part.taken:,} of {part.documents:,} {plural} in a pass, "
            f"{part.taken / taken:.1%} of its {plural} and "
            f"{part.trained_tokens / max(trained, 1):.1%} of its trained tokens"
        )


def describe_documents(
    documents: Documents, template: Template, listed: Path | None
) -> Iterator[str]:
    """Yields lines on formats, template and whatever else the owner should know."""
    statistics = documents.statistics
    yield from statistics.formats
    if statistics.chat:
        stops = ", ".join(map(repr, statistics.stops))
        yield f"chat template: {statistics.template}; answers end with {stops}"
        if template.is_dated:
            yield DATED
    yield from describe_findings(documents, listed)


def describe_counts(documents: Documents, selection: Selection, reused: bool) -> str:
    """Says how large the set is, and of how many documents it is a part."""
    index = documents.index[selection.numbers]
    tokens, trained = int(index["length"].sum()), int(index["trained"].sum())
    size, units = documents.unit_size, documents.units
    count = counted_units(len(documents.index) // size, units)
    if len(index) < len(documents.index):
        count = f"{len(index) // size:,} of {count}"
    if units == "labelled" and documents.labels is not None:
        labels = documents.labels[selection.numbers]
        count += f" ({(labels > 0).sum():,} desirable, {(labels < 0).sum():,} undesirable)"
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
    packed, units = statistics.packed, statistics.read.units
    longest = (
        f"; the longest {NOUNS[units]}: {packed.longest_origin} with {packed.longest:,} tokens"
    )
    yield (
        f"{counted(packed.rows, 'row')} of {packed.max_length:,} tokens, "
        f"{statistics.padding_share:.1%} padding, packing {config.packing!r}"
        f"{longest if units != 'documents' else ''}"
    )
    if packed.over_length:
        yield (
            f"{packed.over_length:,} of {counted_units(statistics.documents, units)} are over the "
            f"limit of {packed.max_length:,} tokens (longest {packed.longest:,}); overlength="
            f"{config.overlength!r} loses {statistics.lost_share:.1%} of the trained tokens"
        )
    if packed.dropped:
        verb = "is" if packed.dropped == 1 else "are"
        equal = (
            f"; a cut made the answers of {packed.made_equal:,} equal" if packed.made_equal else ""
        )
        yield (
            f"{counted_units(packed.dropped, units)} {verb} in no row: over the limit, or nothing "
            f"to train{equal}"
        )


def check_skipped(documents: Documents, config: DataConfig, name: str) -> None:
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


def no_rows_report(statistics: Statistics, config: DataConfig, name: str) -> str:
    """Says why no document is left in a row, and what to do."""
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
        f"{name}: none of {counted_units(statistics.documents, statistics.read.units)} is left in "
        f"a row: "
        f"{', '.join(reasons)}. {' and '.join(remedies).capitalize()}."
    )
