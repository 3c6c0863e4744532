"""Traced steps of a run: what is written, and that they change nothing else."""

import json
import warnings
from pathlib import Path

import jax
import pytest
from jax.profiler import ProfileData

from jaxft import console
from jaxft.errors import ConfigError, TrainingError
from jaxft.programs.trainer import train
from tests.tiny_run import read_metrics, read_records


@pytest.fixture
def said(monkeypatch):
    """The lines that a run logs."""
    lines = []
    monkeypatch.setattr(console, "write", lambda text: lines.extend(text.plain.splitlines()))
    return lines


def traced_steps(workdir):
    """Returns the numbers of the steps in the traces of a run."""
    files = Path(workdir).glob("profile/plugins/profile/*/*.xplane.pb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jaxlib's own types
        return sorted(
            dict(event.stats)["step_num"]
            for file in files
            for plane in ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        )


@pytest.mark.slow(seconds=6)
def test_a_profile_shows_the_longest_operations_and_changes_nothing_else(config, home, said):
    changes = {"data__validation": str(home / "held_out.jsonl"), "train__eval_every": 4}
    plain = train(config("plain", **changes)).workdir
    workdir = train(config(**changes), profile=3).workdir
    assert read_metrics(workdir) == read_metrics(plain)
    assert traced_steps(workdir) == [3, 4, 5]
    record = json.loads((workdir / "profile/operations.json").read_text())
    rows = record["operations"]
    assert (record["steps"], len(rows)) == ([3, 5], 10)
    spent = [row["milliseconds"] for row in rows]
    assert spent == sorted(spent, reverse=True)
    assert all(row["what"] for row in rows)
    for row in rows:
        assert row["share"] == pytest.approx(row["milliseconds"] / 3 / record["step_milliseconds"])
        assert row["calls"] % 3 == 0
    shown = [line for line in said if line.split()[:1] == [rows[0]["name"]]]
    assert len(shown) == 1
    assert shown[0].endswith(rows[0]["what"])
    assert any(f"xprof --logdir={workdir / 'profile'}" in line for line in said)


def test_traced_steps_count_for_everything_but_the_throughput(config):
    records = read_records(train(config(), profile=2).workdir / "metrics.jsonl")
    untimed = [r["step"] for r in records if r["tokens_per_second"] is None]
    assert untimed == [3, 4]
    tokens = [r["tokens"] for r in records]
    assert len(tokens) == 8 and tokens == sorted(set(tokens))


def test_a_run_too_short_for_its_profile_is_refused_before_it_begins(config):
    short = config(train__steps=4)
    with pytest.raises(ConfigError, match=r"--profile=3 traces steps 3 to 5.* 4 steps.*fewer"):
        train(short, profile=3)
    assert not Path(short.train.workdir).exists()
    with pytest.raises(ConfigError, match=r"profile is -1.*from 1 on"):
        train(short, profile=-1)


@pytest.mark.slow(seconds=4)
def test_a_resumed_run_traces_after_two_steps_of_its_own_or_says_that_it_does_not(config, said):
    train(config(train__steps=3))
    workdir = train(config(train__steps=6), resume=True, profile=1).workdir
    assert traced_steps(workdir) == [6]
    said.clear()
    train(config(train__steps=8), resume=True, profile=1)
    assert any("steps 9 to 9" in line and "None is traced" in line for line in said)
    assert traced_steps(workdir) == [6]


@pytest.mark.slow(seconds=2)
def test_a_run_that_ends_within_the_traced_steps_ends_its_trace(config, monkeypatch, said):
    def fail(session, step, figures):
        if step == 4:
            raise TrainingError("lost")

    monkeypatch.setattr("jaxft.programs.session.Session.require_finite", fail)
    run = config()
    with pytest.raises(TrainingError, match="lost"):
        train(run, profile=4)
    assert any("ended within the traced steps" in line for line in said)
    assert {3, 4} <= set(traced_steps(run.train.workdir))
    assert not (Path(run.train.workdir) / "profile/operations.json").exists()


@pytest.mark.slow(seconds=2)
def test_a_profiler_in_use_is_no_reason_to_stop_training(config, tmp_path, said):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(tmp_path / "own", profiler_options=options):
        result = train(config(train__steps=4), profile=1)
    assert result.reason == "end"
    assert any("No trace, as the profiler failed" in line for line in said)
