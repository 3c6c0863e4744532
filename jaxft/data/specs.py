"""Names and options of one source: the one-line form of `data.train` and the keys like it.

A line names several sources, separated by commas. Each is a file, a folder, a glob or a hub id,
followed by options after colons:

    a.jsonl:0.3, b.csv:format=columns:prompt=question:completion=answer, org/name:config[split]:0.2
"""

import glob
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.config import FORMATS, TEXT_SPLITS, DataConfig
from jaxft.errors import ConfigError, collected, nearest

COLUMNS = {
    "columns": ("prompt", "completion", "system"),
    "text": ("text",),
    "preference": ("chosen", "rejected", "prompt", "system"),
    "labelled": ("prompt", "completion", "label", "system"),
}
"""Columns that can be named in a format; those that must be named come first."""

_REQUIRED = {
    "columns": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
}
_NAMED = tuple(dict.fromkeys(sum(COLUMNS.values(), ())))
_OPTIONS = ("format", *_NAMED, "text_split", "weight", "limit")
_MUST_NAME = ("columns",)
"""Formats that are nothing without named columns."""
_OUTSIDE_BRACKETS = r"(?![^\[]*\])"
_OPTION = re.compile(r"(?P<name>[A-Za-z_]+)=(?P<value>.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One source as it is written, and how it is read.

    Attributes:
      name: A path, a glob, or a hub id with what belongs to it: 'org/name:config[split]'.
      format: One of the choices of `data.format`.
      columns: Pairs of a part, such as 'prompt', and the column that holds it.
      text_split: One of the choices of `data.text_split`.
      names_split: Whether the source itself says so, and not the configuration.
      weight: Share of the documents of a pass, in proportion to the other weights; 0: none given.
      limit: Number of rows that are taken; 0: all. They are a seeded sample, of a streamed hub data
        set the first ones.
    """

    name: str
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    text_split: str = "paragraph"
    weight: float = 0.0
    limit: int = 0
    names_split: bool = field(default=False, compare=False)

    @property
    def mapping(self) -> dict[str, str]:
        """The columns by part; of format 'text' the column 'text' unless another is named."""
        return dict(self.columns) or ({"text": "text"} if self.format == "text" else {})


def parse_specs(text: str, config: DataConfig) -> list[SourceSpec]:
    """Reads a line of sources.

    Args:
      text: Such as `a.jsonl:0.3,b.csv:format=columns:prompt=q:completion=a`. Commas and colons
        within brackets, and within the name of a file that exists, are part of the name.
      config: What holds for sources that do not say.

    Raises:
      ConfigError: For what cannot be understood, of all sources at once.
    """
    problems: list[str] = []
    specs = []
    for part in _parts(text):
        with collected(problems):
            specs.append(_parse(part, config))
    weighted = [spec for spec in specs if spec.weight]
    if weighted and len(weighted) < len(specs):
        bare = next(spec for spec in specs if not spec.weight)
        problems.append(
            f"{weighted[0].name!r} has a weight and {bare.name!r} has none; give all sources of "
            f"the list one, such as '{bare.name}:0.5', or none of them."
        )
    problems += [
        f"{spec.name!r} is named twice with the same weight and limit; name it once, with those "
        "that are meant in all."
        for spec in dict.fromkeys(specs)
        if specs.count(spec) > 1 and (spec.weight or spec.limit)
    ]
    if problems:
        raise ConfigError(problems)
    return specs


def parse_columns(text: str, row_format: str) -> tuple[tuple[str, str], ...]:
    """Reads `data.columns`, such as 'prompt=question,completion=answer'.

    Raises:
      ConfigError: If it is not of that form, or a column that the format needs is not named.
    """
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    columns = tuple((name.strip(), column.strip()) for name, _, column in pairs)
    _check_columns(columns, row_format, "--config.data.columns")
    return columns


def _parts(text: str) -> Iterator[str]:
    """Splits at commas, but not within brackets or within the name of a file that exists."""
    pieces = re.split("," + _OUTSIDE_BRACKETS, text)
    while pieces:
        count = next((n for n in range(len(pieces), 1, -1) if _is_one_file(pieces[:n])), 1)
        part = ",".join(pieces[:count]).strip()
        if part:
            yield part
        pieces = pieces[count:]


def _is_one_file(pieces: list[str]) -> bool:
    """Whether a file has the commas between some pieces in its name; options may follow it."""
    *first, last = pieces
    return any(
        _exists(",".join([*first, last[:end]]).strip())
        for end in (len(last), *(match.start() for match in re.finditer(":", last)))
    )


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(name))
    except ValueError:  # a null character
        return False


def _parse(part: str, config: DataConfig) -> SourceSpec:
    name, pieces = _split_name(part)
    options: dict[str, str] = {}
    problems = []
    for piece in pieces:
        match = _OPTION.fullmatch(piece)
        option = match["name"] if match else "weight" if _NUMBER.fullmatch(piece) else ""
        if option not in _OPTIONS:
            problems.append(
                f"{part!r} has no option {piece!r}.{nearest(option or piece, _OPTIONS)} The "
                f"options are {', '.join(f'{name}=' for name in _OPTIONS)} and a number, the "
                "weight."
            )
        elif option in options:
            problems.append(f"{part!r} names {option} twice.")
        else:
            options[option] = match["value"].strip() if match else piece
    if problems:
        raise ConfigError(problems)
    return _spec(part, name, options, config)


def _split_name(part: str) -> tuple[str, list[str]]:
    """Returns what is named, colons in it included, and the options after it."""
    pieces = re.split(":" + _OUTSIDE_BRACKETS, part)
    for count in range(len(pieces), 0, -1):
        name = ":".join(pieces[:count])
        if _exists(name) or (glob.has_magic(name) and next(_matches(name), None)):
            break
    else:
        name, count = pieces[0], 1
    rest = [piece.strip() for piece in pieces[count:]]
    # What follows a hub id is its configuration.
    is_option = rest and (_OPTION.fullmatch(rest[0]) or _NUMBER.fullmatch(rest[0]))
    if rest and not is_option and not Path(name).expanduser().is_file():
        name = f"{name}:{rest.pop(0)}"
    return name.strip(), rest


def _matches(pattern: str) -> Iterator[str]:
    return glob.iglob(os.path.expanduser(pattern), recursive=True)


def _spec(part: str, name: str, options: dict[str, str], config: DataConfig) -> SourceSpec:
    problems: list[str] = []
    columns = tuple((key, options[key]) for key in options if key in _NAMED)
    row_format = options.get("format", "")
    if not row_format and columns:
        row_format = _format_of(dict(columns))
    if not row_format:
        row_format = config.format
        with collected(problems):
            columns = parse_columns(config.columns, row_format) if row_format in COLUMNS else ()
    elif columns and row_format in FORMATS:
        with collected(problems):
            _check_columns(columns, row_format, repr(part))
    elif row_format == "columns" and config.format == "columns" and config.columns:
        with collected(problems):
            columns = parse_columns(config.columns, row_format)
    text_split = options.get("text_split", config.text_split)
    for option, value, choices in (
        ("format", row_format, FORMATS),
        ("text_split", text_split, TEXT_SPLITS),
    ):
        if value not in choices:
            problems.append(
                f"{part!r}: {option} is {value!r}; expected one of {', '.join(choices)}."
                f"{nearest(value, choices)}"
            )
    weight, limit = options.get("weight", ""), options.get("limit", "")
    if "weight" in options and not (_NUMBER.fullmatch(weight) and 0 < float(weight) < math.inf):
        problems.append(f"{part!r}: weight is {weight!r}; expected a number above 0.")
    if "limit" in options and not (limit.isdecimal() and len(limit) < 16 and int(limit)):
        problems.append(f"{part!r}: limit is {limit!r}; expected a whole number of rows above 0.")
    if problems:
        raise ConfigError(problems)
    return SourceSpec(
        name=name,
        format=row_format,
        columns=columns,
        text_split=text_split,
        weight=float(weight or 0),
        limit=int(limit or 0),
        names_split="text_split" in options,
    )


def _format_of(columns: Mapping[str, str]) -> str:
    """Returns the format in which columns of these names are read."""
    if columns.keys() == {"text"}:
        return "text"
    if columns.keys() & {"chosen", "rejected"}:
        return "preference"
    return "labelled" if "label" in columns else "columns"


def _check_columns(columns: tuple[tuple[str, str], ...], row_format: str, where: str) -> None:
    known = COLUMNS.get(row_format, ())
    if not known:
        raise ConfigError(
            f"{where} names columns, but the format is {row_format!r}; they belong to the formats "
            f"{', '.join(map(repr, COLUMNS))}."
        )
    if row_format not in _MUST_NAME and not columns:
        return
    mapping = dict(columns)
    problems = [
        f"{where} names {name!r}; expected {', '.join(known)}.{nearest(name, known)}"
        for name in mapping
        if name not in known
    ]
    if len(mapping) < len(columns):
        problems.append(f"{where} names a column of the same part twice.")
    problems += [
        f"{where} does not say which column is the {name}; write {name}=…"
        for name in _REQUIRED[row_format]
        if not mapping.get(name)
    ]
    if problems:
        raise ConfigError(problems)
