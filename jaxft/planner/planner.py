"""Plans of one model: compiled where there is a compiler, else estimated in closed form."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxft.compiled.collectives import Reader
from jaxft.compiled.hlo import Module
from jaxft.compiled.layout import describe, make_program, with_any_attention
from jaxft.config import RunConfig, to_dict
from jaxft.hardware.devices import array_bytes
from jaxft.models.families import Architecture
from jaxft.planner.analytic import Estimator
from jaxft.planner.compilation import Compiled, compile_lowered
from jaxft.planner.cost import totals
from jaxft.planner.kernels import kernels_of
from jaxft.planner.liveness import peak_of
from jaxft.planner.memory import Memory, memory_of, memory_without_program
from jaxft.planner.network import Network
from jaxft.planner.placed import attention_on, estimated_devices, place, place_run
from jaxft.planner.plan import Exchange, Plan, Speed, StepTime, Work
from jaxft.planner.prices import Prices
from jaxft.planner.reading import Reading, estimated_time, exchanges, notes, step_time
from jaxft.planner.rematerialisation import Choice, choose, estimate_policies, memory_of_device
from jaxft.planner.timeline import Rates, Simulator, Timeline
from jaxft.planner.topology import Topology
from jaxft.training.checks import check_rows
from jaxft.training.compilation import refused_options
from jaxft.training.flops import Learning, training_flops
from jaxft.training.program import Program, make_placement


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes plans of one model.

    Attributes:
      architecture: The model.
      prices: Prices of chips.
      cache: Folder of compiled programs; empty for the usual one, `off` for none.
      rates: Shares of published rates that are reached.
    """

    architecture: Architecture
    prices: Prices
    cache: str = ""
    rates: Rates = field(default_factory=Rates)

    def make(self, config: RunConfig, topology: Topology, *, evaluation: bool = False) -> Plan:
        """Compiles a run, or estimates it where there is no compiler; as `plan` and `estimate`."""
        made = self.plan if topology.can_compile else self.estimate
        return made(config, topology, evaluation=evaluation)

    def choose_remat(self, config: RunConfig, topology: Topology) -> Choice:
        """Chooses for `model.remat=auto` among the policies that a search looks at.

        Args:
          config: The run's.
          topology: Where.

        Raises:
          ConfigError: If the strategy cannot place the model there, or the rows cannot be split.
        """
        placed = place_run(config, self.architecture, topology, estimated_devices(topology))
        check_rows(config, placed.placement)
        estimator = Estimator(architecture=self.architecture, topology=topology, rates=self.rates)
        policies = estimate_policies(config, estimator, placed)
        return choose(policies, memory_of_device(topology))

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
        trained, fixed = (
            {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves.values()}
            for leaves in (program.state.trainable, program.state.frozen | program.state.base)
        )
        memory = memory_of(
            compiled,
            peak_of(found.module),
            held,
            topology.chip.core,
            trained=trained,
            fixed=fixed - trained,
            batch=_bytes_per_device(program.batch),
            architecture=self.architecture.config,
        )
        work = Work(
            model_flops=needed[0],
            model_flops_full=needed[1],
            flops=sum(found.flops.values(), 0.0),
            bytes=found.bytes,
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
            notes=notes(topology, found.module),
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
        placed = place(config, self.architecture, placement, abstract, choice)
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
        time = estimated_time(found.seconds, terms=found.terms, spent=found.spent)
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
            evaluation=estimated_time(tested.seconds) if tested else None,
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

    def _simulate(
        self,
        module: Module,
        reader: Reader,
        topology: Topology,
        program: Program,
        *,
        cycles: bool = False,
    ) -> Timeline:
        network = Network(topology.chip, program.evaluator.placement.mesh, topology.shape)
        rates = self.rates._replace(cycles=cycles)
        kernels = self._kernels(topology)
        return Simulator(module, reader, network, kernels=kernels, rates=rates).run()

    def _kernels(self, topology: Topology) -> Any:
        return kernels_of(self.architecture.config, topology.chip.core, self.rates)

    def _read(self, text: str, topology: Topology, program: Program) -> Reading:
        """Reads what a program computes and when."""
        module = Module(text)
        reader = Reader(module, program.evaluator.placement.mesh)
        step = self._simulate(module, reader, topology, program)
        slower = self._simulate(module, reader, topology, program, cycles=True)
        flops, moved = totals(module, self._kernels(topology))
        return Reading(module, reader, step, slower.seconds, flops, moved)

    def _evaluation(
        self, config: RunConfig, program: Program, topology: Topology, *, wanted: bool
    ) -> tuple[StepTime | None, int]:
        if not wanted:
            return None, 0
        evaluator = program.evaluator
        placement = evaluator.placement
        rows = config.eval.batch_size or config.train.batch_size
        rows = placement.whole_rows(rows)
        batch = evaluator.abstract_rows(config, rows)
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
        "trained": sum(math.prod(leaf.shape) for leaf in program.state.trainable.values()),
        "topology": topology,
        "strategy": placement.name,
        "mesh": dict(placement.mesh.shape),
        "settings": to_dict(config),
    }


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
    # Of all layers, each as often as its heads have numbers.
    layers = zip(model.windows, model.attending, strict=True)
    seen = sum(
        _squared(length, window or length) * (layer.head_dim + layer.value_dim) / 2
        for window, layer in layers
    )
    found = training_flops(
        multiplied,
        learning=learning,
        layers=1,
        heads=model.heads,
        head_dim=1,
        tokens=rows * length,
        squared_lengths=rows * seen,
        states=model.states,
        forward_passes=config.objective.forward_passes,
    )
    return found.causal, found.full


def _bytes_per_device(arrays: Mapping[str, Any]) -> int:
    """Returns what one device holds of some abstract arrays."""
    return sum(
        array_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in arrays.values()
    )


def _squared(length: int, window: int) -> float:
    """Returns twice the visible pairs of a row, less its tokens: its square without a window."""
    window = min(window, length)
    return window**2 + (length - window) * (2 * window - 1)
