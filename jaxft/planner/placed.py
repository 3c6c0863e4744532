"""A model under a strategy on a mesh: what estimates need whatever a run keeps or repeats."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxft.compiled.layout import cpu_devices
from jaxft.config import OptimConfig, RunConfig
from jaxft.hardware.devices import array_bytes
from jaxft.models.adapters import NOTHING, Adaptation, is_beside
from jaxft.models.attention import Choice, choose_backend
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, after_layers, reaches_layers
from jaxft.models.module import AbstractModel
from jaxft.models.quantised import is_leaf
from jaxft.planner.topology import Topology
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.sharding.rules import Placement, as_names
from jaxft.training.checks import check_strategy
from jaxft.training.optim import make_optimizer
from jaxft.training.optimizers.muon import TURNS, is_muons, layers_over, matrix_shape
from jaxft.training.optimizers.placing import sharding_of
from jaxft.training.program import make_placement
from jaxft.training.state import partition


class Weight(NamedTuple):
    """A matrix that tokens are multiplied with.

    Attributes:
      shape: Shape of the whole; of one layer where there are several.
      plan: The way devices hold, gather and reduce it.
      trained: Whether it has a gradient.
      routed: Whether it is of all experts, of which a token meets a few.
      beside: Whether it is of an adapter.
      stored: Bytes of the codes and scales that travel in its place; None if it travels itself.
      dense: Whether every token is multiplied with it, in the type that `model.matmul` says.
      axes: Names of its dimensions.
      share: Share of the layers that have it; 1 of a weight outside layers.
    """

    shape: tuple[int, ...]
    plan: WeightPlan
    trained: bool
    routed: bool = False
    beside: bool = False
    stored: int | None = None
    dense: bool = False
    axes: tuple[str, ...] = ()
    share: float = 1.0


class Placed:
    """A model under a strategy on a mesh.

    Args:
      placement: The strategy on a mesh.
      abstract: The model.
      length: Positions of a row.
      freeze: As `optim.freeze`: what it matches has no gradient and no moments.
      adaptation: What is learnt beside the model; without it all of the model is.
      flash: Whether attention's scores are made a block at a time, and not of whole rows.
    """

    def __init__(
        self,
        placement: Placement,
        abstract: AbstractModel,
        length: int,
        freeze: str = "",
        adaptation: Adaptation = NOTHING,
        *,
        flash: bool = True,
    ):
        self.placement, self.abstract, self.length = placement, abstract, length
        self.trainable = partition(abstract.params, freeze, adaptation).trainable
        self.flash = flash

    @functools.cached_property
    def parameters(self) -> int:
        """Bytes of parameters on a device."""
        return self._held(self.abstract.params)

    @functools.cached_property
    def gradients(self) -> int:
        """Bytes of gradients on a device, in the parameters' type."""
        return self._held(self.trainable, self.placement.gradient_rules)

    def optimizer(self, config: OptimConfig) -> int:
        """Returns bytes of the optimizer's state on a device."""
        optimizer = make_optimizer(config, optax.constant_schedule(0.0), self.abstract)
        shardings = self.placement.shardings(
            self.trainable, self.abstract.axes, rules=self.placement.moment_rules
        )
        total = 0
        state = jax.eval_shape(optimizer.init, self.trainable)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            placed = sharding_of(path, leaf, self.trainable, shardings, self.placement)
            total += math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return total

    def orthogonalised(self) -> float:
        """Returns the FLOPs with which Muon makes its matrices orthogonal on a device."""
        total = 0.0
        for path, spec in self.trainable.items():
            axes = self.abstract.axes[path]
            if is_muons(axes):
                *stacked, outputs, inputs = matrix_shape(axes, spec.shape)
                short, long = sorted((outputs, inputs))
                over = layers_over(self.placement, stacked[0])
                parts = math.prod(self.placement.mesh.shape[name] for name in over)
                total += math.prod(stacked) / parts * TURNS * short**2 * (4 * long + 2 * short)
        return total

    @functools.cached_property
    def reference(self) -> int:
        """Bytes of the model's own weights that train, as they were, on a device."""
        return self._held({p: spec for p, spec in self.trainable.items() if not is_beside(p)})

    def _held(
        self, params: Mapping[str, jax.ShapeDtypeStruct], rules: Mapping[str, Any] | None = None
    ) -> int:
        shardings = self.placement.shardings(params, self.abstract.axes, rules=rules)
        return sum(
            array_bytes(shardings[path].shard_shape(spec.shape), spec.dtype)
            for path, spec in params.items()
        )

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """Each weight of a layer, and each matrix of its adapter, of all blocks that there are."""
        layers = sum(map(len, self.abstract.stacks.values()))
        return [
            Weight(
                shape,
                self._plan(axes[1:], shape),
                path in self.trainable,
                "experts" in axes,
                is_beside(path),
                self._stored(path),
                not (is_beside(path) or {"experts", "router"}.intersection(axes)),
                axes[1:],
                self.abstract.params[path].shape[0] / layers,
            )
            for path, axes in self._axes.items()
            if axes[0] == "layers" and len(axes) >= 3 and "taps" not in axes
            for shape in [tuple(self.abstract.params[path].shape)[1:]]
        ]

    @property
    def _axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the dimensions of each parameter, one for codes and scales together."""
        axes = self.abstract.axes
        return {path: names for path, names in axes.items() if not path.endswith(".scales")}

    def _stored(self, path: str) -> int | None:
        """Returns the bytes of one layer's codes and scales, of a weight that has them."""
        if not is_leaf(path):
            return None
        leaves = path, f"{path.rpartition('.')[0]}.scales"
        specs = [self.abstract.params[leaf] for leaf in leaves]
        return sum(array_bytes(spec.shape[1:], spec.dtype) for spec in specs)

    @functools.cached_property
    def head(self) -> Weight:
        """The head, which may be the embedding's table too."""
        path = "head.w" if "head.w" in self.abstract.params else "embed.w"
        shape = tuple(self.abstract.params[path].shape)
        trained = self._has_gradient(path)
        return Weight(shape, self._plan(("vocab", "embed"), shape), trained)

    @functools.cached_property
    def projection(self) -> Weight | None:
        """The weight that inputs of all layers are made with, in models that have it."""
        path = "per_layer.projection.w"
        if path not in self.abstract.params:
            return None
        shape = tuple(self.abstract.params[path].shape)
        return Weight(shape, self._plan(self.abstract.axes[path], shape), path in self.trainable)

    @property
    def reaches_own_inputs(self) -> bool:
        """Whether gradients reach what inputs of all layers are made of."""
        return bool(self.trained_tables) or (
            self.projection is not None and self.projection.trained
        )

    @functools.cached_property
    def trained_tables(self) -> list[Weight]:
        """The tables in which tokens are looked up that have a gradient."""
        paths = [p for p in ("embed.w", "per_layer.table.w") if p in self.abstract.params]
        shapes = {path: tuple(self.abstract.params[path].shape) for path in paths}
        return [
            Weight(shape, self._plan(("vocab", "embed"), shape), trained=True)
            for path, shape in shapes.items()
            if self._has_gradient(path)
        ]

    def _has_gradient(self, table: str) -> bool:
        """Whether a table has one: what is learnt beside it is made part of it first."""
        site = table.rpartition(".")[0]
        return any(path.rpartition(".")[0] == site for path in self.trainable)

    @property
    def reaches_layers(self) -> bool:
        """Whether gradients go back into the layers: to their weights, or to what is before."""
        return reaches_layers(self.trainable)

    @property
    def passes_head(self) -> bool:
        """Whether gradients go back through the head."""
        return self.reaches_layers or after_layers(self.trainable)

    @functools.cached_property
    def reads_mlp_out(self) -> bool:
        """Whether the backward pass reads what the feed-forward part returns.

        A norm after it does, and the weights by which outputs of experts are mixed.
        """
        return any(
            path.endswith(".mlp_post_norm.scale") or "experts" in axes
            for path, axes in self.abstract.axes.items()
        )

    @functools.cached_property
    def reads_all_mlp_out(self) -> bool:
        """Whether it reads all of that: a norm does, and the gate of a shared expert."""
        ends = (".mlp_post_norm.scale", ".shared_gate.w")
        return any(path.endswith(ends) for path in self.abstract.axes)

    @functools.cached_property
    def updated(self) -> dict[str, tuple[str, ...]]:
        """Mesh axes over which updated parameters are gathered, as moments are cut further."""
        values, moments = (
            self.placement.shardings(self.trainable, self.abstract.axes, rules=rules)
            for rules in (None, self.placement.moment_rules)
        )
        return {
            path: tuple(name for name in _names(moments[path]) if name not in _names(values[path]))
            for path in self.trainable
        }

    def bytes_of(self, path: str) -> int:
        """Returns the bytes of a parameter as a device holds it."""
        return self._held({path: self.abstract.params[path]})

    def _plan(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> WeightPlan:
        # How many rows there are does not matter, only how they are split.
        with self.placement.activate():
            return plan_weight(axes, shape, (self.placement.batch_shards, self.length))


def _names(sharding: Any) -> tuple[str, ...]:
    return tuple(name for entry in sharding.spec for name in as_names(entry))


def estimated_devices(topology: Topology) -> Sequence[Any]:
    """Returns devices for a mesh: of the slice, or made-up ones for GPUs that are not there."""
    return topology.devices() if topology.can_compile else cpu_devices(topology.device_count)


def attention_on(
    config: RunConfig, architecture: Architecture, topology: Topology, placement: Placement
) -> Choice:
    """Returns the back end of attention that a run on devices which are not here would use.

    Raises:
      ConfigError: If the one that is asked for is not available there.
    """
    platform = "tpu" if topology.chip.is_tpu else "gpu"
    capability = topology.chip.capability
    if topology.local:
        device = topology.devices()[0]
        platform = device.platform
        capability = str(getattr(device, "compute_capability", ""))
    return choose_backend(
        config.model.attention,
        architecture.config,
        platform=platform,
        length=config.data.max_length,
        compute_dtype=make_numerics(config.model.dtypes).compute_dtype,
        max_segments=1,
        compute_capability=capability,
        parts=placement.parts("seq"),
    )


def place(
    config: RunConfig,
    architecture: Architecture,
    placement: Placement,
    abstract: AbstractModel,
    attention: Choice,
) -> Placed:
    """Returns what estimates of a run need of the model on a mesh, with a back end of attention."""
    return Placed(
        placement,
        abstract,
        config.data.max_length,
        config.optim.freeze,
        architecture.adaptation,
        # Rows that are split go round in a ring, a block at a time.
        flash=attention.backend != "xla",
    )


def place_run(
    config: RunConfig,
    architecture: Architecture,
    topology: Topology,
    devices: Sequence[Any] | None = None,
) -> Placed:
    """Returns what estimates of a run need of its model, where its strategy puts it.

    Args:
      config: The run's.
      architecture: The model.
      topology: The hardware.
      devices: Devices of the mesh; all of this machine by default.

    Raises:
      ConfigError: If the strategy cannot place the model there, or its attention is not available.
    """
    placement = make_placement(config, devices)
    check_strategy(config, architecture, placement)
    abstract = architecture.abstract(make_numerics(config.model.dtypes))
    attention = attention_on(config, architecture, topology, placement)
    return place(config, architecture, placement, abstract, attention)
