"""The way from a list of devices and the sizes asked for to a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxft.errors import ConfigError
from jaxft.sharding.rules import Strategy, known_strategies, load_strategy


def make_mesh(
    sizes: Mapping[str, int],
    strategy: Strategy,
    *,
    name: str,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Lays devices out along the strategy's axes, neighbours in the network side by side.

    Devices of several TPU slices, which a slower network joins, form a hybrid mesh: the strategy's
    axis `across_slices` goes from slice to slice first, and every other axis stays within one.

    Args:
      sizes: Axis to device count; 0 leaves the axis to the strategy, -1 takes what remains. Sizes
        that are all given may use fewer devices than one process has.
      strategy: Names the axes and the one that takes what remains if none is -1.
      name: The strategy's name, for messages.
      devices: All of the process group's devices by default.

    Raises:
      ConfigError: If an axis is not the strategy's, or the sizes do not multiply to the devices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = strategy.across_slices
    if slices > 1 and across != strategy.fill and not sizes.get(across, 0):
        sizes = {**sizes, across: slices}
    shape = _resolve(sizes, strategy, name=name, count=len(devices))
    if slices > 1 and shape.get(across, 0) % slices:
        raise ConfigError(
            f"mesh.{across} is {shape[across]}, and there are {slices} slices, which strategy "
            f"{name!r} joins along {across!r}. Use a multiple of {slices}."
        )
    grid = _grid(shape, devices, across=across, slices=slices)
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _grid(
    shape: Mapping[str, int], devices: Sequence[Any], *, across: str, slices: int
) -> np.ndarray:
    """Returns the devices in the mesh's shape, as their network suggests."""
    if slices == 1:
        used = devices[: math.prod(shape.values())]
        return mesh_utils.create_device_mesh(
            tuple(shape.values()), devices=used, allow_split_physical_axes=True
        )
    between = {axis: slices if axis == across else 1 for axis in shape}
    within = [size // between[axis] for axis, size in shape.items()]
    return mesh_utils.create_hybrid_device_mesh(
        within, tuple(between.values()), devices=devices, allow_split_physical_axes=True
    )


def check_sizes(sizes: Mapping[str, int], strategy: Strategy, *, name: str) -> None:
    """Refuses sizes of axes that the strategy does not have.

    Args:
      sizes: Axis to device count, as `make_mesh` takes them.
      strategy: Names its axes.
      name: The strategy's name, for messages.

    Raises:
      ConfigError: With a line for each such axis.
    """
    foreign = [a for a, size in sizes.items() if size not in (0, 1) and a not in strategy.mesh_axes]
    if foreign:
        raise ConfigError(
            [
                f"mesh.{axis} is {sizes[axis]}, but strategy {name!r} has no axis {axis!r}; its "
                f"axes are {', '.join(strategy.mesh_axes)}. Set --config.mesh.{axis}=0, or take a "
                f"strategy with that axis: {', '.join(_with_axis(axis))}."
                for axis in foreign
            ]
        )


def _with_axis(axis: str) -> list[str]:
    return [name for name in known_strategies() if axis in load_strategy(name).mesh_axes]


def _resolve(
    sizes: Mapping[str, int], strategy: Strategy, *, name: str, count: int
) -> dict[str, int]:
    check_sizes(sizes, strategy, name=name)
    shape = {axis: sizes.get(axis, 0) for axis in strategy.mesh_axes}
    if -1 not in shape.values() and 0 in shape.values():
        # The strategy's own axis takes what remains, or the first one that was left to it.
        left = [axis for axis, size in shape.items() if size == 0]
        shape[strategy.fill if strategy.fill in left else left[0]] = -1
    shape = {axis: size or 1 for axis, size in shape.items()}
    known = math.prod(size for size in shape.values() if size > 0)
    if -1 in shape.values() and count % known == 0:
        return {axis: count // known if size == -1 else size for axis, size in shape.items()}
    # Fewer devices than there are, if every size was given: for comparing meshes on one machine.
    fits = known == count or (known < count and jax.process_count() == 1)
    if -1 not in shape.values() and fits:
        return shape
    asked = " x ".join(f"{axis}={size}" for axis, size in shape.items())
    divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
    raise ConfigError(
        f"A mesh of {asked} does not fit {count} devices: the sizes must multiply to {count}, or "
        f"with -1 for one axis to a divisor of it ({divisors})."
    )


def rings(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Returns the sizes of an axis' parts that each lie along one dimension of a TPU's network.

    The last part is that of neighbours: of 8 x 8 chips on one axis the result is (8, 8). On other
    devices, and where chips are not laid out so, an axis is one part: 16 chips of 4 x 4 are a ring.
    """
    index = [0] * len(mesh.axis_names)
    index[mesh.axis_names.index(axis)] = slice(None)  # pyright: ignore
    coordinates = [_coordinates(device) for device in mesh.devices[tuple(index)]]
    return _lines(coordinates) or (len(coordinates),)


def _coordinates(device: Any) -> tuple[int, ...]:
    return (getattr(device, "slice_index", 0), *getattr(device, "coords", ()))


def _lines(coordinates: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Cuts a sequence into equal lines, and what lies across them likewise; None if it is no grid.

    Along a line one coordinate changes.
    """
    count = len(coordinates)
    length = next(n for n in range(count, 0, -1) if _is_line(coordinates[:n]))
    if length == count:
        return (count,)
    if length == 1 or count % length:
        return None
    if not all(_is_line(coordinates[i : i + length]) for i in range(0, count, length)):
        return None
    across = {_lines(coordinates[i::length]) for i in range(length)}
    sizes = across.pop()
    return None if across or sizes is None else (*sizes, length)


def _is_line(coordinates: Sequence[tuple[int, ...]]) -> bool:
    return sum(len(set(values)) > 1 for values in zip(*coordinates, strict=True)) <= 1
