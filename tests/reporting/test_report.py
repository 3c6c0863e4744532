import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from jaxft.config import RunConfig
from jaxft.files import append_jsonl, write_json
from jaxft.reporting.report import write_report
from jaxft.workdir.workdir import Workdir

_VOID = {"meta", "path", "br", "wbr"}


class _Page(HTMLParser):
    """Collects tags and text, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data


def _parse(path):
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def workdir(tmp_path):
    config = RunConfig()
    config.model.path = "/somewhere/deep/stories260K"
    config.data.train = "train.jsonl"
    config.optim.learning_rate = 0.125
    workdir = Workdir.check(tmp_path / "run <1>", config, resume=False, overwrite=False)
    workdir.begin(config)
    return workdir


def _metrics(workdir, steps, **changes):
    for step in steps:
        record = {
            "step": step,
            "loss": 5.0 - step / 100,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens": 4000 * step,
            "trained_tokens": 1000 * step,
            "tokens_per_second": 2000.0 + step,
            "seconds": 2.0 * step,
        }
        append_jsonl(workdir.metrics, record | changes)


def _evaluation(step, loss, dataset="validation", **more):
    return {"step": step, "dataset": dataset, "loss": loss, "perplexity": math.exp(loss)} | more


def test_a_whole_run_is_told(workdir):
    _metrics(workdir, range(10, 301, 10))
    for step, loss, right in ((0, 5.0, 0.25), (150, 1.25, 0.5), (300, 1.5, 0.75)):
        interval = {"value": right, "low": right - 0.05, "high": right + 0.05, "count": 200}
        interval["of_rows"] = 1000
        append_jsonl(workdir.evaluations, _evaluation(step, loss, label_accuracy=interval))
        append_jsonl(workdir.evaluations, _evaluation(step, 2 + step / 300, "retention"))
    for step, answer in ((0, "blah"), (150, "oncology"), (300, "cardiology")):
        sample = {"step": step, "prompt": "chest pain?", "output": answer, "reference": "heart"}
        append_jsonl(workdir.samples, sample)
    page = _parse(write_report(workdir))
    words = " ".join(page.text.split())
    assert "Best validation loss 1.250 at step 150 · from 5.000, \N{MINUS SIGN}3.750" in words
    assert (
        "Label accuracy 75.0 % at step 300 · 95 % interval 70.0 to 80.0 %, 200 of 1,000 rows · "
        "before training 25.0 %" in words
    )
    assert "Training time 10:00 300 steps" in words
    assert "Tokens 1.2 M 300,000 of them trained" in words
    assert "Step 0 blah Step 300 cardiology Reference heart" in words
    assert "oncology" not in words
    assert (
        "label accuracy 25.0 % 75.0 % 300 75.0 % (70.0 to 80.0 %, 200 of 1,000 rows) +50.0" in words
    )
    assert "retention loss, nats per token 2.000 2.000 0 3.000 +1.000" in words
    assert "optim.learning_rate 0.125 1e-05 Peak learning rate." in words
    assert page.tags.count("figure") == 6  # loss, evaluation loss, accuracy, rate, norm, speed
    assert "jax" in words


def test_a_run_with_a_name_is_called_so(workdir):
    assert "<title>run &lt;1&gt;" in write_report(workdir).read_text("utf-8")
    config = json.loads(workdir.config.read_text("utf-8"))
    write_json(workdir.config, config | {"train.name": "ft:base:local:shop:1a"})
    page = write_report(workdir).read_text("utf-8")
    assert "<title>ft:base:local:shop:1a" in page and "run &lt;1&gt;" not in page


def _drawn(workdir, title):
    """Returns the series of a chart by name: what its script knows."""
    text = write_report(workdir).read_text()
    _, _, rest = text.partition(f"<b>{title}</b>")
    found = json.loads(re.search(r'<script type="application/json">(.*?)</script>', rest).group(1))
    return {series["name"]: series["points"] for series in found}


def test_a_record_stands_in_the_middle_of_its_steps(workdir):
    # The loss after s steps is 3 / 2^s; a record is the mean of what its steps found before them.
    losses = [3 / 2**s for s in range(41)]
    for step in range(4, 41, 4):
        _metrics(workdir, [step], loss=sum(losses[step - 4 : step]) / 4)
    for step in (0, 40):
        append_jsonl(workdir.evaluations, _evaluation(step, losses[step]))
    chart = _drawn(workdir, "Loss")
    assert "logarithmic" in workdir.report.read_text()
    assert chart["training"][0][2] == "steps 1 to 4"
    # Step 0 is at 0 % and step 40 at 100 %: the first four losses are of the weights of 0 to 3.
    assert [point[0] for point in chart["training"][:2]] == [3.75, 13.75]
    assert [point[0] for point in chart["validation"]] == [0, 100]
    assert [point[3] for point in chart["training"]][:2] == ["1.406", "0.088"]
    assert _drawn(workdir, "Throughput")["throughput"][0][2] == "steps 1 to 4"


def test_an_early_fall_is_drawn_as_it_was_among_many_records(workdir):
    generator = random.Random(0)
    losses = {step: 0.03 + 3 / 2**step for step in range(1, 401)}
    for step, loss in losses.items():
        _metrics(workdir, [step], loss=loss * generator.uniform(0.9, 1.1))
    series = _drawn(workdir, "Loss")
    assert len(series["training, each record"]) == 400
    means = series["training, means of neighbours"]
    for point in means[:8]:
        step = int(point[2].removeprefix("step "))
        assert float(point[3]) == pytest.approx(losses[step], rel=0.11)
    assert float(means[-1][3]) == pytest.approx(0.03, rel=0.05)
    assert 40 < len(means) < 80


def test_evaluations_of_other_data_are_left_out_and_counted(workdir):
    _metrics(workdir, [10, 20])
    append_jsonl(workdir.evaluations, _evaluation(0, 9.0, digest="a"))
    append_jsonl(workdir.evaluations, _evaluation(10, 0.5, digest="a"))
    append_jsonl(workdir.evaluations, _evaluation(20, 2.0, digest="b", rows=5, of_rows=19))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "Best validation loss 2.000 at step 20" in words
    assert "2 earlier evaluation(s) of validation were of other data" in words
    assert "validation: 5 of 19 rows, drawn at random" in words


def test_a_run_that_only_made_it_worse_is_told(workdir):
    _metrics(workdir, [10])
    for step, loss in ((0, 1.0), (10, 1.5)):
        append_jsonl(workdir.evaluations, _evaluation(step, loss))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "lowest before training, at step 0" in words


def _preferences(workdir):
    """Writes a run of preferences: 200 records, three evaluations, a figure of the user's own."""
    values = json.loads(workdir.config.read_text()) | {"objective.name": "dpo"}
    workdir.config.write_text(json.dumps(values))
    for step in range(1, 201):
        figures = {"accuracy": 0.5 + step / 1000, "margin": step / 100, "kl": 0.1, "wildness": 3.0}
        figures |= {"chosen_reward": -0.1, "rejected_reward": -step / 100}
        figures |= {"chosen_log_prob": -40.0, "rejected_log_prob": -50.0}
        _metrics(workdir, [step], loss=0.69 - step / 1000, **figures)
    for step, right in ((0, 0.52), (100, 0.6), (200, 0.712)):
        record = {"step": step, "dataset": "validation", "loss": 0.69 - step / 2000, "weight": 40.0}
        record |= {"rows": 20, "of_rows": 20, "documents": 80, "digest": "d"}
        record |= {"accuracy": right, "accuracy_low": right - 0.031, "accuracy_high": right + 0.031}
        record |= {"rejected_reward": -step / 100, "wildness": 2.0 + step}
        append_jsonl(workdir.evaluations, record)


def test_a_run_of_preferences_is_told_by_the_figures_of_preferences(workdir):
    _preferences(workdir)
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert (
        "Preferred answers ranked first 71.2 % at step 200 · 95 % interval 68.1 to 74.3 % · "
        "before training 52.0 %" in words
    )
    assert "Loss per pair" in words and "nats per token" not in words
    assert "validation: 20 rows, 80 documents, 40 pairs" in words
    assert "preferred answers ranked first 52.0 % 71.2 % 200 71.2 % (68.1 to 74.3 %)" in words
    assert "loss, per pair 0.690 0.590 200 0.590" in words
    # What is neither better high nor low has no best value.
    less = "\N{MINUS SIGN}2.000"
    assert f"rejected reward 0.000 {less} {less}" in words


def test_the_head_of_a_run_names_its_objective_with_what_was_changed(workdir):
    values = json.loads(workdir.config.read_text())
    changed = {"objective.name": "dpo", "objective.dpo.beta": 0.2, "objective.dpo.robust": False}
    workdir.config.write_text(json.dumps(values | changed))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "stories260K fine-tuned by dpo with beta 0.2 on train.jsonl" in words
    workdir.config.write_text(json.dumps(values | {"objective.name": "dpo"}))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "stories260K fine-tuned by dpo on train.jsonl" in words


def test_the_text_beside_answers_of_preferences_is_the_chosen_answer(workdir):
    _preferences(workdir)
    sample = {"step": 0, "prompt": "Why?", "output": "Because.", "reference": "So it is."}
    append_jsonl(workdir.samples, sample)
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "Step 0 Because. Chosen answer So it is." in words


def test_the_share_of_likelier_answers_is_told_in_words(workdir):
    _preferences(workdir)
    append_jsonl(workdir.evaluations, _evaluation(300, 0.5, likelihood_accuracy=2 / 3))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "preferred answers that are likelier 66.7 %" in words
    assert "likelihood_accuracy" not in words


def test_figures_that_belong_together_share_a_chart(workdir):
    _preferences(workdir)
    rewards = _drawn(workdir, "Rewards")
    assert list(rewards) == ["chosen", "rejected", "rejected, validation"]
    texts = [point[3].replace("\N{MINUS SIGN}", "-") for point in rewards["rejected, validation"]]
    assert texts == ["0.000", "-1.000", "-2.000"]
    assert list(_drawn(workdir, "Log-probabilities")) == ["chosen", "rejected"]
    assert len(_drawn(workdir, "KL divergence")["training, each record"]) == 200
    margin = _drawn(workdir, "Margin")
    assert margin["training, each record"][0][2:] == ["step 1", "0.010"]
    shown = _drawn(workdir, "Preferred answers ranked first")
    assert list(shown)[-1] == "validation"


def test_a_figure_that_nobody_knows_has_a_chart_and_a_row_of_its_own(workdir):
    _preferences(workdir)
    drawn = _drawn(workdir, "wildness")
    assert [point[3] for point in drawn["validation"]] == ["2.000", "102", "202"]
    words = " ".join(_parse(workdir.report).text.split())
    assert "wildness 2.000 202 +200.000" in words
    for name in ("documents", "accuracy_low", "trained_tokens"):
        assert f"<b>{name}</b>" not in workdir.report.read_text()


def test_preferences_that_are_not_evaluated_are_told_by_the_last_record(workdir):
    workdir.config.write_text(json.dumps({"objective.name": "ipo"}))
    _metrics(workdir, [10], accuracy=0.5, margin=0.0)
    _metrics(workdir, [20], accuracy=0.75, margin=1.0)
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "Preferred answers ranked first 75.0 % in training, at the last record" in words


@pytest.mark.parametrize(
    ("objective", "unit", "accuracy"),
    [
        ("sft", "nats per token", "Accuracy"),
        ("kto", "per answer", "Answers judged as labelled"),
        ("simpo", "per pair", "Preferred answers ranked first"),
        ("not_there.any_more", "per unit", "Accuracy"),
    ],
)
def test_the_loss_says_what_it_is_a_mean_over(workdir, objective, unit, accuracy):
    workdir.config.write_text(json.dumps({"objective.name": objective}))
    _metrics(workdir, [10, 20], accuracy=0.5)
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert f"Loss {unit}" in words
    assert f"{accuracy} 50.0 % in training" in words


def test_use_of_experts_is_drawn(workdir):
    _metrics(workdir, [10, 20], expert_busiest=3.0, expert_unused=0.25, expert_dropped=0.125)
    assert list(_drawn(workdir, "Experts")) == ["unused experts", "dropped tokens"]
    assert _drawn(workdir, "Busiest expert")["busiest expert"][0][3] == "3.000"


def test_the_page_asks_nothing_of_the_network(workdir):
    _metrics(workdir, range(10, 301, 10))
    page = _parse(write_report(workdir))
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "action", "srcset"} & {name for name, _ in page.attributes}
    text = workdir.report.read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_a_run_that_has_only_begun_has_a_page(workdir):
    assert "no records yet" in _parse(write_report(workdir)).text
    _metrics(workdir, [10])
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "Training loss 4.900 at the last step · first 4.900; no evaluation" in words


def test_a_folder_without_config_and_environment_has_a_page(tmp_path):
    workdir = Workdir(path=tmp_path)
    _metrics(workdir, [10, 20])
    workdir.evaluations.write_text('{"broken\n{"no step": 1}\n')
    assert "Loss" in _parse(write_report(workdir)).text


def test_a_loss_that_is_not_finite_is_named_with_its_step(workdir):
    _metrics(workdir, range(10, 100, 10))
    _metrics(workdir, [100], loss=math.nan, grad_norm=math.inf, tokens_per_second=math.nan)
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "not finite in 1 record(s), first at step 100" in words
    assert "NaN" not in workdir.report.read_text()


def test_texts_of_the_run_cannot_break_the_page(workdir):
    bad = '</pre></script><script>alert("x")</script>&'
    append_jsonl(workdir.samples, {"step": 0, "prompt": bad, "output": bad, "reference": bad})
    _metrics(workdir, range(1, 30), **{bad: 1.0})
    append_jsonl(workdir.evaluations, _evaluation(0, 1.0, bad))
    append_jsonl(workdir.evaluations, _evaluation(9, 0.5, bad))
    values = json.loads(workdir.config.read_text())
    values |= {"data.train": bad, "model.path": bad, "objective.name": bad, "old.key": bad, bad: 1}
    workdir.config.write_text(json.dumps(values))
    machine = json.loads(workdir.environment.read_text())
    workdir.environment.write_text(json.dumps(machine | {"device_kind": bad, "devices": 1}))
    page = _parse(write_report(workdir))
    assert "alert(" not in "".join(workdir.report.read_text().split("<script>")[1:])
    assert page.tags.count("script") == 1 + page.tags.count("figure")
    assert page.text.count(bad) >= 12


def test_an_evaluation_repeated_after_a_resume_counts_once(workdir):
    append_jsonl(workdir.evaluations, _evaluation(0, 3.0))
    append_jsonl(workdir.evaluations, _evaluation(10, 9.0))
    append_jsonl(workdir.evaluations, _evaluation(10, 2.0))
    words = " ".join(_parse(write_report(workdir)).text.split())
    assert "Best validation loss 2.000 at step 10 · from 3.000, \N{MINUS SIGN}1.000" in words


def test_a_long_run_has_a_small_page(workdir):
    lines = [
        json.dumps({"step": s, "loss": 1 + 1 / s, "grad_norm": 1.0, "tokens_per_second": 1.0})
        for s in range(1, 40_001)
    ]
    workdir.metrics.write_text("\n".join(lines) + "\n")
    assert write_report(workdir).stat().st_size < 600_000
