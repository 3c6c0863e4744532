"""Runs of several real processes: equal results, checkpoints, and the ways in which they end."""

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft import distributed
from jaxft.config import RunConfig
from jaxft.data.batch import STANDARD, Batch
from jaxft.distributed import launch
from jaxft.errors import ConfigError
from jaxft.programs.evaluation import evaluate
from jaxft.programs.trainer import train
from jaxft.training.feeding import put
from jaxft.training.program import make_placement
from tests.hosts import Hosts, script, train_on
from tests.tiny_run import command, read_metrics, read_records, tiny_config, write_chats

STEPS = 8
# Rows go round the hosts: each holds some that do not follow one another.
INTERLEAVED = """
from jaxft.sharding.rules import Strategy
STRATEGY = Strategy(
    mesh_axes=("data", "fsdp"), fill="data", rules={"batch": ("fsdp", "data"), "embed": "fsdp"}
)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model and data that all runs share."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def configure(home):
    """Makes configs of the same run under other names and placements."""

    def configure(workdir: str, **changes: object) -> RunConfig:
        common = {
            "data__validation": str(home / "held_out.jsonl"),
            "train__steps": STEPS,
            "train__batch_size": 8,
            "train__accumulation": 1,
            "train__save_every": 4,
            "train__keep_last": 3,
            "eval__samples": 2,
            "eval__max_new_tokens": 4,
            "eval__answers": "exact",
            "eval__answer_rows": 5,
            "eval__max_rows": 4,
            "mesh__data": 0,
        }
        return tiny_config(home, workdir, **common | changes)

    return configure


@pytest.fixture(scope="module")
def reference(configure):
    """Folder of the run in one process on one device."""
    return train(configure("reference", mesh__data=1)).workdir


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints."""
    return [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal()]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Compares what two runs recorded; whatever depends on the order of rows must be equal."""
    found, expected = read_metrics(folder), read_metrics(reference)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for record, other in zip(found, expected, strict=True):
        for name in ("step", "learning_rate", "tokens", "trained_tokens"):
            assert record[name] == other[name]
        for name in ("loss", "grad_norm"):
            assert record[name] == pytest.approx(other[name], rel=1e-5)
    evaluations = [read_records(path / "eval.jsonl") for path in (folder, reference)]
    assert len(evaluations[0]) == len(evaluations[1])
    for record, other in zip(*evaluations, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for name in ("weight", "exact_match", "rows", "digest"):
            assert record[name] == other[name]
    assert read_records(folder / "samples.jsonl") == read_records(reference / "samples.jsonl")


@pytest.mark.slow(seconds=7)
def test_two_hosts_train_as_one_process_does_and_the_first_alone_speaks(
    configure, reference, tmp_path
):
    config = configure("two", strategy="fsdp")
    with train_on(2, config, tmp_path, "--profile=2", devices=2) as hosts:
        hosts.succeed()
        assert "cpu devices of 2 hosts (data=1 x fsdp=4)" in hosts.text(0)
        assert "Steps 3 to 4 were traced" in hosts.text(0)
        # Gloo writes its line in pieces, between which those of another thread may fall.
        gloo = r"\[Gloo\] Rank|is connected to|Expected number of connected|peer ranks( is :|\.)"
        assert re.sub(gloo + r"|\d|\s", "", hosts.text(1)) == ""
    folder = Path(config.train.workdir)
    assert_same_run(folder, reference)
    assert (folder / "report.html").is_file()
    assert len(list((folder / "events").iterdir())) == 1
    # Both run on this machine, so that one alone traces.
    assert len(list(folder.glob("profile/plugins/profile/steps_3_to_4/*.xplane.pb"))) == 1


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(
    ("count", "strategy", "mesh"),
    [
        (4, "other.interleaved", {"mesh__fsdp": 2}),
        # Two hosts hold the same rows, and other parts of the heads.
        (4, "fsdp_tp", {"mesh__tensor": 4}),
    ],
)
def test_hosts_train_as_one_process_does(configure, reference, tmp_path, count, strategy, mesh):
    config = configure(f"hosts_{strategy}", strategy=strategy, **mesh)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/interleaved.py").write_text(INTERLEAVED)
    with train_on(count, config, tmp_path, devices=8 // count) as hosts:
        hosts.succeed()
    assert_same_run(Path(config.train.workdir), reference)


@pytest.mark.slow(seconds=80)
def test_a_run_of_four_hosts_goes_on_with_two_and_with_one(configure, reference, tmp_path):
    config = configure("fewer", strategy="fsdp", mesh__fsdp=8)

    def stop_after(step: int) -> None:
        """Leaves the folder as a run that was killed after a step would."""
        for saved in (Path(config.train.workdir) / "checkpoints").iterdir():
            if int(saved.name) > step:
                shutil.rmtree(saved)

    def position(step: int) -> dict[str, Any]:
        file = Path(config.train.workdir) / f"checkpoints/{step}/progress/metadata"
        return json.loads(file.read_text())["data"]

    with train_on(4, config, tmp_path, devices=2) as hosts:
        hosts.succeed()
    last = position(STEPS)
    stop_after(4)
    with train_on(2, config, tmp_path, "--resume", devices=4) as hosts:
        hosts.succeed()
        assert "checkpoint of step 4" in hosts.text(0)
    assert_same_run(Path(config.train.workdir), reference)
    assert position(STEPS) == last
    stop_after(4)
    train(config, resume=True)
    assert_same_run(Path(config.train.workdir), reference)
    assert position(STEPS) == last


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(("count", "killed"), [(2, 0), (3, 1)])
def test_when_a_host_is_killed_the_others_say_so_within_a_minute_and_the_run_resumes(
    configure, tmp_path, count, killed
):
    config = configure(
        f"killed{killed}",
        train__steps=5000,
        train__save_every=20,
        train__batch_size=12,
        data__validation="",
        eval__answers="none",
    )
    folder = Path(config.train.workdir)
    with train_on(count, config, tmp_path, devices=2) as hosts:
        hosts.wait_until(lambda: saved_steps(folder))
        hosts.send(killed, signal.SIGKILL)
        since = time.monotonic()
        status = hosts.wait(timeout=60)
        assert time.monotonic() - since < 60
        others = [i for i in range(count) if i != killed]
        assert all(status[i] for i in others)
        for i in others:
            # Gloo may end a host before its watch can: then its sentinel points to host 0's log.
            hosts.expect(i, "Complete checkpoints are intact")
            assert re.search(
                rf"host {killed} .*(was lost|ended)|another host was lost", hosts.text(i)
            )
        if killed:
            assert re.search(r"host 1 \(.*\) was lost: no sign of life", hosts.text(0))
            assert "*** Check failure stack trace" not in hosts.text(0)
    saved = max(saved_steps(folder))
    config.train.steps, config.mesh.data = saved + 2, 4
    train(config, resume=True)
    assert [r["step"] for r in read_metrics(folder)] == list(range(1, saved + 3))


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize(("host", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_host_lets_all_save_the_same_step_and_stop(
    configure, tmp_path, host, number
):
    config = configure(
        f"signal{host}",
        train__steps=5000,
        train__save_every=0,
        train__batch_size=12,
        data__validation="",
        eval__answers="none",
    )
    folder = Path(config.train.workdir)
    with train_on(2, config, tmp_path, devices=2) as hosts:
        hosts.wait_until(lambda: "step 20/" in hosts.text(0))
        # The first host holds the lock for all.
        held = json.loads((folder / "run.lock").read_text())
        assert held["pid"] == hosts.processes[0].pid
        hosts.send(host, number)
        assert set(hosts.wait().values()) == {143}, hosts.all_text()
        assert "Stopped by SIGTERM after step" in hosts.text(0)
    step = read_metrics(folder)[-1]["step"]
    assert 20 <= step < 5000
    assert f"Stopped by SIGTERM after step {step}, which is saved" in hosts.text(0)
    assert not (folder / "run.lock").exists()
    assert saved_steps(folder) == [step]


@pytest.mark.slow(seconds=3)
def test_a_barrier_names_the_host_that_is_missing(tmp_path):
    wait = script('distributed.barrier("here", timeout=2)')
    sleep = script("time.sleep(30)")
    with Hosts([wait, sleep, wait], tmp_path, devices=1) as hosts:
        status = hosts.wait(timeout=60)
        for i in (0, 2):
            assert status[i] == 1
            assert "Waited 2 s at 'here' for host 1 (" in hosts.text(i)
        assert "ended, and so this one does. It said: Waited 2 s" in hosts.text(1)


@pytest.mark.slow(seconds=5)
def test_hosts_of_other_versions_end_together(tmp_path):
    other = script("pass", before="distributed.launch._version = lambda name: '9.9'")
    with Hosts([script("pass"), other], tmp_path, devices=1) as hosts:
        assert hosts.wait(timeout=60) == {0: 1, 1: 2}
        assert "The hosts differ in versions" in hosts.text(1)
        assert "It said: The hosts differ in versions" in hosts.text(0)


@pytest.mark.slow(seconds=3)
def test_sigterm_ends_all_hosts_where_no_loop_answers_it(tmp_path):
    sleep = script("print('at work', flush=True); time.sleep(60)")
    with Hosts([sleep] * 2, tmp_path, devices=1) as hosts:
        hosts.wait_until(lambda: all("at work" in hosts.text(i) for i in (0, 1)))
        hosts.send(1, signal.SIGTERM)
        assert hosts.wait(timeout=30) == {0: 143, 1: 143}
        assert "Stopped by SIGTERM" in hosts.text(0)


@pytest.mark.slow(seconds=5)
def test_leaving_on_one_host_ends_all(tmp_path):
    commands = [script("sys.exit(3)"), script('distributed.barrier("x")')]
    with Hosts(commands, tmp_path, devices=1) as hosts:
        assert hosts.wait(timeout=30) == {0: 3, 1: 1}
        assert "It said: exited with 3" in hosts.text(1)


@pytest.mark.slow(seconds=8)
def test_a_host_that_was_taken_for_lost_does_not_end_well(tmp_path):
    # A call that holds Python's lock, as a page fault on a file system that stalls.
    before = "distributed.watch.LOST = 4"
    stall = script("import ctypes; ctypes.PyDLL(None).sleep(12)", before=before)
    with Hosts([script("pass", before=before), stall], tmp_path, devices=1) as hosts:
        status = hosts.wait(timeout=60)
        assert all(status.values()), hosts.all_text()
        assert "no sign of life" in hosts.text(0)


@pytest.mark.slow(seconds=10)
def test_an_error_that_wraps_another_hosts_death_waits_for_its_name(tmp_path):
    fail = (
        "from jaxft.errors import CheckpointError; from jax.errors import JaxRuntimeError\n"
        "    try: raise JaxRuntimeError('gone')\n"
        "    except JaxRuntimeError as e: raise CheckpointError('Free some space') from e"
    )
    before = "distributed.watch.LOST = 4"
    wait = script("time.sleep(40)", before=before)
    die = script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", before=before)
    with Hosts([wait, script(fail, before=before), die], tmp_path, devices=1) as hosts:
        status = hosts.wait(timeout=60)
        assert status[0] == status[1] == 1
        assert "host 2 (" in hosts.text(1) and "was lost" in hosts.text(1)
        assert "Free some space" not in hosts.text(1)


@pytest.mark.slow(seconds=7)
def test_hosts_that_never_start_are_named(tmp_path):
    short = script("pass", before="distributed.launch._START = 6")
    with Hosts([short] * 4, tmp_path, devices=1, absent=[1, 3]) as hosts:
        assert hosts.wait(timeout=60) == {0: 1, 2: 1}
        for i in (0, 2):
            assert "Waited 6 s for host 1, host 3 of 4 to start" in hosts.text(i)


@pytest.mark.slow(seconds=6)
def test_a_host_that_is_never_reached_is_named(tmp_path):
    short = script("pass", before="distributed.launch._START = 5")
    with Hosts([short] * 2, tmp_path, devices=1, absent=[0]) as hosts:
        assert hosts.wait(timeout=60) == {1: 1}
        assert "Host 0 did not answer at localhost:" in hosts.text(1)


@pytest.mark.slow(seconds=6)
def test_an_error_on_one_host_ends_all_of_them(configure, tmp_path):
    config, other = configure("other"), configure("other")
    other.optim.learning_rate = 0.5
    commands = [command(config), command(other)]
    with Hosts(commands, tmp_path, devices=1) as hosts:
        status = hosts.wait(timeout=60)
        assert status == {0: 1, 1: 2}
        assert "optim.learning_rate is 0.5 on host 1" in hosts.text(1)
        assert "ended, and so this one does" in hosts.text(0)
        assert "optim.learning_rate is 0.5" in hosts.text(0)
    assert not Path(config.train.workdir).exists()


@pytest.mark.slow(seconds=9)
def test_a_workdir_that_hosts_do_not_share_is_refused(configure, tmp_path):
    config = configure("elsewhere")
    config.train.workdir = "run"  # each host has its own current folder
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with Hosts([command(config)] * 2, tmp_path, devices=1, folders=folders) as hosts:
        assert hosts.wait(timeout=60) == {0: 1, 1: 1}
        for i in (0, 1):
            assert "is not the same folder on all hosts" in hosts.text(i)
            assert "is not seen on host 1 (" in hosts.text(i)
    assert not list(folders[0].iterdir())


@pytest.mark.slow(seconds=15)
def test_hosts_with_unlike_held_out_data_end_together(configure, tmp_path):
    config = configure("unlike", mesh__data=0)
    config.data.validation = "held_out.jsonl"  # each host has its own current folder
    folders = [tmp_path / "a", tmp_path / "b"]
    for count, folder in zip((9, 40), folders, strict=True):
        folder.mkdir()
        write_chats(folder / "held_out.jsonl", count, seed=1)
    with Hosts([command(config)] * 2, tmp_path, devices=1, folders=folders) as hosts:
        assert hosts.wait(timeout=60) == {0: 1, 1: 2}
        assert "The hosts differ in held-out data" in hosts.text(1)


@pytest.mark.slow(seconds=30)
def test_a_checkpoint_is_evaluated_by_two_hosts_as_by_one(configure, reference, tmp_path):
    config = configure("unused", strategy="fsdp", eval__answers="exact")
    output = tmp_path / "results.json"
    line = command(config, f"--checkpoint={reference}", f"--output={output}")
    line[line.index("train")] = "eval"
    with Hosts([line] * 2, tmp_path, devices=4) as hosts:
        hosts.succeed()
        assert "validation" in hosts.text(0)
        assert "validation" not in hosts.text(1)
    found = json.loads(output.read_text())["results"]["validation"]
    expected = evaluate(config, reference)["validation"]
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found[name] == pytest.approx(expected.record()[name], rel=1e-5)
    assert expected.answers is not None
    assert [answer["output"] for answer in found["answers"]] == expected.answers.outputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "belong together"),
        ({"processes": 2, "process": 0}, "belong together"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "expected 0 to 1"),
        ({"coordinator": "a:1", "processes": 2, "process": -2}, "--process is -2 of"),
        ({"coordinator": "a:1", "processes": -3, "process": 0}, "--processes is -3"),
        ({"coordinator": "a:0", "processes": 2, "process": 0}, "from 1 to 65535"),
        ({"coordinator": "a:65536", "processes": 2, "process": 0}, "from 1 to 65535"),
    ],
)
def test_flags_that_do_not_name_a_process_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message), distributed.together(**arguments):
        pass


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_GPUS_ON_NODE": "2"}, {"local_device_ids": [0, 1]}),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_GPUS_ON_NODE": "2"}, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (OMPI, {}),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_the_environment_says_whether_there_are_several_processes(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch._environment() == expected


def test_commands_for_one_process_are_refused_under_a_launcher(monkeypatch):
    distributed.refuse_several("export")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="SLURM started several"):
        distributed.refuse_several("export")


def test_rows_reach_the_devices_that_hold_them(configure):
    placement = make_placement(configure("unused", strategy="fsdp_tp", mesh__tensor=2))
    assert placement.held_rows(8) == list(range(8))
    rows = np.arange(2 * 8 * 6).reshape(2, 8, 6)
    batch = Batch(**{name: rows + i for i, name in enumerate(STANDARD)})
    placed = put(batch, placement.micro_batches)
    for array, expected in zip(placed.values(), batch.values(), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert placed.tokens.sharding == placement.micro_batches
