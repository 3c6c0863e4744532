"""Raw rows of every kind of file, each with its line."""

import json
import logging
import tracemalloc

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxft.config import DataConfig
from jaxft.data.discovery import find_sources
from jaxft.data.preparation import prepare
from jaxft.data.problems import Problems
from jaxft.data.sources import Row
from jaxft.errors import DataError
from tests.data.test_preparation import make_tokenizer


def read(path, **options):
    problems = Problems("test")
    sources = find_sources(str(path), DataConfig(**options))
    rows = [row for source in sources for row in source.rows(problems)]
    problems.check()
    return rows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', "JSON lines"),
        ("a.json", '[{"text": "a"}]', "JSON"),
        ("a.csv", "text,b\na,c\n", "a table"),
    ],
)
def test_a_split_of_text_is_refused_for_what_is_no_text(tmp_path, name, content, kind):
    path = write(tmp_path / name, content)
    message = f"{name} holds {kind}, so that 'text_split=line' does not apply; leave it out"
    with pytest.raises(DataError, match=message):
        find_sources(f"{path}:format=text:text_split=line")
    assert find_sources(str(path), DataConfig(text_split="line"))  # which is for other sources
    text = write(tmp_path / "a.txt", "a\nb\n")
    assert len(read(f"{text}:text_split=line")) == 2
    with pytest.raises(DataError, match="org/name is a hub data set, so that 'text_split=line'"):
        find_sources("org/name:text_split=line")


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ({"prompt": "q", "completion": "a", "id": 3}, {}),
        ({"instruction": "q", "input": "", "output": "a"}, {}),
        ({"question": "q", "answer": "a"}, {}),
        ({"text": "a"}, {}),
        ({"messages": MESSAGES}, {}),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, {}),
        ({"conversations": TURNS, "system": "s"}, {}),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}),
        ({"q": "q", "a": True}, {"format": "columns", "columns": "prompt=q,completion=a"}),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_object_in_the_form_of_a_row_is_one_row(tmp_path, value, options, indent):
    path = write(tmp_path / "one.json", json.dumps(value, indent=indent))
    [row] = read(path, **options)
    assert (row.value, row.line) == (value, 1)
    [source] = find_sources(str(path), DataConfig(**options))
    assert source.remark() == ""


@pytest.mark.parametrize(
    "value",
    [
        {"conversations": [{"conversations": TURNS}]},
        {"messages": [{"messages": MESSAGES}], "version": 1},
        {"text": "A licence.", "data": [{"prompt": "q", "completion": "a"}]},
    ],
)
def test_a_json_object_that_holds_rows_is_no_row(tmp_path, value):
    path = write(tmp_path / "rows.json", json.dumps(value))
    [row] = read(path)
    assert row.value in [item for rows in value.values() if isinstance(rows, list) for item in rows]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([3.0, None, 1.0], [3, None, 1]),
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ([3.0, None, 1.5], [3.0, None, 1.5]),
        ([1e300, None, 1.0], [1e300, None, 1.0]),
    ],
)
@pytest.mark.parametrize("kind", [pyarrow.float64(), pyarrow.float32()])
def test_integers_that_gaps_made_floats_are_integers_again(tmp_path, cells, expected, kind):
    if kind == pyarrow.float32():
        cells, expected = ([x and min(x, 1e30) for x in side] for side in (cells, expected))
    half = pyarrow.array(np.zeros(3, np.float16))
    table = pyarrow.table({"a": pyarrow.array(cells, kind), "b": half})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    [source] = find_sources(str(tmp_path / "a.parquet"))
    found = [row.value["a"] for row in source.rows(Problems("x"))]
    assert list(map(type, found)) == list(map(type, expected))
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=1e-6)


def test_json_lines_skip_blank_lines_and_keep_line_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\n\n{"a": "\u2028"}\r\n')
    assert read(path) == [Row({"a": 1}, 1), Row({"a": "\u2028"}, 3)]


def test_a_json_array_gives_the_line_where_each_object_begins(tmp_path):
    rows = [{"text": "x" * 40, "n": i} for i in range(3)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1))
    assert [(row.value, row.line) for row in read(path)] == [(rows[i], 2 + 4 * i) for i in range(3)]


def test_a_json_array_is_read_in_pieces(tmp_path, monkeypatch):
    for module in ("files", "json_text"):
        monkeypatch.setattr(f"jaxft.data.{module}.READ_CHARACTERS", 3)
    rows = [{"long number": 12345.678, "text": 'a "b" ]}' * i} for i in range(9)]
    for indent in (None, 2):
        path = write(tmp_path / "a.json", json.dumps(rows, indent=indent))
        assert [row.value for row in read(path)] == rows


def test_json_objects_of_rows_and_of_lists_are_read(tmp_path):
    by_id = write(tmp_path / "a.json", '{\n"7": {"a": 1},\n"8": {"a": 2}\n}')
    assert read(by_id) == [Row({"a": 1}, 2), Row({"a": 2}, 3)]
    nested = write(tmp_path / "b.json", '{\n"data": [{"a": 1}, {"a": 2}]\n}')
    assert [row.value for row in read(nested)] == [{"a": 1}, {"a": 2}]


def test_the_one_list_of_objects_in_a_json_object_is_its_rows(tmp_path):
    content = (
        '{"version": "x", "info": {"n": [1]}, "data": [\n{"a": 1},\n{"a": 2}\n], "tags": ["b"]}'
    )
    path = write(tmp_path / "a.json", content)
    assert read(path) == [Row({"a": 1}, 2), Row({"a": 2}, 3)]
    [source] = find_sources(str(path))
    assert "list 'data'" in source.remark()
    [source] = find_sources(str(write(tmp_path / "b.json", '[{"a": [{"b": 1}]}]')))
    assert source.remark() == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of objects: 'train', 'test'"),
        ('{"prompts": "a", "answers": "b"}', "'prompts', 'answers' are neither a row nor"),
        ('{"prompt": ["a"], "completion": ["b"]}', "'prompt', 'completion' are neither a row nor"),
        ('{"version": 1, "7": {"a": 1}}', "'version' is neither a row nor"),
    ],
)
def test_json_objects_without_clear_rows_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.json", content))


def test_json_lines_named_json_are_read(tmp_path):
    assert len(read(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))) == 2


def test_csv_with_bom_quotes_and_windows_line_ends(tmp_path):
    content = '\ufefftext,label\r\n"a, ""b""\r\nc",x\r\n\r\nd,y\r\n'
    rows = read(write(tmp_path / "a.csv", content))
    assert rows == [
        Row({"text": 'a, "b"\r\nc', "label": "x"}, 2),
        Row({"text": "d", "label": "y"}, 5),
    ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_delimiters_are_found_in_the_header(tmp_path, delimiter):
    path = write(tmp_path / "a.csv", f"text{delimiter}label\na, b{delimiter}x\n")
    assert read(path)[0].value == {"text": "a, b", "label": "x"}


def test_parquet_rows_do_not_grow_keys_from_the_schema(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.value for row in read(tmp_path / "a.parquet")] == rows


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("paragraph", [("a\nb", 2), ("c", 5)]),
        ("line", [("a", 2), ("b", 3), ("c", 5)]),
        ("file", [("\na\nb\n\nc\n", 1)]),
    ],
)
def test_text_is_split_into_documents(tmp_path, split, expected):
    path = write(tmp_path / "a.txt", "\na\r\nb\n\nc\n")
    assert [(row.value, row.line) for row in read(path, text_split=split)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON at column \d+"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2: not UTF-8: byte 0xe9 at column 8"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', r"a\.json:3: broken JSON"),
        ("a.json", b'[\n{"a": 1},\n', r"a\.json:3: broken JSON: the file ends too early"),
        ("a.json", b'{\n"a": {"b": 1},\n"c": {"b" 2}\n}', r"a\.json:3: broken JSON"),
        ("a.json", b'{"v": 1, "data": [\n{"b": 1},\n{"b" 2}\n]}', r"a\.json:3: broken JSON"),
        ("a.json", b'"text"', r"a\.json:1: expected a JSON array"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: 1 fields; expected 2: a, b"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: broken CSV"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n", r"a\.csv:3: not UTF-8"),
        ("a.txt", b"fine\n\xff\n", r"a\.txt:2: not UTF-8"),
        ("a.parquet", b"not parquet", r"a\.parquet:1: not a readable Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_the_first_twenty_problems_come_together(tmp_path):
    path = write(tmp_path / "a.jsonl", "{\n" * 30)
    with pytest.raises(DataError) as error:
        read(path)
    assert sum("broken JSON" in problem for problem in error.value.problems) == 20
    assert error.value.problems[-1] == "Nothing was trained."


def test_globs_folders_and_lists_are_resolved_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "notes.xyz"):
        write(tmp_path / name, "")
    names = [path.name for path in sorted(tmp_path.iterdir())][:3]
    found = find_sources(f"{tmp_path}/c.csv, {tmp_path}/*.jsonl")
    assert [source.name.rpartition("/")[2] for source in found] == ["c.csv", "a.jsonl", "b.jsonl"]
    assert [source.name.rpartition("/")[2] for source in find_sources(str(tmp_path))] == names


def test_a_folder_gives_its_data_files_alone(tmp_path):
    for name in ("README.md", "dataset_infos.json", "notes.txt", ".hidden.jsonl"):
        write(tmp_path / name, "")
    assert [source.name for source in find_sources(str(tmp_path))] == [str(tmp_path / "notes.txt")]
    names = [str(write(tmp_path / f"train-{i}.jsonl", "")) for i in range(2)]
    assert [source.name for source in find_sources(str(tmp_path))] == names


def test_a_folder_of_several_parts_is_refused_with_what_to_write(hub_folder):
    with pytest.raises(DataError) as error:
        find_sources(f"{hub_folder},{hub_folder.parent}/none.jsonl")
    parts, missing = error.value.problems
    assert "test.jsonl, train.jsonl" in parts
    assert f"'{hub_folder}[train]'" in parts
    assert f"'{hub_folder}/test.jsonl'" in parts
    assert "no file" in missing
    write(hub_folder / "test.jsonl", '{"question": "q", "answer": "b"}\n').unlink()
    (hub_folder / "data").mkdir()
    write(hub_folder / "data/dev.csv", "question,answer\nq,a\n")
    with pytest.raises(DataError, match=r"train\.jsonl, data/dev\.csv"):
        find_sources(str(hub_folder))


@pytest.mark.parametrize(("training", "answer"), [(True, "a"), (False, "b")])
def test_data_below_a_folder_are_read_by_split(tmp_path, monkeypatch, training, answer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write(folder / "README.md", "# A card\n\nNot to be trained on.\n")
    for split, text in (("train", "a"), ("validation", "b")):
        table = pyarrow.Table.from_pylist([{"question": "q", "answer": text}])
        parquet.write_table(table, folder / f"data/{split}-00000-of-00001.parquet")
    [source] = find_sources(str(folder), training=training)
    assert list(source.rows(Problems("test"))) == [Row({"question": "q", "answer": answer}, 1)]


def test_missing_files_are_named_together_with_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError) as error:
        find_sources(f"{tmp_path}/trian.jsonl,{tmp_path}/no/x.csv,{tmp_path}/*.txt")
    first, second, third = error.value.problems
    assert "Did you mean 'train.jsonl'?" in first
    assert "no folder" in second
    assert "No file matches" in third


def test_a_missing_hub_data_set_is_explained():
    [source] = find_sources("nobody/nothing-of-this-name:config[train]")
    with pytest.raises(DataError, match=r"'nobody/nothing-of-this-name.*"):
        list(source.rows(Problems("test")))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_is_out_of_reach_is_asked_once_and_the_cache_alone_is_read(
    monkeypatch, streaming
):
    asked = []

    def refuse(api, name, **options):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited to try again"))
    [source] = find_sources("org/name", DataConfig(streaming=streaming))
    with pytest.raises(DataError, match=r"neither a file nor in the cache.*cannot be reached"):
        list(source.rows(Problems("test")))
    assert asked == ["org/name"]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_warnings_of_the_hub_are_printed_once(hub_folder):
    find_sources(f"{hub_folder}[test]")
    assert not logging.getLogger("huggingface_hub").propagate


def test_a_stream_with_a_limit_ends_after_its_first_rows(hub_folder, tmp_path):
    tokenizer = make_tokenizer()
    config = DataConfig(streaming=True, cache=str(tmp_path / "rows"))
    rows = prepare(
        f"{hub_folder}[train]:limit=2",
        config,
        tokenizer,
        seed=0,
        training=True,
        on_log=lambda text: None,
    )
    assert rows.documents.index["line"].tolist() == [1, 2]


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set in the layout of the hub, with a cache of its own."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"question": "q", "answer": "a"}\n' * 3)
    write(folder / "test.jsonl", '{"question": "q", "answer": "b"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_by_split(hub_folder, streaming):
    [source] = find_sources(f"{hub_folder}[test]", DataConfig(streaming=streaming))
    assert list(source.rows(Problems("test"))) == [Row({"question": "q", "answer": "b"}, 1)]
    assert source.origin(1) == f"{hub_folder}[test]:1"
    before = source.fingerprint()
    assert source.fingerprint() == before
    write(hub_folder / "test.jsonl", '{"question": "q", "answer": "c, changed"}\n')
    assert source.fingerprint() != before


def test_a_hub_split_that_is_not_there_names_those_that_are(hub_folder):
    [source] = find_sources(f"{hub_folder}[tset]")
    with pytest.raises(DataError, match=r"tset.*"):
        list(source.rows(Problems("test")))


def test_labels_of_hub_data_sets_are_names(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: data)
    [source] = find_sources("org/name")
    [row] = source.rows(Problems("test"))
    assert row.value == {"text": "a", "label": "yes"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "one line.json"])
@pytest.mark.slow(seconds=2)
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    def peak(count):
        row = {"text": "word " * 60}
        content = {
            "a.jsonl": "".join(json.dumps(row) + "\n" for _ in range(count)),
            "a.json": json.dumps([row] * count, indent=0),
            "a.csv": "text,n\n" + f"{row['text']},1\n" * count,
            "a.txt": f"{row['text']}\n\n" * count,
            "one line.json": json.dumps([row] * count),
        }[name]
        path = write(tmp_path / name, content)
        del content
        [source] = find_sources(str(path))
        tracemalloc.start()
        assert sum(1 for _ in source.rows(Problems("test"))) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(40_000) < 1.2 * peak(10_000) + 100_000
