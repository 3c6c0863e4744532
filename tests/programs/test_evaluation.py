"""Evaluation as a command of its own: figures, answers, comparison, retention."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import jaxft
from jaxft import data
from jaxft.config import DataConfig
from jaxft.data import prepare
from jaxft.errors import ConfigError
from jaxft.files import as_json
from jaxft.hf.tokenizer import load_tokenizer
from jaxft.programs import answers, evaluation
from jaxft.programs.answers import Answers, read_sample_prompts
from jaxft.programs.comparison import compare
from jaxft.programs.evaluation import evaluate, evaluate_pair, named_sources
from jaxft.programs.tables import print_comparison, print_evaluation, record
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


@pytest.mark.slow(seconds=4)
def test_figures_do_not_depend_on_batch_size_packing_or_mesh(run):
    config, _ = run
    rows = [
        evaluated(config, **changes)["validation"].sums
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
        correct = [sums.figures["token_accuracy"][0].sum() for sums in (other, rows[0])]
        assert correct[0] == correct[1]
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
        str(path): evaluated(config, path, step=step)["validation"].sums.loss.value
        for path, step in (
            (result.checkpoint, "best"),
            (output, "best"),
            (result.workdir, "latest"),
        )
    }
    assert len(set(losses.values())) == 1
    recorded = [json.loads(s) for s in (result.workdir / "eval.jsonl").read_text().splitlines()]
    assert next(iter(losses.values())) == pytest.approx(recorded[-1]["loss"], rel=1e-6)


def test_the_config_is_not_changed(run):
    config, result = run
    before = copy.deepcopy(config)
    evaluate(config, result.checkpoint)
    assert config == before


@pytest.mark.slow(seconds=3)
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


def test_a_part_of_the_training_data_that_was_trained_on_is_refused(run):
    config, result = run
    with pytest.raises(ConfigError, match=r"Evaluate it with --config\.data\.validation="):
        evaluated(config, result.workdir, step="latest", data__validation="20%")
    assert "validation" in evaluated(config, data__validation="20%")  # the model before


@pytest.mark.slow(seconds=2)
def test_a_held_out_part_of_rows_that_are_read_otherwise_is_refused(folder):
    config = tiny_config(folder, "part", data__validation="20%", train__steps=2)
    result = jaxft.train(config)
    assert "validation" in evaluated(config, result.workdir, step="latest")
    with pytest.raises(ConfigError, match=r"Evaluate it with --config\.data\.bad_rows=error"):
        evaluated(config, result.workdir, step="latest", data__bad_rows="skip")


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("a.jsonl", "expected 'name=source'"),
        ("=a.jsonl", "expected 'name=source'"),
        ("x=", "expected 'name=source'"),
        ("x=a;x=b", "uses the name 'x' twice, for 'a' and for 'b'"),
        ("validation=a", r"'validation' is the name of data\.validation: set --config\.data\.val"),
        ("retention=a", r"'retention' is the name of eval\.retention: set --config\.eval\.ret"),
    ],
)
def test_a_malformed_list_of_sets_is_refused(run, datasets, message):
    config = copy.deepcopy(run[0])
    config.eval.datasets = datasets
    with pytest.raises(ConfigError, match=message):
        named_sources(config)
    with pytest.raises(ConfigError, match=message):
        config.validate()


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
        found = [next(o for q, o in outputs.items() if q in text) for text in texts]
        return [model.tokenizer.encode(text) for text in found]

    monkeypatch.setattr(evaluation.Model, "complete", answering)
    label = evaluated(config, data__validation=str(file), eval__answers="label")["validation"]
    assert label.answers is not None
    assert label.answers.right.tolist() == [True, True, False]
    assert label.answers.labels == 3
    assert label.record()["label_accuracy"]["value"] == pytest.approx(2 / 3)
    exact = evaluated(config, data__validation=str(file), eval__answers="exact")["validation"]
    assert exact.answers is not None
    assert exact.answers.right.tolist() == [False, True, False]


@pytest.mark.slow(seconds=3)
def test_generated_answers_are_those_of_each_prompt_alone(run):
    config, result = run
    answers = evaluated(config, result.checkpoint, eval__answers="exact", eval__max_new_tokens=6)[
        "validation"
    ].answers
    model = jaxft.load(result.checkpoint)
    for prompt, output in zip(answers.prompts, answers.outputs, strict=True):
        assert output == model.generate([{"role": "user", "content": prompt}], max_new_tokens=6)


@pytest.mark.slow(seconds=6)
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

    rows = prepare(config.data.validation, config.data, tokenizer, seed=0, training=False)
    prompts = read_sample_prompts(config, tokenizer, rows, context=1000)
    assert len(prompts) == 3
    shortest = min(len(prompt.ids) for prompt in prompts)
    context = shortest + config.eval.max_new_tokens
    kept = read_sample_prompts(config, tokenizer, rows, context=context)
    assert all(len(prompt.ids) <= shortest for prompt in kept)
    assert not read_sample_prompts(config, tokenizer, rows, context=5)


def test_a_comparison_pairs_rows(run):
    config, result = run
    a, b = evaluated(config), evaluated(config, result.checkpoint)
    comparison = compare(a, b)["validation"]
    rows_a, rows_b = a["validation"].sums, b["validation"].sums
    difference = comparison.differences["loss"]
    assert difference.value == pytest.approx(rows_b.loss.value - rows_a.loss.value)
    assert difference.high < 0  # training helped
    same = compare(b, b)["validation"].differences["loss"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def in_pairs(run, folder):
    """The trained model with a tokenizer that reads two letters as one token where it can."""
    _, result = run
    exported = jaxft.export(result.checkpoint, folder / "in_pairs", on_log=lambda text: None)
    file = exported / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary, letters = tokenizer["model"]["vocab"], "abc"
    tokenizer["model"]["merges"] = [[a, b] for a in letters for b in letters]
    for pair in tokenizer["model"]["merges"]:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer["pre_tokenizer"] = None
    file.write_text(json.dumps(tokenizer))
    return exported


@pytest.mark.slow(seconds=6)
def test_models_that_read_other_tokens_are_paired_by_document(run, in_pairs, capfd):
    config, result = run
    pair = evaluate_pair(config, result.checkpoint, in_pairs)
    err = capfd.readouterr().err
    assert err.index("read the data as different tokens") < err.index("Evaluating validation")
    a, b = (results["validation"] for results in pair)
    assert a.sums.weight.sum() > b.sums.weight.sum()
    comparison = compare(*pair)["validation"]
    assert "loss" not in comparison.differences
    assert comparison.documents == 9
    # The text is the same, and of the same length however it is cut.
    assert a.sums.bytes.tolist() == b.sums.bytes.tolist()
    per_byte = [e.sums.total.sum() / math.log(2) / e.sums.bytes.sum() for e in (a, b)]
    difference = comparison.differences["bits_per_byte"]
    assert difference.value == pytest.approx(per_byte[1] - per_byte[0])
    assert difference.low > 0  # tokens that were never trained
    assert difference.count == 9
    print_comparison({"validation": comparison}, "one", "two", config)
    out = " ".join(capfd.readouterr().out.split())
    assert f"to B the same documents are {b.sums.weight.sum():.0f} trained tokens" in out
    assert "paired by document (9 of validation)" in out


def test_documents_on_one_line_of_a_file_are_paired_one_by_one(run, in_pairs, folder):
    config, result = run
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    (folder / "held_out.json").write_text(f"[{','.join(lines)}]")
    config = copy.deepcopy(config)
    config.data.validation = str(folder / "held_out.json")
    pair = evaluate_pair(config, result.workdir, in_pairs, step="latest")  # of the one that has any
    assert compare(*pair)["validation"].documents == 9


@pytest.mark.slow(seconds=2)
def test_answers_to_different_questions_are_not_paired(run, capfd):
    config, result = run
    answered = evaluated(config, result.checkpoint, eval__answers="exact")["validation"]
    assert answered.answers is not None
    other = dataclasses.replace(answered.answers, prompts=answered.answers.prompts[::-1])
    same = compare({"a": answered}, {"a": answered})["a"]
    unlike = compare({"a": answered}, {"a": dataclasses.replace(answered, answers=other)})["a"]
    assert same.answers is not None
    assert same.answers.value == 0
    assert unlike.answers is None
    assert "loss" in unlike.differences
    assert "were asked different questions" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow(seconds=2)
def test_models_that_read_other_tokens_are_not_paired_by_rows(run, in_pairs):
    config, result = run
    for packing in ("documents", "stream"):
        models = (result.checkpoint, in_pairs)
        a, b = (evaluated(config, path, data__packing=packing) for path in models)
        with pytest.raises(ConfigError, match=r"--config\.data\.packing=none"):
            compare(a, b)


@pytest.mark.slow(seconds=2)
def test_bytes_are_those_of_the_answers_and_do_not_depend_on_rows(run, folder):
    config, _ = run
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][-1]["content"] for line in lines]
    for changes in ({}, {"data__packing": "none"}, {"data__max_length": 96}):
        rows = evaluated(config, **changes)["validation"].sums
        assert rows.bytes.sum() == sum(len(text.encode()) for text in answers)
        bits = rows.total.sum() / math.log(2) / rows.bytes.sum()
        assert rows.estimates["bits_per_byte"].value == pytest.approx(bits)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", ["gpt2", "qwen3-hf", "mistral-v3"])
def test_bytes_of_text_are_counted_across_tokens_that_split_letters(shared, tmp_path, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    texts = ["Ein Übermut: 你好, 🦙!", "two  spaces", "plain words here"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(packing="none", max_length=64, cache=str(tmp_path / "cache"))
    rows = data.prepare(str(file), config, tokenizer, seed=0, training=False)
    counted = data.count_bytes(rows, tokenizer, range(3))
    for text, count, number in zip(texts, counted, range(3), strict=True):
        # Of a text without BOS the first token is predicted by nothing.
        ids = rows[number].tokens[rows[number].segments > 0].tolist()
        begins = ids[0] == tokenizer.bos_token_id
        untrained = "" if begins else tokenizer.decode(ids[:1])
        assert count == len(text.encode()) - len(untrained.encode())


@pytest.mark.slow(seconds=2)
def test_a_sample_of_rows_is_the_same_for_every_model_and_says_so(run, folder, capsys):
    config, result = run
    changes = {"eval__max_rows": 5, "data__validation": str(folder / "train.jsonl")}
    a, b = (evaluated(config, path, **changes)["validation"] for path in ("", result.checkpoint))
    assert list(a.held_out.numbers) == list(b.held_out.numbers) != [0, 1, 2, 3, 4]
    assert (
        compare({"validation": a}, {"validation": b})["validation"].differences["loss"].count == 5
    )
    record = a.record()
    assert (record["rows"], record["of_rows"]) == (5, 19)
    assert 5 < record["documents"] < 40
    print_evaluation({"validation": a}, config)
    assert "5 of 19 rows, drawn at random" in " ".join(capsys.readouterr().out.split())
    other = evaluated(config, train__seed=1, **changes)["validation"]
    assert list(other.held_out.numbers) != list(a.held_out.numbers)


@pytest.mark.slow(seconds=2)
def test_answers_are_to_a_sample_of_rows_and_not_to_the_first(run, folder, capsys):
    config, result = run
    changes = {
        "data__validation": str(folder / "train.jsonl"),
        "eval__answers": "exact",
        "eval__answer_rows": 12,
        "eval__max_new_tokens": 12,
    }
    results = [evaluated(config, path, **changes) for path in ("", result.checkpoint)]
    a, b = (found["validation"].answers for found in results)
    assert a.prompts == b.prompts
    numbers = [int(prompt.split()[-1]) for prompt in a.prompts]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12
    assert numbers != [*range(12)]
    assert a.record()["exact_match"].keys() == {"value", "low", "high", "count", "of_rows"}
    assert (a.accuracy.count, a.of_rows) == (12, 40)
    print_evaluation(results[0], config)
    assert "answers to 12 of 40 rows" in " ".join(capsys.readouterr().out.split())


def test_a_sample_of_a_stream_is_uniform():
    counts = np.zeros(50)
    for seed in range(400):
        kept, total = answers._sample(iter(range(50)), 10, seed=seed)
        assert total == 50 and kept == sorted(set(kept)) and len(kept) == 10
        counts[kept] += 1
    # Each is drawn in 80 of 400 on average, with a standard deviation of 8.
    assert counts.min() > 48 and counts.max() < 112
    assert answers._sample(iter("abc"), 0, seed=0) == (["a", "b", "c"], 3)


@pytest.mark.parametrize("start", [evaluate, jaxft.train], ids=["eval", "train"])
def test_labels_that_no_answer_can_reach_are_refused_early(run, start, tmp_path):
    config = copy.deepcopy(run[0])
    config.train.workdir = str(tmp_path / "run")
    config.eval.answers, config.eval.max_new_tokens = "label", 5
    message = r"5, but \d of 9 labels of validation are longer.*--config.eval.max_new_tokens=10\."
    with pytest.raises(ConfigError, match=message):
        start(config)
    assert not (tmp_path / "run").exists()


def test_references_that_no_answer_can_reach_are_counted(run, capfd):
    config, _ = run
    found = evaluated(config, eval__answers="exact", eval__max_new_tokens=5)["validation"]
    tokens = [len(reference) + 1 for reference in found.answers.references]
    count = sum(length > 5 for length in tokens)
    said = " ".join(capfd.readouterr().err.split())
    assert f"{count} of 9 reference answers are longer than eval.max_new_tokens 5" in said
    assert f"Set --config.eval.max_new_tokens={max(tokens)} to reach all" in said


def test_an_evaluation_says_which_checkpoint_it_took(run, folder, capsys):
    config, result = run
    found = evaluated(config, result.workdir)
    assert found["validation"].model.name == f"{result.workdir}, step 30 (the best)"
    stored = json.loads(as_json(record({"results": found}, config=config)))
    assert stored["models"]["results"] == {
        "path": str(result.workdir),
        "step": 30,
        "choice": "the best",
    }
    assert stored["config"]["data.max_length"] == 48
    figures = stored["results"]["validation"]
    assert (figures["rows"], figures["of_rows"], figures["documents"]) == (5, 5, 9)
    base = evaluated(config)
    print_evaluation(base, config)
    out = " ".join(capsys.readouterr().out.split())
    assert f"Model: {folder / 'base'}" in out
    assert "5 rows, 9 documents, 65 trained tokens" in out
    assert "data.max_length=48" in out


@pytest.mark.slow(seconds=2)
def test_tables_and_json_hold_the_figures(run, capsys):
    config, result = run
    changes = {"eval__retention": config.data.train, "eval__answers": "exact"}
    a, b = evaluated(config, **changes), evaluated(config, result.checkpoint, **changes)
    print_evaluation(a, config)
    print_comparison(compare(a, b), "base", "tuned", config)
    text = " ".join("".join(capsys.readouterr()).split())
    loss = a["validation"].sums.loss.value
    assert f"{loss:.4f}" in text and "exact match" in text
    assert "nats a token over A" in text
    stored = json.loads(as_json(record({"a": a, "b": b}, compare(a, b), config=config)))
    assert stored["a"]["validation"]["loss"] == loss
    assert stored["b - a"]["validation"]["loss"]["value"] < 0
    assert stored["b"]["validation"]["answers"][0].keys() == {
        "prompt",
        "output",
        "reference",
        "right",
    }


def test_rows_that_are_read_otherwise_than_in_training_are_told(run, capfd):
    config, result = run
    config = copy.deepcopy(config)
    config.data.control_tokens = "refuse"
    found = evaluate(config, result.workdir)
    said = " ".join(capfd.readouterr().err.split())
    assert "data.control_tokens is 'refuse' here; the run was trained with 'text'." in said
    print_evaluation(found, config)
    assert "data.control_tokens=refuse" in capfd.readouterr().out


def test_an_accuracy_without_answers_is_not_a_number():
    nothing = Answers("exact_match", [], [], [], np.array([], bool), 0, 0)
    assert math.isnan(nothing.accuracy.value)


@pytest.mark.slow(seconds=12)
def test_answers_of_a_model_that_opens_with_an_empty_block_are_right(folder):
    """What is learnt by heart is answered right, whatever the template puts before an answer."""
    config = tiny_config(folder, "block", train__steps=40, train__batch_size=4)
    config.model.path = str(Path(jaxft.__file__).parent / "demo" / "base")
    (folder / "block.jinja").write_text(
        "{%- for m in messages -%}{{- '<|' + m.role + '|>' -}}"
        "{%- if m.role == 'assistant' and loop.last -%}"
        "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
        "{{- m.content + '<|end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
    (folder / "block.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"say {number}", "completion": label}) + "\n"
            for number, label in enumerate(("cat", "dog", "cow", "hen"))
        )
    )
    config.data.train = config.data.validation = str(folder / "block.jsonl")
    config.data.template = str(folder / "block.jinja")
    config.optim.learning_rate = 3e-3
    config.eval.answers = "label"
    result = jaxft.train(config)
    answers = jaxft.evaluate(config, result.checkpoint)["validation"].answers
    assert answers.references == answers.outputs == ["cat", "dog", "cow", "hen"]
    assert answers.right.all()
