"""What a run takes, held against the compiled step, and how a lack of memory is told."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import cli
from jaxft.cli import looking
from jaxft.compiled.layout import make_program
from jaxft.errors import OutOfMemoryError
from jaxft.hardware.devices import Room, host_memory_free, host_memory_total, room, shortage
from jaxft.planner.candidates import with_flags
from jaxft.programs import capacity, model, trainer, weights
from jaxft.programs.capacity import EVALUATION, TRAINING, find_changes
from jaxft.programs.estimates import Estimates
from jaxft.programs.evaluation import evaluate
from jaxft.programs.trainer import train
from jaxft.training.program import make_placement
from jaxft.workdir.source import find_architecture
from tests.tiny_run import command

MIB = 2**20
# Rows that no machine has room for.
ABSURD = 10**9


def compiled_bytes(config):
    """What the compiler says that a training step takes on a device."""
    architecture = find_architecture(config)
    program = make_program(config, architecture, placement=make_placement(config))
    memory = program.compile().memory_analysis()
    apart = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + apart


def estimated_bytes(config, task=TRAINING):
    return sum(task.kinds(config, Estimates(find_architecture(config))).values())


def changes_for(config, limit, task=TRAINING):
    """The changes with which a run fits into so many bytes."""
    estimates = Estimates(find_architecture(config))
    kinds = task.kinds(config, estimates)
    assert sum(kinds.values()) > limit
    return find_changes(task, config, estimates, kinds, Room(limit, limit, "this machine"))


def has(monkeypatch, limit, free=None):
    """Lets each device have so many bytes."""
    found = Room(limit, limit if free is None else free, "this machine")
    monkeypatch.setattr(capacity, "room", lambda devices: found)
    monkeypatch.setattr(model, "room", lambda devices: found)
    monkeypatch.setattr(weights, "room", lambda devices: found)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize(
    "flags",
    [{}, {"model.remat": "full"}, {"train.accumulation": 2, "model.dtypes": "mixed"}],
    ids=["none", "full", "accumulated"],
)
def test_estimates_of_this_machine_are_near_what_is_compiled(config, flags):
    run = with_flags(config(train__batch_size=2048), flags)
    assert 0.75 < estimated_bytes(run) / compiled_bytes(run) < 1.35


@pytest.mark.slow(seconds=9)
def test_changes_that_are_found_fit_when_they_are_compiled(config):
    run = config(train__batch_size=2048)
    limit = compiled_bytes(run) // 3
    found = changes_for(run, limit)
    assert found and all(change.same for change in found)
    for change in found:
        assert change.bytes <= limit
        assert compiled_bytes(with_flags(run, change.flags)) < 1.2 * limit


def test_the_least_change_comes_first_and_those_of_the_result_last(config):
    run = config(train__batch_size=2048, strategy="fsdp", mesh__fsdp=1)
    whole = estimated_bytes(run)
    first = changes_for(run, int(0.9 * whole))[0]
    assert first.flags == {"model.remat": "full"}
    assert {"train.accumulation": 2} in [c.flags for c in changes_for(run, int(0.9 * whole))]
    # 50 MiB of it are the program, which nothing makes smaller.
    other = changes_for(run, 51 * MIB)
    assert other and not any(change.same for change in other)
    assert "another result" in str(other[0])
    assert changes_for(run, 50 * MIB) == []


def test_a_strategy_that_splits_what_is_held_is_found(config):
    run = config(train__batch_size=8, mesh__data=8)
    whole = estimated_bytes(run)
    found = changes_for(run, whole - 200_000)
    [change] = [c for c in found if c.flags == {"strategy": "fsdp", "mesh.data": 0}]
    assert change.same
    assert change.bytes == estimated_bytes(with_flags(run, change.flags))


@pytest.mark.slow(seconds=2)
def test_a_run_that_no_machine_has_room_for_is_refused_before_its_data(config, tmp_path, capfd):
    with pytest.raises(OutOfMemoryError) as error:
        train(config(train__batch_size=ABSURD))
    said = str(error.value)
    assert "Training does not fit: by estimate it takes" in said
    assert "--config.train.batch_size=" in said
    assert "Data" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluation_that_no_machine_has_room_for_is_refused_with_its_own_flag(config, home):
    run = config(eval__batch_size=ABSURD, data__validation=str(home / "held_out.jsonl"))
    with pytest.raises(OutOfMemoryError, match=r"--config\.eval\.batch_size=\d+  \("):
        evaluate(run)
    # A run that evaluates does not fit either.
    with pytest.raises(OutOfMemoryError, match=r"--config\.eval\.batch_size=\d+  \("):
        train(run)


@pytest.mark.slow(seconds=4)
def test_what_is_held_throughout_is_refused_and_what_may_not_fit_is_warned_of(
    config, monkeypatch, capfd
):
    run = config(train__batch_size=64, train__steps=2)
    kinds = TRAINING.kinds(run, Estimates(find_architecture(run)))
    has(monkeypatch, kinds["parameters"] + kinds["optimizer"] - 1)
    with pytest.raises(OutOfMemoryError, match="parameters and optimizer alone take"):
        train(run)
    whole = sum(kinds.values())
    has(monkeypatch, limit=2 * whole, free=whole - MIB)
    train(run)
    said = " ".join(capfd.readouterr().err.split())
    assert "Training may not fit: by estimate it takes" in said
    assert "It may end for lack of memory, on a CPU without a word." in said
    assert "--config.train.accumulation=" in said


@pytest.mark.slow(seconds=2)
def test_a_step_that_is_compiled_and_takes_more_than_there_is_loads_no_weights(
    config, monkeypatch, capfd
):
    run = config(train__batch_size=2048)
    has(monkeypatch, int(0.8 * compiled_bytes(run)))
    with pytest.raises(OutOfMemoryError, match="Training does not fit: compiled it takes"):
        train(run)
    assert "Weights" not in capfd.readouterr().err


# Lets XLA and NumPy run out of memory that the machine has: of the address space so much is left.
SHORT = """
import resource, sys
from jaxft import cli
from jaxft.programs import model, trainer
def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, -1))
original = MODULE.NAME
def short(*args, **kwargs):
    limit(MORE)
    return original(*args, **kwargs)
MODULE.NAME = short
sys.exit(cli.main(sys.argv[1:]))
"""


def run_short(arguments, *, before, more=2**29, lines=""):
    """Runs a command whose memory is short from a function on."""
    module, _, name = before.partition(".")
    program = SHORT.replace("MODULE", module).replace("NAME", name).replace("MORE", str(more))
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=lines,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == 1, result.stderr
    return result.stderr


@pytest.mark.slow(seconds=15)
def test_training_that_runs_out_of_memory_says_what_would_fit(config):
    arguments = command(config(train__batch_size=1024))[3:]
    said = run_short(arguments, before="trainer._loop", more=2**28)
    assert re.search(r"jaxft: Out of memory (allocating|while) .*\d+ bytes", said), said
    assert "Training takes about" in said and "--config.train.accumulation=" in said
    assert "--config.model.remat=full" in said


def test_generation_that_runs_out_of_memory_says_what_takes_less(home, config, monkeypatch):
    config()
    monkeypatch.setattr(
        model, "generate_tokens", lambda *_, **__: jax.block_until_ready(jnp.zeros(10**14))
    )
    with pytest.raises(OutOfMemoryError) as error:
        jaxft.load(home / "base").generate(["abc"] * 100, max_new_tokens=60)
    said = str(error.value)
    assert "Out of memory" in said and "Prompts at a time: 64, of up to 63 tokens" in said
    assert "at most 32 prompts" in said and "--dtypes=bfloat16" in said


def test_weights_that_do_not_fit_are_refused_before_they_are_read(home, config, monkeypatch):
    config()
    monkeypatch.setattr(model, "load_weights", pytest.fail)
    has(monkeypatch, 1000)
    with pytest.raises(OutOfMemoryError, match=r"as float32, and this machine.*--dtypes=bfloat16"):
        jaxft.load(home / "base")
    with pytest.raises(OutOfMemoryError, match=r"as bfloat16, and this machine.*placement"):
        jaxft.load(home / "base", dtypes="bfloat16")


def test_a_command_that_runs_out_of_the_hosts_memory_ends_in_words(monkeypatch, capsys):
    def exhaust(*_, **__):
        np.zeros(10**15)

    monkeypatch.setattr(looking, "config_of", exhaust)
    assert cli.main(["data"]) == 1
    assert "jaxft: Out of memory: Unable to allocate" in capsys.readouterr().err


def error_of(make):
    with pytest.raises(Exception) as error:
        make()
    return error.value


def test_a_shortage_is_told_from_other_errors():
    of_xla = error_of(lambda: jax.block_until_ready(jnp.zeros(10**14)))
    assert shortage(of_xla) == f"Out of memory allocating {4 * 10**14} bytes."
    of_numpy = error_of(lambda: np.zeros(10**15))
    assert shortage(of_numpy).startswith("Out of memory: Unable to allocate")
    hidden = RuntimeError("checkpoint 3 cannot be written")
    hidden.__cause__ = of_xla
    assert shortage(hidden) == shortage(of_xla)
    # What TPU and GPU compilers, allocators and libraries say.
    for text in (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm.",
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.",
        "INTERNAL: Failed to allocate 8 bytes for new constant",
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "INTERNAL: cuBLAS: CUBLAS_STATUS_ALLOC_FAILED",
    ):
        assert shortage(jax.errors.JaxRuntimeError(text)).startswith("Out of memory")
    for other in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Received message larger than max"),
        jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset"),
        RuntimeError("out of memory, as a test of words says"),
        OSError(2, "No such file or directory"),
    ):
        assert shortage(other) == ""


def test_devices_of_a_cpu_share_the_hosts_memory():
    devices = jax.local_devices()
    assert room(devices).limit == host_memory_total() // len(devices)
    assert 0 < host_memory_free() <= host_memory_total()
    assert str(Room(8 << 30, 2 << 30, "a chip")) == "a chip has 8 GiB, 2 GiB of it free"
    assert str(Room(8 << 30, 8 << 30, "a chip")) == "a chip has 8 GiB"


def test_other_errors_of_a_run_stay_what_they_are(config, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("device lost")

    monkeypatch.setattr(trainer, "_loop", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        train(config())


def test_evaluation_is_estimated_beside_the_optimizers_state(config, home):
    run = config(eval__batch_size=4096)
    alone = estimated_bytes(run)
    run.data.validation = str(home / "held_out.jsonl")
    kinds = TRAINING.kinds(run, Estimates(find_architecture(run)))
    tested = EVALUATION.kinds(run, Estimates(find_architecture(run)))
    assert sum(kinds.values()) == sum(tested.values()) + kinds["optimizer"] > alone
