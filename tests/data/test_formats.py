"""Rows of every format become conversations; what is wrong with a row is said with its key."""

import json

import pytest

from jaxft.config import DataConfig
from jaxft.data.discovery import find_sources
from jaxft.data.formats import EXAMPLES, Conversation, Document, read_items
from jaxft.data.problems import Problems
from jaxft.errors import ConfigError, DataError


def read(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems("rows")
    chosen = []
    [source] = find_sources(str(path), DataConfig(**options))
    items = list(read_items(source, problems, on_format=chosen.append))
    problems.check()
    return chosen[0], [item for _, item in items]


PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WITH_SYSTEM = [{"role": "system", "content": "s"}, *PAIR]
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": PAIR}, "messages", PAIR),
        ({"messages": json.dumps(PAIR)}, "messages", PAIR),
        ({"conversations": TURNS}, "sharegpt", PAIR),
        ({"conversations": TURNS, "system": "s"}, "sharegpt", WITH_SYSTEM),
        ({"conversations": PAIR}, "sharegpt", PAIR),
        ({"instruction": "q", "output": "a"}, "alpaca", PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", PAIR),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", PAIR),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, "prompt_completion", PAIR),
        ({"question": "q", "answer": "a", "id": 3}, "columns", PAIR),
    ],
)
def test_formats_are_detected(tmp_path, row, name, messages):
    chosen, [item] = read(tmp_path, row)
    assert chosen.name == name
    assert isinstance(item, Conversation)
    assert item.messages == messages


def test_alpaca_input_follows_the_instruction(tmp_path):
    _, [item] = read(tmp_path, {"instruction": "Name it.", "input": "grass", "output": "green"})
    assert item.messages[0]["content"] == "Name it.\n\ngrass"


@pytest.mark.parametrize(
    ("cell", "text", "said"),
    [
        (True, "true", "; 'a' holds true or false, which become text such as 'true'"),
        (False, "false", "; 'a' holds true or false, which become text such as 'false'"),
        (3, "3", "; 'a' holds numbers, which become text such as '3'"),
        (2.5, "2.5", "; 'a' holds numbers, which become text such as '2.5'"),
        ("True", "True", ""),
    ],
)
@pytest.mark.parametrize("name", ["columns", "alpaca", "prompt_completion"])
def test_cells_that_are_no_text_are_written_as_json_has_them(tmp_path, cell, text, said, name):
    answer = {"columns": "a", "alpaca": "output", "prompt_completion": "completion"}[name]
    row = {"instruction" if name == "alpaca" else "prompt": "q", answer: cell}
    mapping = {"format": "columns", "columns": "prompt=prompt,completion=a"}
    chosen, [item] = read(tmp_path, row, **(mapping if name == "columns" else {}))
    assert item.messages[-1]["content"] == text
    assert chosen.description.endswith(said.replace("'a'", repr(answer)))
    assert ("become text" in chosen.description) == bool(said)


def test_columns_are_mapped_and_numbers_are_text(tmp_path):
    row = {"body": "q", "stars": 3, "rest": None}
    chosen, [item] = read(
        tmp_path, row, format="columns", columns="prompt=body,completion=stars,system=rest"
    )
    assert item.messages == [PAIR[0], {"role": "assistant", "content": "3"}]
    chosen, [item] = read(tmp_path, row, format="text", columns="text=body")
    assert item == Document("q", item.origin)
    assert "not used: stars, rest" in chosen.description


def test_a_text_column_beside_a_label_is_not_guessed(tmp_path):
    row = {"text": "Where is my card?", "category": "card_arrival"}
    with pytest.raises(DataError, match=r"two ways.*prompt=text,completion=category.*format=text"):
        read(tmp_path, row)
    assert read(tmp_path, row, format="text")[1][0].text == row["text"]


def test_tools_and_tool_calls_are_kept_with_raw_arguments(tmp_path):
    raw = '{"zone":  "UTC", "x": null}'
    messages = [
        PAIR[0],
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": raw}]},
        {"role": "tool", "content": "12"},
        PAIR[1],
    ]
    _, [item] = read(tmp_path, {"messages": messages, "tools": json.dumps([{"name": "f"}])})
    assert item.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": raw}
    assert item.tools == [{"name": "f"}]
    calls = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "12"},
        {"from": "gpt", "value": "a"},
    ]
    _, [item] = read(tmp_path, {"conversations": calls})
    assert item.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_weights_and_content_parts_are_kept(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a", "weight": 0},
    ]
    _, [item] = read(tmp_path, {"messages": messages})
    assert item.messages == [PAIR[0], {**PAIR[1], "weight": 0}]


GOOD = {"messages": PAIR}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, {"mesages": PAIR}, r"key 'messages' is missing; .*Did you mean 'messages'\?"),
        (GOOD, {"messages": []}, r"'messages' is \[\]; expected a list of messages"),
        (GOOD, ["x"], r"the row is \[\"x\"\]; expected an object"),
        (
            GOOD,
            {"messages": [PAIR[0], {"role": "asistant", "content": "a"}]},
            r"messages\[1\]\.role is \"asistant\"; expected one of .*Did you mean 'assistant'\?",
        ),
        (
            GOOD,
            {"messages": [PAIR[0], {"role": "assistant", "content": " "}]},
            r"messages\[1\]\.content is empty; expected an answer",
        ),
        (
            GOOD,
            {"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]},
            r"messages\[1\]\.weight is 0\.5; expected 0 or 1",
        ),
        (
            GOOD,
            {"messages": [{"rol": "user", "content": "q"}, PAIR[1]]},
            r"messages\[0\]\.role is null; .*Did you mean 'role'\?",
        ),
        (
            GOOD,
            {"messages": [{"role": "user", "contnet": "q"}, PAIR[1]]},
            r"messages\[0\]\.content is empty; .*Did you mean 'content'\?",
        ),
        (GOOD, {"messages": PAIR[1:]}, r"messages\[0\]\.role is 'assistant' and comes first"),
        (GOOD, {"messages": PAIR[:1] * 2}, r"messages\[1\]\.role is 'user' and follows 'user'"),
        (GOOD, {"messages": [*PAIR, PAIR[0]]}, r"messages\[2\]\.role is 'user' and comes last"),
        (
            GOOD,
            {"messages": [*PAIR, {"role": "tool", "content": "x"}, PAIR[1]]},
            r"messages\[2\]\.role is 'tool' and follows 'assistant'",
        ),
        (GOOD, {"messages": [PAIR[0], {**PAIR[1], "tool_calls": [3]}]}, r"tool_calls\[0\] is 3"),
        (
            {"conversations": TURNS},
            {"conversations": [{"from": "humam", "value": "q"}]},
            r"conversations\[0\]\.from is \"humam\"; .*Did you mean 'human'\?",
        ),
        (
            {"instruction": "q", "output": "a"},
            {"instrction": "q", "output": "a"},
            r"key 'instruction' is missing; .*Did you mean 'instruction'\?",
        ),
        (
            {"instruction": "q", "output": "a"},
            {"instruction": "q", "output": ""},
            r"'output' is empty",
        ),
        ({"conversations": TURNS}, {"conversatons": TURNS}, r"Did you mean 'conversations'\?"),
        (
            {"conversations": TURNS},
            {"conversations": [{"form": "human", "vlaue": "q"}]},
            r"expected an object with 'from' and 'value'\. Did you mean 'from' and 'value'\?",
        ),
        (
            {"conversations": TURNS},
            {"conversations": [{"from": ["human"], "value": "q"}]},
            r"conversations\[0\]\.from is \[\"human\"\]; expected one of",
        ),
        (
            {"conversations": TURNS},
            {"conversations": [TURNS[0], {**TURNS[1], "content": "b"}]},
            r"conversations\[1\] has 'content' beside 'from' and 'value'",
        ),
        (
            {"conversations": TURNS},
            {"conversations": [TURNS[0], {"from": "function_call", "value": ["f"]}]},
            r"conversations\[1\]\.value is \[\"f\"\]; expected JSON with 'name' and 'arguments'",
        ),
        (
            {"instruction": "q", "output": "a"},
            {"instruction": "q", "input": "i", "context": "c", "output": "a"},
            r"both 'input' and 'context'; expected one",
        ),
        (
            {"instruction": "q", "output": "a"},
            {"instruction": "q", "output": "a", "response": "b"},
            r"both 'output' and 'response'; expected one",
        ),
        (
            {"prompt": "q", "completion": "a"},
            {"prompt": "q", "completion": "a", "response": "b"},
            r"both 'completion' and 'response'; expected one",
        ),
        (
            GOOD,
            {**GOOD, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            r"both 'tools' and 'functions'; expected one",
        ),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q"}, r"key 'completion' is missing"),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}, "is null"),
        ({"text": "t"}, {"text": ["t"]}, r"'text' is \[\"t\"\]; expected a string"),
    ],
)
def test_bad_rows_are_named_with_line_key_and_a_right_example(tmp_path, good, bad, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, good, good, bad)
    assert "rows.jsonl:3: " in str(error.value)
    assert any(example in str(error.value) for example in EXAMPLES.values())


def test_an_unknown_format_shows_all_known_ones(tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, {"a": "x", "b": "y"})
    assert all(example in str(error.value) for example in EXAMPLES.values())


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"mesages": PAIR}, "Did you mean 'messages'?"),
        ({"Message": PAIR, "id": 3}, "Did you mean 'messages'?"),
        (
            {"promt": "q", "complition": "a", "system": "s"},
            "Did you mean 'prompt' and 'completion'?",
        ),
        ({"question": "q", "anwser": "a"}, "Did you mean 'answer'?"),
        ({"textt": "q", "txt": "a"}, "Did you mean 'text'?"),
        ({"prompt": "q", "chosen": "a", "rejcted": "b"}, "Did you mean 'rejected'?"),
        ({"inputs": "q", "targets": "a"}, ""),  # which spelt otherwise are no format either
    ],
)
def test_columns_that_are_mistyped_in_the_first_row_are_named(tmp_path, row, hint):
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    said = str(error.value).splitlines()[0]
    assert "rows.jsonl:1: " in said
    assert said.endswith(f"are in no known format.{' ' * bool(hint)}{hint}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("promt=a,completion=b", "names 'promt'.*Did you mean 'prompt'"),
        ("prompt=a", "does not say which column is the completion"),
    ],
)
def test_column_mappings_are_checked(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {"a": "q", "b": "a"}, format="columns", columns=columns)


def test_mapped_columns_must_exist(tmp_path):
    with pytest.raises(DataError, match=r"no column 'answr'; .*Did you mean 'answer'\?"):
        read(
            tmp_path,
            {"question": "q", "answer": "a"},
            format="columns",
            columns="prompt=question,completion=answr",
        )


def answered(**more):
    return {"messages": [PAIR[0], {**PAIR[1], **more}]}


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        ({"weight": 0}, 0),
        ({"loss_weight": 0.0}, 0),
        ({"loss": False}, 0),
        ({"train": False}, 0),
        ({"training": True}, 1),
        ({"trainable": 1, "weight": 1}, 1),
        ({"train": None}, None),
    ],
)
def test_each_key_that_excludes_a_turn_is_read(tmp_path, more, weight):
    _, [item] = read(tmp_path, answered(**more))
    assert item.messages[1].get("weight") == weight
    turns = [TURNS[0], {**TURNS[1], **more}]
    _, [item] = read(tmp_path, {"conversations": turns})
    assert item.messages[1].get("weight") == weight


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (answered(train=0.5), r"messages\[1\]\.train is 0\.5; expected 0 or 1"),
        (answered(mask=True), r"messages\[1\]\.mask is true, which tools read in unlike ways"),
        (answered(train_detail=[]), r"train_detail is \[\]"),
        (answered(weight=1, train=False), "'weight' and 'train', which contradict each other"),
        (
            {"messages": [{**PAIR[0], "train": True}, PAIR[1]]},
            r"on a turn of 'user'; only assistant",
        ),
        (answered(thinking="r", reasoning="other"), "with unlike texts"),
        (
            {"messages": [{**PAIR[0], "reasoning": "r"}, PAIR[1]]},
            "reasoning in assistant turns alone",
        ),
        (answered(reasoning=["r"]), r"messages\[1\]\.reasoning is \[\"r\"\]; expected a string"),
    ],
)
def test_what_a_message_says_of_its_training_is_understood_or_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_reasoning_is_read_under_each_of_its_names(tmp_path):
    for key in ("reasoning", "reasoning_content", "thinking"):
        _, [item] = read(tmp_path, answered(**{key: "since so"}))
        assert item.messages[1][key] == "since so"
        assert not item.unused
    _, [item] = read(tmp_path, answered(reasoning="since so", reasoning_content="since so"))
    assert item.messages[1]["reasoning"] == "since so"


def test_empty_members_are_dropped_like_null(tmp_path):
    row = answered(tool_calls=[], thinking="", reasoning=None, function_call=None)
    _, [item] = read(tmp_path, row)
    assert item.messages == PAIR


def test_keys_that_nobody_reads_are_listed(tmp_path):
    row = {"messages": [{**PAIR[0], "id": 3, "note": None}, {**PAIR[1], "citations": ["x"]}]}
    _, [item] = read(tmp_path, row)
    assert item.unused == ("id", "citations")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": PAIR, "images": ["a.png"]}, "the row has 'images'"),
        ({"prompt": "q", "completion": "a", "label": False}, "'label', which tells good answers"),
        ({"messages": PAIR, "chosen": PAIR, "rejected": PAIR}, "'chosen' and 'rejected'"),
        (
            {"instruction": "q", "output": "a", "rejected": "b"},
            r"--config\.data\.format=alpaca",
        ),
        ({"question": "q", "answer": "a", "audio": {"path": "a.wav"}}, "'audio'"),
        ({"text": "see <image>", "image": "a.png"}, "'image'"),
    ],
)
def test_rows_that_lose_their_meaning_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
        {"type": "image"},
        {"type": "video", "video": "a.mp4"},
        {"type": "audio", "text": None},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "text", "text": "see", "image_url": "a.png"},
    ],
)
def test_parts_that_are_not_text_are_refused_with_a_sentence_that_says_so(tmp_path, part):
    message = {"role": "user", "content": [{"type": "text", "text": "q", "image": None}, part]}
    text_only = "jaxft tunes text only: no pictures, audio, video or files"
    with pytest.raises(
        DataError, match=rf"rows.jsonl:2: .*messages\[0\]\.content\[1\] .*{text_only}"
    ):
        read(tmp_path, {"messages": PAIR}, {"messages": [message, PAIR[1]]})
    with pytest.raises(DataError, match=rf"messages\[0\] has 'images': {text_only}"):
        read(tmp_path, {"messages": [{**PAIR[0], "images": ["a.png"]}, PAIR[1]]})


def test_what_is_preferred_may_be_left_out_on_request(tmp_path):
    row = {"instruction": "q", "output": "a", "chosen": "a", "rejected": "b", "images": []}
    _, [item] = read(tmp_path, row, format="alpaca")
    assert item.messages == PAIR


def test_history_of_alpaca_rows_becomes_earlier_turns(tmp_path):
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    _, [item] = read(tmp_path, row)
    assert [(m["role"], m["content"]) for m in item.messages] == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    with pytest.raises(DataError, match=r"'history' is \[\"q0\"\]; expected a list of pairs"):
        read(tmp_path, {**row, "history": ["q0"]})


def test_a_system_column_is_the_first_message_in_every_chat_format(tmp_path):
    for row in (
        {"messages": PAIR},
        {"conversations": TURNS},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ):
        _, [item] = read(tmp_path, {**row, "system": "s"})
        assert item.messages == WITH_SYSTEM
    with pytest.raises(DataError, match="role is 'system' and follows 'system'"):
        read(tmp_path, {"messages": WITH_SYSTEM, "system": "t"})


def test_old_calls_functions_and_roles_are_read_as_what_they_are(tmp_path):
    function = {"name": "time", "parameters": {}}
    messages = [
        {"role": "developer", "content": "s"},
        PAIR[0],
        {"role": "assistant", "content": None, "function_call": {"name": "time", "arguments": ""}},
        {"role": "function", "name": "time", "content": "12"},
        PAIR[1],
    ]
    _, [item] = read(tmp_path, {"messages": messages, "functions": [function]})
    assert [m["role"] for m in item.messages] == "system user assistant tool assistant".split()
    [call] = item.messages[2]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "time", "arguments": "{}"}}
    assert item.tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "{}"),
        (" ", "{}"),
        (None, "{}"),
        ({}, "{}"),
        ('{"a":  1}', '{"a":  1}'),
        ({"a": "ü"}, '{"a": "ü"}'),
    ],
)
def test_arguments_are_an_object_as_it_was_written(tmp_path, arguments, expected):
    row = answered(content=None, tool_calls=[{"name": "f", "arguments": arguments}])
    _, [item] = read(tmp_path, row)
    assert item.messages[1]["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{zone: 'CET'}", r"tool_calls\[0\]\.arguments' is .*expected JSON"),
        ("[1]", r"is \[1\]; expected an object of named arguments"),
        ("null", "is null; expected an object"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        (3, "is 3; expected an object"),
    ],
)
def test_broken_arguments_are_refused(tmp_path, arguments, message):
    row = answered(content=None, tool_calls=[{"name": "f", "arguments": arguments}])
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": PAIR, "tools": [{"description": "?"}]}, r"tools\[0\] is .*expected"),
        ({"messages": PAIR, "tools": "{"}, "'tools' is .*expected JSON"),
        (answered(tool_calls=[{"name": ""}]), r"tool_calls\[0\] is"),
        (
            {"messages": [{**PAIR[0], "tool_calls": [{"name": "f"}]}, PAIR[1]]},
            r"messages\[0\] is from 'user' and has calls",
        ),
        (
            answered(tool_calls=[{"name": "f"}], function_call={"name": "f"}),
            "both 'tool_calls' and 'function_call'",
        ),
    ],
)
def test_tools_and_calls_without_a_name_or_a_speaker_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)
