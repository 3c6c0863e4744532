"""Looking for the fastest way to run on a slice: mesh, strategy, what is kept, micro-batches.

All candidates are estimated in closed form, which takes milliseconds. Those that should fit and be
fast are compiled, in several processes, and ranked by what their programs say.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from jaxft.config import RunConfig, from_dict, to_dict
from jaxft.errors import ConfigError, JaxftError
from jaxft.formatting import format_bytes
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel
from jaxft.planner.analytic import Estimator
from jaxft.planner.candidates import Candidate, Search, variants, with_flags
from jaxft.planner.placed import Placed, attention_on, estimated_devices, place
from jaxft.planner.plan import Plan
from jaxft.planner.planner import Planner
from jaxft.planner.topology import Topology, use_compiler_alone
from jaxft.sharding.rules import Placement, mesh_axes_of
from jaxft.training.checks import check_rows, check_strategy, check_weights
from jaxft.training.program import make_placement

# How far an estimate of memory may be over what there is and still be worth compiling.
_SLACK = 1.15
_BROKEN = "a process that compiled was killed, for memory perhaps; try --jobs=1"
# Strategies whose candidates are compiled though others are estimated faster: within this factor.
_CLOSE = 1.5


def search(
    config: RunConfig,
    topology: Topology,
    planner: Planner,
    *,
    names: Sequence[str] = (),
    count: int = 8,
    jobs: int = 0,
    budget: float = 480.0,
    on_log: Callable[[str], None] = lambda text: None,
) -> Search:
    """Finds the fastest candidate for a config's model, rows and batch size on a slice.

    Args:
      config: The run's; its batch size, row length and other keys stay.
      topology: The slice.
      planner: Makes plans.
      names: Strategies to look at; by default all built-in ones that suit the model.
      count: How many that fit are compiled.
      jobs: Processes that compile; 0: as many as there are cores, 8 at most.
      budget: Seconds after which no further compilation begins.
      on_log: Takes lines that say how far it is.

    Raises:
      ConfigError: If no candidate is possible at all, with the reasons.
    """
    started = time.monotonic()
    if not (topology.chip.bfloat16 and topology.chip.bandwidth):
        raise ConfigError(
            f"A search ranks by time, and no figures of {topology.chip.name!r} are published. Plan "
            "single runs on it, or search on a slice."
        )
    candidates = estimate_all(config, topology, planner, names=names)
    # A plan of what cannot be compiled is the same estimate once more.
    limit = topology.chip.core.limit * (_SLACK if topology.can_compile else 1.0)
    hopeful = [c for c in candidates if c.estimate and c.estimate_bytes <= limit]
    what = "compiling" if topology.can_compile else "planning by estimate"
    on_log(
        f"{len(candidates)} candidates, {len(hopeful)} of them may fit; {what} the most promising "
        f"{min(count, len(hopeful))}."
    )
    if not any(c.estimate for c in candidates):
        reasons = list(dict.fromkeys(c.outcome.removeprefix("refused: ") for c in candidates))
        raise ConfigError(reasons[:5] or "There is no strategy to try.")
    done: dict[int, Candidate] = {}
    if topology.can_compile:
        run = _Compiler(config, topology, planner, jobs=jobs)
        done = run.compile(_promising(hopeful), count=count, until=started + budget, on_log=on_log)
    else:
        done = {id(c): _estimated(c, config, topology, planner) for c in hopeful[:count]}
    ranked = [
        done.get(id(c)) or dataclasses.replace(c, outcome=_why_not(c, limit)) for c in candidates
    ]
    ranked.sort(key=lambda c: (not c.is_compiled, c.estimate is None, c.seconds))
    return Search(topology=topology, candidates=tuple(ranked), seconds=time.monotonic() - started)


def _estimated(
    candidate: Candidate, config: RunConfig, topology: Topology, planner: Planner
) -> Candidate:
    plan = planner.estimate(with_flags(config, candidate.flags), topology)
    outcome = "estimated" if plan.fits else "estimated not to fit"
    return dataclasses.replace(candidate, plan=plan, outcome=outcome)


def _why_not(candidate: Candidate, limit: float) -> str:
    if candidate.estimate is None:
        return candidate.outcome
    fits = candidate.estimate_bytes <= limit
    return "estimated slower" if fits else "estimated not to fit"


def estimate_all(
    config: RunConfig, topology: Topology, planner: Planner, *, names: Sequence[str] = ()
) -> list[Candidate]:
    """Returns every candidate with its estimate, the fastest first."""
    architecture = planner.architecture
    abstract = architecture.abstract(make_numerics(config.model.dtypes))
    estimator = Estimator(architecture=architecture, topology=topology, rates=planner.rates)
    devices = estimated_devices(topology)
    known: dict[tuple, Placed | JaxftError | None] = {}
    signatures: set[tuple] = set()
    found = []
    for flags in variants(config, topology, architecture, names=names):
        changed = with_flags(config, flags)
        where = tuple(item for item in flags.items() if item[0].startswith(("mesh.", "strategy")))
        if where not in known:
            known[where] = _placed(changed, topology, architecture, abstract, devices, signatures)
        placed = known[where]
        if placed is None:
            continue
        try:
            if isinstance(placed, JaxftError):
                raise placed
            check_rows(changed, placed.placement)
            found.append(Candidate(flags=flags, estimate=estimator.estimate(changed, placed)))
        except JaxftError as error:
            found.append(
                Candidate(flags=flags, estimate=None, outcome=f"refused: {error.problems[0]}")
            )
    return sorted(found, key=lambda c: c.estimate_seconds)


def _placed(
    config: RunConfig,
    topology: Topology,
    architecture: Architecture,
    abstract: AbstractModel,
    devices: Sequence[Any],
    signatures: set[tuple],
) -> Placed | JaxftError | None:
    """Returns the model under a strategy, why it is refused, or None if it was looked at before.

    Where an axis has one device, a strategy may be another one by another name.
    """
    try:
        placement = make_placement(config, devices)
        check_strategy(config, architecture, placement)
        check_weights(abstract, placement, (placement.batch_shards, config.data.max_length))
        signature = _signature(placement, abstract)
        attention = attention_on(config, architecture, topology, placement)
        if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
            signature = (*signature, placement.strategy.across_slices)
    except JaxftError as error:
        return error
    if signature in signatures:
        return None
    signatures.add(signature)
    return place(config, architecture, placement, abstract, attention)


def _signature(placement: Placement, abstract: AbstractModel) -> tuple:
    """Returns what a placement does to this model: two of the same make the same program."""
    rules = (placement.strategy.rules, placement.gradient_rules, placement.moment_rules)
    shardings = [placement.shardings(abstract.params, abstract.axes, rules=r) for r in rules]
    of_activations = tuple(
        (axis, tuple(name for name in mesh_axes_of(target) if placement.mesh.shape[name] > 1))
        for axis, target in sorted(placement.strategy.rules.items())
        if axis.startswith("act_") or axis in ("batch", "seq", "stream_seq")
    )
    mesh = tuple((axis, size) for axis, size in placement.mesh.shape.items() if size > 1)
    return (
        mesh,
        tuple(str(found[path].spec) for found in shardings for path in abstract.params),
        tuple(entry for entry in of_activations if entry[1]),
    )


def _promising(candidates: list[Candidate]) -> list[Candidate]:
    """Returns the candidates in the order in which they are compiled.

    The best of each strategy comes first if it is not far behind: estimates tell strategies apart
    less surely than variants of one. Those that keep something on the host, which take the compiler
    several times as long, come after those that do not.
    """
    ahead: dict[tuple[bool, str], Candidate] = {}
    for candidate in candidates:
        if candidate.estimate_seconds <= _CLOSE * candidates[0].estimate_seconds:
            key = bool(candidate.flags["model.offload"]), candidate.flags["strategy"]
            ahead.setdefault(key, candidate)
    first = [ahead[key] for key in sorted(ahead, key=lambda key: key[0])]
    taken = {id(candidate) for candidate in first}
    return first + [c for c in candidates if id(c) not in taken]


class _Compiler:
    """Compiles candidates in processes of their own."""

    def __init__(self, config: RunConfig, topology: Topology, planner: Planner, *, jobs: int):
        self.config, self.topology, self.planner = config, topology, planner
        self.jobs = jobs or min(8, len(os.sched_getaffinity(0)))

    def compile(
        self,
        order: list[Candidate],
        *,
        count: int,
        until: float,
        on_log: Callable[[str], None],
    ) -> dict[int, Candidate]:
        """Compiles until `count` fit or the time is over; returns those compiled, by identity."""
        done: dict[int, Candidate] = {}
        waiting, running = list(order), {}
        with self._pool() as pool:
            while waiting or running:
                fitting = sum(c.is_compiled for c in done.values())
                while (
                    waiting
                    and len(running) < self.jobs
                    and fitting + len(running) < count
                    and time.monotonic() < until
                ):
                    candidate = waiting.pop(0)
                    config = with_flags(self.config, candidate.flags)
                    try:
                        future = pool.submit(_plan, to_dict(config), self.topology, self.planner)
                    except BrokenProcessPool:
                        on_log(_BROKEN)
                        return done
                    running[future] = candidate
                if not running:
                    break
                finished, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    candidate = running.pop(future)
                    done[id(candidate)] = found = _outcome(candidate, future)
                    on_log(f"{len(done)}: {found.name}: {_result(found)}")
        return done

    def _pool(self) -> concurrent.futures.Executor:
        if self.topology.local:  # this machine's devices belong to this process
            return concurrent.futures.ThreadPoolExecutor(1)
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(
            self.jobs, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)
        )


def _begin_worker(parent: int) -> None:
    """Prepares a process that compiles, and lets it end with the one that started it."""
    use_compiler_alone()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # nobody waits for the result; the compiler cannot be interrupted

    threading.Thread(target=follow, daemon=True).start()


def _plan(values: dict[str, Any], topology: Topology, planner: Planner) -> Plan:
    return planner.plan(from_dict(values), topology)


def _outcome(candidate: Candidate, future: concurrent.futures.Future) -> Candidate:
    try:
        plan = future.result()
    except BrokenProcessPool:
        return dataclasses.replace(candidate, outcome=f"refused: {_BROKEN}")
    except (JaxftError, jax.errors.JaxRuntimeError) as error:  # others may still do
        lines = str(error).splitlines() or [type(error).__name__]
        return dataclasses.replace(candidate, outcome=f"refused: {lines[0]}")
    outcome = "compiled" if plan.fits else "does not fit"
    return dataclasses.replace(candidate, plan=plan, outcome=outcome)


def _result(candidate: Candidate) -> str:
    if candidate.plan is None:
        return candidate.outcome
    if candidate.plan.time is None:
        return f"does not fit, by {format_bytes(-candidate.plan.memory.headroom)}"
    return f"{candidate.plan.time.seconds:.3g} s a step"
