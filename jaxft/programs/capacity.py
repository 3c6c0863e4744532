"""Whether a run fits into the memory that is here, and the smallest changes with which it does.

What it takes is the planner's estimate in closed form, which costs milliseconds, or what the
compiled step says of itself.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxft import console
from jaxft.config import RunConfig, TrainConfig, to_dict
from jaxft.errors import JaxftError, OutOfMemoryError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import Room, room, shortage
from jaxft.models.families import Architecture
from jaxft.planner.candidates import with_flags
from jaxft.programs.estimates import Estimates, Kinds
from jaxft.training.program import make_placement
from jaxft.workdir.source import find_architecture

type Flags = dict[str, Any]

# Of what an estimate says that was too little, changes are looked for that take this share.
_SURE = 0.75
# What an estimate says that is too much by this factor is so for sure.
_HOPELESS = 2.0
# Kinds that take less than this share of the whole are not listed.
_SMALL = 0.03
# Rows shorter than this are no remedy.
_SHORTEST = 64


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that takes memory.

    Attributes:
      name: Name of the task.
      kinds: Bytes on one device by kind, estimated.
      held: Kinds that are held throughout, whatever else changes.
      changes: Ways to take less, each a list of flags, from the least change to the most; those
        that leave the result as it is, and those that do not.
    """

    name: str
    kinds: Callable[[RunConfig, Estimates], Kinds]
    held: tuple[str, ...]
    changes: Callable[[RunConfig], tuple[list[list[Flags]], list[list[Flags]]]]


@dataclass(frozen=True, slots=True)
class Change:
    """A change with which a run fits by estimate.

    Attributes:
      flags: Config keys and values.
      bytes: Bytes that training takes on a device with the change.
      same: Whether the result stays what it was.
    """

    flags: Flags
    bytes: int
    same: bool

    def __str__(self) -> str:
        words = " ".join(f"--config.{key}={value}" for key, value in self.flags.items())
        return f"{words}  ({format_bytes(self.bytes)}{'' if self.same else ', another result'})"


def here(config: RunConfig) -> Room:
    """Returns what each device of this process has on which a run computes.

    Raises:
      ConfigError: If the run's mesh does not fit the devices.
    """
    devices = make_placement(config).mesh.devices.flat
    # A small mesh may have none of this process; they are like the others.
    ours = [d for d in devices if d.process_index == jax.process_index()]
    return room(ours or jax.local_devices())


def check(task: Task, config: RunConfig, architecture: Architecture) -> None:
    """Warns of a run that may not fit, before anything is loaded.

    Raises:
      OutOfMemoryError: If it cannot: what it holds throughout is more than there is, or all that it
        takes is so by far.
    """
    estimates = Estimates(architecture)
    kinds, found = task.kinds(config, estimates), here(config)
    held, whole = sum(kinds[kind] for kind in task.held), sum(kinds.values())
    if not found.limit or whole <= found.free:
        return
    advice = _advice(task, config, estimates, kinds, found)
    if held > found.limit:
        raise OutOfMemoryError(
            f"{task.name} does not fit: {' and '.join(task.held)} alone take "
            f"{format_bytes(held)} on a device, and {found.name} has "
            f"{format_bytes(found.limit)}. {advice}"
        )
    takes = (
        f"by estimate it takes {format_bytes(whole)} on a device ({_listed(kinds)}), and {found}"
    )
    if whole > _HOPELESS * found.limit:
        raise OutOfMemoryError(f"{task.name} does not fit: {takes}. {advice}")
    end = ", on a CPU without a word" if jax.default_backend() == "cpu" else ""
    console.log(
        f"{task.name} may not fit: {takes}. It may end for lack of memory{end}. {advice}",
        style="yellow",
    )


def check_compiled(task: Task, config: RunConfig, architecture: Architecture, step: Any) -> None:
    """Refuses a run whose compiled step says that it takes more than there is.

    The compiler for TPU has done so by itself.

    Raises:
      OutOfMemoryError: Before anything is loaded that would end for lack of memory.
    """
    if said := misfit(config, step):
        estimates, found = Estimates(architecture), here(config)
        kinds = task.kinds(config, estimates)
        advice = _advice(task, config, estimates, kinds, found)
        raise OutOfMemoryError(f"{task.name} does not fit: {said}. {advice}")


def misfit(config: RunConfig, step: Any) -> str:
    """Says how much a compiled step takes and what there is; nothing if it fits."""
    found, memory = here(config), step.memory_analysis()
    if memory is None or not found.limit or jax.default_backend() == "tpu":
        return ""
    apart = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + apart
    if needed <= found.limit:
        return ""
    return f"compiled it takes {format_bytes(needed)} on a device, and {found}"


@contextlib.contextmanager
def explained(task: Task, config: RunConfig) -> Iterator[None]:
    """Turns a lack of memory, on a device or the host, into an OutOfMemoryError with what to do."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        said = shortage(error)
        if not said:
            raise
        raise OutOfMemoryError(f"{said} {_explain(task, config)}") from error


def _explain(task: Task, config: RunConfig) -> str:
    try:
        estimates, found = Estimates(find_architecture(config)), here(config)
        if task is TRAINING:
            config = estimates.settled(config, found)
        kinds = task.kinds(config, estimates)
    except JaxftError:
        return ""
    return (
        f"{task.name} takes about {format_bytes(sum(kinds.values()))} on a device by estimate "
        f"({_listed(kinds)}); {found}. "
        f"{_advice(task, config, estimates, kinds, found)}"
    )


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a run fits, by estimate.

    Attributes:
      kinds: Bytes that training takes on a device, by kind.
      room: Memory that is there.
      settled: Config of the run, with a policy in place of `model.remat=auto`.
      chosen: The policy that `model.remat=auto` would be; empty if the run names one.
      changes: Changes with which it fits, if it does not.
    """

    kinds: Kinds
    room: Room
    settled: RunConfig
    chosen: str
    changes: list[Change]

    @property
    def bytes(self) -> int:
        """All that training takes on a device."""
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        """Whether it fits beside what uses the memory now."""
        return not self.room.limit or self.bytes <= self.room.free

    @property
    def fits_alone(self) -> bool:
        """Whether it fits if nothing else uses the memory."""
        return not self.room.limit or self.bytes <= self.room.limit

    def __str__(self) -> str:
        size = format_bytes(self.bytes)
        chosen = f", where model.remat 'auto' takes {self.chosen}," if self.chosen else ""
        return f"{size} on a device{chosen} by estimate ({_listed(self.kinds)}); {self.room}"


def judge(config: RunConfig, estimates: Estimates, found: Room) -> Judgement:
    """Estimates whether training fits.

    Args:
      config: Of the run.
      estimates: Of its model, on its devices.
      found: What each of these has.

    Raises:
      ConfigError: If the run cannot be placed on them.
    """
    settled = estimates.settled(config, found)
    chosen = "" if settled is config else settled.model.remat
    kinds = TRAINING.kinds(settled, estimates)
    judged = Judgement(kinds, found, settled, chosen, [])
    if judged.fits:
        return judged
    return replace(judged, changes=find_changes(TRAINING, settled, estimates, kinds, found))


def advise(changes: list[Change]) -> str:
    """Says which changes would make a run fit."""
    if not changes:
        return (
            "None of the settings that save memory is enough. `jaxft plan --topology=…`, with the "
            "same flags, says on which machine it fits."
        )
    return "\n  ".join(["The smallest changes that fit, by estimate:", *map(str, changes)])


def _advice(task: Task, config: RunConfig, estimates: Estimates, kinds: Kinds, found: Room) -> str:
    return advise(find_changes(task, config, estimates, kinds, found))


def find_changes(
    task: Task, config: RunConfig, estimates: Estimates, kinds: Kinds, found: Room
) -> list[Change]:
    """Returns the smallest changes with which a run fits by estimate.

    Args:
      task: What is to fit.
      config: Of the run that does not.
      estimates: Of its model.
      kinds: Its own estimate. If that fits, the estimate was too low, and changes have to save
        more.
      found: What there is.
    """
    whole = sum(kinds.values())
    limit = min(found.limit, max(found.free, sum(kinds[kind] for kind in task.held)))
    most = limit if whole > limit else _SURE * whole
    chosen: list[Change] = []
    for same, ways in zip((True, False), task.changes(config), strict=True):
        for way in ways:
            change = _first_that_fits(task, config, estimates, way, most, same)
            more = change and any(c.flags.items() <= change.flags.items() for c in chosen)
            if change and not more:
                chosen.append(change)
        if chosen:
            break
    return chosen


def _first_that_fits(
    task: Task,
    config: RunConfig,
    estimates: Estimates,
    way: list[Flags],
    most: float,
    same: bool,
) -> Change | None:
    for flags in way:
        changed = with_flags(config, flags)
        with contextlib.suppress(JaxftError):  # such as rows that a mesh cannot split
            changed.validate(evaluation=task is EVALUATION)
            size = sum(task.kinds(changed, estimates).values())
            if size <= most:
                return Change(flags, size, same)
    return None


# --- Training -----------------------------------------------------------------------------------


def _training_kinds(config: RunConfig, estimates: Estimates) -> Kinds:
    """Returns the fuller of a training step, and of evaluation beside the optimizer's state."""
    step = estimates.training(config)
    if not (config.data.validation or config.eval.retention):
        return step
    tested = estimates.evaluation(config) | {"optimizer": step["optimizer"]}
    return max(step, tested, key=lambda kinds: sum(kinds.values()))


def _training_changes(config: RunConfig) -> tuple[list[list[Flags]], list[list[Flags]]]:
    train, model = config.train, config.model
    whole = {"model.remat": "full"} if model.remat != "full" else {}
    chunk = {"objective.chunk": 128} if not 0 < config.objective.chunk <= 128 else {}
    counts = [{"train.accumulation": count} for count in _more_parts(train)]
    smaller: list[Flags] = []
    if config.data.validation or config.eval.retention:
        rows = config.eval.batch_size or train.batch_size
        smaller = [{"eval.batch_size": rows >> i} for i in range(1, rows.bit_length())]
    both = [whole | chunk | more for more in ({}, *counts)]
    everything = [more | rows for more in both for rows in (smaller[-1:] or [{}])]
    ways = [
        [whole] if whole else [],
        counts,
        smaller,
        [whole | more for more in counts] if whole else [],
        [more for more in both if more],
        [more for more in everything if more],
        _on_all_devices(config, [{}, whole, *both, *everything]),
    ]
    if jax.default_backend() != "cpu" and model.offload != "inputs":
        on_host = {"model.remat": "full", "model.offload": "inputs"}
        ways.append([on_host, *(on_host | more for more in everything)])
    least = everything[-1]
    narrow = {"model.dtypes": "bfloat16"} if model.dtypes != "bfloat16" else {}
    shorter = _shorter(config)
    rows = [{"train.batch_size": train.batch_size >> i} for i in range(1, 63)]
    fewer = [
        {**whole, **chunk, **row, "train.accumulation": row["train.batch_size"]}
        for row in rows
        if row["train.batch_size"]
    ]
    others = [
        [narrow | more for more in ({}, whole, *everything)] if narrow else [],
        fewer,
        [more | least for more in shorter],
        [narrow | more | least for more in shorter] if narrow else [],
        _on_all_devices(config, [narrow | more | least for more in ({}, *shorter)]),
    ]
    return ways, others


# --- Evaluation ---------------------------------------------------------------------------------


def _evaluation_kinds(config: RunConfig, estimates: Estimates) -> Kinds:
    return estimates.evaluation(config)


def _evaluation_changes(config: RunConfig) -> tuple[list[list[Flags]], list[list[Flags]]]:
    rows = config.eval.batch_size or config.train.batch_size
    fewer = [{"eval.batch_size": rows >> i} for i in range(1, rows.bit_length())]
    chunk = {"objective.chunk": 128} if not 0 < config.objective.chunk <= 128 else {}
    ways = [
        fewer,
        [chunk | more for more in ({}, *fewer)] if chunk else [],
        _on_all_devices(config, [{}, *(chunk | more for more in fewer)]),
    ]
    least = chunk | (fewer[-1] if fewer else {})
    narrow = {"model.dtypes": "bfloat16"} if config.model.dtypes != "bfloat16" else {}
    others = [
        [narrow | more for more in ({}, least)] if narrow else [],
        [more | least for more in _shorter(config)],
        _on_all_devices(config, [narrow | least]),
    ]
    return ways, others


def _more_parts(train: TrainConfig) -> list[int]:
    """Returns into how many micro-batches more a step can be cut, each twice the last or more."""
    size = train.batch_size
    low = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    parts, least = [], 2 * train.accumulation
    for count in [*low, *(size // n for n in reversed(low))]:
        if count >= least:
            parts.append(count)
            least = 2 * count
    return parts if parts[-1:] == [size] or size == train.accumulation else [*parts, size]


def _on_all_devices(config: RunConfig, ways: list[Flags]) -> list[Flags]:
    """Returns changes with weights and moments split over all devices, if that is another run."""
    if jax.device_count() == 1 or config.strategy == "fsdp":
        return []
    mesh = {f"mesh.{axis}": 0 for axis, size in to_dict(config.mesh).items() if size}
    return [{"strategy": "fsdp", **mesh, **flags} for flags in ways]


def _shorter(config: RunConfig) -> list[Flags]:
    length = config.data.max_length
    halves = (length >> i for i in range(1, length.bit_length()))
    return [{"data.max_length": half} for half in halves if half >= _SHORTEST]


TRAINING = Task(
    name="Training",
    kinds=_training_kinds,
    held=("parameters", "optimizer"),
    changes=_training_changes,
)
EVALUATION = Task(
    name="Evaluation", kinds=_evaluation_kinds, held=("parameters",), changes=_evaluation_changes
)


# --- Words --------------------------------------------------------------------------------------


def _listed(kinds: Mapping[str, int]) -> str:
    whole = sum(kinds.values())
    large = {kind: size for kind, size in kinds.items() if size > _SMALL * whole}
    return ", ".join(f"{kind} {format_bytes(size)}" for kind, size in large.items())
