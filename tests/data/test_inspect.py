"""The report on the data of a run, as a terminal shows it."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from jaxft.config import DataConfig, RunConfig
from jaxft.data.inspect import inspect
from jaxft.data.preparation import prepare
from jaxft.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers/qwen3-hf")


@pytest.fixture(scope="module")
def report(tmp_path_factory, tokenizer):
    tmp_path = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"question {i}", "completion": f"answer {i} " * (i + 1)} for i in range(20)]
    train = [*rows, {"prompt": "Question  3", "completion": rows[3]["completion"].upper()}]
    held_out = [rows[5], {"prompt": "new", "completion": "one"}]
    for name, items in (("train", train), ("validation", held_out)):
        text = "".join(json.dumps(item) + "\n" for item in items)
        (tmp_path / f"{name}.jsonl").write_text(text)
    data = DataConfig(
        train=str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "validation.jsonl"),
        cache=str(tmp_path / "cache"),
        max_length=64,
        overlength="truncate",
    )
    return inspect(RunConfig(data=data), tokenizer)


def show(report, **options):
    console = Console(width=100, record=True, file=io.StringIO(), **options)
    console.print(report)
    return console


def test_duplicates_and_overlap_are_counted(report):
    train, validation = report.sets
    assert (train.duplicates, validation.duplicates) == (1, 0)
    assert train.overlap is None
    assert validation.overlap.count == 1
    (example,) = validation.overlap.examples
    assert re.fullmatch(r".*validation.*:\d+ = .*train.*:\d+", example)


def test_the_histogram_counts_every_document(report):
    for item in report.sets:
        lengths = item.rows.documents.index["length"]
        assert item.counts.sum() == len(lengths)
        assert item.edges[0] == lengths.min()
        assert item.edges[-1] == lengths.max() + 1
        assert (np.diff(item.edges) > 0).all()


def test_samples_are_the_documents_with_their_mask(report, tokenizer):
    assert [sample.origin.rpartition(":")[2] for sample in report.samples] == ["1", "2", "3"]
    (before, masked), (answer, trained), (after, masked_too) = report.samples[0].runs
    assert (masked, trained, masked_too) == (False, True, False)
    assert before == "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n"
    assert answer.endswith("answer 0 <|im_end|>")
    assert after == "\n"


def test_the_terminal_shows_every_section(report):
    text = show(report).export_text()
    for expected in (
        "format prompt_completion",
        "chat template: tokenizer; answers end with <|im_end|>",
        "no BOS, EOS '<|im_end|>'",
        "exact duplicates",
        "masked share",
        "also in training",
        "validation is trained on",
        "1 of 2 validation documents (50.0%)",
        "Tokens in a document: train",
        "trained tokens lost",
        "train.jsonl:1",
    ):
        assert expected in text, expected


def test_trained_tokens_are_coloured(report):
    console = show(report, force_terminal=True, color_system="truecolor")
    styled = console.export_text(styles=True)
    assert "\x1b[1;32manswer 0 <|im_end|>" in styled
    assert "\x1b[2mquestion 0<|im_end|>" in styled


def test_trained_tokens_are_marked_where_there_is_no_colour(report):
    for options in ({}, {"force_terminal": True, "color_system": "truecolor", "no_color": True}):
        text = show(report, **options).export_text()
        assert "⟦trained tokens⟧, masked" in text
        assert "⟦<think>" in text
        assert "answer 0 <|im_end|>⟧" in text
    text = show(report, force_terminal=True, color_system="truecolor").export_text()
    assert "⟦" not in text


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": "word " * (10 * i + 1)} for i in range(10)]
    for name in ("train", "other"):
        text = "".join(json.dumps(item) + "\n" for item in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
        rows = rows[:2]
    return DataConfig(
        train=str(tmp_path / "train.jsonl"), cache=str(tmp_path / "cache"), max_length=32
    )


@pytest.mark.parametrize(("overlength", "length"), [("error", 32), ("drop", 4)])
def test_documents_that_training_refuses_are_shown_with_the_refusal(
    data, tokenizer, overlength, length
):
    data.overlength, data.max_length = overlength, length
    report = inspect(RunConfig(data=data), tokenizer)
    [train] = report.sets
    assert train.counts.sum() == 10
    with pytest.raises(DataError, match=r"data\.max_length") as error:
        prepare(data.train, data, tokenizer, seed=0, training=True, on_log=lambda text: None)
    assert train.refusal == str(error.value)
    text = show(report).export_text()
    assert "Refused as it is" in text
    assert "Tokens in a document: train" in text
    assert "overlength=split" not in text
    styled = show(report, force_terminal=True, color_system="truecolor").export_text(styles=True)
    assert "\x1b[1;31mtrain: " in styled


def test_every_held_out_set_is_reported(data, tokenizer):
    data.overlength = "truncate"
    other = data.train.replace("train.jsonl", "other.jsonl")
    sources = {"validation": other, "retention": other}
    report = inspect(RunConfig(data=data), tokenizer, sources=sources)
    assert [item.name for item in report.sets] == ["train", "validation", "retention"]
    assert [item.overlap and item.overlap.count for item in report.sets] == [None, 2, 2]
    assert "2 of 2 retention documents (100.0%)" in show(report).export_text()
    data.train = ""
    report = inspect(RunConfig(data=data), tokenizer, sources={"retention": other})
    assert [(item.name, item.overlap) for item in report.sets] == [("retention", None)]


def test_a_report_on_nothing_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"set --config\.data\.train, --config"):
        inspect(RunConfig(), tokenizer)


def test_markup_in_the_data_is_shown_as_it_is(tmp_path, tokenizer):
    path = tmp_path / "[red].jsonl"
    path.write_text(json.dumps({"prompt": "[bold]q[/bold]", "completion": "[/x] a"}) + "\n")
    data = DataConfig(train=str(tmp_path / "*.jsonl"), cache=str(tmp_path / "cache"))
    text = show(inspect(RunConfig(data=data), tokenizer)).export_text()
    assert "[bold]q[/bold]" in text
    assert "[/x] a" in text


def test_one_long_document_does_not_flatten_the_histogram(tmp_path, tokenizer):
    rows = [{"text": "word " * (20 + i)} for i in range(60)] + [{"text": "word " * 5000}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(path), cache=str(tmp_path / "cache"), overlength="split")
    report = inspect(RunConfig(data=data), tokenizer)
    [train] = report.sets
    assert train.counts.sum() == 61
    assert train.counts[-1] == 1
    assert (train.counts[:-1] > 0).all()
    assert train.edges[-2] < 100
    assert "1 far beyond the others" in show(report).export_text()


@pytest.mark.parametrize(
    ("turns", "words"), [(1, 3000), (1, 3), (30, 3), (30, 300)], ids=lambda value: str(value)
)
def test_the_answer_is_seen_however_long_the_prompt(tmp_path, tokenizer, turns, words):
    user = {"role": "user", "content": "word " * words}
    messages = [
        message
        for turn in range(turns)
        for message in (user, {"role": "assistant", "content": f"answer {turn}"})
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    data = DataConfig(train=str(path), cache=str(tmp_path / "cache"), max_length=65536)
    report = inspect(RunConfig(data=data), tokenizer)
    [sample] = report.samples
    assert any(f"answer {turns - 1}" in text for text, trained in sample.runs if trained)
    assert sample.runs[0][0].startswith("<|im_start|>user")
    if turns > 4:
        assert any("parts" in text for text, trained in sample.runs if trained is None)
    if words > 3:
        assert any("tokens …" in text for text, trained in sample.runs if trained is None)
    assert len("".join(text for text, _ in sample.runs)) < 3000


@pytest.mark.parametrize(
    ("packing", "words", "warning"),
    [
        ("documents", 100, "trained on positions that the model has never seen"),
        ("documents", 2, "no document is longer than that"),
        ("stream", 2, "trained on positions that the model has never seen"),
    ],
)
def test_rows_beyond_the_context_are_said(tmp_path, tokenizer, packing, words, warning):
    path = tmp_path / "a.txt"
    path.write_text("word " * words)
    cache = str(tmp_path / "cache")
    data = DataConfig(train=str(path), cache=cache, packing=packing, max_length=256)
    report = inspect(RunConfig(data=data), tokenizer, context=64)
    text = " ".join(show(report).export_text().split())
    assert "data.max_length 256 is beyond the model's context of 64 tokens" in text
    assert warning in text
    report = inspect(RunConfig(data=data), tokenizer, context=256)
    assert "context of" not in show(report).export_text()


def test_each_fact_is_shown_once(tmp_path, tokenizer):
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q"}]))
    data = DataConfig(
        train=str(path),
        validation="10%",
        cache=str(tmp_path / "cache"),
        max_length=64,
        bad_rows="skip",
        bad_share=0.1,
    )
    said = []
    report = inspect(RunConfig(data=data), tokenizer, on_progress=said.append)
    assert said == []
    text = " ".join(show(report).export_text().split())
    for fact in ("format prompt_completion", "chat template: tokenizer", "key 'completion' is"):
        assert text.count(fact) == (2 if fact.startswith("key") else 1), fact
    assert text.count("padding") == 2  # of the tokenizer, and the share
    assert "validation: a part of the same data as train" in text


def test_a_source_that_is_named_twice_is_no_part_of_itself(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(cache=str(tmp_path / "cache"), max_length=64)
    sources = {"validation": str(path), "new": str(path)}
    text = show(inspect(RunConfig(data=data), tokenizer, sources=sources)).export_text()
    assert "new: the same data as validation" in text
    assert "part of" not in text
