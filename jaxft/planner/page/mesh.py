"""The part of a page that draws the mesh, coloured by what fast links join."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from jaxft.errors import ConfigError
from jaxft.hardware.chips import Switch
from jaxft.planner.page.parts import section
from jaxft.planner.plan import Plan
from jaxft.sharding.rules import load_strategy

_MOST_DEVICES = 1024
_MOST_COLUMNS = 64


class _Domains(NamedTuple):
    """What fast links join: slices of TPUs, NVLink domains of GPUs.

    Attributes:
      name: Of one.
      between: Of what joins them.
      within: Of the links in one.
      parts: For each mesh axis, how many of them it spans.
    """

    name: str
    between: str
    within: str
    parts: dict[str, int]

    def of(self, at: Sequence[int], mesh: dict[str, int]) -> int:
        """Returns the number of the domain of the device at a place of the mesh."""
        number = 0
        for index, (axis, size) in zip(at, mesh.items(), strict=True):
            parts = self.parts[axis]
            number = number * parts + index * parts // size
        return number


def _domains(plan: Plan) -> _Domains | None:
    """Returns None if it is not known which axis joins slices."""
    topology, mesh = plan.topology, plan.mesh
    parts = dict.fromkeys(mesh, 1)
    network = topology.chip.network
    if isinstance(network, Switch):
        stride = math.prod(mesh.values())
        for axis, size in mesh.items():
            stride //= size
            parts[axis] = min(size, -(-size * stride // network.size))
        return _Domains("NVLink domain", "network between domains", "NVLink", parts)
    links = "links of the slice (ici)" if network else "links of this machine"
    found = _Domains("slice", "data centre network (dcn)", links, parts)
    if topology.slices == 1:
        return found
    try:
        across = load_strategy(plan.strategy).across_slices
    except ConfigError:
        return None
    if mesh.get(across, 1) % topology.slices:
        return None
    parts[across] = topology.slices
    return found


def mesh_section(plan: Plan) -> str:
    """Returns the devices in the order of the mesh and what joins them; empty for a single one."""
    count = math.prod(plan.mesh.values())
    if count == 1:
        return ""
    domains = _domains(plan)
    axes = "".join(
        f'<p class="held"><b>{escape(axis)} {size:,}</b>: '
        f"{escape(_axis_words(axis, size, domains))}</p>"
        for axis, size in plan.mesh.items()
        if size > 1
    )
    picture, caption = _mesh_picture(plan.mesh, domains)
    return section("Mesh", escape(caption), f'<div class="card">{picture}{axes}</div>')


def _axis_words(axis: str, size: int, domains: _Domains | None) -> str:
    if domains is None:
        return "how it lies on slices is not known"
    parts = domains.parts[axis]
    if parts == 1:
        return domains.within
    if parts == size:
        return domains.between
    return f"{domains.between}, {parts} parts; {size // parts} devices of each by {domains.within}"


def _mesh_picture(mesh: dict[str, int], domains: _Domains | None) -> tuple[str, str]:
    """Returns the devices in the mesh's order, and what the picture shows in words."""
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    names, count = list(sizes), math.prod(sizes.values())
    first = _first_across(list(sizes.values()))
    width = math.prod(list(sizes.values())[first:])
    columns, drawn = min(width, _MOST_COLUMNS), min(count, _MOST_DEVICES)
    side = max(9, min(34, 1000 // columns))
    several = domains is not None and math.prod(domains.parts.values()) > 1
    cells = []
    for place in range(drawn):
        at = _unravel(place, list(sizes.values()))
        text = ", ".join(f"{axis} {index}" for axis, index in zip(names, at, strict=True))
        hue, of = at[0] if len(at) > 1 else place, next(iter(sizes.values()))
        if domains is not None and several:
            hue, of = domains.of(at, sizes), math.prod(domains.parts.values())
            text += f" · {domains.name} {hue}"
        x, y = place % columns * side, place // columns * side
        cells.append(
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" style="--h:{_hue(hue, of)}">'
            f"<title>{text}</title></rect>"
        )
    height = math.ceil(drawn / columns) * side
    picture = (
        f'<svg class="mesh" viewBox="0 0 {columns * side} {height}" width="{columns * side}" '
        f'role="img" aria-label="Devices of the mesh">{"".join(cells)}</svg>'
    )
    caption = f"Across: {' × '.join(names[first:])}."
    if names[:first]:
        caption += f" Down: {' × '.join(names[:first])}."
    if width > columns:
        caption += f" Continued every {columns} devices."
    if several and domains is not None:
        caption += f" Each colour is one {domains.name}."
    elif len(names) > 1:
        caption += f" Each colour is one index of {names[0]}."
    if drawn < count:
        caption += f" The first {drawn:,} of {count:,} devices are drawn."
    return picture, caption


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


def _hue(place: int, count: int) -> int:
    # A whole turn would end in the colour that it began with.
    return round(200 + 300 * place / count) % 360
