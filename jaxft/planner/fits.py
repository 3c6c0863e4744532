"""The smallest slice of each chip on which a model can be tuned, in each of the usual ways.

Everything here is estimated in closed form, whether there is a compiler or not.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.compiled.layout import cpu_devices
from jaxft.config import AdapterConfig, RunConfig
from jaxft.config.keys import walk
from jaxft.errors import ConfigError, JaxftError, nearest
from jaxft.hardware.chips import CHIPS, Chip, chip_named
from jaxft.models.families import Architecture
from jaxft.planner.candidates import Candidate, with_flags
from jaxft.planner.plan import Plan
from jaxft.planner.planner import Planner
from jaxft.planner.prices import Prices
from jaxft.planner.search import estimate_all
from jaxft.planner.topology import Topology, sold_shape

DEFAULT_CHIPS = ("v5e", "v5p", "v6e", "l4", "a100", "h100", "h200", "b200")
# Ways to tune, by the keys that a config has if it does not say them itself.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter.rank": 0, "model.quantise": "", "optim.lora_plus": 1.0},
    "LoRA": {"adapter.rank": 16, "model.quantise": ""},
    "QLoRA": {"adapter.rank": 16, "model.quantise": "nf4"},
}
# Most devices that are looked at: a slice of v5e, a cluster of 32 machines.
_MOST = 256


@dataclass(frozen=True, slots=True)
class Fit:
    """The smallest slice of one chip on which a way to tune fits.

    Attributes:
      method: One of `METHODS`.
      chip: Name of the chip.
      plan: Estimate of the fastest run on that slice; None if there is no such slice.
      flags: Config keys that make the run.
      reason: Reason why there is no plan.
      is_known: Whether slices could be looked at; false without what their chips are planned by.
    """

    method: str
    chip: str
    plan: Plan | None = None
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    is_known: bool = True


def find_fits(
    config: RunConfig,
    architecture_of: Callable[[RunConfig], Architecture],
    prices: Prices,
    chips: Sequence[str] = (),
    *,
    on_log: Callable[[str], None] = lambda text: None,
) -> list[Fit]:
    """Returns the smallest slice of each chip for each way to tune, the cheapest tokens first.

    All devices hold a part of the weights (`fsdp`), and rows of their own.

    Args:
      config: The run's; its row length, dtypes and optimizer stay, and its adapter's rank and
        the type of its quantised weights where a way to tune has them.
      architecture_of: Reads the model of a config.
      prices: Prices of chips.
      chips: Names; empty for `DEFAULT_CHIPS`.
      on_log: Takes lines that say how far it is.

    Raises:
      ConfigError: For an unknown chip, or if the config goes on from an adapter.
      ModelError: If there is no such model, or it is not supported.
    """
    known = [_chip(name) for name in chips or DEFAULT_CHIPS]
    if config.adapter.path:
        raise ConfigError(
            f"--fit compares ways to tune a model, and adapter.path {config.adapter.path} has one "
            "already. Leave the key out, or plan the run itself, without --fit."
        )
    if config.strategy != "fsdp":
        on_log(f"The config's strategy {config.strategy} is not looked at: all fits are of fsdp.")
    # What stands for GPUs. If jax runs already, with fewer, more of them are refused when tried.
    with contextlib.suppress(ConfigError):
        cpu_devices(_MOST)
    found = []
    for method, keys in METHODS.items():
        run = with_flags(config, _chosen(config, keys))
        planner = Planner(architecture=architecture_of(run), prices=prices)
        for chip in known:
            on_log(f"Estimating {method} on {chip.name}")
            found.append(_smallest(method, run, chip, planner))
    order = list(METHODS)
    return sorted(found, key=lambda fit: (order.index(fit.method), _price(fit)))


def _chosen(config: RunConfig, keys: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a way to tune, with the config's own value of what it has at all."""
    if not keys["adapter.rank"]:
        return keys | {item.path: item.default for item in walk(AdapterConfig(), "adapter.")}
    own = {"adapter.rank": config.adapter.rank, "model.quantise": config.model.quantise}
    return {key: value and (own[key] or value) for key, value in keys.items()}


def _chip(name: str) -> Chip:
    chip = chip_named(name)
    if chip is None or chip.network is None or not chip.bandwidth:
        known = [one.name for one in CHIPS if one.network]
        raise ConfigError(
            f"--chip={name} is not known; known are {', '.join(known)}.{nearest(name, known)}"
        )
    return chip


def _slices(chip: Chip) -> Iterator[Topology]:
    """Yields the slices of a chip, or numbers of GPUs, each twice as large as the last or more."""
    for count in (1 << i for i in range(_MOST.bit_length())):
        shape = sold_shape(chip, count) if chip.is_tpu else (count,)
        if shape is not None and count * chip.cores <= _MOST:
            yield Topology(f"{chip.name}:{count}", chip, shape)


def _smallest(method: str, config: RunConfig, chip: Chip, planner: Planner) -> Fit:
    reason = ""
    for topology in _slices(chip):
        rows = -(-config.train.batch_size // topology.device_count) * topology.device_count
        run = with_flags(config, {"train.batch_size": rows})
        try:
            candidates = estimate_all(run, topology, planner, names=("fsdp",))
        except JaxftError as error:  # such as that libtpu is missing
            return Fit(method, chip.name, reason=error.problems[0], is_known=False)
        best = next(filter(lambda c: _is_possible(c, topology), candidates), None)
        if best is not None:
            flags = {**best.flags, "train.batch_size": rows}
            plan = planner.estimate(with_flags(run, flags), topology)
            return Fit(method, chip.name, plan, flags)
        reason = next((c.outcome for c in candidates if c.estimate is None), "")
    return Fit(method, chip.name, reason=reason or f"does not fit {_MOST} devices")


def _is_possible(candidate: Candidate, topology: Topology) -> bool:
    estimate = candidate.estimate
    return (
        estimate is not None
        and not candidate.flags["model.offload"]
        and estimate.bytes <= topology.chip.core.limit
    )


def _price(fit: Fit) -> tuple[bool, float, float]:
    """Returns what a fit is ordered by: the price of tokens, then the number of chips."""
    if fit.plan is None or fit.plan.speed is None:
        return True, 0.0, 0.0
    price = fit.plan.speed.price_per_million_tokens
    return False, price or float("inf"), fit.plan.topology.chips
