"""Estimates of runs on the devices that are here, which cost milliseconds."""

from collections.abc import Sequence
from typing import Any

from jaxft.config import RunConfig, to_dict
from jaxft.hardware.devices import Room
from jaxft.models.activations import AUTO
from jaxft.models.families import Architecture
from jaxft.planner.analytic import Estimator
from jaxft.planner.candidates import with_flags
from jaxft.planner.placed import Placed, place_run
from jaxft.planner.rematerialisation import Choice, choose, estimate_policies
from jaxft.planner.topology import LOCAL, Topology, parse
from jaxft.training.checks import check_rows

# Bytes by kind, as `planner.memory.KINDS`.
type Kinds = dict[str, int]


class Estimates:
    """Estimates of runs of one model, which share what they have in common.

    Args:
      architecture: The model.
      topology: The hardware; that of this machine if absent.
      devices: Devices that stand for it, made up or not; all that jax has if absent.
    """

    def __init__(
        self,
        architecture: Architecture,
        topology: Topology | None = None,
        devices: Sequence[Any] | None = None,
    ):
        self.architecture, self._devices = architecture, devices
        self._topology = topology or parse(LOCAL)
        self._estimator = Estimator(architecture=architecture, topology=self._topology)
        self._placed: dict[tuple, Placed] = {}

    def training(self, config: RunConfig) -> Kinds:
        """Returns what a training step takes.

        Raises:
          ConfigError: If the strategy cannot place the model, or rows cannot be split.
        """
        return self._estimator.memory(config, self._place_training(config))

    def seconds(self, config: RunConfig) -> float:
        """Returns the time of a training step; 0 where no rates of the chip are published.

        Raises:
          ConfigError: As `training`.
        """
        if not self._topology.chip.bfloat16:
            return 0.0
        return self._estimator.estimate(config, self._place_training(config)).seconds

    def evaluation(self, config: RunConfig) -> Kinds:
        """Returns what an evaluation step takes.

        Raises:
          ConfigError: If the strategy cannot place the model.
        """
        placed = self._place(config)
        rows = placed.placement.whole_rows(config.eval.batch_size or config.train.batch_size)
        return self._estimator.evaluation_memory(config, placed, rows)

    def choose_remat(self, config: RunConfig, found: Room, *, begun: str = "") -> Choice:
        """Chooses for `model.remat=auto`.

        Args:
          config: The run's.
          found: What each device has.
          begun: `model.remat` of the run that is resumed, which is kept if all memory of a device
            is enough for it by estimate; empty for a new run.

        Raises:
          ConfigError: As `training`.
        """
        placed = self._place_training(config)
        policies = estimate_policies(config, self._estimator, placed)
        known = estimate_policies(config, self._estimator, placed, remats=[begun]) if begun else []
        return choose(policies, found.free, begun=next(iter(known), None), limit=found.limit)

    def settled(self, config: RunConfig, found: Room) -> RunConfig:
        """Returns the config with what `model.remat=auto` would be for a new run."""
        if config.model.remat != AUTO:
            return config
        return with_flags(config, {"model.remat": self.choose_remat(config, found).remat})

    def _place_training(self, config: RunConfig) -> Placed:
        placed = self._place(config)
        check_rows(config, placed.placement)
        return placed

    def _place(self, config: RunConfig) -> Placed:
        model, length = config.model, config.data.max_length
        mesh = tuple(to_dict(config.mesh).values())
        key = (model.dtypes, model.attention, config.strategy, mesh, length, config.optim.freeze)
        if key not in self._placed:
            self._placed[key] = place_run(config, self.architecture, self._topology, self._devices)
        return self._placed[key]
