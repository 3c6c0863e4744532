"""Cuts arrays into blocks for a picture: which devices hold each, and where it is drawn."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxft.compiled.layout import Description, Layout
from jaxft.compiled.mesh_picture import hue_of

# Of more blocks along one dimension than this the first and the last are drawn.
_MOST_BLOCKS = 12
_MOST_SHEETS = 4


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle.

    Attributes:
      kind: "b" for a block, "whole" for one that every device holds, "gap" where some are left
        out, "pile" for the edge of a layer behind.
      x: Pixels from the left edge.
      y: Pixels from the top edge.
      width: Pixels across.
      height: Pixels down.
      hue: Angle of the colour; None where the kind has one.
      title: The words on hover; empty for an edge or a gap.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    hue: int | None = None
    title: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A text beside a sheet.

    Attributes:
      x: Pixels from the left edge to the first letter.
      y: Pixels from the top edge to the foot of the letters.
      text: The words.
      turned: Whether it is read from bottom to top.
    """

    x: float
    y: float
    text: str
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An array as rectangles.

    Attributes:
      width: Pixels across.
      height: Pixels down.
      blocks: Rectangles from back to front.
      labels: Texts beside them.
      note: Words on the parts that are left out; may be empty.
    """

    width: int
    height: int
    blocks: list[Block]
    labels: list[Label]
    note: str


class _Dimension(NamedTuple):
    """One dimension of an array: its place, name, size, and the mesh axes that cut it."""

    index: int
    name: str
    size: int
    parts: int
    mesh_axes: tuple[str, ...]

    def range(self, block: int) -> str:
        size = self.size // self.parts
        return f"{self.name} {block * size:,}:{(block + 1) * size:,}"


def _dimensions(layout: Layout, axes: tuple[str, ...], mesh: dict[str, int]) -> list[_Dimension]:
    return [
        _Dimension(i, axis, size, math.prod(mesh[name] for name in names), names)
        for i, (axis, size, names) in enumerate(zip(axes, layout.shape, layout.spec, strict=True))
    ]


def draw_array(layout: Layout, axes: tuple[str, ...], found: Description) -> Picture:
    """Draws an array as a rectangle of blocks, and more than two cut dimensions as several.

    Drawn are the last two dimensions that are cut. The others that are cut make several sheets; a
    leading axis of layers that is not is shown as a pile.
    """
    dimensions = _dimensions(layout, axes, found.mesh)
    rows, columns = _drawn(dimensions)
    sheets = [d for d in dimensions if d.parts > 1 and d not in (rows, columns)]
    pile = next((d for d in dimensions if d.name == "layers" and d.parts == 1), None)
    if pile in (rows, columns):
        pile = None
    width, height = _extent(rows, columns)
    if sheets:  # two in a row
        width, height = min(width, 122), min(height, 122)
    combinations = list(itertools.product(*(range(d.parts) for d in sheets)))
    drawn = combinations[:_MOST_SHEETS]
    holders = _holders(layout, found)
    step, line = 28 + width, height + 58
    blocks: list[Block] = []
    labels: list[Label] = []
    for i, sheet in enumerate(drawn):
        left, top = 18 + i % 2 * step, 18 + i // 2 * line
        if pile is not None:
            blocks += [Block("pile", left + d, top - d, width, height) for d in (10, 5)]
        box = (left, top, width, height)
        fixed = dict(zip(sheets, sheet, strict=True))
        blocks += _blocks((rows, columns), fixed, box, holders, found.devices)
        labels += _labels(rows, columns, box)
        if sheets:
            text = ", ".join(d.range(b) for d, b in fixed.items())
            labels.append(Label(left, top + height + 29, text))
    notes = [_left_out(d) for d in (rows, columns) if d is not None and d.parts > _MOST_BLOCKS]
    if len(combinations) > len(drawn):
        notes.append(f"{len(drawn)} of {len(combinations)} sheets drawn")
    if pile is not None:
        notes.append(f"× {pile.size} layers")
    return Picture(
        width=min(len(drawn), 2) * step + 18,
        height=math.ceil(len(drawn) / 2) * line - (0 if sheets else 16),
        blocks=blocks,
        labels=labels,
        note="; ".join(notes),
    )


def _drawn(dimensions: list[_Dimension]) -> tuple[_Dimension | None, _Dimension | None]:
    """Returns what goes down and what goes across; None for a dimension that is not there."""
    cut = [d for d in dimensions if d.parts > 1]
    others = [d for d in dimensions if d.parts == 1 and d.name != "layers"]
    others = others or [d for d in dimensions if d.parts == 1]
    chosen = cut[-2:]
    while len(chosen) < 2 and others:
        largest = max(others, key=lambda d: d.size)
        others.remove(largest)
        chosen.append(largest)
    chosen.sort()
    if not chosen:
        return None, None
    return (chosen[0], chosen[1]) if len(chosen) == 2 else (None, chosen[0])


def _extent(rows: _Dimension | None, columns: _Dimension | None) -> tuple[int, int]:
    """Returns width and height of the rectangle: its proportions, drawn in, and room for labels."""
    if columns is None:
        return 200, 26
    room = _text_width(_title(columns))
    if rows is None:
        return max(200, room), 26
    ratio = math.sqrt(rows.size / columns.size)
    width, height = (190 / ratio, 190) if ratio >= 1 else (240, 240 * ratio)
    return max(96, room, round(width)), max(70, _text_width(_title(rows)), round(height))


def _text_width(text: str) -> int:
    return round(6.4 * len(text))


def _holders(layout: Layout, found: Description) -> np.ndarray:
    """Returns the places of the mesh by the block that they hold: `[*blocks, copies]`."""
    mesh = found.mesh
    names = list(mesh)
    order = [names.index(axis) for axes in layout.spec for axis in axes]
    rest = [i for i in range(len(names)) if i not in order]
    places = np.arange(len(found.devices)).reshape(tuple(mesh.values()))
    parts = [math.prod(mesh[axis] for axis in axes) for axes in layout.spec]
    return places.transpose(order + rest).reshape(*parts, -1)


def _blocks(
    drawn: tuple[_Dimension | None, _Dimension | None],
    fixed: Mapping[_Dimension, int],
    box: tuple[int, int, int, int],
    holders: np.ndarray,
    devices: Sequence[int],
) -> Iterator[Block]:
    rows, columns = drawn
    left, top, width, height = box
    down, across = _shown(rows), _shown(columns)
    cell_width, cell_height = width / len(across), height / len(down)
    for (i, row), (j, column) in itertools.product(enumerate(down), enumerate(across)):
        place = left + j * cell_width, top + i * cell_height, cell_width, cell_height
        if row is None or column is None:
            yield Block("gap", *place)
            continue
        at = dict(fixed)
        for dimension, block in ((rows, row), (columns, column)):
            if dimension is not None:
                at[dimension] = block
        index = {dimension.index: block for dimension, block in at.items()}
        held = holders[tuple(index.get(k, 0) for k in range(holders.ndim - 1))]
        ranges = ", ".join(dimension.range(block) for dimension, block in at.items())
        title = f"{ranges}\n{_numbers([devices[holder] for holder in held])}"
        if len(held) == len(devices) > 1:
            yield Block("whole", *place, title=title)
        else:
            yield Block("b", *place, hue=hue_of(held[0], len(devices)), title=title)


def _shown(dimension: _Dimension | None) -> list[int | None]:
    """Returns the blocks to draw; None for the gap where some are left out."""
    count = 1 if dimension is None else dimension.parts
    if count <= _MOST_BLOCKS:
        return list(range(count))
    first = _MOST_BLOCKS // 2
    return [*range(first), None, *range(count - (_MOST_BLOCKS - first - 1), count)]


def _left_out(dimension: _Dimension) -> str:
    return f"{_MOST_BLOCKS - 1} of {dimension.parts} blocks along {dimension.name} drawn"


def _labels(
    rows: _Dimension | None, columns: _Dimension | None, box: tuple[int, int, int, int]
) -> Iterator[Label]:
    left, top, _, height = box
    if columns is not None:
        yield Label(left, top + height + 14, _title(columns))
    if rows is not None:
        yield Label(left - 6, top + height, _title(rows), turned=True)


def _title(dimension: _Dimension) -> str:
    cut = f" / {dimension.parts} {' × '.join(dimension.mesh_axes)}" if dimension.parts > 1 else ""
    return f"{dimension.name}{cut}"


def _numbers(devices: Sequence[int]) -> str:
    """Returns `devices 0–3, 8–11`, or the first of many."""
    runs: list[list[int]] = []
    for number in sorted(devices):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    more = f", … ({len(devices)} in all)" if len(texts) > 8 else ""
    return f"device{'s' if len(devices) > 1 else ''} {', '.join(texts[:8])}{more}"
