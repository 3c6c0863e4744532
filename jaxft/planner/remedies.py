"""Changes with which a run fits that does not: small ones, each planned to see."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxft.config import RunConfig
from jaxft.errors import JaxftError
from jaxft.planner.candidates import batch_shards, with_flags
from jaxft.planner.plan import Plan, Remedy
from jaxft.planner.planner import Planner
from jaxft.planner.topology import Topology, next_larger
from jaxft.sharding.rules import load_strategy


class Change(NamedTuple):
    """Something to try.

    Attributes:
      words: The change in words.
      flags: Config keys and values.
      topology: The hardware with the change.
    """

    words: str
    flags: dict[str, Any]
    topology: Topology


def try_remedies(
    plan: Plan,
    config: RunConfig,
    planner: Planner,
    *,
    on_log: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Returns a plan that does not fit with what was tried: those that fit first, then by memory.

    If no single change is enough, those that concern memory are tried together, then on the next
    larger slice.
    """
    tried: list[Remedy] = []
    for change in single_changes(config, plan):
        _try(change, config, plan.topology, planner, tried, on_log)
    for change in together(config, plan):
        if any(remedy.fits for remedy in tried):
            break
        _try(change, config, plan.topology, planner, tried, on_log)
    # Those that fit in the order of what they change, the others by what they miss.
    ranked = sorted(
        tried, key=lambda r: (not r.fits, "topology" in r.flags, 0 if r.fits else r.used)
    )
    return dataclasses.replace(plan, remedies=tuple(ranked))


def _try(
    change: Change,
    config: RunConfig,
    topology: Topology,
    planner: Planner,
    tried: list[Remedy],
    on_log: Callable[[str], None],
) -> None:
    try:
        found = planner.make(with_flags(config, change.flags), change.topology)
    except (JaxftError, RuntimeError) as error:  # jaxlib's errors are RuntimeErrors
        on_log(f"{change.words}: refused, {str(error).splitlines()[0]}")
        return
    flags = dict(change.flags)
    if change.topology.name != topology.name:
        flags["topology"] = change.topology.name
    seconds = found.time.seconds if found.time else 0.0
    remedy = Remedy(
        change=change.words, flags=flags, fits=found.fits, used=found.memory.used, seconds=seconds
    )
    on_log(f"{remedy.change}: {'fits' if remedy.fits else 'does not fit'}")
    tried.append(remedy)


def single_changes(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """Yields changes of one thing, the least first."""
    topology = plan.topology
    for words, flags in _memory_changes(config, plan):
        yield Change(words, flags, topology)
    for name, sizes in (("fsdp", {}), ("fsdp_tp_sp", {"mesh.tensor": 4})):
        if config.strategy != name:
            yield Change(f"strategy {name}", {"strategy": name, **sizes}, topology)
    larger = next_larger(topology)
    if larger is not None:
        yield Change(f"the slice {larger.sold_as or larger.name}", {}, larger)


def together(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """Yields changes of several things that cost no other mesh, then with a larger slice."""
    topology = plan.topology
    flags: dict[str, Any] = {}
    for _, more in _memory_changes(config, plan):
        flags |= more
    # Sums over micro-batches take memory of their own.
    whole = {key: value for key, value in flags.items() if key != "train.accumulation"}
    smallest = whole | _smallest_micro_batches(config, plan)
    for tried in (whole, smallest) if whole != smallest else (whole,):
        yield Change(_in_words(tried), tried, topology)
    if (larger := next_larger(topology)) is not None:
        yield Change(
            f"the slice {larger.sold_as or larger.name}, {_in_words(whole)}", whole, larger
        )


def _in_words(flags: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in flags.items())


def _memory_changes(config: RunConfig, plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    model, train = config.model, config.train
    if model.remat != "full":
        yield "keep the layers' inputs alone", {"model.remat": "full", "model.offload": ""}
    if train.batch_size // train.accumulation >= 2 * _shards(plan):
        count = 2 * train.accumulation
        yield f"{count} micro-batches", {"train.accumulation": count}
    if config.objective.chunk > 128 or not config.objective.chunk:
        yield "logits of 128 positions at a time", {"objective.chunk": 128}
    if plan.topology.chip.host and model.offload != "inputs":
        flags = {"model.remat": "full", "model.offload": "inputs"}
        yield "keep the layers' inputs alone, on the host", flags


def _smallest_micro_batches(config: RunConfig, plan: Plan) -> dict[str, Any]:
    rows, left = divmod(config.train.batch_size, _shards(plan))
    return {"train.accumulation": rows} if rows > 1 and not left else {}


def _shards(plan: Plan) -> int:
    return batch_shards(load_strategy(plan.strategy), plan.mesh)
