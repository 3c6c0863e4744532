"""What generate asks: conversations in the forms of training data, with or without an answer."""

import json

import pytest

from jaxft.errors import ConfigError, DataError
from jaxft.programs.questions import from_file, from_prompts, read_tools

ASK = {"role": "user", "content": "Is it open?"}
TELL = {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}


def write(tmp_path, *rows, name="asked.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": [ASK]}], [[ASK]]),
        ([{"messages": [ASK, TELL]}], [[ASK]]),  # a row of training data: its answer is asked
        ([{"messages": [ASK, TELL, ASK]}, {"messages": [ASK]}], [[ASK, TELL, ASK], [ASK]]),
        ([[ASK, TELL, ASK]], [[ASK, TELL, ASK]]),
        ([[{"messages": [ASK]}, {"messages": [ASK]}]], [[ASK], [ASK]]),
        (
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Is it open?"},
                        {"from": "bard", "value": "Yes."},
                    ]
                }
            ],
            [[ASK]],
        ),
        ([{"conversations": [{"from": "human", "value": "Is it open?"}]}], [[ASK]]),
        ([{"instruction": "Is it open?", "output": "Yes."}], [[ASK]]),
        ([{"prompt": "Is it open?", "completion": "Yes."}], [[ASK]]),
    ],
)
def test_forms_of_training_data_are_read(tmp_path, rows, expected):
    found = from_file(write(tmp_path, *rows))
    shown = [[{k: m[k] for k in ("role", "content")} for m in q.messages] for q in found]
    assert shown == expected
    assert all(q.text == "Is it open?" for q in found)


def test_json_over_several_lines_is_one_value(tmp_path):
    file = write(tmp_path, json.dumps({"messages": [ASK]}, indent=2), name="asked.json")
    assert from_file(file)[0].text == "Is it open?"


def test_system_messages_and_tools_go_before_each_conversation(tmp_path):
    file = write(tmp_path, {"messages": [ASK]}, [ASK, TELL, ASK])
    for question in from_file(file, system="Be brief.", tools=[TOOL]):
        assert question.messages[0] == {"role": "system", "content": "Be brief."}
        assert question.tools == [TOOL]
    [question] = from_prompts(["Is it open?"], system="Be brief.", tools=[TOOL])
    assert (question.messages[0]["role"], question.tools) == ("system", [TOOL])


def test_a_tool_result_may_come_last(tmp_path):
    result = {"role": "tool", "content": "12:00"}
    [question] = from_file(write(tmp_path, {"messages": [ASK, CALL, result], "tools": [TOOL]}))
    assert question.text == "12:00" and question.tools == [TOOL]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"messages": [ASK]}, "{"], {}, "asked.jsonl:2: broken JSON"),
        (["{"], {}, "asked.jsonl: broken JSON"),
        ([{"messages": [ASK]}, {"messages": [ASK, ASK]}], {}, "asked.jsonl:2: .*follows 'user'"),
        (['{"messages": [], "messages": []}'], {}, "'messages' occurs twice"),
        ([{"messages": [{"role": "usr", "content": "a"}]}], {}, "Did you mean 'user'"),
        ([{"text": "a document"}], {}, "expected messages"),
        (["7"], {}, "expected an object"),
        ([{"messages": [{"role": "system", "content": "a"}, ASK]}], {"system": "b"}, "system"),
        ([{"messages": [ASK], "tools": [TOOL]}], {"tools": [TOOL]}, "tools of its own"),
        ([{"prompt": "a", "completion": "b"}], {"system": "b"}, "goes with rows of messages"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path, rows, options, words):
    with pytest.raises(DataError, match=words):
        from_file(write(tmp_path, *rows), **options)


def test_tools_are_a_list_or_an_object_with_one(tmp_path):
    assert read_tools(write(tmp_path, [TOOL])) == [TOOL]
    assert read_tools(write(tmp_path, {"tools": [TOOL]})) == [TOOL]
    for value in ([], 7, ["clock"], {"tools": "x"}):
        with pytest.raises(ConfigError, match="expected a list of function descriptions"):
            read_tools(write(tmp_path, value))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tools(str(tmp_path / "none.json"))
