"""JSON in which anything would be lost in silence, or that Python cannot read, is refused."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.discovery import find_sources
from jaxft.data.json_text import JsonError, JsonText, loads
from jaxft.data.problems import Problems
from jaxft.errors import DataError

BAD = {
    '{"a": 1, "b": 2, "a": 3}': "key 'a' occurs twice in one object",
    '{"m": [{"x": 1, "x": 1}]}': "key 'x' occurs twice in one object",
    f'{{"a": {"1" * 5000}}}': "an integer of 5,000 digits",
    f'{{"a": -{"1" * 5000}, "a": 1}}': "an integer of 5,001 digits",
}
DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}\n{"a": 2}]', "2: .*expected ',' or ']'"),
        ('[{"a": 1},\n,{"a": 2}]', "2: .*expected a value behind ',', not ','"),
        ('[{"a": 1},\n]', "2: .*expected a value behind ',', not ']'"),
        ('{"rows": [{"a": 1}]\n"more": 2}', "2: .*expected ',' or '}'"),
        ('[{"a": 1},\n', "too early"),
    ],
)
def test_commas_that_are_missing_or_too_many_are_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    [source] = find_sources(str(tmp_path / "a.json"))
    with pytest.raises((DataError, JsonError), match=message):
        list(source.rows(Problems("test")))


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_what_would_be_lost_is_refused_in_every_form_of_json(tmp_path, text, message):
    with pytest.raises(JsonError, match=message):
        loads(text)
    good = '{"a": 1}'
    forms = {
        "a.jsonl": f"{good}\n{text}\n",
        "a.json": f"[\n{text},\n{good}]",
        "b.json": f'{{"x": {good},\n"y": {text}}}',
        "c.json": f'{{"version": 1, "rows": [{good},\n{text}]}}',
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        problems = Problems("test")
        [source] = find_sources(str(tmp_path / name))
        assert len(list(source.rows(problems))) == 1
        with pytest.raises(DataError, match=rf"{name}:2: {message}"):
            problems.check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nested too deeply"),
        ('{"a": 1} {"b": 2}', "'{\"b\": 2}' follows the value"),
        ('{"a": ', "broken JSON at column 7"),
        ("", "broken JSON"),
    ],
)
def test_texts_that_are_not_one_value_are_refused(text, message):
    with pytest.raises(JsonError, match=message):
        loads(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'[{{"a": {DEEP}', r"a\.json:1: broken JSON: it is nested too deeply"),
        ('{"a": {"b": 1},\n"a": {"b": 2}}', r"a\.json:2: broken JSON: key 'a' occurs twice"),
        ('{\n"a": {"b": 1}}\n{"a": {"b": 2}}', r"a\.json:3: broken JSON: more follows"),
        ('{"a": {"b": 1}, [1]: 2}', r"expected the name of a member"),
        (b'[{"a": "fine"},\n{"a": "caf\xe9"}]', r"a\.json:2: not UTF-8: byte 0xe9"),
    ],
)
def test_files_of_json_that_go_on_otherwise_are_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = Problems("test")
    with pytest.raises(DataError, match=message):
        for source in find_sources(str(path)):
            for row in source.rows(problems):
                assert isinstance(row.value, dict), "expected an object"
        problems.check()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=values)
def test_values_are_those_of_the_standard_library(value):
    text = json.dumps(value)
    assert loads(f" {text} \n") == json.loads(text)
    reader = JsonText(iter(f"[{text},\n{text}]"))
    assert [item for item, _, _ in reader.items()] == [json.loads(text)] * 2
    reader.end()


def test_looking_for_repeated_keys_costs_little():
    messages = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "y"}]
    lines = [json.dumps({"messages": messages, "id": i, "tags": [1, 2]}) for i in range(20_000)]

    def seconds(read):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for line in lines:
                read(line)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(loads) < 4 * seconds(json.loads)
