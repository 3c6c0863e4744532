"""Places the devices of a mesh in a picture: the last axes go across, the others down."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_MOST_COLUMNS = 64
_WIDTH = 960  # pixels
# Of a label a smaller cell would show a part.
_LEAST_LABELLED = 24


@dataclass(frozen=True, slots=True)
class Cell:
    """A device.

    Attributes:
      x: Pixels from the left edge.
      y: Pixels from the top edge.
      hue: Angle of the colour.
      title: The words on hover.
      label: The text in it; may be empty.
    """

    x: int
    y: int
    hue: int
    title: str
    label: str


@dataclass(frozen=True, slots=True)
class MeshPicture:
    """Devices in the order of their mesh.

    Attributes:
      width: Pixels across.
      height: Pixels down.
      side: Pixels of one device.
      cells: The devices.
      caption: Sentences that say which axes go across and which down.
    """

    width: int
    height: int
    side: int
    cells: tuple[Cell, ...]
    caption: str


def draw_mesh(
    mesh: Mapping[str, int],
    *,
    cell: Callable[[int, Sequence[int], str], tuple[int, str, str]],
    most: int = 0,
) -> MeshPicture:
    """Gives devices their places.

    Args:
      mesh: Devices along each axis; axes of one device are left out.
      cell: Maps number, indices along the axes, and these in words to hue, title and label.
      most: Devices to draw at most; 0 for all.
    """
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    names, count = list(sizes), math.prod(sizes.values())
    first = _first_across(list(sizes.values()))
    width = math.prod(list(sizes.values())[first:])
    columns, drawn = min(width, _MOST_COLUMNS), min(count, most or count)
    side = max(9, min(34, _WIDTH // columns))
    cells = []
    for place in range(drawn):
        at = _unravel(place, list(sizes.values()))
        words = ", ".join(f"{axis} {index}" for axis, index in zip(names, at, strict=True))
        hue, title, label = cell(place, at, words)
        x, y = place % columns * side, place // columns * side
        cells.append(Cell(x, y, hue, title, label if side >= _LEAST_LABELLED else ""))
    caption = f"Across: {' × '.join(names[first:])}." if names else "One device."
    if names[:first]:
        caption += f" Down: {' × '.join(names[:first])}."
    if width > columns:
        caption += f" Continued every {columns} devices."
    if drawn < count:
        caption += f" The first {drawn:,} of {count:,} devices are drawn."
    height = math.ceil(drawn / columns) * side
    return MeshPicture(columns * side, height, side, tuple(cells), caption)


def hue_of(number: int, count: int) -> int:
    """Returns the colour of one of several as an angle."""
    # A whole turn would end in the colour that it began with.
    return round(200 + 300 * int(number) / count) % 360


def _first_across(sizes: Sequence[int]) -> int:
    """Returns from which axis on they go across: as many as make it no higher than wide."""
    count = math.prod(sizes)
    return next((i for i in reversed(range(len(sizes))) if math.prod(sizes[i:]) ** 2 >= count), 0)


def _unravel(place: int, sizes: Sequence[int]) -> list[int]:
    at = []
    for size in reversed(sizes):
        place, index = divmod(place, size)
        at.append(index)
    return at[::-1]
