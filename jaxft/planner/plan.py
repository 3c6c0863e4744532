"""A plan: what one run would cost on one slice, compiled where there is a compiler.

Memory and collectives are what the compiled program says; times are estimates.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxft.compiled.collectives import Collective, Frame, Reader
from jaxft.compiled.hlo import Computation, Instruction, Module
from jaxft.compiled.layout import cpu_devices, describe, make_program, with_any_attention
from jaxft.config import RunConfig, to_dict
from jaxft.models.attention import Choice, choose_backend
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel
from jaxft.planner import timeline as lanes
from jaxft.planner.analytic import Estimator
from jaxft.planner.compilation import Compiled, compile_lowered
from jaxft.planner.cost import MOVES, cost_of, moved_bytes
from jaxft.planner.kernels import efficiency, splash_flops
from jaxft.planner.liveness import peak_of
from jaxft.planner.memory import Memory, memory_of, memory_without_program
from jaxft.planner.network import Network
from jaxft.planner.placed import Placed
from jaxft.planner.prices import Prices
from jaxft.planner.timeline import Rates, Simulator, Timeline
from jaxft.planner.topology import Topology
from jaxft.sharding.rules import Placement
from jaxft.training.flops import Learning, training_flops
from jaxft.training.program import Program, make_placement, refused_options

# Version of the JSON form; a field that changes its meaning or goes away raises it.
SCHEMA = 1

# Least and most that published training steps on TPU slices took of their predictions:
# benchmarks/published.py, whose table is in docs/planning.md.
PUBLISHED_RANGE = (0.85, 1.04)
# As PUBLISHED_RANGE, of closed-form estimates and of steps on GPUs: PyTorch's on A100 and MaxText's
# on H100 and H200. PyTorch's of 2023 on H100 took up to twice their estimates.
ESTIMATED_RANGE = (0.99, 1.52)


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


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes plans of one model.

    Attributes:
      architecture: The model.
      prices: Prices of chips.
      cache: Folder of compiled programs; empty for the usual one, `off` for none.
      rates: Shares of published rates that are reached.
      fused_backward: Whether attention's backward pass is counted as one kernel in place of two.
    """

    architecture: Architecture
    prices: Prices
    cache: str = ""
    rates: Rates = field(default_factory=Rates)
    fused_backward: bool = False

    def make(self, config: RunConfig, topology: Topology, *, evaluation: bool = False) -> Plan:
        """Compiles a run, or estimates it where there is no compiler; as `plan` and `estimate`."""
        made = self.plan if topology.can_compile else self.estimate
        return made(config, topology, evaluation=evaluation)

    def plan(self, config: RunConfig, topology: Topology, *, evaluation: bool = False) -> Plan:
        """Compiles the trainer's own step and reads what it would cost.

        Args:
          config: The run's.
          topology: Where; there must be a compiler for it.
          evaluation: Whether the eval step is compiled too.

        Raises:
          ConfigError: If the strategy cannot place the model there, as a run would be refused.
        """
        placement = make_placement(config, topology.devices())
        program = make_program(config, self.architecture, placement=placement)
        compiled = self._compile(program.lower(), program.compiler_options, topology)
        held = describe(program, model=config.model.path).bytes_per_device
        held |= {"reference": _bytes_per_device(program.fixed)}
        common = _header(config, topology, program) | {
            "source": "compiled",
            "compile_seconds": compiled.seconds,
        }
        needed = self._needed(config, program)
        if not compiled.fits:
            memory = memory_without_program(compiled, held, topology.chip.core)
            work = Work(model_flops=needed[0], model_flops_full=needed[1], flops=0.0, bytes=0.0)
            return Plan(**common, memory=memory, work=work)
        found = self._read(compiled.text, topology, program)
        time = step_time(found, topology) if topology.chip.bfloat16 else None
        shapes = {
            path: leaf.sharding.shard_shape(leaf.shape)
            for path, leaf in program.state.params.items()
        }
        memory = memory_of(
            compiled,
            peak_of(found.module),
            held,
            topology.chip.core,
            parameters=shapes,
            batch=_bytes_per_device(program.batch),
            architecture=self.architecture.config,
        )
        work = Work(
            model_flops=needed[0], model_flops_full=needed[1], flops=found.flops, bytes=found.bytes
        )
        tested, tested_memory = self._evaluation(config, program, topology, wanted=evaluation)
        return Plan(
            **common,
            memory=memory,
            work=work,
            time=time,
            speed=self.speed(config, topology, time, needed) if time else None,
            exchanges=exchanges(found),
            evaluation=tested,
            evaluation_memory=tested_memory,
            timeline=found.step if time else None,
            notes=_notes(topology, found.module),
        )

    def estimate(self, config: RunConfig, topology: Topology, *, evaluation: bool = False) -> Plan:
        """Estimates in closed form what a run would cost, without a compiler.

        Args:
          config: The run's.
          topology: Where; GPUs need not be here.
          evaluation: Whether the eval step is estimated too.

        Raises:
          ConfigError: If the strategy cannot place the model there, or the rows cannot be split.
        """
        placement = make_placement(config, estimated_devices(topology))
        program = make_program(with_any_attention(config), self.architecture, placement=placement)
        choice = attention_on(config, self.architecture, topology, placement)
        abstract = program.evaluator.abstract
        placed = place(config, placement, abstract, choice)
        estimator = Estimator(architecture=self.architecture, topology=topology, rates=self.rates)
        found = estimator.estimate(config, placed)
        needed = self._needed(config, program)
        chip = topology.chip.core
        memory = Memory(
            limit=chip.limit,
            used=found.bytes,
            kinds=found.kinds,
            host=found.host,
            host_limit=chip.host_memory,
        )
        time = _estimated_time(found.seconds, terms=found.terms, spent=found.spent)
        rows = placement.whole_rows(config.eval.batch_size or config.train.batch_size)
        tested = estimator.evaluation(config, placed, rows) if evaluation else None
        plan = Plan(
            **_header(config, topology, program),
            source="estimate",
            memory=memory,
            work=Work(
                model_flops=needed[0], model_flops_full=needed[1], flops=found.flops, bytes=0.0
            ),
            time=time if memory.fits else None,
            speed=self.speed(config, topology, time, needed) if memory.fits else None,
            exchanges=tuple(
                Exchange(
                    kind=one.collective.kind,
                    axes=one.collective.axes,
                    network=one.network,
                    count=0,
                    exact=False,
                    bytes=one.collective.bytes,
                    wire_bytes=one.collective.wire_bytes,
                    seconds=one.seconds,
                    overlapped=one.hidden,
                )
                for one in sorted(found.exchanges, key=lambda e: -e.collective.wire_bytes)
            ),
            evaluation=_estimated_time(tested.seconds) if tested else None,
            evaluation_memory=tested.bytes if tested else 0,
            notes=(
                "A closed-form estimate: nothing was compiled. The exchange of weights and "
                "gradients is taken to be hidden in part.",
                f"Attention: {choice.backend} ({choice.reason}).",
            ),
        )
        return plan if plan.evaluation_fits else dataclasses.replace(plan, evaluation=None)

    def _needed(self, config: RunConfig, program: Program) -> tuple[float, float]:
        """Returns a device's share of `model_flops`."""
        evaluator = program.evaluator
        learning = evaluator.learning(program.state.trainable)
        causal, full = model_flops(
            config, evaluator.multiplied_parameters, self.architecture, learning
        )
        devices = evaluator.placement.mesh.size
        return causal / devices, full / devices

    def _compile(self, lowered: Any, options: dict[str, Any], topology: Topology) -> Compiled:
        target = f"{topology.slices}x{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
        with refused_options():
            return compile_lowered(lowered, options, target=target, cache=self.cache)

    def _kernel_flops(self, instruction: Any, computation: Any) -> tuple[float, int] | None:
        return splash_flops(
            instruction, computation, self.architecture.config, fused=self.fused_backward
        )

    def _simulate(
        self,
        module: Module,
        reader: Reader,
        topology: Topology,
        program: Program,
        *,
        cycles: bool = False,
    ) -> Timeline:
        chip = topology.chip.core
        mesh = program.evaluator.placement.mesh

        def kernel_seconds(instruction: Any, computation: Any) -> float | None:
            found = self._kernel_flops(instruction, computation)
            if found is None or not chip.bfloat16:
                return None
            return found[0] / (chip.bfloat16 * efficiency(chip, found[1]))

        network = Network(topology.chip, mesh, topology.shape)
        rates = self.rates._replace(cycles=cycles)
        return Simulator(module, reader, network, kernels=kernel_seconds, rates=rates).run()

    def _read(self, text: str, topology: Topology, program: Program) -> "_Reading":
        """Reads what a program computes and when."""
        module = Module(text)
        reader = Reader(module, program.evaluator.placement.mesh)
        step = self._simulate(module, reader, topology, program)
        slower = self._simulate(module, reader, topology, program, cycles=True)
        flops, moved = totals(module, self._kernel_flops)
        return _Reading(module, reader, step, slower.seconds, flops, moved)

    def _evaluation(
        self, config: RunConfig, program: Program, topology: Topology, *, wanted: bool
    ) -> tuple[StepTime | None, int]:
        if not wanted:
            return None, 0
        evaluator = program.evaluator
        placement = evaluator.placement
        rows = config.eval.batch_size or config.train.batch_size
        rows = placement.whole_rows(rows)
        batch = program.batch.map(
            lambda leaf: type(leaf)((rows, leaf.shape[-1]), leaf.dtype, sharding=placement.rows)
        )
        lowered = evaluator.eval_step.lower(program.state.params, batch)
        compiled = self._compile(lowered, {}, topology)  # as the trainer does
        if compiled.allocation is None:
            return None, compiled.needed
        found = self._read(compiled.text, topology, program)
        time = step_time(found, topology) if topology.chip.bfloat16 else None
        return time, compiled.allocation.total

    def speed(
        self, config: RunConfig, topology: Topology, time: StepTime, flops: Sequence[float]
    ) -> Speed:
        """Returns what follows from the time of a step.

        Args:
          config: The run's.
          topology: Where.
          time: Of a step.
          flops: Of a device, attention once for each visible pair, and in full.
        """
        tokens = config.train.batch_size * config.data.max_length
        rate = tokens / time.seconds
        peak = topology.chip.core.peak(
            "float32" if config.model.dtypes == "float32" else "bfloat16"
        )
        price = self.prices.of(topology.chip.name)
        hourly = price.per_chip_hour * topology.chips if price else 0.0
        return Speed(
            tokens_per_second=rate,
            tokens_per_second_per_chip=rate / topology.chips,
            mfu=flops[0] / (time.seconds * peak) if peak else 0.0,
            mfu_full=flops[1] / (time.seconds * peak) if peak else 0.0,
            price_per_hour=hourly,
            price_per_million_tokens=hourly / 3600 / rate * 1e6,
            currency=self.prices.currency,
            priced=price.date if price else "",
        )


def _header(config: RunConfig, topology: Topology, program: Program) -> dict[str, Any]:
    """Returns the fields of a plan that say what was planned."""
    placement = program.evaluator.placement
    return {
        "model": config.model.path,
        "parameters": program.evaluator.parameters,
        "topology": topology,
        "strategy": placement.name,
        "mesh": dict(placement.mesh.shape),
        "settings": to_dict(config),
    }


def estimated_devices(topology: Topology) -> Sequence[Any]:
    """Returns devices for a mesh: of the slice, or made-up ones for GPUs that are not there."""
    return topology.devices() if topology.can_compile else cpu_devices(topology.device_count)


# Compute capability of the GPUs that can be planned for.
_CAPABILITY = {"a100": "8.0", "a100-40": "8.0", "h100": "9.0", "h200": "9.0"}
_CAPABILITY |= {"b200": "10.0", "gb200": "10.0"}


def attention_on(
    config: RunConfig, architecture: Architecture, topology: Topology, placement: Placement
) -> Choice:
    """Returns the back end of attention that a run on devices which are not here would use.

    Raises:
      ConfigError: If the one that is asked for is not available there.
    """
    platform = "tpu" if topology.chip.is_tpu else "gpu"
    capability = _CAPABILITY.get(topology.chip.name, "")
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
    config: RunConfig, placement: Placement, abstract: AbstractModel, attention: Choice
) -> Placed:
    """Returns what estimates of a run need of the model on a mesh, with a back end of attention."""
    return Placed(
        placement,
        abstract,
        config.data.max_length,
        config.optim.freeze,
        # Rows that are split go round in a ring, a block at a time.
        flash=attention.backend != "xla",
    )


def _estimated_time(
    seconds: float,
    *,
    terms: Mapping[str, float] | None = None,
    spent: Mapping[str, float] | None = None,
) -> StepTime:
    low, high = ESTIMATED_RANGE
    return StepTime(
        seconds=seconds,
        terms=dict(terms or {}),
        spent={kind: size for kind, size in (spent or {}).items() if size},
        by_cycles=0.0,
        low=low * seconds,
        high=high * seconds,
    )


def model_flops(
    config: RunConfig,
    multiplied: int,
    architecture: Architecture,
    learning: Learning | None = None,
) -> tuple[float, float]:
    """Returns the FLOPs that a step's mathematics needs, of full rows of one document each.

    Args:
      config: The run's.
      multiplied: Parameters that a token is multiplied with.
      architecture: Of the model.
      learning: What of it learns; all by default.

    Returns:
      Attention counted once for each visible pair, and in full; of all devices.
    """
    model, length, rows = architecture.config, config.data.max_length, config.train.batch_size
    windows = [model.kinds[i].window or length for i in model.pattern]
    seen = sum(_squared(length, window) for window in windows) / len(windows)
    found = training_flops(
        multiplied,
        learning=learning,
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        tokens=rows * length,
        squared_lengths=rows * seen,
        forward_passes=config.objective.forward_passes,
    )
    return found.causal, found.full


def _bytes_per_device(arrays: Mapping[str, Any]) -> int:
    """Returns what one device holds of some abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in arrays.values()
    )


def _squared(length: int, window: int) -> float:
    """Returns twice the visible pairs of a row, less its tokens: its square without a window."""
    window = min(window, length)
    return window**2 + (length - window) * (2 * window - 1)


class _Reading(NamedTuple):
    """Facts that are read from a compiled program.

    Attributes:
      module: The program.
      reader: Reader of its collectives.
      step: Timeline of the step.
      by_cycles: Length of the timeline in which matrix products take the compiler's cycles.
      flops: FLOPs of matrix products on a device.
      bytes: Bytes to and from a device's main memory.
    """

    module: Module
    reader: Reader
    step: Timeline
    by_cycles: float
    flops: float
    bytes: float


def step_time(found: _Reading, topology: Topology) -> StepTime:
    """Adds a timeline up."""
    chip, step = topology.chip.core, found.step
    spent: dict[str, float] = {}
    for span, times in step.every():
        if span.lane == lanes.CORE:
            spent[span.kind] = spent.get(span.kind, 0.0) + span.seconds * times
    low, high = PUBLISHED_RANGE if topology.chip.is_tpu else ESTIMATED_RANGE
    return StepTime(
        seconds=step.seconds,
        terms={
            "compute": found.flops / chip.bfloat16 if chip.bfloat16 else 0.0,
            "memory": found.bytes / chip.bandwidth if chip.bandwidth else 0.0,
            **{lane: step.total(lane=lane) for lane in (lanes.ICI, lanes.DCN, lanes.TO_HOST)},
        },
        spent=spent,
        by_cycles=found.by_cycles if chip.clock else 0.0,
        low=low * step.seconds,
        high=high * step.seconds,
    )


def totals(module: Module, kernel_flops: Any) -> tuple[float, float]:
    """Returns FLOPs of matrix products and bytes of main memory of one step on a device."""

    def visit(name: str, times: float) -> tuple[float, float]:
        computation = module.computations[name]
        flops = moved = 0.0
        for instruction in computation.instructions.values():
            called = _called(module, computation, instruction)
            for inner, runs in called:
                more = visit(inner, times * runs)
                flops, moved = flops + more[0], moved + more[1]
            if instruction.opcode in MOVES:
                moved += times * moved_bytes(instruction)
            if called or instruction.opcode.endswith(("-start", "-done")):
                continue
            cost = cost_of(module, computation, instruction)
            kernel = kernel_flops(instruction, computation)
            flops += times * (cost.flops + (kernel[0] if kernel else 0.0))
            moved += times * cost.bytes
        return flops, moved

    return visit(module.entry, 1.0)


def _called(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[str, float]]:
    """Returns what an instruction runs, and how often; of branches each for its share."""
    if instruction.opcode == "while":
        trips = module.trips(computation, instruction)
        return [(instruction.called("body")[0], 1 if trips is None else trips)]
    if instruction.opcode == "conditional":
        branches = module.branches(instruction)
        return [(branch, 1 / len(branches)) for branch in branches]
    if instruction.opcode == "call":
        return [(name, 1) for name in instruction.called("to_apply")]
    return []


def exchanges(found: _Reading) -> tuple[Exchange, ...]:
    """Adds the collectives of a program up, with the time they take and that is waited for them."""
    taken: dict[str, float] = {}
    waited: dict[str, float] = {}
    for span, times in found.step.every():
        if span.lane in (lanes.ICI, lanes.DCN):
            taken[span.name] = taken.get(span.name, 0.0) + span.seconds * times
        elif span.kind.startswith(lanes.WAIT):
            waited[span.name] = waited.get(span.name, 0.0) + span.seconds * times
    groups: dict[tuple[str, tuple[str, ...], str], list[Collective]] = {}
    for one in found.reader.visit(found.module.entry, Frame()):
        network = lanes.DCN if one.across_slices else lanes.ICI
        groups.setdefault((one.kind, one.axes, network), []).append(one)
    return tuple(
        sorted(
            (
                _exchange(kind, axes, network, group, taken, waited)
                for (kind, axes, network), group in groups.items()
            ),
            key=lambda exchange: -exchange.wire_bytes,
        )
    )


def _exchange(
    kind: str,
    axes: tuple[str, ...],
    network: str,
    group: Sequence[Collective],
    taken: Mapping[str, float],
    waited: Mapping[str, float],
) -> Exchange:
    names = {one.name for one in group}
    seconds = sum(taken.get(name, 0.0) for name in names)
    exposed = sum(waited.get(name, 0.0) for name in names)
    return Exchange(
        kind=kind,
        axes=axes,
        network=network,
        count=sum(one.count for one in group),
        exact=all(one.exact for one in group),
        bytes=sum(one.count * one.bytes for one in group),
        wire_bytes=sum(one.count * one.wire_bytes for one in group),
        seconds=seconds,
        overlapped=min(1.0, max(0.0, 1 - exposed / seconds)) if seconds else 0.0,
    )


def _notes(topology: Topology, module: Module) -> tuple[str, ...]:
    found = []
    if not topology.chip.bfloat16:
        found.append(
            "No figures of this device are published: memory and collectives alone are known."
        )
    elif not topology.chip.is_tpu:
        found.append("Times of GPU programs were not held against a GPU.")
    unknown = sum(
        instruction.opcode == "while" and module.trips(computation, instruction) is None
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    )
    if unknown:
        found.append(f"How often {unknown} loops run is not in the program: they count once.")
    return tuple(found)


def describe_shape(topology: Topology) -> str:
    """Returns `2 slices of v5e 16x16, 256 chips each`, or `64 h100`."""
    if not topology.chip.is_tpu:
        return f"{topology.chips} {topology.chip.name}"
    shape = "x".join(map(str, topology.shape))
    each = math.prod(topology.shape)
    if topology.slices > 1:
        return f"{topology.slices} slices of {topology.chip.name} {shape}, {each} chips each"
    return f"{topology.chip.name} {shape}, {each} chip{'s' if each > 1 else ''}"
