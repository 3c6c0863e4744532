"""Detection of the format of preferences: as named, or told from the first row."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxft.data.formats.cells import as_row
from jaxft.data.formats.detection import check_columns, describe_mapping
from jaxft.data.formats.items import Format, Item
from jaxft.data.formats.layouts import (
    describe_unused,
    label_columns,
    label_layout,
    pair_columns,
    pair_layout,
    respelt,
    single_layout,
)
from jaxft.data.formats.preferences import describe_pairs, read_labelled, read_pair, renamed
from jaxft.data.sources import Row
from jaxft.data.specs import SourceSpec
from jaxft.errors import DataError

UNIT_EXAMPLES = {
    "preference": '{"prompt": "Is it open?", "chosen": "Yes, until six.", "rejected": "No idea."}',
    "labelled": '{"prompt": "Is it open?", "completion": "Yes, until six.", "label": true}',
}
_WANTED = {
    "pairs": ("pairs of answers, one chosen and one rejected", ("preference",)),
    "labelled": ("answers labelled good or bad, or pairs of them", ("labelled", "preference")),
}


def choose_unit_format(row: Row, spec: SourceSpec, origin: str, units: str) -> Format:
    """Returns the format of rows of preferences: the named one, or that of the first row.

    Args:
      row: The first row.
      spec: How its source is written.
      origin: `file:line` of the row.
      units: What the objective takes: 'pairs' or 'labelled'.

    Raises:
      DataError: If the row is nothing that such an objective takes; it names one that would.
      RowError: If the row is not even an object, which says nothing of the other rows.
    """
    wanted, formats = _WANTED[units]
    if isinstance(row.value, str):
        raise _refusal(origin, "is plain text, which holds no answers", units, "sft")
    value = as_row(row.value)
    if spec.format != "auto" and spec.format not in formats:
        other = {"labelled": "kto"}.get(spec.format, "sft")
        raise DataError(
            f"{origin}: the format of the source is {spec.format!r}, but the objective takes "
            f"{wanted}: --config.data.format={formats[0]}, which finds the columns by itself. "
            f"--config.objective.name={other} takes this format."
        )
    name = spec.format if spec.format != "auto" else _told_apart(value, units)
    if not name:
        raise _unknown(value, origin, units)
    if spec.mapping:
        check_columns(spec.mapping, list(value), origin)
        read = _reader(name, spec.mapping)
        return Format(
            name,
            lambda cells, place: read(renamed(cells, spec.mapping), place),
            describe_mapping(spec.mapping, value),
            tuple(spec.mapping.values()),
        )
    used = pair_columns(value) if name == "preference" else label_columns(value)
    description = f"columns {', '.join(used)}{describe_unused(used, value)}"
    if name == "preference":
        description += describe_pairs(value)
    return Format(name, _reader(name, value), description)


def _reader(name: str, first: Mapping[str, Any]) -> Callable[[Any, str], Item]:
    """Returns what reads all rows that have the columns of the first one."""
    if name == "preference":
        return functools.partial(read_pair, layout=pair_layout(first))
    return functools.partial(read_labelled, layout=label_layout(first))


def _told_apart(value: Mapping[str, Any], units: str) -> str:
    """Returns the format of a row; '' if it is none that the objective takes."""
    if units == "labelled" and label_columns(value):
        return "labelled"
    return "preference" if pair_columns(value) else ""


def _unknown(value: Mapping[str, Any], origin: str, units: str) -> DataError:
    if units == "pairs" and label_columns(value):
        return _refusal(origin, "holds one answer with a label", units, "kto")
    name, _ = single_layout(value)
    if name:
        what = "holds a text without answers" if name == "text" else "holds one answer"
        return _refusal(origin, what, units, "sft")
    hint = respelt(value, lambda cells: _columns_of(cells, units))
    return _refusal(origin, f"has the columns {', '.join(value)}", units, "", hint=hint)


def _columns_of(value: Mapping[str, Any], units: str) -> list[str]:
    """Returns the columns that make a row what an objective takes; none if they do not."""
    return (units == "labelled" and label_columns(value)) or pair_columns(value)


def _refusal(origin: str, what: str, units: str, objective: str, *, hint: str = "") -> DataError:
    wanted, formats = _WANTED[units]
    other = f" --config.objective.name={objective} takes such rows." if objective else ""
    return DataError(
        [
            f"{origin}: the row {what}; the objective takes {wanted}.{hint}{other}",
            "Rows that it takes, as texts, messages or ShareGPT turns, with the prompt in a column "
            "of its own or at the beginning of both answers:",
            *(UNIT_EXAMPLES[name] for name in formats),
            "Columns with other names: --config.data.format=preference "
            "--config.data.columns=prompt=…,chosen=…,rejected=…",
        ]
    )
