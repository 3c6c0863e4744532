"""The instrument that measures speed: turns, ratios, work, tables and pictures made of lines."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import (
    attention,
    compare,
    evaluation,
    gpu,
    input_pipeline,
    saving,
    tables,
    train_step,
    turns,
    workload,
)
from jaxft.errors import ConfigError
from jaxft.models.families import FAMILIES
from tests.test_setup import ROOT


def work(*words: str, **more: object) -> argparse.Namespace:
    """Returns the options of a benchmark with tiny rows for eight devices."""
    parser = argparse.ArgumentParser()
    workload.add_options(parser)
    size = ["--shape=tiny", "--rows=8", "--length=32", "--set=strategy=ddp"]
    options = parser.parse_args([*size, *words])
    for name, value in ({"steps": 1, "operations": 0} | more).items():
        setattr(options, name, value)
    return options


def test_a_ratio_has_the_interval_of_students_paired_test():
    ours, theirs = [10.0, 12.0, 11.0, 13.0], [8.0, 11.0, 8.5, 9.0]
    value, low, high = turns.ratio(ours, theirs)
    expected = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    assert value == np.median(ours) / np.median(theirs)
    np.testing.assert_allclose([low, high], np.exp([expected.low, expected.high]), rtol=1e-12)
    assert turns.ratio([3.0], [2.0]) == (1.5, None, None)


def test_sides_take_turns_and_each_begins_as_often(tmp_path, capsys):
    seen, output = [], tmp_path / "lines.jsonl"

    def side(name, figure):
        def measure():
            seen.append(name)
            return {"tokens_per_second": figure}

        return measure

    turns.take_turns(
        {"new": side("new", 6.0), "old": side("old", 4.0)},
        rounds=2,
        output=output,
        about={"shape": "tiny"},
    )
    assert seen == ["new", "old", "old", "new"]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    last = lines[-1]
    assert (last["ratio"], last["low"], last["high"]) == (1.5, 1.5, 1.5)
    assert (last["of"], last["over"], last["shape"]) == ("new", "old", "tiny")


def test_systems_that_do_not_do_the_same_are_not_compared(capsys):
    sides = {
        name: lambda count=count: {"tokens_per_second": 1.0, "trained_parameters": count}
        for name, count in (("jaxft", 3), ("torch", 4))
    }
    arguments = {"rounds": 1, "output": None, "about": {}}
    with pytest.raises(SystemExit, match=r"trained_parameters is .*'jaxft': 3, 'torch': 4"):
        turns.take_turns(sides, **arguments, equal=("trained_parameters",))
    with pytest.raises(SystemExit, match="measured no 'seconds', but tokens_per_second"):
        turns.take_turns(sides, **arguments, figure="seconds")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_measurement_is_the_last_line_of_its_process():
    assert turns.once(python("print('log'); print('{\"a\": 1}')")) == {"a": 1}
    with pytest.raises(turns.Failed, match="status 3 and no record: out of luck"):
        turns.once(python("import sys; print('out of luck', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(turns.Failed, match="status 0 and no record"):
        turns.once(python("print('nothing')"))


def test_a_measurement_that_hangs_is_stopped_with_what_it_started(tmp_path):
    child = "import time; time.sleep(2); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(turns.Failed, match="took longer than 1 s and was stopped"):
        turns.once(python(code), folder=tmp_path, limit=0.7)
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_variant_is_keys_options_a_checkout_or_pytorch(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/train_step.py").touch()
    found = compare.variant_of(f"objective.chunk=8 --rows=4 checkout={tmp_path}")
    assert found.command("train_step", ["--shape=15m"])[1:] == [
        str(tmp_path / "benchmarks/train_step.py"),
        *("--shape=15m", "--set", "objective.chunk=8", "--rows=4", "--once", "jaxft"),
    ]
    other = compare.variant_of("torch=python3")
    assert other.command("train_step", [])[2:] == ["--torch-python", "python3", "--once", "torch"]
    assert compare.named("", "") == ("as it is", "as it is, again")
    with pytest.raises(SystemExit, match="'8' of a variant is neither KEY=VALUE"):
        compare.variant_of("--rows 8")
    with pytest.raises(SystemExit, match=r"There is no benchmark .*/later\.py"):
        found.command("later", [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set=model.dtype=float32"], r"model\.dtype"),
        (["--trained=0"], "share above 0"),
        (["--set=objective.name=dpo"], "sft alone"),
        (["--set=model.remat=auto"], "name a policy"),
        (["--set=model.quantise=nf4"], "adapter"),
    ],
)
def test_work_that_cannot_be_done_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        workload.make_workload(work(*words))


def test_an_unknown_shape_names_those_there_are():
    with pytest.raises(SystemExit, match=r"neither a folder .* nor one of tiny"):
        workload.make_workload(work("--shape=small"))


def test_pytorch_is_not_compared_where_it_would_do_something_else():
    def refused(*words):
        said = []
        train_step.refuse_what_torch_does_not_do(work(*words), said.append)
        return said

    assert not refused("--set=adapter.rank=4", "--set=model.dtypes=bfloat16")
    assert "model.quantise" in refused("--set=model.quantise=nf4")[0]
    assert refused("--packed") and refused("--trained=0.5")


@pytest.mark.slow(seconds=12)
@pytest.mark.parametrize(
    ("keys", "share"),
    [((), 1.0), (("adapter.rank=4",), 0.15), (("adapter.rank=4", "model.quantise=nf4"), 0.15)],
)
def test_a_training_step_is_that_of_the_run(keys, share):
    options = work("--packed", *(f"--set={key}" for key in keys), operations=3)
    found = train_step.measure(options)
    assert abs(found["loss"] - np.log(2048)) < 0.1
    assert found["trained_parameters"] <= share * found["parameters"]
    assert found["step_bytes"] > 0 and found["mfu"] is None
    spent = [one["seconds"] for one in found["operations"]]
    assert len(spent) == 3 and spent == sorted(spent, reverse=True)


@pytest.mark.slow(seconds=4)
def test_adapters_of_the_work_start_as_those_of_a_run():
    made = workload.make_workload(work("--set=adapter.rank=4"))
    params = made.params()
    assert all(
        bool(np.any(value)) is (not path.endswith("lora_b"))
        for path, value in jax.device_get(params).items()
    )


@pytest.mark.slow(seconds=20)
def test_evaluation_saving_attention_and_the_input_are_measured():
    found = evaluation.measure(work())
    assert abs(found["loss"] - np.log(2048)) < 0.1
    found = saving.measure(work(saves=2, scratch=None))
    # Parameters and two moments in float32, compressed.
    assert 2 * 4 * found["parameters"] < found["checkpoint_bytes"] < 20 * found["parameters"]
    assert found["held_up_seconds"] > 0 and found["background_seconds"] > 0
    assert attention.measure(work("--packed"))["attention"] == "xla"
    found = input_pipeline.measure(work(documents=60))
    assert 0 <= found["data_share"] < 1
    assert found["documents_per_second"] > found["prepared_rows_per_second"] > 0


@pytest.mark.slow(seconds=25)
@pytest.mark.parametrize(
    ("benchmark", "keys"),
    [("train_step", ("adapter.rank=4",)), ("evaluation", ())],
)
def test_pytorch_takes_turns_with_the_same_trained_parameters(benchmark, keys, tmp_path):
    theirs = os.environ.get("JAXFT_ORACLE_PYTHON", "")
    if not theirs:
        pytest.skip("JAXFT_ORACLE_PYTHON names no Python with torch and transformers")
    output = tmp_path / "lines.jsonl"
    sets = [f"--set={key}" for key in ("model.dtypes=bfloat16", *keys)]
    size = ["--shape=tiny", "--rows=2", "--length=32", "--steps=1", "--rounds=1"]
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *size, *sets]
    run = subprocess.run(
        [*command, f"--torch-python={theirs}", f"--output={output}"],
        cwd=ROOT,
        env=with_one_device(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.get("system") for line in lines] == ["jaxft", "torch", None]
    assert lines[0]["trained_parameters"] == lines[1]["trained_parameters"]
    assert abs(lines[0]["loss"] - lines[1]["loss"]) < 0.2
    [pair] = tables.pairs(lines[:2], tables._OF_STEPS)
    assert pair.ratio[0] == pytest.approx(lines[2]["ratio"], abs=1e-3)


def with_one_device() -> dict[str, str]:
    """Returns the environment of a process with one device; of PyTorch's with one thread.

    Threads that wait for each other's tiny parts take minutes on a machine that does other work.
    """
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quick, "PYTHONPATH": str(ROOT)}


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    commands = []

    def once(command, *, limit):
        commands.append(command)
        if len(commands) == 1:
            raise turns.Failed("ended with status 1 and no record: wrong", "all it said")
        return {"system": "jaxft", "tokens_per_second": 9.0, "mfu": None}

    monkeypatch.setattr(turns, "once", once)
    output = tmp_path / "gpu.jsonl"
    attention, *others = gpu.cases(torch_python="")
    cases = [attention, *(case for case in others if case.command[0] == "train_step")][:3]
    lines = gpu.measure(cases, seconds=100, output=output)
    assert ["failed" in line for line in lines] == [True, False, False]
    # Without cuDNN's attention training steps have XLA's, and say so.
    assert ["--set=model.attention=xla" in command for command in commands] == [False, True, True]
    assert "all it said" in output.with_suffix(".log").read_text()
    assert "FAILED: ended with status 1" in gpu.table(lines)
    late = gpu.measure(cases, seconds=1, output=output)
    assert all("no time was left" in line["failed"] for line in late)


def test_the_cases_of_a_gpu_are_options_that_benchmarks_have():
    cases = list(gpu.cases(torch_python="python3"))
    assert sum(case.limit for case in cases) < 1200
    for case in [*cases, *map(gpu.tiny, cases)]:
        if case.command[0] != "generation":
            parser = argparse.ArgumentParser()
            workload.add_options(parser)
            workload.config_of(parser.parse_known_args(case.command[1:])[0])


@pytest.mark.slow(seconds=150)
def test_all_of_a_gpu_is_measured_in_one_call(tmp_path):
    environment = with_one_device() | {"TINY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    [file] = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [case.name for case in gpu.cases(torch_python="")]
    assert [line["case"] for line in lines] == expected[2:]  # without attention of GPUs alone
    assert all(line["tokens_per_second"] > 0 for line in lines)
    steps = [line for line in lines if line["measurement"] == "train_step"]
    assert len(steps) == 7 and all(len(line["operations"]) == 10 for line in steps)
    assert "Longest operations of a step" in run.stdout
    assert tables.on_gpu(lines).count("\n") == len(lines) + 1


def test_the_tables_of_the_document_are_those_of_the_lines():
    page = tables.PAGE.read_text()
    assert tables.with_tables(page, tables.text()) == page, "python -m benchmarks.tables --write"


@pytest.mark.parametrize("name", list(tables.pictures()))
def test_pictures_are_of_the_lines(name):
    shown = tables.pictures()[name]
    assert shown
    picture = (tables.IMAGES / f"{name}.png").read_bytes()
    assert tables.digest(shown).encode() in picture, "python -m benchmarks.tables --write"


def test_the_parts_of_a_planned_step_add_up():
    for name in ("tpu-steps", "peers"):
        for _, line in tables.read_lines(tables.RESULTS, name):
            assert sum(line["spent"].values()) == pytest.approx(line["seconds"], rel=1e-3)


def test_the_table_of_families_is_that_of_the_lines():
    lines = {line["family"]: line for _, line in tables.read_lines(tables.RESULTS, "-parity")}
    text = (ROOT / "docs/models.md").read_text()
    told = set()
    for names, counts, logits in re.findall(r"^\| (.*\(`.*) \| (.*)\| (\S+e-\d+) \|$", text, re.M):
        found = {name: lines[name] for name in re.findall(r"`(\w+)`", names) if name in FAMILIES}
        largest = max(line["largest_logit_difference"] for line in found.values())
        assert logits == f"{largest:.1e}", names
        sizes = [size for line in found.values() for size in line["parameters"].values()]
        assert all(f"{size:,}" in counts for size in sizes), names
        told |= found.keys()
    assert told == lines.keys() == FAMILIES.keys()


def test_of_a_workload_the_newest_file_counts(tmp_path):
    def line(system, speed, **more):
        shape = {"shape": "15m", "rows": 1, "length": 8, "dtypes": "float32", "packed": False}
        about = {"measurement": "train_step", "system": system, "processor": "one"}
        return about | shape | {"tokens_per_second": speed} | more

    def write(name, *lines):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("2026-01-01-a.jsonl", line("jaxft", 1.0), line("jaxft", 5.0, shape="110m"))
    write(
        "2026-01-02-a.jsonl",
        *(line("jaxft", 8.0), line("torch", 4.0), line("jaxft", 2.0, variant="slow")),
        *(line("torch", 4.0), line("jaxft", 8.0, set=[])),
    )
    text = tables.text(tmp_path)
    rows = [re.split(r" *\| *", row)[1:6] for row in text.splitlines() if row.startswith("| 1")]
    assert rows == [
        ["15m, 1 × 8, float32", "8", "4", "2.00 (2.00 to 2.00)", "2"],
        ["110m, 1 × 8, float32", "5", "", "", "1"],
    ]


def test_lines_of_every_kind_have_a_table(tmp_path):
    work = {"shape": "15m", "rows": 2, "length": 8, "dtypes": "float32", "packed": False}
    seconds = {"held_up_seconds": 0.5, "background_seconds": 2.0, "step_seconds": 1.0}
    lines = [
        {"measurement": "saving", **work, **seconds, "step_seconds_meanwhile": 1.5}
        | {"checkpoint_bytes": 2**20},
        {"measurement": "input_pipeline", **work, "prepared_rows_per_second": 7.0}
        | {"read_rows_per_second": 9.0, "data_share": 0.25},
        {"measurement": "ratio", "benchmark": "train_step", "arguments": "--rows 2", "of": "a=1"}
        | {"over": "as it is", "ratio": 1.25, "low": 1.1, "high": 1.4, "rounds": 5},
    ]
    (tmp_path / "2026-01-01-b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = tables.text(tmp_path)
    assert "| 15m, 2 × 8, float32 | 1 MiB | 500 ms | 2.00 s | 1.00 s | 1.50 s |" in text
    assert "| 15m, 2 × 8 | 7 | 9 | 25.0 % |" in text
    assert "| `train_step --rows 2` | `a=1` | `as it is` | 1.25 (1.10 to 1.40) | 5 |" in text


def test_a_document_without_marks_is_refused():
    with pytest.raises(SystemExit, match="not one pair of the marks"):
        tables.with_tables("no tables", "text")


def test_the_script_runs_from_anywhere():
    script = ROOT / "benchmarks/gpu.sh"
    assert os.access(script, os.X_OK)
    assert Path(script).read_text().startswith("#!/usr/bin/env bash\n")
