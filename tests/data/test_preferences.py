"""Rows of every layout become pairs or labelled answers; others are refused with their line."""

import json
import re

import pytest

from jaxft.config import DataConfig
from jaxft.data.discovery import find_sources
from jaxft.data.formats import UNIT_EXAMPLES, Labelled, Preference, read_items
from jaxft.data.problems import Problems
from jaxft.errors import ConfigError, DataError


def read(tmp_path, *rows, units="pairs", name="rows.jsonl", text=None, **options):
    path = tmp_path / name
    path.write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
    problems = Problems("rows")
    formats = []
    [source] = find_sources(str(path), DataConfig(**options))
    items = list(read_items(source, problems, on_format=formats.append, units=units))
    problems.check()
    return formats[0], [item for _, item in items]


def said(role, content):
    return {"role": role, "content": content}


Q, GOOD, BAD = said("user", "q"), said("assistant", "good"), said("assistant", "bad")
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [Q], "chosen": GOOD, "rejected": BAD},
        {"prompt": [Q], "chosen": "good", "rejected": "bad"},
        # The prompt stands beside whole conversations too, in UltraFeedback.
        {"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD], "messages": [Q, GOOD]},
        {"prompt": "q", "completion": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"messages": [Q], "chosen": GOOD, "rejected": BAD},
        {"input": {"messages": [Q]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "bad"}},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "output": "good", "rejected": "bad"},
        {"instruction": "q", "output": ["good", "bad"]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "q", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
    ids=lambda row: "+".join(f"{key}:{type(cell).__name__}" for key, cell in row.items()),
)
def test_layouts_of_pairs_are_found(tmp_path, row):
    found, [item] = read(tmp_path, row)
    assert found.name == "preference"
    assert isinstance(item, Preference)
    assert item.chosen.messages == [Q, GOOD]
    assert item.rejected.messages == [Q, BAD]
    assert item.origin.endswith("rows.jsonl:1")


def test_earlier_turns_a_system_prompt_and_tools_belong_to_both_answers(tmp_path):
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    before = [Q, {**said("assistant", ""), "tool_calls": [call]}, said("tool", "12")]
    asked = {"messages": before, "tools": [TOOL], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    _, [item] = read(tmp_path, row)
    assert item.chosen.tools == item.rejected.tools == [TOOL]
    assert [m["role"] for m in item.chosen.messages] == ["user", "assistant", "tool", "assistant"]
    assert item.unused == ("input.parallel_tool_calls",)
    row = {**PAIR, "system": "s", "tools": json.dumps([TOOL])}
    _, [item] = read(tmp_path, row)
    assert item.rejected.messages == [said("system", "s"), Q, BAD]
    assert item.rejected.tools == [TOOL]
    row = {"instruction": "q", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"}
    _, [item] = read(tmp_path, row)
    assert item.chosen.messages == [said("user", "a"), said("assistant", "b"), Q, GOOD]


@pytest.mark.parametrize(
    "answers",
    [
        {"prompt": "True or false?", "chosen": "True", "rejected": "False"},
        {"prompt": "True", "chosen": "True", "rejected": "False"},
        {
            "chosen": [said("user", "True or false?"), said("assistant", "True")],
            "rejected": [said("user", "True or false?"), said("assistant", "False")],
        },
    ],
)
def test_an_answer_may_repeat_its_prompt(tmp_path, answers):
    _, [item] = read(tmp_path, answers)
    assert item.chosen.answer["content"] == "True"


@pytest.mark.parametrize("asked", ["good", "good or bad?"])
def test_a_labelled_answer_may_repeat_its_prompt(tmp_path, asked):
    row = {"prompt": asked, "completion": "good", "label": True}
    _, [item] = read(tmp_path, row, units="labelled")
    assert item.conversation.answer["content"] == "good"
    row = {"messages": [said("user", "good"), GOOD], "label": True}
    with pytest.raises(DataError, match='the answer ends with "good" twice'):
        read(tmp_path, row, units="labelled")


def test_a_call_is_compared_with_a_text(tmp_path):
    function = {"name": "clock", "arguments": {"zone": "CET"}}
    call = {**said("assistant", None), "tool_calls": [{"type": "function", "function": function}]}
    row = {"prompt": [Q], "chosen": [call], "rejected": [BAD], "tools": [TOOL]}
    _, [item] = read(tmp_path, row)
    assert item.chosen.answer["tool_calls"][0]["function"]["name"] == "clock"
    with pytest.raises(DataError, match="are equal"):
        read(tmp_path, {**row, "rejected": [call]})


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Is it open?\nYes.", "Is it open?\nNo.", ("Is it open?", "Yes.", "No.")),
        # The answers begin alike as well.
        (
            "Q: Is it open?\nA: It is open.",
            "Q: Is it open?\nA: It is shut.",
            ("Q: Is it open?\nA:", "It is open.", "It is shut."),
        ),
        ("Q: q\nA: It", "Q: q\nA: It is.", ("Q: q\nA:", "It", "It is.")),
        ("Q: q\nA:Yes", "Q: q\nA:No", ("Q: q\nA:", "Yes", "No")),
        (
            "### Instruction:\nq\n\n### Response:\nSo\nyes",
            "### Instruction:\nq\n\n### Response:\nSo\nno",
            ("### Instruction:\nq\n\n### Response:", "So\nyes", "So\nno"),
        ),
    ],
)
def test_texts_without_a_prompt_begin_with_it(tmp_path, chosen, rejected, expected):
    found, [item] = read(tmp_path, {"chosen": chosen, "rejected": rejected, "score": 3})
    prompt, *answers = expected
    assert item.chosen.messages == [said("user", prompt), said("assistant", answers[0])]
    assert item.rejected.messages == [said("user", prompt), said("assistant", answers[1])]
    assert found.description.endswith("; the prompt is what both texts begin with")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("I think at six", "I do not know", 'begin with is "I "; expected a prompt, up to the end'),
        ("The sky is blue.", "The sky is black.", 'begin with is "The sky is "; expected'),
        ("q\n", "q\nyes", "'chosen' is only what both texts begin with"),
        ("Q: q\nA: a\nQ: r\nA: b", "Q: q\nA: c", "'chosen' goes on for several turns"),
        ("Q: q\nA: a\nQ: what now", "Q: q\nA: a\nQ: what then", "expected a prompt, up to"),
    ],
)
def test_texts_that_begin_with_no_whole_prompt_are_refused(tmp_path, chosen, rejected, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("asked", ["When do you open?", [said("user", "When do you open?")]])
def test_the_prompt_is_not_guessed_where_a_column_may_hold_it(tmp_path, asked):
    row = {"id": "x1", "user_prompt": asked, "chosen": "q\nAt six", "rejected": "q\nNo idea"}
    with pytest.raises(DataError, match="has 'id' and 'user_prompt' beside two texts") as error:
        read(tmp_path, row)
    flags = re.findall(r"--config\.data\.columns=(\S+)", str(error.value))
    assert len(flags) == 2
    _, [item] = read(tmp_path, row, format="preference", columns=flags[0])
    assert item.chosen.messages == [
        said("user", "When do you open?"),
        said("assistant", "q\nAt six"),
    ]
    _, [item] = read(tmp_path, row, format="preference", columns=flags[1])
    assert item.chosen.messages == [said("user", "q"), said("assistant", "At six")]


def test_columns_of_other_names_are_mapped(tmp_path):
    text = "asked,good,bad\nq,good,bad\n"
    options = {"columns": "prompt=asked,chosen=good,rejected=bad", "format": "preference"}
    found, [item] = read(tmp_path, name="a.csv", text=text, **options)
    assert item.chosen.messages == [Q, GOOD]
    assert "chosen = column 'good'" in found.description
    text = "asked,said,liked\nq,good,True\nq,bad,0\n"
    options = {"columns": "prompt=asked,completion=said,label=liked", "format": "labelled"}
    _, items = read(tmp_path, name="b.csv", text=text, units="labelled", **options)
    assert [item.desirable for item in items] == [True, False]
    source = f"{tmp_path}/a.csv:prompt=asked:chosen=good:rejected=bad"
    [source] = find_sources(source, DataConfig())
    assert source.spec.format == "preference"
    with pytest.raises(ConfigError, match="does not say which column is the rejected"):
        find_sources(f"{tmp_path}/a.csv:chosen=good", DataConfig())


@pytest.mark.parametrize(
    ("row", "desirable"),
    [
        ({"prompt": "q", "completion": "good", "label": True}, True),
        ({"prompt": [Q], "completion": [GOOD], "label": False}, False),
        ({"messages": [Q, GOOD], "label": 1}, True),
        ({"messages": [Q, GOOD], "kto_tag": False}, False),
        ({"conversations": [HUMAN, GPT], "kto_tag": True}, True),
        ({"instruction": "q", "input": "", "output": "good", "kto_tag": "true"}, True),
        ({"question": "q", "answer": "good", "label": "0"}, False),
    ],
)
def test_layouts_of_labelled_answers_are_found(tmp_path, row, desirable):
    found, [item] = read(tmp_path, row, units="labelled")
    assert found.name == "labelled"
    assert isinstance(item, Labelled)
    assert item.conversation.messages == [Q, GOOD]
    assert item.desirable is desirable


def test_pairs_are_taken_for_labelled_answers_too(tmp_path):
    found, [item] = read(tmp_path, PAIR, units="labelled")
    assert found.name == "preference"
    assert isinstance(item, Preference)


MORE = said("user", "more")


def first_row(row):
    """A sound row with the columns of another one."""
    if "preferred_output" in row:
        sides = {"preferred_output": [GOOD], "non_preferred_output": [BAD]}
        return {"input": {"messages": [Q]}, **sides}
    if "output" in row:
        return {"instruction": "q", "output": ["good", "bad"]}
    if row.keys() == {"chosen", "rejected"}:
        return {"chosen": [Q, GOOD], "rejected": [Q, BAD]}
    return PAIR


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": " good\n"}, "'chosen' and 'rejected' are equal"),
        ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "'chosen' and 'rejected' are equal"),
        ({**PAIR, "prompt": " "}, "'prompt' is empty; expected text"),
        ({**PAIR, "prompt": []}, r"'prompt' is \[\]; expected the messages"),
        ({**PAIR, "chosen": ""}, "'chosen' is empty; expected text"),
        ({**PAIR, "rejected": None}, "'rejected' is null; expected a string"),
        ({**PAIR, "rejected": []}, r"'rejected' is \[\]; expected an answer"),
        (
            {**PAIR, "rejected": ["a", "b"]},
            "'rejected' is a list of 2 texts; expected one answer. Write a row for each",
        ),
        (
            {"chosen": [Q, said("assistant", " q")], "rejected": [Q, BAD]},
            "'chosen' ends with \" q\" twice, as prompt and as answer; expected an answer",
        ),
        (
            {"chosen": [said("user", "x"), GOOD], "rejected": [Q, BAD]},
            'unlike prompts: message 0 is "x" and "q"',
        ),
        (
            {"chosen": [Q, GOOD, MORE, GOOD], "rejected": [Q, BAD, MORE, BAD]},
            "part at message 1 and go on for 3 and 3 messages; expected one final answer",
        ),
        ({"chosen": [Q, GOOD], "rejected": [Q, BAD, MORE, BAD]}, "part at message 1"),
        (
            {"chosen": [Q, GOOD, MORE], "rejected": [Q, BAD]},
            r"chosen\[2\].role is 'user' and comes",
        ),
        ({**PAIR, "chosen": [GOOD, MORE, GOOD]}, "'chosen' has 3 turns; expected one answer"),
        ({"chosen": GOOD, "rejected": BAD}, "'chosen' has no prompt before the answer"),
        ({"prompt": [Q, GOOD], "chosen": GOOD, "rejected": BAD}, "'prompt' ends with an answer"),
        (
            {**PAIR, "chosen": [MORE, GOOD], "rejected": [MORE, BAD]},
            "'chosen' is a whole conversation in which \"q\" of the prompt does not occur",
        ),
        ({**PAIR, "label": True}, "the row has 'label' beside two answers"),
        ({**PAIR, "images": ["x.png"]}, "the row has 'images': jaxft tunes text only"),
        (
            {"prompt": [Q], "chosen": {**GOOD, "weight": 0}, "rejected": BAD},
            "'chosen' ends with a turn of weight 0",
        ),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        (
            {"input": {}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "input.messages is null",
        ),
        ({"input": {"messages": [Q]}, "preferred_output": [GOOD]}, "'non_preferred_output' is mis"),
        ({"instruction": "q", "output": ["good"]}, "expected a better and a worse answer"),
        ({**PAIR, "instruction": "x", "prompt": None}, "'prompt' is null"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "told by 'question' and 'chosen' and"),
        ({"prompt": "q", "completion": "good"}, "has no pair of answers.*objective.name=sft"),
        ({"prompt": "q", "chosn": "a", "rejected": "b"}, "Did you mean 'chosen'\\?"),
    ],
)
def test_pairs_that_compare_nothing_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, first_row(row), row)
    assert "rows.jsonl:2: " in str(error.value)
    assert UNIT_EXAMPLES["preference"] in str(error.value)


LABELLED = {"prompt": "q", "completion": "good", "label": True}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LABELLED, "label": "good"}, "'label' is \"good\"; expected true or false"),
        ({**LABELLED, "label": -1}, "'label' is -1; expected true or false"),
        ({**LABELLED, "label": "good"}, "Write true in place of good, yes or the like"),
        ({**LABELLED, "label": None}, "'label' is null; expected true or false"),
        ({"prompt": "q", "completion": "good"}, "has no label"),
        ({"prompt": "q", "completion": "good", "lable": True}, "Did you mean 'label'\\?"),
        ({"promt": "q", "completion": "good", "label": True}, "Did you mean 'prompt'\\?"),
        ({**LABELLED, "kto_tag": False}, "both 'label' and 'kto_tag'"),
        ({**LABELLED, "completion": ""}, "'completion' is empty"),
        ({**LABELLED, "rejected": "bad"}, "the row has 'rejected' beside a label"),
    ],
)
def test_labelled_answers_that_say_nothing_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, LABELLED, row, units="labelled")
    assert "rows.jsonl:2: " in str(error.value)
    assert UNIT_EXAMPLES["labelled"] in str(error.value)


@pytest.mark.parametrize(
    ("row", "units", "message"),
    [
        ({"prompt": "q", "completion": "a"}, "pairs", "holds one answer; .*objective.name=sft"),
        ({"prompt": "q", "completion": "a"}, "labelled", "holds one answer; .*objective.name=sft"),
        (LABELLED, "pairs", "one answer with a label; .*objective.name=kto"),
        ({"promt": "q", "answer": "a"}, "pairs", "one chosen and one rejected\\.\n"),
        ({"prompt": "q", "chosen": "a", "rejcted": "b"}, "pairs", "Did you mean 'rejected'\\?"),
        ({"prompt": "q", "completon": "a", "label": True}, "labelled", "you mean 'completion'"),
        ({"text": "t"}, "pairs", "a text without answers; .*objective.name=sft"),
        ({"a": "t"}, "pairs", "has the columns a; the objective takes pairs"),
        (PAIR, "documents", "pair of answers, .*objective.name=dpo"),
        ({"prompt": "q", "completion": "a", "label": True}, "documents", "objective.name=kto"),
        ({"messages": [Q, GOOD], "kto_tag": True}, "documents", "objective.name=kto"),
        ({"messages": [Q, GOOD], "chosen": "x", "rejected": "y"}, "documents", "=dpo"),
    ],
)
def test_rows_of_another_objective_are_refused_with_its_name(tmp_path, row, units, message):
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, row, units=units)
    assert "rows.jsonl:1: " in str(error.value)


@pytest.mark.parametrize(
    ("row_format", "units", "message"),
    [
        ("messages", "pairs", "format=preference.*objective.name=sft"),
        ("labelled", "pairs", "objective.name=kto"),
        ("preference", "documents", "objective.name=dpo"),
        ("labelled", "documents", "objective.name=kto"),
    ],
)
def test_formats_of_another_objective_are_refused(tmp_path, row_format, units, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, PAIR, units=units, format=row_format)


def test_plain_text_holds_no_pairs(tmp_path):
    with pytest.raises(DataError, match=r"a.txt:1: .*plain text, which holds no answers"):
        read(tmp_path, name="a.txt", text="some text\n")


def test_real_pairs_are_read_and_those_that_are_equal_are_named(shared):
    file = shared / "data/rasbt-instruct/instruction-data-with-preference.json"
    problems, formats = Problems("rows"), []
    problems.add = lambda origin, text, **_: formats.append(text)
    [source] = find_sources(str(file), DataConfig())
    items = list(read_items(source, problems, on_format=lambda f: None, units="pairs"))
    rows = json.loads(file.read_text())
    equal = [row for row in rows if row["chosen"].split() == row["rejected"].split()]
    assert (len(items), len(formats)) == (1100 - len(equal), len(equal))
    for row, item in items:
        assert item.chosen.answer["content"] == row.value["chosen"]
        assert item.rejected.answer["content"] == row.value["rejected"]
