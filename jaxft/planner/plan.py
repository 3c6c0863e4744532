"""A plan: what one run would cost on one slice, compiled where there is a compiler.

Memory and collectives are what the compiled program says; times are estimates.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jaxft.planner.memory import Memory
from jaxft.planner.timeline import Timeline
from jaxft.planner.topology import Topology

# Version of the JSON form; a field that changes its meaning or goes away raises it.
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """All collectives of one kind over the same mesh axes, in one step and per device.

    Attributes:
      kind: Name that XLA gives it.
      axes: Mesh axes along which it goes.
      network: `ici` within a slice or an NVLink domain, `dcn` between them.
      count: Runs in a step.
      exact: Whether that is known, and not only the least it can be.
      bytes: Payload.
      wire_bytes: Bytes that a device sends if groups are rings.
      seconds: Seconds the links are busy; an estimate.
      overlapped: Share of these in which the core has other work.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    count: int
    exact: bool
    bytes: int
    wire_bytes: int
    seconds: float
    overlapped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The time of a step; all of it estimates, in seconds.

    Attributes:
      seconds: The whole step, by the schedule.
      terms: Need of each resource on its own: `compute`, `memory`, `ici`, `dcn`, `host`.
      spent: Seconds of the core by what it does, its waits by what it waits for; adds up to
        `seconds`.
      by_cycles: The whole step if matrix products take what the compiler estimates, where that is
        more than at the rate of large ones; 0 if it estimates nothing.
      low: Lower end of the interval in which published steps lie around their predictions.
      high: Upper end of that interval.
    """

    seconds: float
    terms: dict[str, float]
    spent: dict[str, float]
    by_cycles: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a step on one device: what it computes and moves.

    Attributes:
      model_flops: FLOPs that the mathematics needs, attention once for each visible pair.
      model_flops_full: The same with attention counted in full.
      flops: FLOPs of all matrix products that run, with what rematerialisation repeats.
      bytes: Bytes to and from device memory.
    """

    model_flops: float
    model_flops_full: float
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Figures that follow from the time of a step; estimates.

    Attributes:
      tokens_per_second: Tokens of all chips together; every position of a row counts.
      tokens_per_second_per_chip: Tokens of one chip.
      mfu: Model FLOPs over the peak, attention once for each visible pair.
      mfu_full: Attention counted in full.
      price_per_hour: Price of all chips; 0 if no price is known.
      price_per_million_tokens: Price of a million tokens; 0 if no price is known.
      currency: Currency of both prices.
      priced: The date of the price.
    """

    tokens_per_second: float
    tokens_per_second_per_chip: float
    mfu: float
    mfu_full: float
    price_per_hour: float
    price_per_million_tokens: float
    currency: str
    priced: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that was compiled to see whether the run then fits.

    Attributes:
      change: The change in words.
      flags: Config keys and values that make it; `topology` for another slice.
      fits: Whether it does.
      used: Bytes that it takes.
      seconds: Time of a step, if it fits; an estimate.
    """

    change: str
    flags: dict[str, Any]
    fits: bool
    used: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a slice.

    Attributes:
      model: Path or name.
      parameters: Number of parameters.
      trained: Number of those that train.
      topology: The slice.
      strategy: Name of the strategy.
      mesh: Devices along each axis.
      settings: Every key of the run's config.
      source: `compiled`, or `estimate` where there is no compiler.
      memory: Memory of one device.
      work: Work of one step and device.
      time: None if the run does not fit, or nothing is published of the device.
      speed: Tokens a second and prices; None where `time` is.
      exchanges: Most wire bytes first; empty if nothing was compiled because the run does not fit.
      evaluation: Time of the eval step; None where it does not fit, is not known or not asked for.
      evaluation_memory: Bytes that the eval step takes on a device.
      remedies: Changes that were tried where the run does not fit.
      timeline: The schedule, for pictures; None where `time` is.
      compile_seconds: Time that compiling took.
      notes: Sentences that a reader of this plan should know.
    """

    model: str
    parameters: int
    trained: int
    topology: Topology
    strategy: str
    mesh: dict[str, int]
    settings: dict[str, Any]
    source: str
    memory: Memory
    work: Work
    time: StepTime | None = None
    speed: Speed | None = None
    exchanges: tuple[Exchange, ...] = ()
    evaluation: StepTime | None = None
    evaluation_memory: int = 0
    remedies: tuple[Remedy, ...] = ()
    timeline: Timeline | None = None
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough, for evaluating too if that was planned."""
        return self.memory.fits and self.evaluation_fits

    @property
    def evaluation_fits(self) -> bool:
        """Whether the eval step fits beside the optimizer's state, which a training run keeps."""
        beside = self.memory.kinds.get("optimizer", 0)
        return not self.memory.limit or self.evaluation_memory + beside <= self.memory.limit

    def record(self) -> dict[str, Any]:
        """Returns the plan in the form of its JSON, without the timeline."""
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("timeline", "topology")
        }
        values = {name: _jsonable(value) for name, value in fields.items()}
        topology = self.topology
        return {
            "schema": SCHEMA,
            **values,
            "fits": self.fits,
            "topology": {
                "name": topology.name,
                "chip": topology.chip.name,
                "shape": list(topology.shape),
                "slices": topology.slices,
                "chips": topology.chips,
                "devices": topology.device_count,
                "sold_as": topology.sold_as,
            },
        }


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    return value


def said_to_train(plan: Plan) -> str:
    """Returns how many parameters train, to follow the number of all; nothing if all do."""
    return f", of which {plan.trained:,} train" if plan.trained < plan.parameters else ""


def describe_shape(topology: Topology) -> str:
    """Returns `2 slices of v5e 16x16, 256 chips each`, or `64 h100`."""
    if not topology.chip.is_tpu:
        return f"{topology.chips} {topology.chip.name}"
    shape = "x".join(map(str, topology.shape))
    each = math.prod(topology.shape)
    if topology.slices > 1:
        return f"{topology.slices} slices of {topology.chip.name} {shape}, {each} chips each"
    return f"{topology.chip.name} {shape}, {each} chip{'s' if each > 1 else ''}"
