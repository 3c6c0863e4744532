"""`jaxft plan`, from its arguments to the plans."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft.compiled.layout import cpu_devices
from jaxft.config import RunConfig, from_dict, to_dict, to_yaml
from jaxft.errors import ConfigError, JaxftError, collected
from jaxft.files import write_text
from jaxft.formatting import format_bytes
from jaxft.models.activations import AUTO
from jaxft.planner.candidates import Candidate, Search, with_flags
from jaxft.planner.fits import Fit, find_fits
from jaxft.planner.plan import Plan
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.remedies import try_remedies
from jaxft.planner.search import search
from jaxft.planner.topology import LOCAL, Topology, next_larger, parse
from jaxft.sharding.mesh import check_sizes
from jaxft.sharding.rules import load_strategy
from jaxft.workdir.source import find_architecture


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wish for plans: where, how, and in what detail.

    Attributes:
      topologies: Names of slices.
      strategies: Names; empty for the config's alone, in a search for all that suit the model.
      search: Whether the fastest way to run is looked for.
      evaluation: Whether the eval step is planned too.
      remedies: Whether changes are tried where the run does not fit.
      prices: File of prices; empty for those that come with jaxft.
      cache: Folder of compiled programs; empty for the usual one, `off` for none.
      count: Number of candidates of a search that are compiled.
      jobs: Processes of a search; 0: as many as there are cores.
      budget: Seconds after which a search begins no compilation.
    """

    topologies: Sequence[str]
    strategies: Sequence[str] = ()
    search: bool = False
    evaluation: bool = True
    remedies: bool = True
    prices: str = ""
    cache: str = ""
    count: int = 8
    jobs: int = 0
    budget: float = 480.0


def plan(
    config: RunConfig, request: Request, *, on_log: Callable[[str], None] = lambda text: None
) -> tuple[list[Plan], list[Search]]:
    """Plans a run on each slice, with each strategy.

    Args:
      config: The run's.
      request: What is to be planned.
      on_log: Takes lines that say how far it is.

    Raises:
      ModelError: If there is no such model, or it is not supported.
      ConfigError: For an unknown slice or strategy, and where no plan can be made at all.
    """
    prices = read_prices(request.prices)
    topologies = _topologies(request.topologies)
    _check_strategies(config, request)
    made_up = [topology for topology in topologies if not topology.can_compile]
    if made_up:
        _make_up_devices(made_up, larger=request.remedies and not request.search)
    architecture = find_architecture(config)
    planner = Planner(architecture=architecture, prices=prices, cache=request.cache)
    plans: list[Plan] = []
    searches: list[Search] = []
    for topology in topologies:
        if request.search:
            searches.append(_searched(config, topology, planner, request, on_log))
            plans += _best(config, topology, planner, request, searches[-1])
        else:
            plans += _planned(config, topology, planner, request, on_log)
    return plans, searches


def fits(
    config: RunConfig,
    chips: Sequence[str],
    *,
    prices: str = "",
    on_log: Callable[[str], None] = lambda text: None,
) -> list[Fit]:
    """Returns the smallest slice of each chip for each way to tune; as `find_fits`."""
    return find_fits(config, find_architecture, read_prices(prices), chips, on_log=on_log)


def _check_strategies(config: RunConfig, request: Request) -> None:
    """Refuses strategies that are unknown or lack an axis of the config, before any is compiled."""
    problems: list[str] = []
    for name in request.strategies or [config.strategy]:
        with collected(problems):
            strategy = load_strategy(name)
            if not request.search:  # which finds the sizes itself
                check_sizes(to_dict(config.mesh), strategy, name=name)
    if problems:
        raise ConfigError(problems)


def _make_up_devices(topologies: Sequence[Topology], *, larger: bool) -> None:
    """Lets jax have as many devices as these have, or the next larger: it cannot get them later."""
    count = max(topology.device_count for topology in topologies)
    more = [found.device_count for t in topologies if larger and (found := next_larger(t))]
    try:
        cpu_devices(max([count, *more]))
    except ConfigError:  # jax runs already, with fewer: a larger slice is refused when it is tried
        cpu_devices(count)


def _best(
    config: RunConfig, topology: Topology, planner: Planner, request: Request, found: Search
) -> list[Plan]:
    """Returns the plan of a search's best candidate, with its evaluation."""
    if found.best is None or found.best.plan is None:
        return []
    if not request.evaluation:
        return [found.best.plan]
    chosen = with_flags(config, found.best.flags)
    return [planner.make(chosen, topology, evaluation=True)]


def _topologies(names: Sequence[str]) -> list[Topology]:
    found, problems = [], []
    if LOCAL in names and len(names) > 1:
        problems.append("--topology=local uses this machine's devices; plan it by itself.")
    for name in names:
        try:
            found.append(parse(name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _searched(
    config: RunConfig,
    topology: Topology,
    planner: Planner,
    request: Request,
    on_log: Callable[[str], None],
) -> Search:
    on_log(f"Searching on {topology.name}")
    return search(
        config,
        topology,
        planner,
        names=request.strategies,
        count=request.count,
        jobs=request.jobs,
        budget=request.budget,
        on_log=on_log,
    )


def _planned(
    config: RunConfig,
    topology: Topology,
    planner: Planner,
    request: Request,
    on_log: Callable[[str], None],
) -> list[Plan]:
    """Plans with each strategy; one that the run is refused with is said and left out."""
    plans, problems = [], []
    for name in request.strategies or [config.strategy]:
        chosen = config if name == config.strategy else with_flags(config, {"strategy": name})
        on_log(f"{'Compiling' if topology.can_compile else 'Estimating'} {name} on {topology.name}")
        try:
            found = _made(chosen, topology, planner, request, on_log)
        except JaxftError as error:
            problems += [f"{topology.name}, {name}: {problem}" for problem in error.problems]
            continue
        except jax.errors.JaxRuntimeError as error:
            said = (str(error).splitlines() or ["no reason"])[0]
            problems.append(f"{topology.name}, {name}: the compiler failed: {said}")
            continue
        if not found.memory.fits and request.remedies:
            found = try_remedies(found, from_dict(found.settings), planner, on_log=on_log)
        plans.append(found)
    if not plans:
        raise ConfigError(problems)
    for problem in problems:
        on_log(problem)
    return plans


def _made(
    config: RunConfig,
    topology: Topology,
    planner: Planner,
    request: Request,
    on_log: Callable[[str], None],
) -> Plan:
    """Plans a run, for `model.remat=auto` with the fastest policy that fits."""
    if config.model.remat != AUTO:
        return planner.make(config, topology, evaluation=request.evaluation)
    choice = planner.choose_remat(config, topology)
    on_log(str(choice))

    def make(remat: str) -> Plan:
        run = with_flags(config, {"model.remat": remat})
        return planner.make(run, topology, evaluation=request.evaluation)

    found = make(choice.remat)
    for policy in choice.order[1:]:
        if found.memory.fits:
            break
        on_log(f"It does not fit, by {format_bytes(-found.memory.headroom)}: {policy.remat} now")
        found = make(policy.remat)
    return found


def write_config(file: str, config: RunConfig, found: Search) -> Path:
    """Writes the config file of a search's best candidate and returns its path.

    Raises:
      ConfigError: If no candidate fits.
    """
    if found.best is None:
        raise ConfigError(
            f"No candidate was found to fit {found.topology.name}; {file} was not written."
        )
    path = Path(file)
    write_text(path, config_file(config, found.best, found.topology, suffix=path.suffix))
    return path


def config_file(
    config: RunConfig, candidate: Candidate, topology: Topology, *, suffix: str = ".py"
) -> str:
    """Returns the text of a config file that runs a candidate: Python, or YAML by the suffix."""
    chosen = with_flags(config, candidate.flags)
    default = to_dict(RunConfig())
    changed = {key: value for key, value in to_dict(chosen).items() if value != default[key]}
    title = f"{candidate.name} on {topology.name}."
    plan = candidate.plan
    if plan is not None and plan.time is not None and plan.speed is not None:
        title += (
            f"\n\nPredicted by jaxft plan, not measured: {plan.time.seconds:.3g} s a step,\n"
            f"{plan.speed.tokens_per_second_per_chip:,.0f} tokens/s a chip, "
            f"{format_bytes(plan.memory.used)} of {format_bytes(plan.memory.limit)} of memory."
        )
    if suffix != ".py":
        comment = "".join(f"# {line}".rstrip() + "\n" for line in title.splitlines())
        return f"{comment}\n{to_yaml(changed)}"
    lines = [f"    config.{key} = {_literal(value)}" for key, value in changed.items()]
    return (
        f'"""{title}\n"""\n\n'
        "from jaxft import RunConfig\n\n\n"
        "def get_config() -> RunConfig:\n"
        '    """Returns the run."""\n'
        "    config = RunConfig()\n" + "\n".join(lines) + "\n    return config\n"
    )


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
