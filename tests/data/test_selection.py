"""What one pass holds: held-out parts, weights and limits, each with the counts it should have."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import DataConfig, RunConfig
from jaxft.data.inspect import inspect
from jaxft.data.preparation import conversations, prepare
from jaxft.data.selection import _held_out, _weighted
from jaxft.errors import ConfigError, DataError
from tests.data.test_preparation import make_tokenizer

WORDS = [f"w{number}" for number in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["User", "Assistant", ":", *WORDS])


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache=str(tmp_path / "cache"), max_length=32)


def write(path, prompts):
    rows = [{"prompt": prompt, "completion": "w0"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(source, config, tokenizer, *, seed=0, training=True):
    log = []
    rows = prepare(source, config, tokenizer, seed=seed, training=training, on_log=log.append)
    return rows, "\n".join(log)


def places(rows):
    """Returns file and row number of the documents that are in some row, counted."""
    found = [origin for number in range(len(rows)) for origin in rows.origins(number)]
    assert len(found) == len(rows.numbers)
    return sorted(found)


def test_a_percentage_of_the_training_data_is_held_out(tmp_path, config, tokenizer):
    config.train = write(tmp_path / "a.jsonl", WORDS)
    config.validation = "5%"
    train, _ = run(config.train, config, tokenizer)
    held_out, log = run(config.validation, config, tokenizer, training=False)
    assert (train.statistics.documents, held_out.statistics.documents) == (380, 20)
    assert not set(places(train)) & set(places(held_out))
    assert "20 of 20 documents" not in log
    assert "from the cache" in log
    # A sample, not the end or the beginning, and another one under another seed.
    lines = [int(place.rpartition(":")[2]) for place in places(held_out)]
    assert 120 < np.mean(lines) < 280
    other, _ = run(config.validation, config, tokenizer, seed=1, training=False)
    assert places(other) != places(held_out)
    again, _ = run(config.validation, config, tokenizer, training=False)
    assert again.digest == held_out.digest


def test_the_held_out_part_is_of_every_source(tmp_path, config, tokenizer):
    sources = [write(tmp_path / f"{i}.jsonl", WORDS[100 * i : 100 * i + 100]) for i in range(3)]
    config.train, config.validation = ",".join(sources), "10%"
    held_out, _ = run("10%", config, tokenizer, training=False)
    counts = [sum(place.startswith(source) for place in places(held_out)) for source in sources]
    assert counts == [10, 10, 10]


def test_equal_rows_are_on_the_same_side(tmp_path, config, tokenizer):
    first = write(tmp_path / "a.jsonl", [*WORDS[:50], *WORDS[:50]])
    second = write(tmp_path / "b.jsonl", [word.upper() + " " for word in WORDS[:50]])
    config.train, config.validation = f"{first},{second}", "20%"
    train, _ = run(config.train, config, tokenizer)
    held_out, _ = run("20%", config, tokenizer, training=False)
    hashes = [set(rows.documents.index[rows.numbers]["hash"]) for rows in (train, held_out)]
    assert not hashes[0] & hashes[1]
    assert len(hashes[1]) == 10
    assert held_out.statistics.documents == 30


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=120),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**40),
)
def test_no_content_is_on_both_sides_and_no_source_gives_more_than_its_share(rows, share, seed):
    hashes = np.array([content for content, _ in rows], np.uint64)
    group = np.array([source for _, source in rows])
    held_out = _held_out(hashes, group, share, seed)
    assert not set(hashes[held_out]) & set(hashes[~held_out])
    for source in set(group.tolist()):
        count = int((group == source).sum())
        assert held_out[group == source].sum() <= share * count + 0.5
    if len(set(hashes.tolist())) == len(rows):
        assert held_out.sum() == sum(
            int(share * (group == source).sum() + 0.5) for source in range(group.max() + 1)
        )


@pytest.mark.parametrize(
    ("prompts", "share", "message"),
    [
        (WORDS[:8], "5%", r"data.validation 5% of 8 rows leaves no row for validation"),
        (WORDS[:1] * 40, "5%", "no row for validation; rows with the same content stay together"),
        (WORDS[:8], "99%", "leaves nothing to train on"),
    ],
)
def test_a_side_without_rows_is_refused(tmp_path, config, tokenizer, prompts, share, message):
    config.train, config.validation = write(tmp_path / "a.jsonl", prompts), share
    for source, training in ((config.train, True), (share, False)):
        with pytest.raises(DataError, match=message):
            run(source, config, tokenizer, training=training)


def test_answers_are_of_the_held_out_rows(tmp_path, config, tokenizer):
    config.train, config.validation = write(tmp_path / "a.jsonl", WORDS), "5%"
    rows, _ = run("5%", config, tokenizer, training=False)
    found = conversations("5%", config, rows=rows, on_log=lambda text: None)
    assert sorted(item.origin for item in found) == places(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "a", "validation": "0%"}, "more than 0% and less than 100%"),
        ({"train": "a", "validation": "100%"}, "more than 0% and less than 100%"),
        ({"train": "a", "validation": "0.1"}, r"write --config\.data\.validation=10%, for a file"),
        ({"train": "a", "validation": "15"}, r"write --config\.data\.validation=15%, for a file"),
        ({"train": "a", "validation": "yes"}, r"write --config\.data\.validation=10%, for a file"),
        ({"train": "a", "validation": "5%:limit=3"}, "stands alone, without ':limit=3'"),
        ({"validation": "5%"}, r"data\.train is empty; name it with --config\.data\.train="),
    ],
)
def test_percentages_that_mean_nothing_are_refused_early(changes, message):
    config = RunConfig(data=DataConfig(**changes))
    config.model.path = "x"
    with pytest.raises(ConfigError, match=message):
        config.validate()


@pytest.mark.parametrize("key", ["retention", "datasets"])
def test_a_percentage_is_of_the_validation_alone(key):
    config = RunConfig(data=DataConfig(train="a"))
    config.model.path = "x"
    setattr(config.eval, key, "5%" if key == "retention" else "more=5%")
    with pytest.raises(ConfigError, match=r"only data\.validation can be a part"):
        config.validate()


def test_weights_are_shares_of_a_pass_in_which_nothing_is_twice(tmp_path, config, tokenizer):
    first = write(tmp_path / "a.jsonl", WORDS[:300])
    second = write(tmp_path / "b.jsonl", [f"{word} {word}" for word in WORDS[:60]])
    rows, log = run(f"{first}:0.75,{second}:0.25", config, tokenizer)
    found = places(rows)
    assert len(set(found)) == len(found) == 240
    assert sum(place.startswith(second) for place in found) == 60  # the scarcest is whole
    assert f"{first}: 180 of 300 documents in a pass, 75.0% of its documents" in log
    assert f"{second}: 60 of 60 documents in a pass, 25.0% of its documents" in log
    other, _ = run(f"{first}:0.75,{second}:0.25", config, tokenizer, seed=1)
    assert places(other) != found
    assert rows.documents.skipped == other.documents.skipped  # tokenised once
    same, _ = run(f"{first}:3,{second}:1", config, tokenizer)
    assert same.digest == rows.digest


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
)
def test_shares_are_right_to_a_row_and_the_pass_as_long_as_can_be(counts, weights):
    group = np.repeat(np.arange(len(counts)), counts)
    weights = weights[: len(counts)]
    chosen = _weighted(group, np.ones(len(group), bool), weights, seed=3)
    taken = np.bincount(group[chosen], minlength=len(counts))
    shares = np.array(weights) / sum(weights)
    total = min(count / share for count, share in zip(counts, shares, strict=True))
    assert (np.abs(taken - total * shares) <= 0.5 + 1e-6).all()
    assert (taken == counts).any()


def test_a_weight_holds_for_all_files_of_a_glob(tmp_path, config, tokenizer):
    for number in range(3):
        write(tmp_path / f"part{number}.jsonl", WORDS[20 * number : 20 * number + 20])
    other = write(tmp_path / "other.jsonl", WORDS[100:120])
    rows, log = run(f"{tmp_path}/part*.jsonl:0.5,{other}:0.5", config, tokenizer)
    assert rows.statistics.documents == 40
    assert f"{tmp_path}/part*.jsonl: 20 of 60 documents" in log


def test_an_empty_source_cannot_have_a_weight(tmp_path, config, tokenizer):
    first, second = write(tmp_path / "a.jsonl", WORDS), write(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match=r"no document, because .*b\.jsonl has none"):
        run(f"{first}:1,{second}:1", config, tokenizer)


def test_a_limit_takes_a_sample_of_all_files(tmp_path, config, tokenizer):
    for number in range(2):
        write(tmp_path / f"{number}.jsonl", WORDS[200 * number : 200 * number + 200])
    source = f"{tmp_path}/*.jsonl:limit=40"
    rows, log = run(source, config, tokenizer)
    assert rows.statistics.documents == rows.statistics.read.documents == 40
    assert "counting the rows of" in log
    lines = [int(place.rpartition(":")[2]) for place in places(rows)]
    assert 60 < np.mean(lines) < 140
    assert 8 < sum("/0.jsonl" in place for place in places(rows)) < 32
    assert run(source, config, tokenizer)[0].digest == rows.digest
    assert run(source, config, tokenizer, seed=1)[0].digest != rows.digest
    whole, _ = run(f"{tmp_path}/*.jsonl:limit=400", config, tokenizer)
    assert whole.statistics.documents == 400
    found = conversations(source, config, rows=rows, on_log=lambda text: None)
    assert sorted(item.origin for item in found) == places(rows)


def test_limits_weights_and_a_held_out_part_go_together(tmp_path, config, tokenizer):
    first = write(tmp_path / "a.jsonl", WORDS[:200])
    second = write(tmp_path / "b.jsonl", WORDS[200:])
    config.train, config.validation = f"{first}:limit=100:0.8,{second}:0.2", "10%"
    train, _ = run(config.train, config, tokenizer)
    held_out, _ = run("10%", config, tokenizer, training=False)
    parts = [(part.documents, part.taken) for part in train.statistics.packed.parts]
    assert parts == [(90, 90), (180, 23)]
    parts = [(part.documents, part.taken) for part in held_out.statistics.packed.parts]
    assert parts == [(10, 10), (20, 3)]
    assert not set(places(train)) & set(places(held_out))


def test_views_of_one_conversation_stay_together(tmp_path, config):
    tokenizer = make_tokenizer("User Assistant : think q a r".split())
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ' ' }}{{ (m.content.split('</think>')[-1] if not "
        "loop.last else m.content) + ' ' }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    answers = [{"role": "assistant", "content": f"<think>r</think>a {i}"} for i in range(3)]
    messages = [item for answer in answers for item in ({"role": "user", "content": "q"}, answer)]
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [{"role": "system", "content": f"q {i}"}, *messages]} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config,
        template=str(template),
        thinking="keep",
        train=str(path),
        validation="10%",
        max_length=512,
    )
    train, _ = run(config.train, config, tokenizer)
    held_out, _ = run("10%", config, tokenizer, training=False)
    lines = [train.documents.index[found.numbers]["line"] for found in (train, held_out)]
    assert [len(set(item.tolist())) for item in lines] == [18, 2]
    assert not set(lines[0].tolist()) & set(lines[1].tolist())
    assert len(lines[0]) == 3 * 18


def test_the_log_counts_the_documents_of_each_side(tmp_path, config, tokenizer):
    config.train, config.validation = write(tmp_path / "a.jsonl", WORDS[:100]), "10%"
    for source, training, count in ((config.train, True, 90), ("10%", False, 10)):
        rows, log = run(source, config, tokenizer, training=training)
        packed = rows.statistics.packed
        assert f"\n{'train' if training else 'validation'}: {count} of 100 documents, " in log
        assert f" {packed.document_tokens:,} tokens, {packed.document_trained_tokens:,} t" in log


def test_the_report_shows_the_two_sides(tmp_path, config, tokenizer):
    config.train, config.validation = write(tmp_path / "a.jsonl", WORDS[:100]), "10%"
    train, validation = inspect(RunConfig(data=config), tokenizer).sets
    assert (train.counts.sum(), validation.counts.sum()) == (90, 10)
    assert validation.overlap is not None
    assert validation.overlap.count == 0


def test_a_stream_leaves_out_what_is_held_out(tmp_path, config, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{word}\n\n" for word in WORDS))
    config = dataclasses.replace(config, packing="stream", train=str(path), validation="25%")
    train, _ = run(config.train, config, tokenizer)
    held_out, _ = run("25%", config, tokenizer, training=False)
    seen = [
        sorted(int(i) for row in rows for i in row.tokens[row.segments > 0] if i > 4)
        for rows in (train, held_out)
    ]
    assert [len(tokens) for tokens in seen] == [300, 100]
    assert sorted(seen[0] + seen[1]) == [int(i) for i in tokenizer.convert_tokens_to_ids(WORDS)]
    assert train.max_segments == 1
    for row in train:
        assert (row.targets[:-1] == row.tokens[1:])[row.segments[1:] > 0].all()
        assert row.positions[row.segments > 0].tolist() == list(range((row.segments > 0).sum()))
    weights = sum(int(row.weights.sum()) for row in train)
    assert weights == train.statistics.trained_tokens
