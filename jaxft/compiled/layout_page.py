"""Writes a page with a picture of every array of a run, cut into blocks as its devices hold it.

One file that needs no network and no script: vector pictures, with the details on hover.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxft.compiled.layout import (
    GIANT_BYTES,
    Communication,
    Description,
    Layout,
    Parameter,
    format_spec,
)
from jaxft.files import write_text
from jaxft.formatting import format_bytes
from jaxft.reporting.report import page, short_name, tile

# Of more blocks along one dimension than this the first and the last are drawn.
_MOST_BLOCKS = 12
_MOST_SHEETS = 4
_MOST_COLUMNS = 64


def write_page(file: str, found: Description) -> Path:
    """Writes the page and returns its path.

    Raises:
      TrainingError: If the file cannot be written.
    """
    mesh = " × ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    subtitle = (
        f"<b>{escape(short_name(found.model))}</b>, {found.count:,} parameters, under "
        f"<b>{escape(found.strategy)}</b> on {len(found.devices)} devices: {escape(mesh)}"
    )
    sections = [_tiles(found), _mesh_picture(found), _cards(found), _table(found)]
    if found.communication is not None:
        sections.append(_exchange(found.communication))
    path = Path(file)
    write_text(path, page("Shardings", subtitle, sections, style=_STYLE))
    return path


def _tiles(found: Description) -> str:
    parts = found.bytes_per_device
    boxes = [
        tile(
            "A device holds", format_bytes(sum(parts.values())), "of state and gradients", lead=True
        )
    ]
    notes = {"parameters": "", "gradients": "when the optimizer reads them", "optimizer": "state"}
    boxes += [
        tile(name.capitalize(), format_bytes(size), notes[name]) for name, size in parts.items()
    ]
    note = f"arrays of {format_bytes(GIANT_BYTES)} or more, whole on every device"
    giants = tile("Replicated giants", str(len(found.giants)), note)
    boxes.append(giants.replace('class="tile', 'class="tile bad') if found.giants else giants)
    return f'<section class="tiles">{"".join(boxes)}</section>'


def _mesh_picture(found: Description) -> str:
    """The devices in the mesh's order, each in the colour that its blocks have below."""
    sizes = {axis: size for axis, size in found.mesh.items() if size > 1}
    names, count = list(sizes), len(found.devices)
    # As many of the last axes go across as make it no higher than wide.
    first = next(
        (i for i in reversed(range(len(names))) if _product(sizes, names[i:]) ** 2 >= count), 0
    )
    width = _product(sizes, names[first:])
    columns = min(width, _MOST_COLUMNS)
    side = max(9, min(34, 900 // columns))
    cells = []
    for place, number in enumerate(found.devices):
        x, y = place % columns * side, place // columns * side
        at = np.unravel_index(place, tuple(sizes.values()) or (1,))
        text = ", ".join(f"{axis} {index}" for axis, index in zip(names, at, strict=False))
        label = f'<text x="{x + side / 2}" y="{y + side / 2 + 4}">{number}</text>'
        cells.append(
            f'<rect class="b" x="{x}" y="{y}" width="{side}" height="{side}" '
            f'style="--h:{_hue(place, count)}"><title>device {number}: {text}</title></rect>'
            + (label if side >= 24 else "")
        )
    across, down = (" × ".join(part) for part in (names[first:], names[:first]))
    caption = f"Across: {across}." + (f" Down: {down}." if down else "") if names else "One device."
    if width > columns:
        caption += f" Continued every {columns} devices."
    height = math.ceil(count / columns) * side
    return (
        '<section><h2>Mesh</h2><p class="dim">A block below has the colour of the first device '
        f"that holds it. {escape(caption)}</p>"
        f'<svg class="mesh" viewBox="0 0 {columns * side} {height}" width="{columns * side}" '
        f'role="img" aria-label="Devices of the mesh">{"".join(cells)}</svg></section>'
    )


def _product(sizes: dict[str, int], names: Sequence[str]) -> int:
    return math.prod(sizes[name] for name in names)


def _hue(place: int | np.integer, count: int) -> int:
    # A whole turn would end in the colour that it began with.
    return round(200 + 300 * int(place) / count) % 360


def _cards(found: Description) -> str:
    """One card for parameters whose arrays have equal shapes and places, the largest first."""
    groups: dict[tuple, list[Parameter]] = {}
    for parameter in found.parameters:
        key = (parameter.axes, tuple(parameter.layouts.items()))
        groups.setdefault(key, []).append(parameter)
    by_size = sorted(groups.values(), key=lambda group: -_held(group[0]))
    cards = "".join(_card(group, found) for group in by_size)
    return f'<section><h2>Arrays</h2><div class="arrays">{cards}</div></section>'


def _held(parameter: Parameter) -> int:
    return sum(layout.bytes_per_device for layout in parameter.layouts.values())


def _card(group: Sequence[Parameter], found: Description) -> str:
    first = group[0]
    paths = "".join(f"<code>{escape(parameter.path)}</code>" for parameter in group)
    dims = " × ".join(
        f"{axis} {size:,}" for axis, size in zip(first.axes, first.value.shape, strict=True)
    )
    places: dict[Layout, list[str]] = {}
    for name, layout in first.layouts.items():
        places.setdefault(layout, []).append(name)
    figures = "".join(
        _figure(" and ".join(names) if len(places) > 1 else "", layout, first.axes, found)
        for layout, names in places.items()
    )
    return (
        f'<article class="array{" bad" if first.is_giant else ""}"><h3>{paths}</h3>'
        f'<p class="dims">{escape(dims)}</p><div class="figures">{figures}</div></article>'
    )


def _figure(name: str, layout: Layout, axes: tuple[str, ...], found: Description) -> str:
    share = layout.bytes_per_device / max(layout.bytes, 1)
    copies = "held once" if layout.copies == 1 else f"{layout.copies:,} copies of each block"
    if layout.copies == len(found.devices) > 1:
        copies = "whole on every device"
    title = f"<figcaption>{escape(name)}</figcaption>" if name else ""
    classes = ' class="giant"' if layout.is_giant else ""
    return (
        f"<figure{classes}>{title}{_picture(layout, axes, found)}"
        f'<div class="meter"><i style="width:{max(100 * share, 0.5):.2f}%"></i></div>'
        f'<p class="held"><b>{format_bytes(layout.bytes_per_device)}</b> of '
        f"{format_bytes(layout.bytes)} on a device, {copies}<br>{layout.dtype} "
        f"{escape(format_spec(layout.spec))}</p></figure>"
    )


class _Dimension(NamedTuple):
    """One dimension of an array: its name, size, and the mesh axes that cut it."""

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


def _picture(layout: Layout, axes: tuple[str, ...], found: Description) -> str:
    """The array as a rectangle of blocks; what is beyond two dimensions as sheets behind or beside.

    Drawn are the last two dimensions that are cut. The others that are cut make several sheets; a
    leading axis of layers that is not is shown as a pile.
    """
    dimensions = _dimensions(layout, axes, found.mesh)
    rows, columns = _drawn(dimensions)
    sheets = [d for d in dimensions if d.parts > 1 and d not in (rows, columns)]
    pile = next((d for d in dimensions if d.name == "layers" and d.parts == 1), None)
    piled = pile is not None and pile not in (rows, columns)
    width, height = _extent(rows, columns)
    if sheets:  # two in a row
        width, height = min(width, 122), min(height, 122)
    combinations = list(itertools.product(*(range(d.parts) for d in sheets)))
    drawn = combinations[:_MOST_SHEETS]
    holders = _holders(layout, found)
    step, line = 28 + width, height + 58
    shapes = []
    for i, sheet in enumerate(drawn):
        left, top = 18 + i % 2 * step, 18 + i // 2 * line
        if piled:
            shapes += [_outline(left + d, top - d, width, height) for d in (10, 5)]
        fixed = {d.index: block for d, block in zip(sheets, sheet, strict=True)}
        box = (left, top, width, height)
        shapes += [*_blocks((rows, columns), fixed, sheets, box, holders, found)]
        shapes += _labels(rows, columns, box)
        if sheets:
            label = ", ".join(d.range(b) for d, b in zip(sheets, sheet, strict=True))
            shapes.append(f'<text x="{left}" y="{top + height + 29}">{escape(label)}</text>')
    total_width = min(len(drawn), 2) * step + 18
    total_height = math.ceil(len(drawn) / 2) * line - (0 if sheets else 16)
    notes = [_left_out(d) for d in (rows, columns) if d is not None and d.parts > _MOST_BLOCKS]
    if len(combinations) > len(drawn):
        notes.append(f"{len(drawn)} of {len(combinations)} sheets drawn")
    if piled and pile is not None:
        notes.append(f"× {pile.size} layers")
    note = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    return (
        f'<svg viewBox="0 0 {total_width} {total_height}" width="{total_width}" role="img" '
        f'aria-label="Blocks of the array">{"".join(shapes)}</svg>{note}'
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
    fixed: dict[int, int],
    sheets: list[_Dimension],
    box: tuple[int, int, int, int],
    holders: np.ndarray,
    found: Description,
) -> Iterator[str]:
    rows, columns = drawn
    left, top, width, height = box
    down, across = _shown(rows), _shown(columns)
    cell_width, cell_height = width / len(across), height / len(down)
    for (i, row), (j, column) in itertools.product(enumerate(down), enumerate(across)):
        x, y = left + j * cell_width, top + i * cell_height
        place = f'x="{x:.1f}" y="{y:.1f}" width="{cell_width:.1f}" height="{cell_height:.1f}"'
        if row is None or column is None:
            yield f'<rect class="gap" {place}/>'
            continue
        at = dict(fixed)
        ranges = [d.range(fixed[d.index]) for d in sheets]
        for dimension, block in ((rows, row), (columns, column)):
            if dimension is not None:
                at[dimension.index] = block
                ranges.append(dimension.range(block))
        held = holders[tuple(at.get(k, 0) for k in range(holders.ndim - 1))]
        whole = len(held) == len(found.devices) > 1
        style = "" if whole else f' style="--h:{_hue(held[0], len(found.devices))}"'
        devices = _numbers([found.devices[holder] for holder in held])
        yield (
            f'<rect class="{"whole" if whole else "b"}" {place}{style}><title>'
            f"{escape(', '.join(ranges))}\n{devices}</title></rect>"
        )


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
) -> Iterator[str]:
    left, top, _, height = box
    if columns is not None:
        yield f'<text x="{left}" y="{top + height + 14}">{escape(_title(columns))}</text>'
    if rows is not None:
        at = f"translate({left - 6} {top + height}) rotate(-90)"
        yield f'<text transform="{at}">{escape(_title(rows))}</text>'


def _title(dimension: _Dimension) -> str:
    cut = f" / {dimension.parts} {' × '.join(dimension.mesh_axes)}" if dimension.parts > 1 else ""
    return f"{dimension.name}{cut}"


def _outline(x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="pile" x="{x}" y="{y}" width="{width}" height="{height}"/>'


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


def _table(found: Description) -> str:
    """Every array in the model's order."""
    largest = max(
        (layout.bytes_per_device for p in found.parameters for layout in p.layouts.values()),
        default=1,
    )
    rows = []
    for parameter in found.parameters:
        for name, layout in parameter.layouts.items():
            title = f"<code>{escape(parameter.path)}</code>" if name == "parameter" else name
            share = 100 * layout.bytes_per_device / max(largest, 1)
            rows.append(
                f"<tr{' class=giant' if layout.is_giant else ''}><th>{title}"
                f"<td>{' × '.join(f'{size:,}' for size in layout.shape)}"
                f"<td>{escape(format_spec(layout.spec))}"
                f"<td>{format_bytes(layout.bytes_per_device)}"
                f'<div class="meter"><i style="width:{share:.2f}%"></i></div>'
                f"<td>{layout.copies:,}</tr>"
            )
    return (
        '<section><h2>Bytes of a device</h2><div class="scroll"><table class="sizes"><thead><tr>'
        "<th>Array<th>Shape<th>Split over<th>A device holds<th>Copies</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _exchange(found: Communication) -> str:
    rows = "".join(
        f"<tr><th>{escape(total.kind)}<td>{escape(', '.join(total.axes))}"
        f"<td>{'' if total.exact else 'at least '}{total.count:,}"
        f"<td>{format_bytes(total.bytes)}<td>{format_bytes(total.wire_bytes)}</tr>"
        for total in found.totals
    )
    return (
        '<section><h2>Exchange in one training step</h2><p class="dim">For each device, in the '
        f"program that the compiler for {escape(found.platform)} made; others may choose other "
        f"collectives. It takes {format_bytes(found.argument_bytes)} of arguments and "
        f"{format_bytes(found.temporary_bytes)} of temporaries.</p>"
        '<div class="scroll"><table class="numbers"><thead><tr><th>Collective<th>Mesh axes'
        "<th>Count<th>Payload<th>Sent in rings</tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


_STYLE = """
:root { --block: .76; --depth: .115; }
@media (prefers-color-scheme: dark) { :root { --block: .6; --depth: .115; } }
.tile.bad strong, .array.bad h3 code, tr.giant td, tr.giant th { color: var(--bad); }
svg.mesh { max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--second); }
svg.mesh text { text-anchor: middle; fill: #000c; pointer-events: none; }
rect.b { fill: oklch(var(--block) var(--depth) var(--h)); stroke: var(--surface); }
rect.b:hover, rect.whole:hover { stroke: var(--ink); stroke-width: 2; }
rect.whole { fill: var(--axis); stroke: var(--surface); }
.giant rect.whole { fill: var(--bad); }
rect.gap { fill: none; }
rect.pile { fill: var(--surface); stroke: var(--axis); }
.arrays { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.array { padding: 1rem 1.15rem; overflow: hidden; }
.array h3 { display: flex; flex-wrap: wrap; gap: .1rem .8rem; color: var(--ink); }
.array h3 code { font-weight: 600; }
.array.bad { box-shadow: 0 0 0 1px var(--bad); }
.dims, .note, .held { margin: .2rem 0; font-size: .82rem; color: var(--muted); }
.held { color: var(--second); margin-top: .5rem; overflow-wrap: anywhere; }
.array figure { margin: .6rem 0 0; min-width: 0; }
.array figcaption { font-size: .82rem; color: var(--second); }
.array svg { max-width: 100%; height: auto; display: block; }
.figures { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; }
.meter { height: 6px; max-width: 260px; margin-top: .4rem; border-radius: 3px; overflow: hidden;
  background: var(--grid); }
.meter i { display: block; height: 100%; background: var(--c0); }
.giant .meter i { background: var(--bad); }
.sizes td:nth-child(4), .sizes td:nth-child(5) { font-variant-numeric: tabular-nums; }
.sizes td:nth-child(4) { min-width: 130px; }
@media (max-width: 720px) { .arrays { grid-template-columns: minmax(0, 1fr); } }
"""
