"""Real processes that are interrupted, killed and run out of disk, and what they leave behind."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import jaxft
from jaxft.errors import CheckpointError, ModelError, TrainingError
from jaxft.files import read_jsonl
from jaxft.programs.trainer import train
from jaxft.workdir.checkpoint import Checkpoints
from tests.tiny_run import assert_same_arrays, command, read_metrics, read_records, tiny_config

ROOT = Path(__file__).parents[1]
TEMPORARY = "*.orbax-checkpoint-tmp*"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model and data that the runs of this file share, with their compiled programs."""
    return tmp_path_factory.mktemp("home")


class Process:
    """A `jaxft train` whose log is in a file."""

    def __init__(self, config, log, *options, program=None):
        self.workdir = Path(config.train.workdir)
        self._log = log
        arguments = command(config, *options)
        if program:
            arguments[1:3] = ["-c", program]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self):
        return self._log.read_text()

    def send(self, number):
        self._process.send_signal(number)

    def wait(self, timeout=120.0):
        return self._process.wait(timeout)

    def wait_for(self, condition, timeout=120.0):
        """Returns whether the condition came true before the process ended."""
        end = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < end, self.log
            time.sleep(0.002)
        return True

    def wait_for_step(self, step):
        path = self.workdir / "metrics.jsonl"

        def reached():
            return path.is_file() and path.read_bytes().count(b"\n") >= step

        assert self.wait_for(reached), self.log

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


@pytest.fixture
def start(tmp_path):
    """Starts processes, and ends those that a failed test leaves."""
    processes = []

    def start(config, *options, program=None):
        log = tmp_path / f"log{len(processes)}.txt"
        processes.append(Process(config, log, *options, program=program))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def complete_steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def long_run(home, workdir, **changes):
    config = tiny_config(home, train__steps=4000, train__epochs=0, **changes)
    config.train.workdir = str(workdir)
    return config


@pytest.mark.slow(seconds=8, but=r"^15$")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_go_on(home, tmp_path, start, number):
    run = start(long_run(home, tmp_path / "run", train__log_every=4))
    run.wait_for_step(3)
    run.send(number)
    assert run.wait() == 128 + number, run.log
    [said] = re.findall(
        rf"Stopped by {number.name} after step (\d+), which is saved\. Continue", run.log
    )
    assert "--resume" in run.log
    assert complete_steps(run.workdir)[-1] == int(said)
    assert not list((run.workdir / "checkpoints").glob(TEMPORARY))
    assert (run.workdir / "report.html").is_file()
    # Each log step has its line, the unfinished period none: the next part of the run adds it.
    steps = [r["step"] for r in read_metrics(run.workdir)]
    assert steps == list(range(4, int(said) + 1, 4))
    rest = tiny_config(home, train__log_every=4, train__steps=int(said) + 5, train__epochs=0)
    rest.train.workdir = str(run.workdir)
    result = train(rest, resume=True)
    assert [r["step"] for r in read_metrics(result.workdir)][-1] == int(said) + 5


@pytest.mark.slow(seconds=15)
def test_a_folder_in_use_is_refused_until_its_run_is_killed(home, tmp_path, start, capfd):
    # All checkpoints stay: one that is read here must not be deleted meanwhile.
    config = long_run(home, tmp_path / "run", train__save_every=2, train__keep_last=500)
    run = start(config)
    run.wait_for_step(5)
    for options in ((), ("--resume",), ("--overwrite",)):
        other = start(config, *options)
        assert other.wait() == 1
        assert re.search(r"in use by another run:\s+process \d+ on host", other.log), other.log
        assert "Data" not in other.log  # refused before the long work
    jaxft.load(run.workdir)  # reading is allowed
    run.wait_for_step(10)
    run.send(signal.SIGKILL)
    run.wait()
    assert (run.workdir / "run.lock").is_file()
    rest = tiny_config(home, train__epochs=0, train__save_every=2)
    rest.train.steps = complete_steps(run.workdir)[-1] + 3
    rest.train.workdir = config.train.workdir
    result = train(rest, resume=True)
    assert [r["step"] for r in read_metrics(result.workdir)] == [*range(1, result.step + 1)]
    assert not (run.workdir / "run.lock").exists()


def test_a_run_that_cannot_start_leaves_no_folder(home, tmp_path):
    config = tiny_config(home, model__path=str(tmp_path / "nowhere"))
    config.train.workdir = str(tmp_path / "a/run")
    with pytest.raises(ModelError):
        train(config)
    assert not (tmp_path / "a").exists()


# Saves do not end here, as on a slow disk: WHERE is the main thread's part or that of a thread.
STUCK = """
import sys, time
from jaxft.workdir import checkpoint
from jaxft import cli
original = checkpoint.ocp.CheckpointManager.WHERE
def slow(*args, **kwargs):
    original(*args, **kwargs)
    print("SAVING", file=sys.stderr, flush=True)
    for _ in range(600):  # a signal between the print and one long sleep would wait for its end
        time.sleep(0.1)
checkpoint.ocp.CheckpointManager.WHERE = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "where", [pytest.param("save", marks=pytest.mark.slow(seconds=8)), "_finalize"]
)
def test_a_second_interrupt_stops_at_once(home, tmp_path, start, where):
    run = start(long_run(home, tmp_path / "run"), program=STUCK.replace("WHERE", where))
    run.wait_for_step(3)
    run.send(signal.SIGINT)
    assert run.wait_for(lambda: "SAVING" in run.log), run.log
    before = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.log
    assert time.monotonic() - before < 30  # the save would take 60
    assert "Traceback" not in run.log


@pytest.mark.slow(seconds=80)
def test_kills_at_random_moments_lose_no_more_than_the_steps_since_the_last_save(
    home, tmp_path, start
):
    kills = 6
    # Periods, saves, evaluations and epochs end at different steps.
    changes = {
        "train__steps": 30 + 8 * kills,
        "train__log_every": 3,
        "train__save_every": 2,
        "train__eval_every": 7,
        "train__keep_last": 1,
    }
    config = tiny_config(home, "killed", **changes)
    config.data.validation = str(home / "held_out.jsonl")
    config.train.workdir = str(tmp_path / "killed")
    undisturbed = tiny_config(home, **changes)
    undisturbed.data.validation = config.data.validation
    undisturbed.train.workdir = str(tmp_path / "undisturbed")
    expected = train(undisturbed)

    generator = random.Random(kills)
    folder = tmp_path / "killed/checkpoints"
    in_saves = done = 0
    for _ in range(kills):
        run = start(config, "--resume")
        begun = run.wait_for(lambda done=done: complete_steps_or_none(folder) > done)
        assert begun, run.log
        if generator.random() < 0.5:
            run.wait_for(lambda: any(folder.glob(TEMPORARY)))
        else:
            time.sleep(generator.uniform(0, 0.1))
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.log
        in_saves += any(folder.glob(TEMPORARY))
        saved = complete_steps(tmp_path / "killed")[-1]
        assert saved >= done, "a checkpoint was lost"
        resumed = re.findall(r"checkpoint of step (\d+)", run.log)
        assert resumed == ([str(done)] if done else []), run.log
        records = read_records_of_torn(tmp_path / "killed/metrics.jsonl")
        # The save of step n is complete before that of step n + 2 begins.
        assert records[-1]["step"] <= saved + 2 * config.train.save_every
        done = saved
    assert in_saves, "no kill met a save"
    run = start(config, "--resume")
    assert run.wait() == 0, run.log
    last = f"checkpoints/{changes['train__steps']}"
    assert_same_arrays(tmp_path / "killed" / last, expected.workdir / last)
    assert read_metrics(tmp_path / "killed") == read_metrics(expected.workdir)
    evaluations = [read_records(w / "eval.jsonl") for w in (tmp_path / "killed", expected.workdir)]
    assert evaluations[0] == evaluations[1]
    assert complete_steps(tmp_path / "killed") == complete_steps(expected.workdir)


def complete_steps_or_none(folder):
    steps = complete_steps(folder.parent) if folder.is_dir() else []
    return steps[-1] if steps else 0


def read_records_of_torn(path):
    return list(read_jsonl(path))


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# A checkpoint has 235 kB of arrays and 50 kB beside them: with 250 kB it fails while it is written.
@pytest.mark.parametrize(
    "room", [0, pytest.param(100_000, marks=pytest.mark.slow(seconds=8)), 250_000]
)
def test_a_disk_that_fills_up_is_an_error_and_leaves_older_checkpoints(
    home, small_disk, monkeypatch, capfd, room
):
    config = tiny_config(home, train__save_every=1)
    disk = small_disk(4_000_000)
    workdir = disk / "run"
    config.train.workdir = str(workdir)
    original = Checkpoints.save

    def save(self, state, **rest):
        if int(state.step) == 3:
            self.wait()
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        original(self, state, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises((CheckpointError, TrainingError)) as error:
            train(config)
    assert re.search(r"full|B free|No space left", str(error.value))
    assert "--resume" in str(error.value)
    log = capfd.readouterr().err
    assert "Traceback" not in log and "ERROR" not in log
    assert complete_steps(workdir) == [1, 2]
    assert not list((workdir / "checkpoints").glob(TEMPORARY))
    assert jaxft.load(workdir).source.step == 2
    (disk / "other").unlink()
    assert train(config, resume=True).step == 8
    whole = tiny_config(home, "whole")
    train(whole, overwrite=True)
    assert_same_arrays(workdir / "checkpoints/8", home / "whole/checkpoints/8")
    assert [r["step"] for r in read_metrics(workdir)] == [*range(1, 9)]


def test_a_disk_too_small_from_the_start_is_an_error(home, small_disk, capfd):
    config = tiny_config(home)
    config.train.workdir = str(small_disk(8192) / "run")
    with pytest.raises((CheckpointError, TrainingError), match=r"No space left|full|B free"):
        train(config)
    assert "Traceback" not in capfd.readouterr().err
