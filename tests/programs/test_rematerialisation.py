"""Runs with `model.remat=auto`: what is chosen, recorded, resumed and tried after it."""

import json
from pathlib import Path

import jax
import pytest

from jaxft.errors import OutOfMemoryError
from jaxft.hardware.devices import Room
from jaxft.planner.candidates import REMATS, with_flags
from jaxft.programs import capacity, trainer
from jaxft.programs.capacity import TRAINING
from jaxft.programs.estimates import Estimates
from jaxft.programs.evaluation import evaluate
from jaxft.programs.trainer import train
from jaxft.training.program import Program
from jaxft.workdir.source import find_architecture
from tests.hosts import Hosts, script
from tests.tiny_run import assert_same_arrays, read_metrics


def need(config, remat: str) -> int:
    """Bytes that a step takes with a policy, by estimate."""
    run = with_flags(config, {"model.remat": remat})
    return sum(TRAINING.kinds(run, Estimates(find_architecture(run))).values())


def has(monkeypatch, limit: int, free: int | None = None) -> None:
    """Lets each device have so many bytes."""
    found = Room(limit, limit if free is None else free, "this machine")
    monkeypatch.setattr(capacity, "room", lambda devices: found)


def recorded(config) -> str:
    return json.loads((Path(config.train.workdir) / "config.json").read_text())["model.remat"]


def said(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def stop(monkeypatch, config, *, step: int) -> None:
    """Runs until a step is dispatched, which fails as a lost device would."""
    calls, original = [], trainer.put

    def put(*arguments, **options):
        calls.append(None)
        if len(calls) == step:
            raise RuntimeError("device lost")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "put", put)
        with pytest.raises(RuntimeError, match="device lost"):
            train(config)


@pytest.mark.slow(seconds=4)
def test_on_a_machine_with_memory_everything_is_kept_and_that_is_recorded(config, capfd, home):
    run = config(model__remat="auto", train__steps=2, data__validation=str(home / "held_out.jsonl"))
    result = train(run)
    assert run.model.remat == "auto"
    assert "--config.model.remat=auto: none, " in said(capfd)
    assert recorded(run) == "none"
    saved = json.loads((result.checkpoint / "config/metadata").read_text())
    assert saved["model.remat"] == "none"
    # An evaluation has no use for it.
    assert evaluate(run, result.workdir)["validation"].sums.loss.value > 0


@pytest.mark.slow(seconds=8)
def test_a_resumed_run_keeps_what_was_chosen_bit_for_bit(config, monkeypatch, capfd):
    changes = {"model__remat": "auto", "train__save_every": 2, "train__steps": 6}
    whole, parts = config("whole", **changes), config("parts", **changes)
    needed = need(whole, "attention")
    has(monkeypatch, 4 * needed, free=needed)
    train(whole)
    stop(monkeypatch, parts, step=4)
    words = said(capfd)
    assert words.count("--config.model.remat=auto: attention, ") == 2
    assert "; qkv+attention would take " in words
    assert recorded(parts) == "attention"
    # With all of its memory free the machine has room for more.
    has(monkeypatch, 4 * needed)
    result = train(parts, resume=True)
    words = said(capfd)
    assert "--config.model.remat=auto: attention, with which the run was begun, " in words
    assert "Changed since the run was started" not in words
    assert recorded(parts) == "attention"
    assert_same_arrays(
        result.workdir / "checkpoints/6", Path(whole.train.workdir) / "checkpoints/6"
    )
    assert read_metrics(result.workdir) == read_metrics(Path(whole.train.workdir))


@pytest.mark.slow(seconds=5)
def test_a_run_that_is_resumed_where_there_is_less_memory_takes_less(config, monkeypatch, capfd):
    run = config(model__remat="auto", train__save_every=2, train__steps=4)
    stop(monkeypatch, run, step=4)
    assert recorded(run) == "none"
    has(monkeypatch, need(run, "full"))
    capfd.readouterr()
    train(run, resume=True)
    assert "; none, with which the run was begun, would take " in said(capfd)
    assert recorded(run) == "full"


@pytest.mark.slow(seconds=5)
def test_what_does_not_fit_as_it_is_compiled_gives_way_to_what_takes_less(
    config, monkeypatch, capfd
):
    run = config(model__remat="auto", train__steps=2)
    tried, compile_, misfit = [], Program.compile, capacity.misfit

    def fails_once(program):
        tried.append(None)
        if len(tried) == 1:  # as the compiler for TPU does
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17G of 16G hbm."
            )
        return compile_(program)

    def misfits_once(config, step):
        return "compiled it takes 2 GiB" if len(tried) == 2 else misfit(config, step)

    monkeypatch.setattr(Program, "compile", fails_once)
    monkeypatch.setattr(capacity, "misfit", misfits_once)
    train(run)
    words = said(capfd)
    assert "none does not fit, Out of memory: Ran out of memory in memory space hbm" in words
    assert "dots is compiled in its place" in words
    assert "dots does not fit, compiled it takes 2 GiB; qkv+attention is compiled" in words
    assert len(tried) == 3
    assert recorded(run) == "qkv+attention"


def test_where_no_policy_fits_the_error_names_what_the_least_takes(config, monkeypatch, capfd):
    run = config(model__remat="auto", train__batch_size=2048)
    least = need(run, "full")
    has(monkeypatch, least // 3)
    with pytest.raises(OutOfMemoryError, match=r"(?s)by estimate it takes .*--config\.train\."):
        train(run)
    assert "--config.model.remat=auto: full, which takes least, " in said(capfd)
    # What is compiled takes more than the estimates say.
    has(monkeypatch, need(run, "none"))
    monkeypatch.setattr(Program, "compile", lambda program: None)
    monkeypatch.setattr(capacity, "misfit", lambda config, step: "compiled it takes 9 GiB")
    with pytest.raises(OutOfMemoryError, match="Training does not fit: compiled it takes 9 GiB"):
        train(run)
    words = said(capfd)
    assert [f"{remat} does not fit, compiled it takes 9 GiB" in words for remat in REMATS] == [
        *[True] * 4,
        False,
    ]
    assert not Path(run.train.workdir).exists()


def test_other_failures_of_the_compiler_are_no_reason_to_try_on(config, monkeypatch):
    def fail(program):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr(Program, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such thing"):
        train(config(model__remat="auto"))


def test_memory_that_runs_short_before_a_policy_is_chosen_is_explained(config, monkeypatch):
    def exhaust(*_, **__):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(trainer, "read_description", exhaust)
    with pytest.raises(OutOfMemoryError, match="Training takes about"):
        train(config(model__remat="auto"))


_CHOOSE = """
from jaxft.config import RunConfig
from jaxft.hardware.devices import Room
from jaxft.models.families import architecture_from_hf
from jaxft.programs import capacity, rematerialisation
from jaxft.programs.estimates import Estimates
from tests.oracle.cases import CASES

config = RunConfig()
config.model.path, config.model.remat = "model", "auto"
config.data.max_length, config.train.batch_size = 64, 4096
model = architecture_from_hf(CASES["gqa"])

def choose():
    sizes = {}
    for remat in ("none", "attention"):
        config.model.remat = remat
        sizes[remat] = sum(Estimates(model).training(config).values())
    config.model.remat = "auto"
    free = sizes["none" if distributed.is_first() else "attention"]
    capacity.room = lambda devices: Room(sizes["none"], free, "this machine")
    left = rematerialisation.settle(config, model, None, start=0)
    print(config.model.remat, left, flush=True)
"""


@pytest.mark.slow(seconds=6)
def test_hosts_that_have_unlike_memory_choose_alike_what_fits_all_of_them(tmp_path):
    with Hosts([script("choose()", before=_CHOOSE)] * 2, tmp_path, devices=2) as hosts:
        hosts.succeed()
        for host in range(2):
            assert "attention ['full']" in hosts.text(host)
