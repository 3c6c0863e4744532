"""Data sets from their files to packed rows, the cache between them, and what is refused."""

import dataclasses
import json
import multiprocessing
import os
import tracemalloc

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.config import DataConfig, RunConfig
from jaxft.data import cache
from jaxft.data.preparation import conversations, prepare
from jaxft.data.tokenising import content_hash
from jaxft.errors import ConfigError, DataError

WORDS = "User Assistant : a b c d e f what is how many the answer yes no green red".split()


def make_tokenizer(words=WORDS):
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache=str(tmp_path / "cache"), max_length=32)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [{"prompt": f"what is {a} {b}", "completion": "yes"} for a in "abcdef" for b in "abcdef"]


def run(source, config, tokenizer, *, seed=0, training=True):
    log = []
    rows = prepare(source, config, tokenizer, seed=seed, training=training, on_log=log.append)
    return rows, "\n".join(log)


def test_the_log_says_what_was_detected(tmp_path, config, tokenizer):
    rows, log = run(write_rows(tmp_path / "a.jsonl", PAIRS), config, tokenizer)
    assert "format prompt_completion, columns prompt, completion" in log
    assert "chat template: built-in default; answers end with '</s>'" in log
    assert "36 documents" in log
    assert f"{rows.statistics.trained_tokens} trained" in log
    assert rows.statistics.trained_tokens == 2 * 36  # the word and the stop token
    assert rows.statistics.documents == 36
    assert rows.is_chat


def test_text_and_conversations_mix(tmp_path, config, tokenizer):
    source = write_rows(tmp_path / "a.jsonl", PAIRS[:2])
    (tmp_path / "b.txt").write_text("a b c\n\nd e f\n")
    rows, _ = run(f"{source},{tmp_path}/b.txt", config, tokenizer)
    assert rows.statistics.documents == 4
    assert rows.statistics.trained_tokens == 2 * 2 + 2 * 3


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_the_end_of_a_document_is_trained(tmp_path, config, tokenizer, packing):
    path = tmp_path / "b.txt"
    path.write_text("a b c\n\nd e f\n")
    rows, _ = run(str(path), dataclasses.replace(config, packing=packing), tokenizer)
    [row] = rows
    assert not rows.is_chat
    assert (row.targets[row.weights > 0] == tokenizer.eos_token_id).sum() == 2


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("paragraph", "First\nsecond\n\nThird\n\n"),
        ("line", "First\nsecond\nThird\n"),
        ("file", "First\nsecond\n\n\nThird\n"),
    ],
)
def test_without_eos_a_stream_keeps_what_separates_documents(tmp_path, config, split, expected):
    vocabulary = {character: i for i, character in enumerate(map(chr, range(128)))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (tmp_path / "a.txt").write_text("First\nsecond\n\n\nThird\n")
    config = dataclasses.replace(config, packing="stream", text_split=split)
    [row], log = run(str(tmp_path / "a.txt"), config, tokenizer)
    assert "".join(map(chr, row.tokens[row.segments > 0])) == expected
    assert "has no EOS: documents of the stream end with the line ends" in log


def test_bad_rows_of_all_kinds_come_together_and_nothing_is_cached(tmp_path, config, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n{"prompt": \n{"prompt": "\xff"}\n'
        b'{"prompt": "a", "completion": ""}\n{"prompt": "a </s>", "completion": "b"}\n'
    )
    with pytest.raises(DataError) as error:
        run(str(path), dataclasses.replace(config, control_tokens="refuse"), tokenizer)
    text = str(error.value)
    for line, message in (
        (2, "key 'completion' is missing"),
        (3, "broken JSON"),
        (4, "not UTF-8"),
        (5, "'completion' is empty"),
        (6, "the conversation spells '</s>'"),
    ):
        assert f"a.jsonl:{line}: {message}" in text or message in text
    assert "A right row: " in text
    assert not list((tmp_path / "cache").iterdir())


def test_an_empty_file_is_refused(tmp_path, config, tokenizer):
    with pytest.raises(DataError, match="no rows"):
        run(write_rows(tmp_path / "a.jsonl", []), config, tokenizer)


def test_a_chat_set_without_any_trained_token_is_refused(tmp_path, config, tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    source = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match="no token of the conversations would be trained"):
        run(source, config, tokenizer)


def test_the_log_reports_what_is_lost(tmp_path, config, tokenizer):
    rows = [*PAIRS, {"prompt": "a " * 40, "completion": "yes"}]
    config.overlength = "drop"
    _, log = run(write_rows(tmp_path / "a.jsonl", rows), config, tokenizer)
    assert "1 of 37 documents are over the limit of 32 tokens" in log
    assert "'drop' loses 2.7% of the trained tokens" in log


@pytest.mark.parametrize("training", [True, False])
def test_a_set_of_which_nothing_is_left_is_refused(tmp_path, config, tokenizer, training):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    config.overlength, config.max_length = "drop", 4
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError) as error:
            run(source, config, tokenizer, training=training)
        text = str(error.value)
        assert text.startswith("train: " if training else "validation: ")
        assert "none of 36 documents" in text
        assert "36 are longer than data.max_length 4 and data.overlength is 'drop'" in text
        assert "Set --config.data.max_length=10" in text
    config.overlength = "truncate"
    with pytest.raises(DataError, match=r"36 have no token to train within data\.max_length"):
        run(source, config, tokenizer, training=training)


def test_texts_without_a_second_token_are_refused(tmp_path, config, tokenizer):
    (tmp_path / "a.txt").write_text("a\n\nb\n")
    config.packing = "none"
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"2 have no token to train\. Give rows with more text"):
        run(str(tmp_path / "a.txt"), config, tokenizer)


def test_the_log_says_which_list_of_a_json_object_is_read(tmp_path, config, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "x", "data": PAIRS}))
    rows, log = run(str(path), config, tokenizer)
    assert rows.statistics.documents == 36
    assert "format prompt_completion, columns prompt, completion; rows are those of" in log
    assert "list 'data'" in log


def test_a_template_with_the_date_gives_the_same_rows_on_every_day(tmp_path, config, tokenizer):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ ' ' + m.role + ' ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} assistant{% endif %}"
    )
    config.template = str(template)
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    tokenizer = make_tokenizer([*WORDS, "2024"])
    rows, log = run(source, config, tokenizer)
    assert rows[0].tokens[0] == tokenizer.convert_tokens_to_ids("2024")
    assert "it is always 26 Jul 2024" in log


def test_what_was_prepared_is_found_again(tmp_path, config, tokenizer):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    run(source, config, tokenizer)
    before = sorted((tmp_path / "cache").iterdir())
    _, log = run(source, config, tokenizer)
    assert "from the cache" in log
    assert sorted((tmp_path / "cache").iterdir()) == before


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "all"},
        {"thinking": "drop"},
        {"format": "prompt_completion"},
        {"format": "columns", "columns": "prompt=completion,completion=prompt"},
        {"packing": "stream"},
        {"packing": "none"},
        {"overlength": "drop"},
        {"max_length": 48},
        {"template": "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_that_changes_rows_is_in_the_key(tmp_path, config, tokenizer, change):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    run(source, config, tokenizer)
    before = set((tmp_path / "cache").iterdir())
    if "template" in change:
        path = tmp_path / "template.jinja"
        path.write_text(change["template"] + "{% if add_generation_prompt %}assistant{% endif %}")
        change = {"template": str(path), "train_on": "all"}
    run(source, dataclasses.replace(config, **change), tokenizer)
    assert set((tmp_path / "cache").iterdir()) > before


def test_content_tokenizer_template_seed_and_version_are_in_the_key(
    tmp_path, config, tokenizer, monkeypatch
):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)

    def is_cached(tokenizer=tokenizer, seed=0):
        before = len(list((tmp_path / "cache").glob("*")))
        run(source, config, tokenizer, seed=seed)
        return len(list((tmp_path / "cache").glob("*"))) == before

    assert not is_cached()
    assert is_cached()
    assert not is_cached(tokenizer=make_tokenizer(WORDS[::-1]))
    assert not is_cached(seed=1)
    write_rows(tmp_path / "a.jsonl", [*PAIRS[1:], PAIRS[0]])
    assert not is_cached()
    monkeypatch.setattr("jaxft.data.preparation.VERSION", 0)
    assert not is_cached()
    config.template = str(tmp_path / "template.jinja")
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + eos_token }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant{% endif %}"
    (tmp_path / "template.jinja").write_text(template + prompt)
    assert not is_cached()
    (tmp_path / "template.jinja").write_text("a " + template + prompt)
    assert not is_cached()


def test_a_limit_for_all_files_of_a_glob_is_another_one_than_for_each(tmp_path, config, tokenizer):
    files = [write_rows(tmp_path / f"{name}.jsonl", PAIRS) for name in "ab"]
    both, _ = run(f"{tmp_path}/*.jsonl:limit=10", config, tokenizer)
    each, _ = run(",".join(f"{file}:limit=10" for file in files), config, tokenizer)
    assert (both.statistics.documents, each.statistics.documents) == (10, 20)


def test_the_seed_of_evaluation_changes_nothing(tmp_path, config, tokenizer):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    first, _ = run(source, config, tokenizer, seed=0, training=False)
    second, _ = run(source, config, tokenizer, seed=1, training=False)
    assert first.origins(0) == second.origins(0)
    shuffled, _ = run(source, config, tokenizer, seed=1)
    assert shuffled.origins(0) != first.origins(0)


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "part").write_text("half")
        raise DataError("bad rows")

    with pytest.raises(DataError):
        cache.find_or_build(tmp_path / "cache", "key", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_explained(tmp_path):
    def build(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"disk is full.*data\.cache"):
        cache.find_or_build(tmp_path / "cache", "key", build)


@pytest.mark.parametrize("name", ["/proc/x", "/dev/null/x", "/" + "n" * 300, "file/sub"])
def test_a_cache_that_cannot_be_written_is_explained(tmp_path, config, tokenizer, name):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "file").write_text("")
    config.cache = str(tmp_path / name) if name == "file/sub" else name
    with pytest.raises(DataError, match=r"cannot be written to .*--config\.data\.cache"):
        run(source, config, tokenizer)


def test_a_source_that_cannot_be_opened_is_not_blamed_on_the_cache(tmp_path, config, tokenizer):
    source = tmp_path / "a.jsonl"
    write_rows(source, PAIRS)
    source.chmod(0)
    if os.access(source, os.R_OK):
        pytest.skip("the superuser reads every file")
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied"):
        run(str(source), config, tokenizer)


def test_rows_that_are_absurdly_long_are_refused_before_anything_is_read():
    config = RunConfig(data=DataConfig(max_length=99999999999))
    with pytest.raises(ConfigError, match=r"max_length is 99999999999; expected at most 16777216"):
        config.validate()


def test_sources_of_a_run_are_read_in_ways_of_their_own(tmp_path, config, tokenizer):
    (tmp_path / "a.csv").write_text("question,reply,n\na,yes,1\nb,no,2\n")
    (tmp_path / "b.txt").write_text("a b\nc d\n\ne f\n")
    config.format, config.columns = "columns", "prompt=question,completion=reply"
    task, _ = run(str(tmp_path / "a.csv"), config, tokenizer)
    assert task.is_chat
    retention = str(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"format of the source is 'columns'.*b\.txt:format=text'"):
        run(retention, config, tokenizer)
    rows, log = run(f"{retention}:format=text:text_split=line", config, tokenizer)
    assert rows.statistics.documents == 3
    assert "one document a line" in log
    both, _ = run(f"{tmp_path}/a.csv,{retention}:format=text", config, tokenizer)
    assert both.statistics.documents == 4


def test_of_two_builders_one_wins_and_both_go_on(tmp_path):
    def build(folder, text):
        (folder / "content").write_text(text)

    def build_while_another_finishes(folder):
        cache.find_or_build(tmp_path, "key", lambda other: build(other, "first"))
        build(folder, "second")

    found, reused = cache.find_or_build(tmp_path, "key", build_while_another_finishes)
    assert not reused
    assert (found / "content").read_text() == "first"
    assert list(tmp_path.iterdir()) == [found]


def _prepare_in_process(source, folder):
    config = DataConfig(cache=folder, max_length=32)
    rows, _ = run(source, config, make_tokenizer())
    return [row.tokens.tolist() for row in rows]


def test_processes_that_prepare_at_once_get_the_same_rows(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        other = pool.apply_async(_prepare_in_process, (source, str(tmp_path / "cache")))
        first, second = _prepare_in_process(source, str(tmp_path / "cache")), other.get()
    assert first == second == _prepare_in_process(source, str(tmp_path / "other cache"))
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 2
    assert not any(name.startswith(".") for name in names)


@pytest.mark.slow(seconds=2)
def test_memory_does_not_grow_with_the_documents(tmp_path, tokenizer):
    def peak(count):
        source = write_rows(
            tmp_path / f"{count}.jsonl",
            ({"prompt": f"what is {i}", "completion": "yes " * 20} for i in range(count)),
        )
        config = DataConfig(cache=str(tmp_path / f"cache {count}"), max_length=64)
        tracemalloc.start()
        rows, _ = run(source, config, tokenizer)
        for number in range(len(rows)):
            rows[number]
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows.statistics.documents == count
        return used

    peak(300)
    assert peak(3_000) < 1.3 * peak(1_000) + 500_000


def test_conversations_are_read_for_answers(tmp_path, config):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    log = []
    found = list(conversations(source, config, maximum=3, on_log=log.append))
    assert [item.messages[-1]["content"] for item in found] == ["yes"] * 3
    assert "format prompt_completion" in log[0]
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="no answers to compare"):
        list(conversations(str(tmp_path / "b.txt"), config, on_log=log.append))


@pytest.mark.parametrize(("training", "answer"), [(True, "a"), (False, "b")])
def test_conversations_are_of_the_split_that_is_meant(
    tmp_path, config, monkeypatch, training, answer
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, text in (("train", "a"), ("validation", "b")):
        (tmp_path / "set" / split).mkdir(parents=True)
        write_rows(
            tmp_path / "set" / split / "part.jsonl", [{"prompt": "what is", "completion": text}]
        )
    [found] = conversations(
        str(tmp_path / "set"), config, training=training, on_log=lambda text: None
    )
    assert found.messages[-1]["content"] == answer


def test_content_hashes_ignore_case_and_white_space():
    assert content_hash("A  b\n") == content_hash("a B")
    assert content_hash("a b") != content_hash("ab")


@pytest.fixture(scope="module")
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "models/stories260K")


@pytest.mark.parametrize(
    ("source", "options", "documents"),
    [
        ("gsm8k/test.jsonl", {}, 1319),
        ("rasbt-instruct/instruction-data.json", {}, 1100),
        (
            "banking77/test.csv",
            {"format": "columns", "columns": "prompt=text,completion=category"},
            3080,
        ),
        (
            "pubmedqa/ori_pqal.json",
            {"format": "columns", "columns": "prompt=QUESTION,completion=final_decision"},
            1000,
        ),
        ("tinyshakespeare/input.txt", {"max_length": 2048}, 7222),
    ],
)
def test_real_data_is_prepared(shared, stories, tmp_path, source, options, documents):
    config = DataConfig(**{"cache": str(tmp_path), "max_length": 1024, **options})
    rows, _ = run(str(shared / "data" / source), config, stories)
    assert rows.statistics.documents == documents
    assert rows.statistics.lost_share == 0
    assert rows.statistics.padding_share < 0.03
    assert sum(int(row.weights.sum()) for row in rows) == rows.statistics.trained_tokens


def test_the_stream_of_a_text_is_its_documents_between_bos_and_eos(shared, stories, tmp_path):
    text = (shared / "data/tinyshakespeare/input.txt").read_text()[:20_000]
    path = tmp_path / "a.txt"
    path.write_text(text)
    config = DataConfig(cache=str(tmp_path / "cache"), max_length=256, packing="stream")
    rows, _ = run(str(path), config, stories)
    paragraphs = [part.strip("\n") for part in text.split("\n\n") if part.strip()]
    end = stories.eos_token_id
    expected = [i for ids in stories(paragraphs).input_ids for i in (*ids, end)]
    tokens = [int(i) for row in rows for i in row.tokens[row.segments > 0]]
    assert tokens == expected
    assert rows[0].weights.sum() == 255
