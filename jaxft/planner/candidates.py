"""Ways to run on a slice: which there are, and what is known of each."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.config import MeshConfig, RunConfig, from_dict, to_dict
from jaxft.models.families import Architecture
from jaxft.planner.analytic import Estimate
from jaxft.planner.plan import Plan
from jaxft.planner.topology import Topology
from jaxft.sharding.rules import Strategy, known_strategies, load_strategy, mesh_axes_of

# What a layer keeps for its backward pass, from most memory to least.
REMATS = ("none", "dots", "qkv+attention", "attention", "full")
# Of what is kept, what waits in the host's memory.
OFFLOADS = {"full": ("inputs",), "qkv+attention": ("inputs+qkv+attention",)}
# Largest parts along mesh axes that exchange within a layer, which no real run exceeds.
_MOST = {"tensor": 16, "context": 16, "stage": 16, "expert": 64}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run.

    Attributes:
      flags: Config keys that make it, with their values.
      estimate: Closed-form memory and time; None if the strategy refuses the run.
      plan: Plan by the compiler, if it was compiled.
      outcome: `compiled`, `does not fit`, `estimated`, `estimated not to fit`,
        `estimated slower`, or `refused: …`.
    """

    flags: dict[str, Any]
    estimate: Estimate | None
    plan: Plan | None = None
    outcome: str = ""

    @property
    def name(self) -> str:
        """Words that tell it from the others."""
        flags = self.flags
        mesh = " × ".join(
            f"{key.removeprefix('mesh.')} {size}"
            for key, size in flags.items()
            if key.startswith("mesh.") and size > 1
        )
        parts = [f"{flags['strategy']} {mesh}".strip(), f"remat {flags['model.remat']}"]
        if flags["model.offload"]:
            parts.append(f"{flags['model.offload']} on the host")
        if flags["train.accumulation"] > 1:
            parts.append(f"{flags['train.accumulation']} micro-batches")
        return ", ".join(parts)

    @property
    def estimate_seconds(self) -> float:
        """Time of a step, in closed form; infinite if it is refused."""
        return self.estimate.seconds if self.estimate else math.inf

    @property
    def estimate_bytes(self) -> int:
        """Bytes of a device's memory, in closed form."""
        return self.estimate.bytes if self.estimate else 0

    @property
    def seconds(self) -> float:
        """Time of a step: by the compiled program, else by the estimate."""
        if self.plan is not None and self.plan.time is not None:
            return self.plan.time.seconds
        return self.estimate_seconds

    @property
    def bytes(self) -> int:
        """Bytes of a device's memory: by the compiled program, else by the estimate."""
        return self.plan.memory.used if self.plan is not None else self.estimate_bytes

    @property
    def is_compiled(self) -> bool:
        """Whether it was compiled, or planned where there is no compiler, and fits."""
        return self.plan is not None and self.plan.fits


@dataclass(frozen=True, kw_only=True)
class Search:
    """The candidates that were looked at on one slice.

    Attributes:
      topology: The slice.
      candidates: Best first: what was compiled and fits by its time, then the rest.
      seconds: Time that the search took.
    """

    topology: Topology
    candidates: tuple[Candidate, ...]
    seconds: float

    @property
    def considered(self) -> int:
        """Number of candidates that were estimated."""
        return len(self.candidates)

    @property
    def compiled(self) -> int:
        """Number of candidates compiled, or planned where there is no compiler."""
        return sum(candidate.plan is not None for candidate in self.candidates)

    @property
    def best(self) -> Candidate | None:
        """The fastest of those that were compiled and fit."""
        return next((c for c in self.candidates if c.is_compiled), None)


def variants(
    config: RunConfig, topology: Topology, architecture: Architecture, *, names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields the flags of each candidate."""
    for name in names or _suitable(architecture):
        strategy = load_strategy(name)
        for mesh in meshes(strategy, topology, architecture, config.data.max_length):
            shards = batch_shards(strategy, mesh)
            for accumulation in _accumulations(config.train.batch_size, shards):
                for remat in REMATS:
                    for offload in ("", *OFFLOADS.get(remat, ())):
                        yield {
                            "strategy": name,
                            **{f"mesh.{axis}": size for axis, size in mesh.items()},
                            "model.remat": remat,
                            "model.offload": offload,
                            "train.accumulation": accumulation,
                        }


def _suitable(architecture: Architecture) -> list[str]:
    has_experts = architecture.config.experts is not None
    return [n for n in known_strategies() if ("ep" in n.split("_")) <= has_experts]


def meshes(
    strategy: Strategy, topology: Topology, architecture: Architecture, length: int
) -> Iterator[dict[str, int]]:
    """Yields sizes of a strategy's axes that multiply to the devices."""
    model, count = architecture.config, topology.device_count
    wholes = {
        "tensor": model.heads,
        "context": length // 128,
        "stage": model.layers,
        "expert": model.experts.count if model.experts else 1,
    }

    def sizes(axes: tuple[str, ...], left: int) -> Iterator[dict[str, int]]:
        axis, *rest = axes
        for size in (d for d in range(1, left + 1) if left % d == 0):
            if size > _MOST.get(axis, count) or wholes.get(axis, size) % size:
                continue
            if not rest:
                if size == left:
                    yield {axis: size}
                continue
            for others in sizes(tuple(rest), left // size):
                yield {axis: size, **others}

    for mesh in sizes(strategy.mesh_axes, count):
        across = mesh.get(strategy.across_slices, 1)
        if across % topology.slices == 0:
            yield mesh


def batch_shards(strategy: Strategy, mesh: Mapping[str, int]) -> int:
    """Returns how many devices have rows of their own on a mesh of these sizes."""
    return math.prod(mesh[axis] for axis in mesh_axes_of(strategy.rules.get("batch", ())))


def _accumulations(batch: int, shards: int) -> list[int]:
    """Returns into how many micro-batches of 1, 2, 4, … rows a device's rows can be cut."""
    rows, left = divmod(batch, shards)
    if left:
        return [1]  # is refused, with the reason
    return [rows // size for size in (1, 2, 4, 8, 16, 32) if rows % size == 0]


def with_flags(config: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """Returns a copy of a config with some keys changed."""
    values = to_dict(config)
    if "strategy" in flags:  # sizes of axes that the strategy does not have say nothing here
        known = load_strategy(flags["strategy"]).mesh_axes
        others = [f.name for f in dataclasses.fields(MeshConfig) if f.name not in known]
        values |= {f"mesh.{name}": 0 for name in others}
    return from_dict(values | flags)
