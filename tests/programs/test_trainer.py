"""The training loop: exact resume, what it saves and evaluates and when, how it stops."""

import copy
import dataclasses
import json
import math
import re
import shutil
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft import console
from jaxft.config import to_dict
from jaxft.errors import CheckpointError, ConfigError, ModelError, TrainingError
from jaxft.programs import advice, run_data, session, trainer, weights
from jaxft.programs.answers import Answers
from jaxft.programs.held_out import UnitSums
from jaxft.programs.trainer import train
from jaxft.workdir.result import TrainResult
from jaxft.workdir.workdir import Workdir
from tests.tiny_run import (
    assert_same_arrays,
    crash,
    read_arrays,
    read_metrics,
    read_records,
    write_chats,
)


def read_rows(home, config):
    """Returns the training rows of `config`."""
    tokenizer = jaxft.load(home / "base").tokenizer
    return run_data.read_data(config, tokenizer, Workdir(path=Path(config.train.workdir)))[0]


def held_out(home):
    return str(home / "held_out.jsonl")


@pytest.mark.slow(seconds=14, but=r"^plain$")
@pytest.mark.parametrize("evaluates", [False, True], ids=["plain", "evaluating"])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(home, config, monkeypatch, evaluates):
    # 19 rows, 4 a step: an epoch ends within a step; periods of 3 steps end between saves of 4.
    changes = {"train__accumulation": 2, "train__log_every": 3, "train__save_every": 4}
    changes["optim__schedule"] = "cosine"
    if evaluates:
        changes |= {"data__validation": held_out(home), "train__eval_every": 3}
    whole, parts = config("whole", **changes), config("parts", **changes)
    train(whole)
    crash(monkeypatch, parts, step=7)
    # The best of the evaluations after steps 3 and 6 is saved as well.
    saved = [int(p.name) for p in (parts_workdir(parts) / "checkpoints").iterdir()]
    assert max(saved) == (6 if evaluates else 4)
    result = train(parts, resume=True)
    assert result.step == 8
    assert_same_arrays(
        result.workdir / "checkpoints/8", result.workdir.with_name("whole") / "checkpoints/8"
    )
    assert read_metrics(result.workdir) == read_metrics(result.workdir.with_name("whole"))
    assert [r["step"] for r in read_metrics(result.workdir)] == [3, 6, 8]
    if evaluates:
        one, other = (
            read_records(result.workdir.with_name(name) / "eval.jsonl")
            for name in ("whole", "parts")
        )
        assert one == other
        assert [r["step"] for r in one] == [0, 3, 6, 8]


@pytest.mark.slow(seconds=5)
def test_the_run_resumed_begins_at_the_last_save_within_a_period(home, config, monkeypatch):
    parts = config(train__log_every=3, train__save_every=4)
    crash(monkeypatch, parts, step=6)
    steps = []
    original = trainer.MetricsWriter.write
    monkeypatch.setattr(
        trainer.MetricsWriter,
        "write",
        lambda self, record: steps.append(record["step"]) or original(self, record),
    )
    train(parts, resume=True)
    assert steps == [6, 8]
    seconds = [r["seconds"] for r in read_records(parts_workdir(parts) / "metrics.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] > 0


def parts_workdir(config):
    return trainer.Workdir.read(config.train.workdir).path


@pytest.mark.slow(seconds=9)
def test_a_crash_before_the_first_save_leaves_nothing_twice(home, config, monkeypatch):
    run = config(data__validation=held_out(home), eval__samples=1)
    crash(monkeypatch, run, step=3)
    result = train(run, resume=True)
    assert [r["step"] for r in read_records(result.workdir / "eval.jsonl")] == [0, 5, 8]
    assert [r["step"] for r in read_records(result.workdir / "samples.jsonl")] == [0, 8]
    assert [r["step"] for r in read_metrics(result.workdir)] == [*range(1, 9)]


@pytest.mark.slow(seconds=2)
def test_a_finished_run_that_is_resumed_stays_as_it_is(home, config):
    run = config(data__validation=held_out(home), eval__samples=1)
    result = train(run)
    names = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
    before = [(result.workdir / name).read_text() for name in names]
    assert train(run, resume=True) == result
    assert [(result.workdir / name).read_text() for name in names] == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Returns the files of a run; without the time in result.json, which each start writes."""
    files = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    ended = folder / "result.json"
    return files | {ended: re.sub(rb'"time": ".*"', b"", files[ended])}


@pytest.mark.slow(seconds=2)
def test_resuming_a_finished_run_with_other_keys_changes_nothing_and_says_so(home, config, capfd):
    run = config(data__validation=held_out(home), eval__samples=1)
    result = train(run)
    before = contents(result.workdir)
    run.optim.learning_rate, run.train.keep_last, run.train.steps = 0.5, 1, 7
    capfd.readouterr()
    assert train(run, resume=True) == result
    assert contents(result.workdir) == before
    said = " ".join(capfd.readouterr().err.split())
    assert "Already finished" in said and "--config.train.steps=16" in said
    assert "Not applied, as no step is left: optim.learning_rate was 0.001 and is now 0.5." in said


@pytest.mark.slow(seconds=2)
def test_a_run_that_patience_ended_is_finished_until_it_has_more(home, config, monkeypatch, capfd):
    run = config(data__validation=held_out(home), train__eval_every=1, eval__patience=1)
    feed_losses(monkeypatch, [5, 6])
    result = train(run)
    assert (result.step, result.reason) == (1, "patience")
    before = contents(result.workdir)
    run.train.log_every = 3
    assert train(run, resume=True) == result
    assert contents(result.workdir) == before
    assert "--config.eval.patience=2" in "".join(capfd.readouterr().err.split())


@pytest.mark.slow(seconds=2)
def test_a_finished_run_that_lacks_its_report_gets_it_with_its_own_settings(home, config):
    run = config()
    result = train(run)
    (result.workdir / "report.html").unlink()
    before = (result.workdir / "config.json").read_text()
    run.train.log_every = 3
    assert train(run, resume=True).step == 8
    assert (result.workdir / "report.html").is_file()
    assert (result.workdir / "config.json").read_text() == before


@pytest.mark.slow(seconds=9)
def test_a_run_over_epochs_made_longer_reads_every_row_equally_often(home, config):
    run = config("longer", train__steps=0, train__epochs=1, train__batch_size=8)
    rows = read_rows(home, run)
    assert len(rows) % 8  # the last step has places left over
    train(run)
    run.train.epochs = 2
    result = train(run, resume=True)
    last = read_records(result.workdir / "metrics.jsonl")[-1]
    assert last["tokens"] == 2 * rows.statistics.tokens
    assert last["trained_tokens"] == 2 * rows.statistics.trained_tokens
    assert result.step == math.ceil(len(rows) / 8) * 2


@pytest.mark.slow(seconds=12)
def test_a_run_is_resumed_on_another_mesh(home, config, monkeypatch):
    one = config(train__save_every=4, train__batch_size=8)
    crash(monkeypatch, one, step=5)
    step_4 = read_arrays(parts_workdir(one) / "checkpoints/4")
    restored = []
    original = trainer.Checkpoints.restore

    def restore(self, abstract, step, base):
        state, counts = original(self, abstract, step, base)
        restored.append(jax.tree.map(lambda a: (np.asarray(a), a.sharding.num_devices), state))
        return state, counts

    monkeypatch.setattr(trainer.Checkpoints, "restore", restore)
    many = copy.deepcopy(one)
    many.strategy, many.mesh.data, many.mesh.fsdp = "fsdp", 0, 8
    result = train(many, resume=True)
    params = {f"params['{path}']": value for path, value in restored[0].params.items()}
    for name, (array, devices) in params.items():
        assert devices == 8
        np.testing.assert_array_equal(array, step_4[name])
    whole = train(config("whole", train__batch_size=8))
    losses = [[r["loss"] for r in read_metrics(w.workdir)] for w in (result, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow(seconds=5)
def test_resume_refuses_other_data(home, config, monkeypatch, tmp_path):
    run = config(train__save_every=2)
    run.data.train = str(tmp_path / "mine.jsonl")
    write_chats(tmp_path / "mine.jsonl", 30)
    crash(monkeypatch, run, step=3)
    path = tmp_path / "mine.jsonl"
    path.write_text(path.read_text().replace("say", "yas", 1))
    with pytest.raises(
        CheckpointError, match=r"changed since .*: there are as many rows, \d+, but"
    ):
        train(run, resume=True)
    write_chats(path, 60)
    with pytest.raises(
        CheckpointError, match=r"changed since .*: \d+ rows then, \d+ now\. Restore"
    ):
        train(run, resume=True)


@pytest.mark.slow(seconds=4)
def test_resume_reports_a_changed_key_and_refuses_one_that_breaks_the_run(
    home, config, monkeypatch, capfd
):
    run = config(train__save_every=2)
    crash(monkeypatch, run, step=3)
    run.train.keep_last = 1
    train(run, resume=True)
    assert "train.keep_last was 2 and is now 1." in capfd.readouterr().err
    run.train.batch_size = 2
    with pytest.raises(CheckpointError, match=r"train.batch_size was 4 and is now 2"):
        train(run, resume=True)


@pytest.mark.slow(seconds=2)
def test_train_leaves_the_config_as_it_was_and_says_how_the_run_ended(home, config):
    run = config(data__validation=held_out(home))
    before = to_dict(run)
    result = train(run)
    assert to_dict(run) == before
    assert result.reason == "end"
    assert result.checkpoint == result.workdir / "checkpoints/8"
    evaluations = [r["loss"] for r in read_records(result.workdir / "eval.jsonl")]
    assert result.best_loss == min(evaluations) < evaluations[0]
    told = json.loads((result.workdir / "result.json").read_text())
    assert told["status"] == "succeeded" and told["step"] == 8
    assert told["trained_tokens"] == read_metrics(result.workdir)[-1]["trained_tokens"]


@pytest.mark.parametrize(
    ("reason", "code"), [("end", 0), ("patience", 0), ("SIGINT", 130), ("SIGTERM", 143)]
)
def test_a_result_tells_programs_whether_the_run_is_to_go_on(reason, code):
    assert TrainResult(Path("run"), Path("run/1"), 1, reason, 0.5).exit_code == code


def test_metrics_count_every_token_once(home, config):
    result = train(config(train__steps=0, train__epochs=2, train__log_every=4))
    last = read_records(result.workdir / "metrics.jsonl")[-1]
    # Two epochs of all documents, as the preparation of the data counts them.
    rows = read_rows(home, config())
    assert result.step == math.ceil(2 * len(rows) / 4)
    assert last["tokens"] == 2 * rows.statistics.tokens
    assert last["trained_tokens"] == 2 * rows.statistics.trained_tokens


# ---- evaluation and stopping ----


def feed_losses(monkeypatch, losses):
    """Lets the evaluations of a run find these losses, the first before training."""
    rest = iter(losses)

    def sums(*_, **__):
        return UnitSums(np.array([next(rest)]), np.ones(1), bytes=np.ones(1))

    monkeypatch.setattr(session, "evaluate_rows", sums)


NAN = float("nan")


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize(
    ("losses", "minimum_change", "stopped"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2], 0.0, 8),
        ([5, 4, 4, 4], 0.0, 3),
        ([5, 4.5, 4.3, 4.1, 3.8], 0.6, 4),  # only the fall from 5 to 4.3 is large enough
        ([5, NAN, NAN], 0.0, 2),
        ([NAN, 5, 6, 7], 0.0, 3),
        ([5, 6, 4, 5, 5], 0.0, 4),
    ],
)
def test_training_stops_when_the_validation_loss_does_not_fall(
    home, config, monkeypatch, losses, minimum_change, stopped
):
    run = config(
        data__validation=held_out(home),
        train__eval_every=1,
        eval__patience=2,
        eval__minimum_change=minimum_change,
    )
    feed_losses(monkeypatch, losses)
    result = train(run)
    assert (result.step, result.reason) == (stopped, "end" if stopped == 8 else "patience")
    seen = [loss for loss in losses[: stopped + 1] if loss == loss]
    assert result.best_loss == min(seen)
    assert [r["step"] for r in read_metrics(result.workdir)] == [*range(1, stopped + 1)]
    assert (result.workdir / "checkpoints" / str(stopped)).is_dir()


@pytest.mark.slow(seconds=2)
def test_the_end_of_patience_names_the_change_that_was_too_small(home, config, monkeypatch, capfd):
    run = config(
        data__validation=held_out(home),
        train__eval_every=1,
        eval__patience=1,
        eval__minimum_change=0.5,
    )
    feed_losses(monkeypatch, [5, 4.9])
    train(run)
    ended = "the validation loss did not fall by eval.minimum_change (0.5) in 1 evaluation."
    assert ended in " ".join(capfd.readouterr().err.split())
    train(run, resume=True)
    assert ended in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow(seconds=3)
def test_resuming_where_no_run_is_says_so_and_names_the_nearest(
    home, config, monkeypatch, tmp_path, capfd
):
    train(config("first", train__steps=2))
    assert "anew" not in capfd.readouterr().err
    run = config("frist", train__steps=2)
    crash(monkeypatch, run, step=1, resume=True)
    said = "".join(capfd.readouterr().err.split())
    assert f"Thereisnorunin{tmp_path / 'frist'}toresume" in said
    assert f"--config.train.workdir={tmp_path / 'first'}?" in said
    (tmp_path / "frist" / "metrics.jsonl").write_text('{"step": 1}\n')
    train(run, resume=True)
    assert "savednocheckpoint:itstartsanew" in "".join(capfd.readouterr().err.split())
    assert "step" in read_metrics(tmp_path / "frist")[0]


@pytest.mark.slow(seconds=5)
def test_patience_outlives_a_resume(home, config, monkeypatch):
    run = config(
        data__validation=held_out(home),
        train__eval_every=1,
        train__save_every=1,
        train__log_every=5,
        eval__patience=3,
    )
    feed_losses(monkeypatch, [5, 6, 6])
    crash(monkeypatch, run, step=3)
    feed_losses(monkeypatch, [6])
    result = train(run, resume=True)
    assert (result.step, result.reason) == (3, "patience")
    assert [r["step"] for r in read_metrics(result.workdir)] == [3]
    feed_losses(monkeypatch, [])
    assert train(run, resume=True).step == 3
    run.eval.patience = 5
    feed_losses(monkeypatch, [6, 6])
    assert train(run, resume=True).step == 5


@pytest.mark.slow(seconds=3)
def test_the_best_checkpoint_is_kept_and_found(home, config, monkeypatch):
    run = config(
        data__validation=held_out(home),
        train__eval_every=1,
        train__save_every=1,
        train__keep_last=2,
    )
    feed_losses(monkeypatch, [5, 4, 2, NAN, 3, 3, 3, NAN, NAN])
    result = train(run)
    folder = result.workdir / "checkpoints"
    assert sorted(int(p.name) for p in folder.iterdir()) == [2, 7, 8]
    assert jaxft.load(result.workdir).source.step == 2
    assert jaxft.load(result.workdir, step="latest").source.step == 8
    with pytest.raises(CheckpointError, match=r"no checkpoint '3'; it has 2, 7, 8"):
        jaxft.load(result.workdir, step="3")


def test_an_improvement_between_saves_is_saved(home, config, monkeypatch):
    run = config(data__validation=held_out(home), train__eval_every=3, train__keep_last=1)
    feed_losses(monkeypatch, [5, 4, 6, 7])
    result = train(run)
    assert sorted(int(p.name) for p in (result.workdir / "checkpoints").iterdir()) == [3, 8]


@pytest.mark.slow(seconds=2)
def test_evaluation_is_due_every_n_steps_or_at_the_end_of_each_epoch(home, config):
    every = train(config("every", data__validation=held_out(home), train__eval_every=3))
    assert [r["step"] for r in read_records(every.workdir / "eval.jsonl")] == [0, 3, 6, 8]
    # 19 rows, 4 a step: rows 19, 38 and 57 are read by steps 5, 10 and 15.
    keys = {
        "train__steps": 0,
        "train__epochs": 3,
        "train__save_epochs": True,
        "train__keep_last": 3,
    }
    epochs = train(config("epochs", data__validation=held_out(home), **keys))
    assert [r["step"] for r in read_records(epochs.workdir / "eval.jsonl")] == [0, 5, 10, 15]
    saved = (epochs.workdir / "checkpoints").iterdir()
    assert sorted(int(path.name) for path in saved) == [5, 10, 15]


def feed_answers(monkeypatch, shares):
    """Lets the evaluations of a run get these of ten answers right, the first before training."""
    rest = iter(shares)

    def answer(config, model, prompts):
        right = np.arange(10) < next(rest)
        return Answers("exact_match", [], [], [], right, 0, prompts.of_rows)

    monkeypatch.setattr(session, "answer", answer)


def answering(home, config, **changes):
    keys = {"eval__answers": "exact", "eval__max_new_tokens": 10, "eval__best": "answers"}
    keys |= {"data__validation": held_out(home), "train__eval_every": 1, "train__keep_last": 1}
    return config(**keys | changes)


@pytest.mark.slow(seconds=3)
def test_answers_are_generated_at_each_evaluation_and_told(home, config, capfd):
    run = answering(home, config, eval__best="loss", train__eval_every=4, eval__answer_rows=5)
    result = train(run)
    records = read_records(result.workdir / "eval.jsonl")
    assert [r["step"] for r in records] == [0, 4, 8]
    assert [(r["exact_match"]["count"], r["exact_match"]["of_rows"]) for r in records] == [
        (5, 9)
    ] * 3
    said = capfd.readouterr().err
    assert said.count("exact match") == 3
    assert "Answers to 5 rows took" in said
    assert "Exact match" in (result.workdir / "report.html").read_text()
    # They are those that the command generates.
    run.eval.answers = "exact"
    found = jaxft.evaluate(run, result.workdir, step="8")["validation"]
    assert found.record()["exact_match"] == records[-1]["exact_match"]
    assert found.record()["bits_per_byte"] == pytest.approx(records[-1]["bits_per_byte"])


def test_the_best_checkpoint_and_patience_go_by_answers_if_asked(home, config, monkeypatch):
    run = answering(home, config, eval__patience=3)
    feed_losses(monkeypatch, [5, 4, 3, 2, 1, 0.5, 0.4])
    feed_answers(monkeypatch, [1, 4, 7, 6, 7, 5])
    result = train(run)
    # At step 4 as many were right as at step 2, which is no improvement.
    assert (result.step, result.reason) == (5, "patience")
    assert jaxft.load(result.workdir).source.step == 4, "of equal ones the newest"
    assert result.best_loss == 0.5


@pytest.mark.parametrize("best", ["loss", "answers"])
def test_answers_need_data_that_asks(home, config, tmp_path, best):
    (tmp_path / "held_out.txt").write_text("one text\n\nanother text\n")
    run = answering(home, config, data__validation=str(tmp_path / "held_out.txt"), eval__best=best)
    with pytest.raises(ConfigError, match="plain text, which asks nothing"):
        train(run)


@pytest.mark.slow(seconds=3)
def test_the_list_of_bad_rows_is_of_the_data_of_the_newest_part(config, tmp_path, capfd):
    bad = write_chats(tmp_path / "bad.jsonl", 5, seed=1)
    bad.write_text('{"messages": [\n' + bad.read_text())
    good = write_chats(tmp_path / "good.jsonl", 5, seed=1)
    keys = {"data__bad_rows": "skip", "data__bad_share": 0.5}
    train(config(data__validation=str(bad), train__steps=2, **keys))
    listed = tmp_path / "run" / "skipped.jsonl"
    assert f"listed in {listed}" in "".join(capfd.readouterr().err.split("\n"))
    assert [record["set"] for record in read_records(listed)] == ["validation"]
    train(config(data__validation=str(good), train__steps=3, **keys), resume=True)
    assert read_records(listed) == []


@pytest.mark.slow(seconds=2)
def test_best_and_patience_begin_anew_with_other_validation_data(
    home, config, monkeypatch, tmp_path, capfd
):
    run = config(
        data__validation=held_out(home),
        train__eval_every=1,
        train__keep_last=1,
        eval__patience=3,
    )
    feed_losses(monkeypatch, [5, 0.1, 0.2, 0.2, 0.2])
    stopped = train(run)
    assert (stopped.step, stopped.reason) == (4, "patience")
    run.data.validation = str(write_chats(tmp_path / "other.jsonl", 7, seed=8))
    feed_losses(monkeypatch, [9, 8, 8.5, 8.6])
    result = train(run, resume=True)
    assert "best checkpoint and patience begin anew" in " ".join(capfd.readouterr().err.split())
    assert (result.step, result.reason, result.best_loss) == (8, "end", 8)
    assert jaxft.load(result.workdir).source.step == 6
    words = (result.workdir / "report.html").read_text()
    assert "5 earlier evaluation(s) of validation were of other data" in words


@pytest.mark.slow(seconds=11)
def test_samples_are_of_the_checkpoint_that_an_export_takes(home, config, monkeypatch):
    run = config(data__validation=held_out(home), train__eval_every=2, eval__samples=2)
    run.optim.learning_rate = 0.05
    feed_losses(monkeypatch, [5, 4, 2, 3, 3])
    result = train(run)
    samples = read_records(result.workdir / "samples.jsonl")
    assert [r["step"] for r in samples] == [0, 0, 4, 4]
    best = jaxft.load(result.workdir)
    assert best.source.step == 4
    for record in samples[2:]:
        prompt = [{"role": "user", "content": record["prompt"]}]
        answer = best.generate(prompt, max_new_tokens=run.eval.max_new_tokens)
        assert record["output"] == answer
    page = (result.workdir / "report.html").read_text()
    assert "Step 4, the best by validation loss" in page
    assert train(run, resume=True) == result


# ---- what is warned of ----


@pytest.mark.slow(seconds=11)
def test_a_run_of_hardly_a_step_says_what_makes_it_longer(home, config, capfd, monkeypatch):
    monkeypatch.setattr(advice, "_FEW_STEPS", 4)
    run = config(train__steps=0, train__epochs=2.0, data__max_length=192)
    result = train(run)
    assert result.step == 3
    said = " ".join(capfd.readouterr().err.split())
    assert "The run has 3 steps" in said
    found = dict(re.findall(r"--config\.([\w.]+=\w+) \((\d+) steps\)", said))
    assert found.keys() == {
        "train.batch_size=2", "train.epochs=4", "data.packing=none", "data.max_length=64"
    }  # fmt: skip
    for flag, steps in found.items():
        path, _, value = flag.partition("=")
        changed = config(
            flag.replace("=", "-"), train__steps=0, train__epochs=2.0, data__max_length=192
        )
        node, leaf = path.split(".")
        old = getattr(getattr(changed, node), leaf)
        setattr(getattr(changed, node), leaf, type(old)(value))
        count = len(read_rows(home, changed))
        made = math.ceil(changed.train.epochs * count / changed.train.batch_size)
        # How full shorter rows will be is estimated.
        assert made == pytest.approx(int(steps), abs=2 if leaf == "max_length" else 0)
    train(config("asked", train__steps=2))
    assert "too few" not in capfd.readouterr().err


@pytest.mark.slow(seconds=2)
def test_validation_that_is_trained_on_is_told(home, config, tmp_path, capfd):
    mixed = tmp_path / "mixed.jsonl"
    lines = (home / "train.jsonl").read_text().splitlines()
    mixed.write_text("\n".join([*(home / "held_out.jsonl").read_text().splitlines(), lines[6]]))
    train(config(data__validation=str(mixed), train__steps=2))
    said = " ".join(capfd.readouterr().err.split())
    assert "1 of 10 validation documents are in the training data too" in said
    assert f"{mixed}:10 = {home / 'train.jsonl'}:7" in said
    train(config("apart", data__validation=held_out(home), train__steps=2))
    assert "training data too" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("objective", "rate", "parameters", "warns"),
    [
        ("dpo", 1e-5, 200_000_000, True),
        ("kto", 2e-6, 7_000_000_000, True),
        ("dpo", 5e-7, 7_000_000_000, False),
        ("dpo", 1e-5, 260_032, False),
        ("orpo", 5e-6, 7_000_000_000, False),
        ("sft", 1e-5, 7_000_000_000, False),
    ],
)
def test_a_learning_rate_of_sft_is_warned_of_in_preferences(
    objective, rate, parameters, warns, config, capfd
):
    run = config(objective__name=objective, optim__learning_rate=rate)
    advice._warn_of_learning_rate(run, parameters)
    said = " ".join(capfd.readouterr().err.split())
    assert ("Set --config.optim.learning_rate=5e-07" in said) == warns


@pytest.mark.parametrize(
    ("rank", "rate", "parameters", "said"),
    [
        (0, 1e-3, 200_000_000, "full tuning of large models is 1e-5 to 2e-5"),
        (0, 1e-4, 200_000_000, ""),
        (0, 1e-3, 260_032, ""),
        (8, 1e-2, 200_000_000, "LoRA of large models is 1e-4 to 2e-4"),
        (8, 1e-3, 200_000_000, ""),
        (8, 1e-5, 260_032, "is 1e-05, the default: an adapter hardly moves at it"),
    ],
)
def test_a_learning_rate_of_another_size_or_way_is_warned_of(
    rank, rate, parameters, said, config, capfd
):
    run = config(adapter__rank=rank, optim__learning_rate=rate)
    run.model.random_init = False
    advice._warn_of_learning_rate(run, parameters)
    text = " ".join(capfd.readouterr().err.split())
    assert said in text if said else not text


def test_only_what_makes_a_short_run_long_enough_is_advised(home, config, capfd):
    run = config(train__steps=0, train__batch_size=64, data__max_length=1024)
    rows = read_rows(home, run)
    advice._warn_of_few_steps(run, rows, steps=1, row_multiple=1)
    said = " ".join(capfd.readouterr().err.split())
    assert "train: 1 row of 1,024 tokens" in said
    assert "The run has 1 step, too few" in said and "packed into 1 row of" in said
    found = re.findall(r"--config\.([\w.]+=\w+) \((\d+) steps\)", said)
    assert found == [("train.epochs=3200", "50")]


# ---- what is not finite ----


def poison(home, tmp_path, tensor, value=np.inf):
    """Writes a copy of the model with one weight of this value."""
    folder = tmp_path / "poisoned"
    shutil.copytree(home / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].flat[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_loss_that_is_not_finite_names_step_rows_and_lines(home, config, tmp_path):
    run = config(train__log_every=3, train__save_every=2)
    run.model.path = poison(home, tmp_path, "model.norm.weight", value=3e38)
    with pytest.raises(TrainingError) as error:
        train(run)
    text = str(error.value)
    assert text.startswith("Step 1: the loss is nan")
    assert "No checkpoint was saved yet; start again with --overwrite" in text
    iterator = trainer.data.batches(read_rows(home, run), batch_size=4, steps=1)
    for number in iterator.row_numbers(0):
        assert f"row {number} ({home / 'train.jsonl'}:" in text
    iterator.close()
    assert not list((tmp_path / "run/checkpoints").iterdir())
    told = json.loads((tmp_path / "run/result.json").read_text())
    assert told["reason"] == "TrainingError" and told["problems"] == [text]


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("save_every", [1, 3, 0])
def test_weights_that_are_not_finite_are_never_saved(home, config, save_every):
    # So large a step that the first update is finite and the loss after it is not.
    run = config(train__save_every=save_every, train__log_every=4)
    run.optim.learning_rate, run.optim.warmup_steps = 1e37, 0
    with pytest.raises(TrainingError, match=r"Step \d: ") as error:
        train(run)
    folder = parts_workdir(run) / "checkpoints"
    saved = sorted(int(p.name) for p in folder.iterdir())
    for step in saved:
        assert all(np.isfinite(a).all() for a in read_arrays(folder / str(step)).values())
    if saved:
        assert f"last good checkpoint is step {saved[-1]}" in str(error.value)


@pytest.mark.slow(seconds=2)
def test_a_model_with_weights_that_are_not_finite_is_refused_by_name(home, config, tmp_path):
    run = config(data__validation=held_out(home))
    for tensor in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        run.model.path = poison(home, tmp_path / tensor, tensor, value=np.nan)
        for start in (train, jaxft.evaluate):
            with pytest.raises(ModelError, match=f"not finite.*: {re.escape(tensor)}\\. The file"):
                start(run)
    assert not (parts_workdir(run) / "eval.jsonl").exists()


def test_weights_that_the_loss_does_not_show_are_not_saved(home, config, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_refuse_not_finite", lambda *_: None)
    # The embedding of a token that is in no row: no loss ever reads it.
    run = config(train__save_every=1)
    run.model.path = poison(home, tmp_path, "model.embed_tokens.weight")
    with pytest.raises(TrainingError, match="Step 1: the updated weights are not finite"):
        train(run)
    assert not list((parts_workdir(run) / "checkpoints").iterdir())


# ---- how it runs ----


def test_the_step_is_compiled_once(home, config):
    run = config(data__validation=held_out(home), train__steps=0, train__epochs=2.3)
    compiled = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(run)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [compiled.count(name) for name in ("jit(step)", "jit(evaluate)")] == [1, 1], compiled


def test_the_loop_dispatches_a_period_before_it_reads_the_one_before(home, config, monkeypatch):
    run = config(train__log_every=2)
    events = []
    build, record = trainer.build, trainer.MetricsWriter.write

    def spy_build(*args, **kwargs):
        program = build(*args, **kwargs)
        compiled = program.lower().compile()

        def step(state, fixed, batch):
            events.append("step")
            return compiled(state, fixed, batch)

        step.memory_analysis = compiled.memory_analysis

        class Lowered:
            def lower(self, *_):
                return self

            def compile(self, **_):
                return step

        return dataclasses.replace(program, train_step=Lowered())

    monkeypatch.setattr(trainer, "build", spy_build)
    monkeypatch.setattr(
        trainer.MetricsWriter,
        "write",
        lambda self, r: events.append(r["step"]) or record(self, r),
    )
    read = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("read") or read(x))
    train(run)
    s = "step"
    # At the last save what is left is read: no step of the run may be in flight.
    end = ["read", 8, "read"]
    assert events == [s, s, *[s, s, "read", 2], *[s, s, "read", 4], *[s, s, "read", 6], *end]


@pytest.mark.slow(seconds=3)
def test_evaluation_and_saves_do_not_count_as_training_time(home, config, monkeypatch):
    plain = train(config("plain"))
    original = session.evaluate_rows

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return original(*args, **kwargs)

    monkeypatch.setattr(session, "evaluate_rows", slow)
    slowed = train(
        config("slowed", data__validation=held_out(home), train__eval_every=1, train__log_every=3)
    )
    seconds = [read_records(r.workdir / "metrics.jsonl")[-1]["seconds"] for r in (plain, slowed)]
    # Nine evaluations slept 1.8 s in all.
    assert seconds[1] < seconds[0] + 0.9


# ---- the workdir stands alone ----


@pytest.mark.slow(seconds=4)
def test_a_workdir_needs_nothing_outside_itself(home, config, tmp_path):
    run = config("first", data__validation=held_out(home))
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    run.model.path = str(base)
    first = train(run)
    shutil.rmtree(base)
    loaded = jaxft.load(first.workdir)
    assert loaded.source.step == 8
    tokens = np.array([[7, 8, 9, 10]])
    logits = np.asarray(loaded(tokens))
    at_5 = jaxft.load(first.workdir / "checkpoints/5")
    assert at_5.source.step == 5
    assert not np.array_equal(logits, at_5(tokens))
    assert loaded.tokenizer.chat_template == loaded.template.text
    assert isinstance(
        loaded.generate([{"role": "user", "content": "say abc"}], max_new_tokens=3), str
    )
    again = config("second", train__steps=2, data__validation=held_out(home))
    again.model.path = str(first.workdir)
    second = train(again)
    before, *_ = read_records(second.workdir / "eval.jsonl")
    *_, after = read_records(first.workdir / "eval.jsonl")
    assert before["loss"] == after["loss"]


def test_a_workdir_that_is_the_models_own_folder_is_refused(home, config, tmp_path):
    run = config()
    first = train(run)
    run.model.path = run.train.workdir
    with pytest.raises(ConfigError, match=r"train\.workdir and model\.path are the same folder"):
        train(run, overwrite=True)
    assert first.checkpoint.is_dir()
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    run.model.path = run.train.workdir = str(base)
    with pytest.raises(ConfigError, match=r"train\.workdir and model\.path are the same folder"):
        train(run)
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.slow(seconds=2)
def test_a_run_prints_no_warnings(home, config, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(config(data__validation=held_out(home), train__save_every=2))
        jaxft.load(result.workdir)
    assert not caught
    err = capfd.readouterr().err
    assert "WARNING" not in err
    assert "Warning" not in err


@pytest.mark.slow(seconds=9)
def test_a_run_on_parts_of_sources_is_resumed_bit_for_bit_and_lists_what_it_left_out(
    home, config, monkeypatch, tmp_path
):
    first = write_chats(tmp_path / "a.jsonl", 60, seed=3)
    first.write_text('{"messages": [\n' + first.read_text())
    second = write_chats(tmp_path / "b.jsonl", 20, seed=4)
    keys = {
        "data__train": f"{first}:limit=50:0.75,{second}:0.25",
        "data__validation": "20%",
        "data__bad_rows": "skip",
        "data__bad_share": 0.2,
        "train__save_every": 3,
        "train__eval_every": 4,
    }
    whole, broken = config("whole", **keys), config("broken", **keys)
    train(whole)
    crash(monkeypatch, broken, step=6)
    train(broken, resume=True)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "broken")
    for name in ("whole", "broken"):
        [skipped] = read_records(tmp_path / name / "skipped.jsonl")
        assert (skipped["set"], skipped["origin"]) == ("train", f"{first}:1")
        assert skipped["row"] == '{"messages": ['
    evaluated = read_records(tmp_path / "whole" / "eval.jsonl")[-1]
    found = jaxft.evaluate(whole, tmp_path / "whole", step="latest")["validation"]
    assert found.sums.loss.value == pytest.approx(evaluated["loss"], rel=1e-6)
    whole.eval.answers, whole.eval.max_new_tokens = "exact", 12
    answers = jaxft.evaluate(whole, tmp_path / "whole", step="latest")["validation"].answers
    assert answers is not None
    # A fifth of 50 and of 20 rows, of which a pass takes 10 and, for a quarter, 3.
    assert len(answers.right) == 13


@pytest.mark.slow(seconds=15)
def test_the_average_of_weights_is_what_is_evaluated_exported_and_resumed(
    home, config, monkeypatch
):
    changes = {"optim__ema": 0.9, "optim__learning_rate": 0.01, "train__steps": 3}
    changes |= {"data__validation": held_out(home), "train__eval_every": 3, "train__save_every": 1}
    whole, parts = config("averaged", **changes), config("averaged_parts", **changes)
    result = train(whole)
    checkpoint = result.workdir / "checkpoints/3"
    arrays = read_arrays(checkpoint)
    [average] = [name for name in arrays if name.endswith("['average']['embed.w']")]
    np.testing.assert_array_equal(arrays["params['embed.w']"], arrays[average])
    crash(monkeypatch, parts, step=3)
    resumed = train(parts, resume=True)
    assert_same_arrays(resumed.workdir / "checkpoints/3", checkpoint)
    evaluated = read_records(result.workdir / "eval.jsonl")[-1]["loss"]
    found = jaxft.evaluate(whole, checkpoint)["validation"]
    assert found.sums.loss.value == pytest.approx(evaluated, rel=1e-5)


def test_wall_time_is_written_for_each_part_and_shown_for_all(config, home, monkeypatch):
    lines = []
    monkeypatch.setattr(console, "write", lambda text: lines.append(text.plain))
    workdir = train(config(train__steps=2, data__validation=held_out(home))).workdir
    train(config(train__steps=4, data__validation=held_out(home)), resume=True)
    records = read_records(workdir / "goodput.jsonl")
    parts = [(r["start_step"], r["step"], r["reason"]) for r in records]
    assert parts == [(0, 2, "end"), (2, 4, "end")]
    for record in records:
        seconds = record["seconds"]
        assert sum(seconds.values()) == pytest.approx(record["wall_seconds"])
        assert record["goodput"] == pytest.approx(seconds["steps"] / record["wall_seconds"])
        assert all(seconds[kind] > 0 for kind in ("steps", "startup", "evaluation", "checkpoint"))
    assert "of wall time:" in lines[-2] and lines[-1].startswith("Done")
    page = (workdir / "report.html").read_text()
    percents = re.findall(r'<i class="k k-\w+" style="width:([\d.]+)%"', page)
    assert sum(map(float, percents)) == pytest.approx(100, abs=0.01)
