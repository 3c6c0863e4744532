"""Bad rows are refused together, or left out, counted by kind and listed with their places."""

import dataclasses
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from jaxft.config import DataConfig, RunConfig
from jaxft.data.inspect import inspect
from jaxft.data.preparation import conversations, prepare, skipped_rows
from jaxft.data.problems import Problems, describe_kinds, kind
from jaxft.errors import DataError
from tests.data.test_preparation import make_tokenizer

GOOD = {"prompt": "what is a", "completion": "yes"}
BAD = [
    ('{"prompt": "a", "completion": ""}', "'completion' is empty; expected text.", "object"),
    ('{"prompt": "a", "completion": ', "broken JSON at column 31", "text"),
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' occurs twice", "text"),
    ('{"prompt": "a", "completion": "\\ud83d yes"}', "half of a character", "object"),
    ('["a", "b"]', 'the row is ["a", "b"]', "list"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def config(tmp_path):
    cache = str(tmp_path / "cache")
    return DataConfig(cache=cache, max_length=32, bad_rows="skip", bad_share=0.1)


def run(source, config, tokenizer, **options):
    log = []
    options = {"seed": 0, "training": True, **options}
    rows = prepare(source, config, tokenizer, on_log=log.append, **options)
    return rows, "\n".join(log)


def write(path, good, bad):
    lines = [json.dumps(GOOD)] * good
    for place, line in enumerate(bad):
        lines.insert(2 * place + 1, line)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_bad_rows_are_left_out_counted_and_listed(tmp_path, config, tokenizer):
    source = write(tmp_path / "a.jsonl", 100, [line for line, _, _ in BAD])
    for _ in range(2):  # the second time from the cache
        rows, log = run(source, config, tokenizer)
        assert rows.statistics.documents == 100
        assert "5 bad rows are left out: " in log
        assert "1 x 'completion' is empty" in log
        assert f"listed in {rows.documents.skipped}" in log
        found = list(skipped_rows(rows))
        assert [item["origin"] for item in found] == [f"{source}:{2 * i + 2}" for i in range(5)]
        for item, (line, problem, form) in zip(found, BAD, strict=True):
            assert problem in item["problem"]
            assert item["row"] == (line if form == "text" else json.loads(line))
    items = conversations(source, config, rows=rows, on_log=lambda text: None)
    assert sum(1 for _ in items) == 100


def test_more_than_the_share_is_refused_with_the_total(tmp_path, config, tokenizer):
    source = write(tmp_path / "a.jsonl", 40, [line for line, _, _ in BAD])
    with pytest.raises(DataError) as error:
        run(source, config, tokenizer)
    text = str(error.value)
    assert "train: 5 of 45 rows (11.11%) are bad, more than the share of 0.1" in text
    assert "1 x 'completion' is empty" in text
    assert "--config.data.bad_share=0.1112" in text
    listed = text.partition("They are listed in ")[2].partition("skipped.jsonl")[0]
    assert len(Path(f"{listed}skipped.jsonl").read_text().splitlines()) == 5
    rows, log = run(source, dataclasses.replace(config, bad_share=0.1112), tokenizer)
    assert rows.statistics.documents == 40
    assert "from the cache" in log
    with pytest.raises(DataError, match="5 of 45 rows"):
        run(source, config, tokenizer)


def test_what_was_read_without_bad_rows_is_not_taken_for_whole(tmp_path, config, tokenizer):
    source = write(tmp_path / "a.jsonl", 100, [BAD[0][0]])
    run(source, config, tokenizer)
    with pytest.raises(DataError, match="1 bad row in train"):
        run(source, dataclasses.replace(config, bad_rows="error"), tokenizer)


def test_the_refusal_says_how_bad_rows_can_be_left_out(tmp_path, config, tokenizer):
    config.bad_rows = "error"
    with pytest.raises(DataError) as error:
        run(write(tmp_path / "a.jsonl", 30, [BAD[0][0]] * 25), config, tokenizer)
    text = str(error.value)
    assert "The first 20 bad rows of train; what follows them was not read:" in text
    assert "--config.data.bad_rows=skip" in text


def test_rows_that_the_template_refuses_are_left_out_too(tmp_path, config, tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = {"messages": messages, "tools": [{"name": "f"}]}
    path = tmp_path / "a.jsonl"
    rows = [*[{"messages": messages}] * 20, tools]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows, _ = run(str(path), config, tokenizer)
    [found] = skipped_rows(rows)
    assert found["row"] == tools
    assert "the row has tools" in found["problem"]


def test_a_bad_first_row_does_not_decide_the_format(tmp_path, config, tokenizer):
    path = tmp_path / "a.jsonl"
    lines = ['["x"]', '{"error": "timeout"}', *[json.dumps(GOOD)] * 30]
    path.write_text("\n".join(lines))
    rows, log = run(str(path), config, tokenizer)
    assert rows.statistics.documents == 30
    assert "are in no known format" in [item["problem"] for item in skipped_rows(rows)][1]
    assert "format prompt_completion" in log
    path.write_text('{"error": "timeout"}\n' * 3)
    with pytest.raises(DataError, match="in no known format"):
        run(str(path), config, tokenizer)


def test_a_set_of_bad_rows_alone_is_refused_with_their_kinds(tmp_path, config, tokenizer):
    config.bad_share = 1.0
    source = write(tmp_path / "a.jsonl", 0, [BAD[0][0]] * 30)
    with pytest.raises(DataError, match=r"but 30 bad ones: 30 x 'completion' is empty"):
        run(source, config, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps([GOOD] * 99)[:-9], "broken JSON"),
        ("a.csv", "prompt,completion\n" + "a,b\n" * 99 + '"a,b\n', "broken CSV"),
        ("a.csv", "prompt,prompt\n" + "a,b\n" * 99, "several columns have the same name: 'prompt'"),
    ],
)
def test_a_file_of_which_the_rest_is_lost_is_refused_even_then(
    tmp_path, config, tokenizer, name, content, message
):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"cannot be read to its end:\n.*{message}"):
        run(str(tmp_path / name), config, tokenizer)


@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_a_bad_line_takes_its_whole_row_with_it(tmp_path, config, tokenizer, name):
    rows = {
        "a.csv": b'prompt,completion\n"a\n\xff\nb",c\na b,c\n',
        "a.txt": b"a\n\xff\nb\n\na b\n",
    }
    (tmp_path / name).write_bytes(rows[name])
    config.bad_share = 0.5
    rows, _ = run(str(tmp_path / name), config, tokenizer)
    assert rows.statistics.documents == 1
    [found] = skipped_rows(rows)
    assert f"{name}:{3 if name == 'a.csv' else 2}" in found["origin"]
    assert "not UTF-8: byte 0xff at column 1" in found["problem"]
    assert "b" in found["row"]


def test_the_report_counts_and_shows_them(tmp_path, config, tokenizer):
    config.train = write(tmp_path / "a.jsonl", 100, [BAD[0][0]])
    [item] = inspect(RunConfig(data=config), tokenizer).sets
    assert item.rows.statistics.read.skipped == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("broken JSON at column 3: x.", "broken JSON at column 45: x."),
        ('messages[1].role is "a"; expected b.', 'messages[20].role is "c"; expected b.'),
        ("'x' is [\"t\"]; expected a string.", "'x' is [1]; expected a string."),
        ('\'x\' is {"t": "; expected…; expected a string.', "'x' is null; expected a string."),
        ("'x' is \"{…; expected JSON: a at 3.", "'x' is \"[; expected JSON: b."),
        ("the arguments of 'f' are not JSON: x.", "the arguments of 'g' are not JSON: x."),
    ],
)
def test_kinds_are_the_same_whatever_the_values(first, second):
    assert kind(first) == kind(second)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the row is [1, 2]; expected an object.", "the row is not an object"),
        (
            'messages[3].role is "me"; expected one of a, b. Did…',
            "messages[N].role is not one of a, b",
        ),
        ("messages[3].weight is 2; expected 0 or 1.", "messages[N].weight is not 0 or 1"),
        ("messages[3].x is empty; expected text.", "messages[N].x is empty"),
        (
            "messages[2].loss is true on a turn of 'user'; only",
            "messages[N].loss is true on a turn of …",
        ),
        ("5 fields; expected 2: a, b.", "N fields"),
        (
            "'chosen' is \"a\", the beginning of its prompt; expected an answer to the prompt.",
            "'chosen' is not an answer to the prompt",
        ),
    ],
)
def test_a_kind_says_what_is_wrong_in_words(text, expected):
    assert kind(text).startswith(expected)


def test_rare_kinds_are_counted_together():
    problems = Problems("x")
    problems.kinds.update({f"kind {chr(97 + i)}": 20 - i for i in range(12)})
    lines = describe_kinds(problems.kinds)
    assert lines[0] == "20 x kind a"
    assert lines[-1] == "19 of other kinds"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_missing_numbers_are_no_text(tmp_path, config, tokenizer, value, column):
    config.bad_rows = "error"
    row = {"prompt": 1.5, "completion": 2.5}
    table = pyarrow.Table.from_pylist([row, {**row, column: value}])
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({**row, column: value})}\n")
    for name in ("a.parquet", "a.jsonl"):
        message = rf"{name}:2: '{column}' is {value}, a missing number; expected text"
        with pytest.raises(DataError, match=message):
            run(str(tmp_path / name), config, tokenizer)


def test_missing_numbers_in_optional_cells_are_missing(tmp_path, config, tokenizer):
    rows = [{"instruction": "a", "input": value, "output": "b"} for value in (float("nan"), None)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = conversations(str(path), config, on_log=lambda text: None)
    assert first.messages == second.messages


def test_half_a_character_is_refused_however_it_came_in(tmp_path, config, tokenizer):
    config.bad_rows = "error"
    inner = '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]'
    rows = [{"messages": json.loads(inner)}, {"messages": inner}]
    rows[0]["messages"][0]["content"] = "a"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row has half of a character, \\ud83d"):
        run(str(path), config, tokenizer)
    path.write_text('{"text": "a \\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has half of a character, \\ud83d"):
        run(str(path), config, tokenizer)
    path.write_text('{"prompt": ["\\ud83d"], "completion": "x"}\n')
    with pytest.raises(DataError) as error:
        run(str(path), config, tokenizer)
    str(error.value).encode()  # a terminal can show it


def test_rows_that_are_nested_too_deeply_are_refused(tmp_path, config, tokenizer):
    config.bad_rows = "error"
    deep = "[" * 100_000 + "]" * 100_000
    half = "[" * 1500 + "]" * 1500
    path = tmp_path / "a.jsonl"
    for line in (f'{{"text": {deep}}}', f'{{"text": {half}}}', f'{{"messages": {half}}}'):
        path.write_text(f"{line}\n")
        with pytest.raises(DataError):
            run(str(path), config, tokenizer)
