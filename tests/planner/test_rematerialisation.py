"""`model.remat=auto`: the policy that is chosen, against all of them planned one by one."""

import dataclasses
from typing import Any

import pytest

from jaxft.config import RunConfig
from jaxft.hardware.chips import CHIPS
from jaxft.models.families import architecture_from_hf
from jaxft.planner import command
from jaxft.planner.analytic import Estimator
from jaxft.planner.candidates import REMATS, with_flags
from jaxft.planner.placed import estimated_devices, place_run
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.rematerialisation import Policy, choose, estimate_policies
from jaxft.planner.search import estimate_all
from jaxft.planner.topology import Topology, parse
from tests.tpu import compiles_for_tpu
from tests.write_golden import MODELS


def run(rows: int, length: int, **flags: Any) -> RunConfig:
    config = RunConfig()
    config.model.path, config.model.remat = "model", "auto"
    config.data.max_length, config.train.batch_size = length, rows
    return with_flags(config, {key.replace("__", "."): value for key, value in flags.items()})


def planner(model: str) -> Planner:
    architecture = architecture_from_hf(MODELS[model])
    return Planner(architecture=architecture, prices=read_prices(), cache="off")


def by_brute_force(config: RunConfig, model: str, topology: Topology) -> str:
    """Plans with every policy; returns the fastest that fits, or that of least memory."""
    plans = {
        remat: planner(model).estimate(with_flags(config, {"model.remat": remat}), topology)
        for remat in REMATS
    }
    fitting = {remat: plan.time.seconds for remat, plan in plans.items() if plan.time}
    if fitting:
        return min(fitting, key=fitting.__getitem__)
    return min(plans, key=lambda remat: plans[remat].memory.used)


# In short rows to keep all takes longer than to make it again, in rows of 16,384 attention does.
# Where scores of whole rows pass through memory only products are worth keeping.
CHOICES = [
    ("llama_8b", "b200:8", run(8, 16384, model__dtypes="bfloat16"), "none"),
    ("llama_8b", "a100:8", run(16, 4096), "dots"),
    ("qwen3_30b_a3b", "b200:8", run(64, 4096), "qkv+attention"),
    ("llama_8b", "l4:8", run(16, 4096), "full"),
]


@pytest.mark.slow(seconds=20, but="^1$")
@pytest.mark.parametrize(
    ("model", "slice_", "config", "expected"), CHOICES, ids=map(str, range(len(CHOICES)))
)
def test_the_fastest_policy_that_fits_by_estimate_is_chosen(model, slice_, config, expected):
    topology = parse(slice_)
    choice = planner(model).choose_remat(config, topology)
    assert choice.remat == by_brute_force(config, model, topology) == expected
    sizes = [policy.bytes for policy in choice.order]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.slow(seconds=4)
@compiles_for_tpu
def test_the_same_holds_of_a_tpu():
    config, topology = run(8, 2048), parse("v6e-8")
    choice = planner("llama_8b").choose_remat(config, topology)
    assert choice.remat == by_brute_force(config, "llama_8b", topology)


def test_a_search_finds_the_same_policy_with_the_same_figures():
    config, topology = run(64, 4096), parse("h100:8")
    candidates = [
        candidate
        for candidate in estimate_all(config, topology, planner("llama_8b"), names=["fsdp"])
        if candidate.flags["mesh.fsdp"] == 8
        and candidate.flags["train.accumulation"] == 1
        and not candidate.flags["model.offload"]
    ]
    assert len(candidates) == len(REMATS)
    first = planner("llama_8b").choose_remat(config, topology).order[0]
    fitting = [c for c in candidates if c.estimate_bytes <= topology.chip.limit]
    assert fitting[0].flags["model.remat"] == first.remat
    assert (fitting[0].estimate_bytes, fitting[0].estimate_seconds) == (first.bytes, first.seconds)


def policies_on(topology: Topology, config: RunConfig) -> list[Policy]:
    architecture = architecture_from_hf(MODELS["llama_8b"])
    placed = place_run(config, architecture, topology, estimated_devices(topology))
    estimator = Estimator(architecture=architecture, topology=topology)
    return estimate_policies(config, estimator, placed)


def test_where_rates_are_not_known_what_keeps_most_comes_first():
    known = parse("h100:8")
    chip = dataclasses.replace(known.chip, bandwidth=0.0)
    unknown = policies_on(dataclasses.replace(known, chip=chip), run(8, 32768))
    assert [policy.remat for policy in unknown] == list(REMATS)
    timed = policies_on(known, run(8, 32768))
    assert [policy.remat for policy in timed] != list(REMATS)
    sizes = [{policy.remat: policy.bytes for policy in found} for found in (unknown, timed)]
    assert sizes[0] == sizes[1]
    # It is not known either what a link of it carries.
    assert not any(chip.is_timed for chip in CHIPS if chip.name in ("gh200", "l40s"))


GIB = 2**30
FAST = [Policy(remat, size * GIB) for remat, size in zip(REMATS, (9, 5, 7, 4, 2), strict=True)]


def names(order) -> list[str]:
    return [policy.remat for policy in order]


def test_what_is_tried_next_takes_less_and_is_the_fastest_that_does():
    choice = choose(FAST, 10 * GIB)
    assert names(choice.order) == ["none", "dots", "attention", "full"]
    assert str(choice) == "--config.model.remat=auto: none, 9 GiB of 10 GiB by estimate."
    choice = choose(FAST, 6 * GIB)
    assert names(choice.order) == ["dots", "attention", "full"]
    assert str(choice) == (
        "--config.model.remat=auto: dots, 5 GiB of 6 GiB by estimate; none would take 9 GiB."
    )
    choice = choose(FAST, 4 * GIB)
    assert str(choice).endswith(
        "attention, 4 GiB of 4 GiB by estimate; qkv+attention would take 7 GiB."
    )


def test_where_nothing_fits_or_nothing_is_known_the_least_is_chosen_and_said():
    assert str(choose(FAST, GIB)) == (
        "--config.model.remat=auto: full, which takes least, 2 GiB by estimate, though a device "
        "has 1 GiB."
    )
    assert str(choose(FAST, 0)) == (
        "--config.model.remat=auto: full, which takes least, 2 GiB by estimate, as what a device "
        "has is not known."
    )


def test_a_run_that_is_resumed_keeps_its_policy_where_it_fits_all_memory():
    begun = Policy("attention", 4 * GIB)
    for free, limit, of in (
        (10 * GIB, 10 * GIB, " of 10 GiB"),
        (GIB, 4 * GIB, " of 4 GiB"),
        (0, 0, ""),
    ):
        choice = choose(FAST, free, begun=begun, limit=limit)
        assert names(choice.order) == ["attention", "full"]
        assert f"attention, with which the run was begun, 4 GiB{of} by estimate." in str(choice)
    smaller = choose(FAST, 3 * GIB, begun=begun, limit=3 * GIB)
    assert str(smaller) == (
        "--config.model.remat=auto: full, 2 GiB of 3 GiB by estimate; attention, with which the "
        "run was begun, would take 4 GiB."
    )
    least = Policy("full", 2 * GIB)
    assert "would take" not in str(choose(FAST, GIB, begun=least, limit=GIB))


def plan(config: RunConfig, name: str, **patches: Any):
    """What `jaxft plan` makes of a run, without remedies, and its log."""
    said: list[str] = []
    request = command.Request(topologies=[name], remedies=False, cache="off")
    [found] = command._planned(config, parse(name), planner("llama_8b"), request, said.append)
    return found, said


def test_a_plan_is_of_the_policy_that_is_chosen():
    found, said = plan(run(32, 4096), "h100:8")
    assert found.settings["model.remat"] == "dots" and found.fits
    assert said[1] == ("--config.model.remat=auto: dots, 64.9 GiB of 73.6 GiB by estimate.")


def test_a_plan_that_does_not_fit_as_it_is_compiled_goes_on_to_less(monkeypatch):
    make = Planner.make

    def compiled(self, config, topology, **options):
        plan = make(self, config, topology, **options)
        more = dataclasses.replace(plan.memory, used=3 * plan.memory.used)
        return dataclasses.replace(plan, memory=more)

    monkeypatch.setattr(Planner, "make", compiled)
    found, said = plan(run(16, 4096), "h100:8")
    assert found.settings["model.remat"] == "attention" and found.memory.fits
    assert (
        len(said) == 4
        and "does not fit, by 52" in said[2]
        and said[2].endswith("qkv+attention now")
        and said[3].endswith("attention now")
    )
    # What takes least is the plan, and remedies start from there.
    found, said = plan(run(128, 4096), "h100:8")
    assert found.settings["model.remat"] == "full" and not found.memory.fits
