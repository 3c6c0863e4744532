"""Evaluation as a command of its own: figures, answers, comparison, retention."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

import jaxft
from jaxft import evaluation
from jaxft.errors import ConfigError
from jaxft.evaluation import Answers, compare, evaluate, named_sources, read_sample_prompts
from jaxft.tables import print_comparison, print_evaluation, write_json
from tests.tiny_run import tiny_config, write_chats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def run(folder):
    config = tiny_config(
        folder,
        data__validation=str(folder / "held_out.jsonl"),
        optim__learning_rate=1e-2,
        train__steps=30,
    )
    return config, jaxft.train(config)


def evaluated(config, checkpoint="", *, step="best", **changes):
    config = copy.deepcopy(config)
    for name, value in changes.items():
        node, _, leaf = name.rpartition("__")
        setattr(getattr(config, node) if node else config, leaf, value)
    return evaluate(config, checkpoint, step=step)


def test_figures_do_not_depend_on_batch_size_packing_or_mesh(run):
    config, _ = run
    rows = [
        evaluated(config, **changes)["validation"].rows
        for changes in (
            {"eval__batch_size": 4},
            {"eval__batch_size": 3},
            {"data__packing": "none"},
            {"data__max_length": 96},
            {"strategy": "fsdp", "mesh__data": 0},
            {"strategy": "fsdp_tp", "mesh__data": 2, "mesh__tensor": 2},
        )
    ]
    for other in rows[1:]:
        assert other.weight.sum() == rows[0].weight.sum()
        assert other.correct.sum() == rows[0].correct.sum()
        assert other.loss.value == pytest.approx(rows[0].loss.value, rel=1e-5)


def test_perplexity_and_interval_belong_to_the_loss(run):
    config, _ = run
    record = evaluated(config)["validation"].record()
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert record["loss_low"] < record["loss"] < record["loss_high"]
    assert record["perplexity_low"] == pytest.approx(math.exp(record["loss_low"]))
    assert 0 <= record["token_accuracy_low"] <= record["token_accuracy"] <= 1


def test_workdir_checkpoint_and_export_evaluate_alike(run, folder):
    config, result = run
    output = jaxft.export(result.checkpoint, folder / "out", on_log=lambda text: None)
    losses = {
        str(path): evaluated(config, path, step="latest")["validation"].rows.loss.value
        for path in (result.checkpoint, output, result.workdir)
    }
    assert len(set(losses.values())) == 1
    recorded = [json.loads(s) for s in (result.workdir / "eval.jsonl").read_text().splitlines()]
    assert next(iter(losses.values())) == pytest.approx(recorded[-1]["loss"], rel=1e-6)


def test_the_config_is_not_changed(run):
    config, result = run
    before = copy.deepcopy(config)
    evaluate(config, result.checkpoint)
    assert config == before


def test_named_sets_and_retention_are_evaluated_beside_validation(run, folder):
    config, _ = run
    other = write_chats(folder / "other.jsonl", 5, seed=7)
    text = folder / "text.txt"
    text.write_text("some plain text\n\nand more of it")
    results = evaluated(
        config,
        eval__datasets=f"first={other}; second={folder / 'train.jsonl'}",
        eval__retention=str(text),
        eval__answers="exact",
        eval__max_new_tokens=8,
    )
    assert list(results) == ["validation", "first", "second", "retention"]
    assert results["first"].answers is not None
    assert results["retention"].answers is None


@pytest.mark.parametrize("datasets", ["a.jsonl", "=a.jsonl", "x=", "x=a;x=b", "validation=a"])
def test_a_malformed_list_of_sets_is_refused(run, datasets):
    config = copy.deepcopy(run[0])
    config.eval.datasets = datasets
    with pytest.raises(ConfigError, match="name=source"):
        named_sources(config)


def test_nothing_to_evaluate_on_is_an_error(run):
    config = copy.deepcopy(run[0])
    config.data.validation = ""
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        named_sources(config)


def test_answers_are_compared_with_the_last_turn(run, folder, monkeypatch):
    config, _ = run
    file = folder / "labels.jsonl"
    rows = [("say a", "Cat."), ("say b", "dog"), ("say c", "cow")]
    file.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": label},
                    ]
                }
            )
            + "\n"
            for question, label in rows
        )
    )
    outputs = {"say a": " cat", "say b": "dog", "say c": "horse"}

    def answering(model, prompts, *, max_new_tokens):
        texts = [model.tokenizer.decode(ids) for ids in prompts]
        return [next(o for q, o in outputs.items() if q in text) for text in texts]

    monkeypatch.setattr(evaluation.Model, "generate_from_ids", answering)
    label = evaluated(config, data__validation=str(file), eval__answers="label")["validation"]
    assert label.answers is not None
    assert label.answers.right.tolist() == [True, True, False]
    assert label.answers.labels == 3
    assert label.record()["label_accuracy"]["value"] == pytest.approx(2 / 3)
    exact = evaluated(config, data__validation=str(file), eval__answers="exact")["validation"]
    assert exact.answers is not None
    assert exact.answers.right.tolist() == [False, True, False]


def test_generated_answers_are_those_of_each_prompt_alone(run):
    config, result = run
    answers = evaluated(config, result.checkpoint, eval__answers="exact", eval__max_new_tokens=6)[
        "validation"
    ].answers
    model = jaxft.load(result.checkpoint)
    for prompt, output in zip(answers.prompts, answers.outputs, strict=True):
        assert output == model.generate([{"role": "user", "content": prompt}], max_new_tokens=6)


def test_prompts_that_leave_no_room_for_an_answer_count_as_wrong(run, folder):
    config, result = run
    context = jaxft.load(result.checkpoint).architecture.config.max_length
    room = evaluated(config, result.checkpoint, eval__answers="exact", eval__max_new_tokens=6)
    none = evaluated(config, result.checkpoint, eval__answers="exact", eval__max_new_tokens=context)
    assert len(none["validation"].answers.right) == len(room["validation"].answers.right)
    assert not none["validation"].answers.right.any()


def test_samples_that_leave_no_room_are_passed_over(run):
    config, result = run
    config = copy.deepcopy(config)
    config.eval.samples = 3
    tokenizer = jaxft.load(result.checkpoint).tokenizer

    class ChatRows:
        is_chat = True

    prompts = read_sample_prompts(config, tokenizer, ChatRows(), context=1000)
    assert len(prompts) == 3
    shortest = min(len(prompt.ids) for prompt in prompts)
    context = shortest + config.eval.max_new_tokens
    kept = read_sample_prompts(config, tokenizer, ChatRows(), context=context)
    assert all(len(prompt.ids) <= shortest for prompt in kept)
    assert not read_sample_prompts(config, tokenizer, ChatRows(), context=5)


def test_a_comparison_pairs_rows(run):
    config, result = run
    a, b = evaluated(config), evaluated(config, result.checkpoint)
    comparison = compare(a, b)["validation"]
    rows_a, rows_b = a["validation"].rows, b["validation"].rows
    assert comparison.loss.value == pytest.approx(rows_b.loss.value - rows_a.loss.value)
    assert comparison.loss.high < 0  # training helped
    same = compare(b, b)["validation"].loss
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_models_that_read_other_tokens_are_not_paired(run):
    config, _ = run
    a = evaluated(config)["validation"]
    rows = dataclasses.replace(a.rows, weight=a.rows.weight + 1)
    with pytest.raises(ConfigError, match="share a tokenizer"):
        compare({"validation": a}, {"validation": dataclasses.replace(a, rows=rows)})


def test_tables_and_json_hold_the_figures(run, tmp_path, capsys):
    config, result = run
    changes = {"eval__retention": config.data.train, "eval__answers": "exact"}
    a, b = evaluated(config, **changes), evaluated(config, result.checkpoint, **changes)
    print_evaluation(a)
    print_comparison(compare(a, b), "base", "tuned")
    text = " ".join("".join(capsys.readouterr()).split())
    loss = a["validation"].rows.loss.value
    assert f"{loss:.4f}" in text and "exact match" in text
    assert "nats a token over A" in text
    write_json(str(tmp_path / "out.json"), {"a": a, "b": b}, compare(a, b))
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["a"]["validation"]["loss"] == loss
    assert stored["b - a"]["validation"]["loss"]["value"] < 0
    assert stored["b"]["validation"]["answers"][0].keys() == {
        "prompt",
        "output",
        "reference",
        "right",
    }


def test_an_accuracy_without_answers_is_not_a_number():
    nothing = Answers("exact_match", [], [], [], np.array([], bool), 0)
    assert math.isnan(nothing.accuracy.value)
