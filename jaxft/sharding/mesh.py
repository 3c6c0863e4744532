"""From a list of devices and the sizes asked for to a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxft.errors import ConfigError
from jaxft.sharding.rules import Strategy


def make_mesh(
    sizes: Mapping[str, int],
    strategy: Strategy,
    *,
    name: str,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Lays devices out along the strategy's axes, neighbours in the network side by side.

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
    shape = _resolve(sizes, strategy, name=name, count=len(devices))
    used = devices[: math.prod(shape.values())]
    grid = mesh_utils.create_device_mesh(
        tuple(shape.values()), devices=used, allow_split_physical_axes=True
    )
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _resolve(
    sizes: Mapping[str, int], strategy: Strategy, *, name: str, count: int
) -> dict[str, int]:
    foreign = [a for a, size in sizes.items() if size not in (0, 1) and a not in strategy.mesh_axes]
    if foreign:
        raise ConfigError(
            [
                f"mesh.{axis} is {sizes[axis]}, but strategy {name!r} has no axis {axis!r}; its "
                f"axes are {', '.join(strategy.mesh_axes)}."
                for axis in foreign
            ]
        )
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
