"""Detection of the format that rows are in: as named, or told from the first row."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.data.formats.cells import as_row, cell_text, optional_text, quoted
from jaxft.data.formats.converters import CONVERTERS, make_document, single_turn
from jaxft.data.formats.items import Conversation, Format
from jaxft.data.formats.layouts import (
    LABELS,
    describe_unused,
    known_columns,
    pair_columns,
    respelt,
    single_layout,
)
from jaxft.data.formats.media import check_text_only
from jaxft.data.problems import RowError
from jaxft.data.sources import Row
from jaxft.data.specs import SourceSpec
from jaxft.errors import DataError, nearest

EXAMPLES = {
    "messages": '{"messages": [{"role": "user", "content": "Is it open?"}, '
    '{"role": "assistant", "content": "Yes, until six."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "Is it open?"}, '
    '{"from": "gpt", "value": "Yes, until six."}]}',
    "alpaca": '{"instruction": "Name the colour.", "input": "grass", "output": "green"}',
    "prompt_completion": '{"prompt": "Is it open?", "completion": "Yes, until six."}',
    "columns": "with --config.data.columns=prompt=question,completion=answer: "
    '{"question": "Is it open?", "answer": "Yes, until six."}',
    "text": '{"text": "A document."}',
}
_PREFERENCE_COLUMNS = ("chosen", "rejected", "label", "kto_tag")
UNIT_FORMATS = ("preference", "labelled")
"""Formats of answers that are compared, which objectives of preferences take."""
_TAKEN_BY = {
    "pairs": "Such rows are for --config.objective.name=dpo and other objectives of preferences.",
    "labelled": "Such rows are for --config.objective.name=kto.",
}
_TEXT_COLUMNS = {
    "alpaca": ("instruction", "input", "context", "output", "response", "system"),
    "prompt_completion": ("prompt", "completion", "response", "system"),
}
"""Columns of the formats with fixed names whose cells are read as text."""
_LABEL_COLUMNS = ("label", "labels", "category", "class", "intent", "target")


def choose_format(row: Row, spec: SourceSpec, origin: str) -> Format:
    """Returns the named format, or the one that the first row is in.

    Raises:
      DataError: If the row is in none of the formats, or in more than one.
      RowError: If the row is not even an object, which says nothing of the other rows.
    """
    if isinstance(row.value, str):
        if spec.format in ("auto", "text"):
            return Format("text", make_document, f"plain text, one document a {spec.text_split}")
        raise DataError(
            f"{origin}: this is plain text, but the format of the source is {spec.format!r}. If "
            f"text is meant, write so after its name: '{spec.name}:format=text'."
        )
    columns = list(as_row(row.value))
    if spec.format in ("columns", "text"):
        check_columns(spec.mapping, columns, origin)
        return _mapped_format(spec.format, spec.mapping, columns)
    if spec.format == "auto":
        return _detect(row.value, origin)
    if spec.format in UNIT_FORMATS:
        raise DataError(
            f"{origin}: the format of the source is {spec.format!r}, answers to be compared. "
            f"{_TAKEN_BY['pairs' if spec.format == 'preference' else 'labelled']}"
        )
    return Format(
        spec.format,
        CONVERTERS[spec.format],
        "as the configuration says",
        _TEXT_COLUMNS.get(spec.format, ()),
    )


def check_meaning(value: Any, row_format: Format, *, named: bool) -> None:
    """Raises RowError for columns without which a row means something else.

    Args:
      value: The row.
      row_format: How it is read.
      named: Whether the user chose that format, and with it what is left out.
    """
    if not isinstance(value, dict):
        return
    check_text_only(value, "the row", "column")
    preferred = [column for column in _PREFERENCE_COLUMNS if _is_preference(value, column)]
    if row_format.name in UNIT_FORMATS:
        return
    if preferred and row_format.is_chat and not named:
        raise RowError(
            f"the row has {quoted(preferred)}, which tells good answers from bad ones; training "
            "on the other columns alone leaves that out. If it is meant, name the format: "
            f"--config.data.format={row_format.name}. "
            f"{_TAKEN_BY['pairs' if pair_columns(value) else 'labelled']}"
        )


def _is_preference(value: dict[str, Any], column: str) -> bool:
    if column in LABELS:
        return isinstance(value.get(column), bool)
    return value.get(column) not in (None, "", [], {})


def check_columns(mapping: Mapping[str, str], columns: list[str], origin: str) -> None:
    """Raises DataError for named columns that a row does not have."""
    problems = [
        f"{origin}: there is no column {column!r}; the columns are {', '.join(columns)}."
        f"{nearest(column, columns)} Name columns that exist with --config.data.columns=…."
        for column in mapping.values()
        if column not in columns
    ]
    if problems:
        raise DataError(problems)


def _detect(value: dict[str, Any], origin: str) -> Format:
    columns = list(value)
    name, used = single_layout(value)
    if not name and pair_columns(value):
        raise DataError(
            f"{origin}: the row is a pair of answers, of which one is preferred "
            f"(columns {', '.join(pair_columns(value))}). {_TAKEN_BY['pairs']}"
        )
    if name == "text":
        labels = [column for column in columns if column in _LABEL_COLUMNS]
        if labels:
            raise DataError(
                f"{origin}: the columns {', '.join(columns)} can be read in two ways. To train the "
                f"label as the answer: --config.data.format=columns --config.data.columns="
                f"prompt=text,completion={labels[0]}. To train the text alone: "
                "--config.data.format=text. Or after the name of this source alone: "
                f"':prompt=text:completion={labels[0]}' or ':format=text'."
            )
        return _mapped_format("text", {"text": "text"}, columns)
    if name == "columns":
        return _mapped_format("columns", {"prompt": used[0], "completion": used[1]}, columns)
    if not name:
        raise DataError(
            [
                f"{origin}: the columns {', '.join(columns)} are in no known format."
                f"{respelt(value, known_columns)}",
                "Name the two that hold prompt and answer: --config.data.format=columns "
                "--config.data.columns=prompt=…,completion=…, or after the name of this source "
                "alone ':prompt=…:completion=…'; or write rows in one of these forms:",
                *EXAMPLES.values(),
            ]
        )
    description = f"columns {', '.join(used)}{describe_unused(used, columns)}"
    return Format(name, CONVERTERS[name], description, _TEXT_COLUMNS.get(name, ()))


def told_columns(names: Iterable[str], spec: SourceSpec) -> list[str]:
    """Returns the columns that make something with these names a row; none if they make no row."""
    if spec.mapping:
        return list(spec.mapping.values()) if {*spec.mapping.values()} <= {*names} else []
    return known_columns(dict.fromkeys(names))


def _mapped_format(name: str, mapping: dict[str, str], columns: list[str]) -> Format:
    used = list(mapping.values())
    description = describe_mapping(mapping, columns)
    if name == "text":
        return Format(
            name,
            lambda value, origin: make_document(cell_text(as_row(value), mapping["text"]), origin),
            description,
            tuple(used),
        )

    def convert(value: Any, origin: str) -> Conversation:
        row = as_row(value)
        system = optional_text(row, mapping["system"]) if "system" in mapping else ""
        return single_turn(
            cell_text(row, mapping["prompt"]),
            cell_text(row, mapping["completion"]),
            origin,
            system=system,
        )

    return Format(name, convert, description, tuple(used))


def describe_mapping(mapping: Mapping[str, str], columns: Iterable[str]) -> str:
    """Returns what a log says of named columns, and of those that are not used."""
    pairs = ", ".join(f"{part} = column {column!r}" for part, column in mapping.items())
    return f"{pairs}{describe_unused(mapping.values(), columns)}"
