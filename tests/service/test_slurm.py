"""Jobs of the service on a real SLURM cluster of one node, and what is refused before."""

import os
import re
import sys
from pathlib import Path

import pytest

from jaxft.config import to_dict
from jaxft.errors import ConfigError
from jaxft.files import write_json
from jaxft.service.executors import ExecutorError, Launch, State, listing
from jaxft.service.executors import slurm as module
from jaxft.service.executors.slurm import Slurm
from jaxft.service.server import serve
from jaxft.service.settings import Settings
from tests.service.slurm_cluster import SMALL, SlurmCluster, wait_until
from tests.test_launch import ROOT
from tests.tiny_run import read_metrics, tiny_config

SCRIPT = ROOT / "launch/slurm.sbatch"

# In place of Python: prints what it is given, and ends a moment after it is asked to.
_RUN = """\
#!/usr/bin/env bash
echo "$@"
trap 'echo saved; exit 143' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def slurm(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setattr(listing, "AGE", 0)
    return Slurm(SMALL, SCRIPT)


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets jobs run a program that waits in place of Python."""
    program = tmp_path / "run"
    program.write_text(_RUN)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def launch_of(folder: Path, job: str, attempt: int = 1) -> Launch:
    config, log = folder / "config.json", folder / f"{job} 100%.txt"
    return Launch(job=job, attempt=attempt, config=config, log=log)


@pytest.mark.slow(seconds=8)
def test_jobs_wait_run_and_end_by_their_names(cluster, slurm, idle, tmp_path):
    first, second = launch_of(tmp_path, "ftjob-Ab1"), launch_of(tmp_path, "ftjob-aB1")
    assert slurm.find(first) is None
    handle = slurm.submit(first)
    # Submitted and not noted, it is found; one that was submitted twice runs once.
    assert slurm.submit(first) == handle == slurm.find(first)
    assert "singleton" in cluster.ask("squeue", "--noheader", "--format=%E")
    other = slurm.submit(second)
    assert other != handle and slurm.find(launch_of(tmp_path, "ftjob-Ab1", 2)) is None
    wait_until(lambda: slurm.state(handle) is State.RUNNING)
    wait_until(lambda: first.log.exists() and first.log.read_text())
    assert first.log.read_text() == f"0: -m jaxft train --config={first.config} --resume\n"
    assert slurm.state(other) is State.WAITING  # the node is taken

    # Preempted, it is queued again; one that waits is taken out of the queue.
    cluster.ask("scontrol", "requeue", cluster.number(handle))
    wait_until(lambda: slurm.state(handle) is State.WAITING)
    slurm.stop(handle)
    assert slurm.state(handle) is State.ENDED and slurm.find(first) == handle

    wait_until(lambda: slurm.state(other) is State.RUNNING)
    wait_until(lambda: second.log.exists() and second.log.read_text())
    # Without slurmctld nothing is known; it is not taken for an end.
    cluster.stop("slurmctld")
    with pytest.raises(ExecutorError, match=r"squeue failed: .*contact slurm controller"):
        slurm.state(other)
    cluster.start_controller()
    assert slurm.state(other) is State.RUNNING

    slurm.stop(other)
    wait_until(lambda: slurm.state(other) is State.ENDED)
    assert "0: saved\n" in second.log.read_text()
    shown = cluster.ask("scontrol", "show", "job", cluster.number(other))
    assert re.search(r"TimeLimit=00:1[01]:00", shown)  # ten minutes more than it ran
    slurm.stop(other)
    assert slurm.state("ftjob-forgotten-1") is State.ENDED
    slurm.stop("ftjob-forgotten-1")


@pytest.mark.slow(seconds=12)
def test_a_run_that_is_stopped_has_saved(cluster, slurm, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, train__steps=100_000, data__validation="")
    launch = launch_of(tmp_path, "ftjob-train")
    write_json(launch.config, to_dict(config))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    handle = slurm.submit(launch)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(read_metrics(metrics.parent)) > 2, 240)
    assert slurm.state(handle) is State.RUNNING
    slurm.stop(handle)
    wait_until(lambda: slurm.state(handle) is State.ENDED)
    last = read_metrics(metrics.parent)[-1]["step"]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert str(last) in saved, (last, saved, launch.log.read_text())


@pytest.mark.slow(seconds=1)
def test_what_sbatch_refuses_is_said(cluster, tmp_path):
    launch = launch_of(tmp_path, "ftjob-refused")
    slurm = Slurm([*SMALL, "--partition=none"], SCRIPT)
    with pytest.raises(ExecutorError, match=r"sbatch failed: .*partition"):
        slurm.submit(launch)
    assert slurm.find(launch) is None


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("-p gpu", r"'-p gpu': write options of sbatch as --name=value"),
        ("gpu", r"'gpu' is no option of the SLURM executor"),
        ("--array=1-4", r"--array is the service's own"),
        ("--output=log.txt", r"--output is the service's own"),
        ("grace=0", r"grace=0 is no whole number of minutes"),
        ("partition=gpu", r"'partition' is no option of the SLURM executor"),
        ("script=none.sbatch", r"There is no batch script .*none.sbatch"),
    ],
)
def test_options_that_cannot_be_passed_on_are_refused(option, problem):
    with pytest.raises(ConfigError, match=problem):
        Slurm.from_options([f"script={SCRIPT}", option])


def test_a_service_with_such_options_does_not_start(tmp_path):
    options = (f"script={SCRIPT}", "--wrap=true")
    settings = Settings(
        workdir=tmp_path, models={"m": "org/m"}, executor="slurm", executor_options=options
    )
    with pytest.raises(ConfigError, match="--wrap is the service's own"):
        serve(settings, host="127.0.0.1", port=0)


def test_a_run_is_asked_to_end_once_and_a_job_that_waits_until_it_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "AGE", 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\n. "{tmp_path}/{name}.does"\n')
        (tmp_path / name).chmod(0o755)
    slurm, calls = Slurm([], SCRIPT), tmp_path / "calls"

    def stop(job: str, *, refused: bool = False, then: str = "") -> str:
        """Returns what is asked of SLURM for a job, which may refuse and show it otherwise."""
        calls.write_text("")
        (tmp_path / "squeue.does").write_text(f"cat {tmp_path}/queue\n")
        (tmp_path / "queue").write_text(job)
        act = f"echo '{then}' >{tmp_path}/queue; echo 'no' >&2; exit 1" if refused else ""
        for name in ("scancel", "scontrol"):
            text = f'echo {name} "$@" >>{calls}\n{act}\n'
            (tmp_path / f"{name}.does").write_text(text)
        slurm.stop("job-1")
        return calls.read_text()

    long, short = "7|RUNNING|1:30|1-00:00:00|job-1\n", "8|RUNNING|1:30|5:00|job-1\n"
    with pytest.raises(ExecutorError, match="scancel failed: no"):
        stop(short, refused=True, then=short)
    slurm = Slurm([], SCRIPT)
    assert stop(short) == "scancel --ctld --signal=TERM 8\n"
    limit = "scontrol update JobId=7 TimeLimit=12\n"
    assert stop(long + short) == limit + "scancel --ctld --signal=TERM 7\n"
    assert stop(long + "9|COMPLETING|1:30|5:00|job-1\n10|FAILED|0:01|5:00|job-1\n") == ""
    waiting = long.replace("RUNNING", "PENDING")  # preempted
    assert stop(waiting) == stop(waiting) == "scancel 7\n"
    assert (
        stop(waiting, refused=True, then=waiting.replace("PENDING", "CANCELLED")) == "scancel 7\n"
    )
    assert stop(waiting.replace("job-1", "JOB-1")) == ""


def test_answers_that_are_not_understood_are_no_state(tmp_path, monkeypatch):
    program = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho '7|DREAMING|1-02:03:30|INVALID|job-1'\n")
    program.chmod(0o755)
    with pytest.raises(ExecutorError, match="job 7 DREAMING: an unknown state"):
        Slurm([], SCRIPT).state("job-1")
    program.write_text("#!/bin/sh\necho '7|RUNNING|1-02:03:30|UNLIMITED|job-1'\n")
    (job,) = module._read_queue()["job-1"]
    assert (job.state, job.used, job.left) == (State.RUNNING, 1563.5, float("inf"))
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    program.write_text("#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(ExecutorError, match="squeue got no answer"):
        Slurm([], SCRIPT).state("job-1")
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExecutorError, match="squeue cannot be started"):
        Slurm([], SCRIPT).state("job-1")
