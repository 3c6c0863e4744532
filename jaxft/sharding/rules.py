"""The way from the names of an array's dimensions to its placement on a mesh."""

import contextlib
import contextvars
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.errors import ConfigError, collected
from jaxft.extensions import load_named
from jaxft.sharding import strategies
from jaxft.sharding.axes import check_axes
from jaxft.sharding.sequence import zigzag_order


@dataclass(frozen=True, slots=True)
class IfDivisible:
    """Mesh axes that a dimension is split over only if they divide its size."""

    mesh_axes: tuple[str, ...]


def if_divisible(*mesh_axes: str) -> IfDivisible:
    """Splits over `mesh_axes` where they divide the dimension; replicates it otherwise."""
    return IfDivisible(mesh_axes)


type Target = str | tuple[str, ...] | IfDivisible


@dataclass(frozen=True, slots=True)
class Strategy:
    """The mesh axes that named dimensions are split over.

    Attributes:
      mesh_axes: Axes of the mesh, slowest-varying first.
      rules: Axis name to mesh axis (or several). Axes that are not listed are replicated.
      fill: The mesh axis that takes the devices left over by explicit sizes.
      overrides: Pairs of a regular expression over parameter paths and the spec that replaces
        what the rules give, for the parameter, its gradient and its moments. Products with it are
        made as the rules say: it is brought there first.
      gradients: Rules that hold for gradients in place of those in `rules`.
      moments: Rules that hold for the optimizer's state in place of those in `rules`.
      across_slices: The mesh axis that spans slices, so that all others stay within the fast
        network of one; by default `data`, without one the first.
    """

    mesh_axes: tuple[str, ...]
    rules: Mapping[str, Target]
    fill: str
    overrides: tuple[tuple[str, P], ...] = ()
    gradients: Mapping[str, Target] = field(default_factory=dict)
    moments: Mapping[str, Target] = field(default_factory=dict)
    across_slices: str = ""

    def __post_init__(self):
        tables = (self.rules, self.gradients, self.moments)
        for table in tables:
            check_axes(tuple(table), "strategy rules")
        named = {a for table in tables for target in table.values() for a in mesh_axes_of(target)}
        if not self.across_slices:
            default = "data" if "data" in self.mesh_axes else self.mesh_axes[0]
            object.__setattr__(self, "across_slices", default)
        named.add(self.across_slices)
        unknown = sorted({self.fill, *named} - set(self.mesh_axes))
        if unknown:
            known = ", ".join(self.mesh_axes)
            raise ConfigError(
                [f"strategy: {axis!r} is not one of its mesh axes, {known}." for axis in unknown]
            )


def as_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_axes_of(target: Target) -> tuple[str, ...]:
    """Returns the mesh axes that a rule names, whether it insists on them or not."""
    return as_names(target.mesh_axes if isinstance(target, IfDivisible) else target)


def known_strategies() -> list[str]:
    """Returns the names of the built-in strategies."""
    return [module.name for module in pkgutil.iter_modules(strategies.__path__)]


def load_strategy(name: str) -> Strategy:
    """Returns a built-in strategy, or the `STRATEGY` of any importable module.

    Modules in the working folder are importable, as for `python -m`.

    Raises:
      ConfigError: If there is no such strategy.
    """
    known = {known: f"{strategies.__name__}.{known}" for known in known_strategies()}
    return load_named(name, known, kind="strategy", attribute="STRATEGY")


@dataclass(frozen=True)
class Placement:
    """A strategy on a mesh: the one object that turns axis names into shardings."""

    name: str
    strategy: Strategy
    mesh: Mesh = field(hash=False)

    def spec(
        self,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        path: str,
        *,
        rules: Mapping[str, Target] | None = None,
    ) -> P:
        """Returns the partition of one array.

        Args:
          axes: Name of each dimension.
          shape: Its size.
          path: For messages.
          rules: In place of the strategy's.

        Raises:
          ConfigError: If a size does not divide, or one mesh axis would split two dimensions.
        """
        entries: list[tuple[str, ...]] = []
        for axis, size in zip(axes, shape, strict=True):
            entries.append(self._mesh_axes(axis, size, path, rules or self.strategy.rules))
        used = [mesh_axis for entry in entries for mesh_axis in entry]
        twice = sorted({mesh_axis for mesh_axis in used if used.count(mesh_axis) > 1})
        if twice:
            raise ConfigError(
                f"strategy {self.name!r} splits two dimensions of {path} {axes} over mesh axis "
                f"{twice[0]!r}; a mesh axis serves one dimension of an array. Change one rule."
            )
        return P(*(entry if len(entry) > 1 else entry[0] if entry else None for entry in entries))

    def _override(self, path: str) -> P | None:
        for pattern, spec in self.strategy.overrides:
            if re.search(pattern, path):
                return spec
        return None

    def _mesh_axes(
        self, axis: str, size: int, path: str, rules: Mapping[str, Target]
    ) -> tuple[str, ...]:
        target = rules.get(axis, ())
        names = tuple(name for name in mesh_axes_of(target) if self.mesh.shape[name] > 1)
        count = math.prod(self.mesh.shape[name] for name in names)
        if size % count == 0:
            return names
        if isinstance(target, IfDivisible):
            return ()
        together = " x ".join(f"{name!r}" for name in names)
        raise ConfigError(
            f"strategy {self.name!r} cannot shard {path}: axis {axis!r} has size {size}, mesh axis "
            f"{together} has size {count}. Use a mesh size that divides {size}, or map {axis!r} to "
            f"if_divisible({', '.join(map(repr, names))})."
        )

    def sharding(self, axes: tuple[str, ...], shape: tuple[int, ...], path: str) -> NamedSharding:
        """Returns `spec`, bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, path))

    def shardings(
        self,
        abstract: Mapping[str, jax.ShapeDtypeStruct],
        axes: Mapping[str, tuple[str, ...]],
        *,
        rules: Mapping[str, Target] | None = None,
    ) -> dict[str, NamedSharding]:
        """Returns the sharding of every parameter; problems are collected and raised once.

        Args:
          abstract: `{path: shape}`.
          axes: `{path: name of each dimension}`.
          rules: In place of the strategy's: `gradient_rules` or `moment_rules`.
        """
        found: dict[str, NamedSharding] = {}
        problems: list[str] = []
        for path, array in abstract.items():
            with collected(problems):
                spec = self._override(path)
                if spec is None:
                    spec = self.spec(axes[path], array.shape, path, rules=rules)
                found[path] = NamedSharding(self.mesh, spec)
        if problems:
            raise ConfigError(problems)
        return found

    @property
    def gradient_rules(self) -> Mapping[str, Target]:
        """Mesh axes for the dimensions of gradients."""
        return {**self.strategy.rules, **self.strategy.gradients}

    @property
    def moment_rules(self) -> Mapping[str, Target]:
        """Mesh axes for the dimensions of the optimizer's state."""
        return {**self.strategy.rules, **self.strategy.moments}

    def split(self, axis: str) -> tuple[str, ...]:
        """Returns the mesh axes of more than one device that a named dimension is split over.

        Raises:
          ConfigError: If that depends on the dimension's size, which is not known here.
        """
        return tuple(name for name in self._always(axis) if self.mesh.shape[name] > 1)

    def _always(self, axis: str) -> tuple[str, ...]:
        """Returns the mesh axes that a named dimension is split over whatever its size."""
        target = self.strategy.rules.get(axis, ())
        if isinstance(target, IfDivisible):
            raise ConfigError(
                f"strategy {self.name!r} maps {axis!r} to if_divisible; name the mesh axes instead."
            )
        return mesh_axes_of(target)

    def parts(self, axis: str) -> int:
        """Returns how many parts a named dimension is split into."""
        return math.prod(self.mesh.shape[name] for name in self.split(axis))

    def slots(self, length: int) -> np.ndarray:
        """Returns where in its row each position lies that the devices hold, int32 `[T]`.

        Where rows are split, a device holds one chunk of their start and the mirrored one of their
        end, so that every device has as many pairs of query and key to score.

        Raises:
          ConfigError: If the row cannot be split evenly.
        """
        parts = self.parts("seq")
        if parts > 1 and length % (2 * parts):
            raise ConfigError(
                f"strategy {self.name!r} splits rows over {parts} devices, two chunks for each; "
                f"data.max_length {length} is not a multiple of {2 * parts}."
            )
        return zigzag_order(length, parts)

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the rows of a batch; never optional, so that no row is lost."""
        return self._always("batch")

    @property
    def batch_shards(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def row_multiple(self) -> int:
        """Divisor of the rows of an evaluation step, so that every device has some."""
        return self.batch_shards * self.parts("layers")

    def whole_rows(self, rows: int) -> int:
        """Returns the rows of an evaluation step, rounded up to what the mesh splits evenly."""
        return -(-rows // self.row_multiple) * self.row_multiple

    @property
    def rows(self) -> NamedSharding:
        """Sharding of `[B, T]` rows."""
        return NamedSharding(self.mesh, P(self.batch_axes))

    @property
    def micro_batches(self) -> NamedSharding:
        """Sharding of `[A, B, T]`: the micro-batches of a step are not split over devices."""
        return NamedSharding(self.mesh, P(None, self.batch_axes))

    def held_rows(self, rows: int) -> list[int]:
        """Places of a micro-batch of `rows` rows that devices of this process hold, in order.

        Processes hold the same rows where they split other dimensions of them.
        """
        sharding = NamedSharding(self.mesh, P(self.batch_axes))
        parts = sharding.addressable_devices_indices_map((rows,)).values()
        return sorted({place for part in parts if part for place in range(rows)[part[0]]})

    def shard_map(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """Returns a function of whole arrays that runs on each device's part of them.

        Args:
          function: Of one device's parts; it may use collectives over the mesh's axes.
          inputs: The `PartitionSpec` of each argument; one for all, or a tree of them.
          outputs: The same of what it returns.
        """
        # Gradients are summed by hand here, so that JAX need not follow what varies over the mesh.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes `constrain` follow this placement while a function is traced."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE = contextvars.ContextVar[Placement | None]("placement", default=None)


def active_placement() -> Placement | None:
    """The placement that a surrounding `Placement.activate` set, if any."""
    return _ACTIVE.get()


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Asks for the placement of an activation whose dimensions are named; identity when bare."""
    placement = _ACTIVE.get()
    if placement is None:
        return x
    check_axes(axes, "constrain")
    return jax.lax.with_sharding_constraint(x, placement.sharding(axes, x.shape, "an activation"))


def place(arrays: Any, shardings: Any) -> Any:
    """Asks for the placement of arrays whose shardings are known, tree by tree."""
    return jax.lax.with_sharding_constraint(arrays, shardings)
