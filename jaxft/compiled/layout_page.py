"""Writes a page with a picture of every array of a run, cut into blocks as its devices hold it.

One file that needs no network and no script: vector pictures, with the details on hover.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxft.compiled.array_picture import Picture, draw_array
from jaxft.compiled.layout import GIANT_BYTES, Description, Layout, Parameter, format_spec
from jaxft.compiled.mesh_picture import draw_mesh, hue_of
from jaxft.files import write_text
from jaxft.formatting import format_bytes
from jaxft.reporting.pages import Tile, render, short_name


def write_page(file: str, found: Description) -> Path:
    """Writes the page and returns its path.

    Raises:
      TrainingError: If the file cannot be written.
    """
    largest = max(
        (layout.bytes_per_device for p in found.parameters for layout in p.layouts.values()),
        default=1,
    )
    page = render(
        "shardings.html",
        title="Shardings",
        found=found,
        model=short_name(found.model),
        axes=" × ".join(f"{axis} {size}" for axis, size in found.mesh.items()),
        tiles_shown=list(_tiles(found)),
        mesh_shown=draw_mesh(found.mesh, cell=lambda *at: _cell(found, *at)),
        cards=_cards(found),
        largest=max(largest, 1),
        bytes=format_bytes,
        spec=format_spec,
        shape=lambda shape: " × ".join(f"{size:,}" for size in shape),
    )
    path = Path(file)
    write_text(path, page)
    return path


def _tiles(found: Description) -> Iterator[Tile]:
    parts = found.bytes_per_device
    total = format_bytes(sum(parts.values()))
    yield Tile("A device holds", total, "of state and gradients", lead=True)
    notes = {"parameters": "", "gradients": "when the optimizer reads them", "optimizer": "state"}
    for name, size in parts.items():
        yield Tile(name.capitalize(), format_bytes(size), notes[name])
    note = f"arrays of {format_bytes(GIANT_BYTES)} or more, whole on every device"
    giants = len(found.giants)
    yield Tile("Replicated giants", str(giants), note, bad=giants > 0)


def _cell(found: Description, place: int, _: Sequence[int], words: str) -> tuple[int, str, str]:
    """Returns hue, title and label of a device; its blocks have the same hue."""
    number = found.devices[place]
    return hue_of(place, len(found.devices)), f"device {number}: {words}", str(number)


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of a card.

    Attributes:
      name: The part of the parameter that it is; empty if all of them lie alike.
      layout: The place of the array.
      picture: The blocks.
      percent: The part of it that a device holds.
      copies: The number of copies of each block, in words.
    """

    name: str
    layout: Layout
    picture: Picture
    percent: float
    copies: str


@dataclass(frozen=True, slots=True)
class _Card:
    """Parameters whose arrays have equal shapes and places.

    Attributes:
      paths: The dotted names.
      shape: The axes and sizes.
      arrays: One of each place: the parameter, and what lies elsewhere than it.
      bad: Whether one is large and whole on every device.
    """

    paths: list[str]
    shape: str
    arrays: list[_Array]
    bad: bool


def _cards(found: Description) -> list[_Card]:
    """Returns the cards, the largest parameters first."""
    groups: dict[tuple, list[Parameter]] = {}
    for parameter in found.parameters:
        key = (parameter.axes, tuple(parameter.layouts.items()))
        groups.setdefault(key, []).append(parameter)
    by_size = sorted(groups.values(), key=lambda group: -_held(group[0]))
    return [_card(group, found) for group in by_size]


def _held(parameter: Parameter) -> int:
    return sum(layout.bytes_per_device for layout in parameter.layouts.values())


def _card(group: Sequence[Parameter], found: Description) -> _Card:
    first = group[0]
    places: dict[Layout, list[str]] = {}
    for name, layout in first.layouts.items():
        places.setdefault(layout, []).append(name)
    dims = zip(first.axes, first.value.shape, strict=True)
    return _Card(
        paths=[parameter.path for parameter in group],
        shape=" × ".join(f"{axis} {size:,}" for axis, size in dims),
        arrays=[
            _Array(
                name=" and ".join(names) if len(places) > 1 else "",
                layout=layout,
                picture=draw_array(layout, first.axes, found),
                percent=max(100 * layout.bytes_per_device / max(layout.bytes, 1), 0.5),
                copies=_copies(layout, len(found.devices)),
            )
            for layout, names in places.items()
        ],
        bad=first.is_giant,
    )


def _copies(layout: Layout, devices: int) -> str:
    if layout.copies == devices > 1:
        return "whole on every device"
    return "held once" if layout.copies == 1 else f"{layout.copies:,} copies of each block"
