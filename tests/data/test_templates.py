"""What is trained under templates as published families have them, and under odd ones."""

import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.chat import chat_examples
from jaxft.data.formats import Conversation
from jaxft.data.problems import RowError
from jaxft.data.template import DATE, resolve_template
from tests import templates
from tests.templates import byte_tokenizer

END = "<|endoftext|>"
# What stands before the content of an answer in the trained part, and what behind.
FAMILIES = {
    "LLAMA2": (" ", f" {END}"),
    "LLAMA3": ("", "<|eot_id|>"),
    "MISTRAL": (" ", END),
    "GEMMA": ("", "<end_of_turn>"),
    "GEMMA3": ("", "<end_of_turn>"),
    "PHI3": ("", "<|end|>"),
    "CHATML": ("", "<|im_end|>"),
    "DEEPSEEK": ("", END),
    "NUMBERED": ("", "<|end|>"),
    "SYSTEM_LAST": ("", "<|end|>"),
}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def talk(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def examples(tokenizer, folder, name, messages, *, tools=None, **options):
    path = folder / "template.jinja"
    path.write_text(getattr(templates, name))
    [result] = chat_examples(
        tokenizer,
        [Conversation(messages, tools, "rows.jsonl:1")],
        template=resolve_template(tokenizer, DataConfig(template=str(path))),
        **{"train_on": "assistant", "thinking": "template"} | options,
    )
    if isinstance(result, RowError):
        raise result
    return result


def runs(tokenizer, folder, name, messages, **options):
    found = []
    for example in examples(tokenizer, folder, name, messages, **options):
        cuts = np.flatnonzero(np.diff(np.r_[False, example.trained, False])).reshape(-1, 2)
        found.append([tokenizer.decode(example.ids[begin:end]) for begin, end in cuts])
    return found


def rendered(tokenizer, name, messages, tools=None):
    """The whole conversation as Hugging Face renders it, on the day that it always is."""
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=getattr(templates, name),
        tokenize=False,
        date_string=DATE.strftime("%d %b %Y"),
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "texts",
    [("q1", "a1"), ("q1", "a1", "q2", "a2"), ("yes", "yes", "yes", "yes", "yes", "yes")],
)
def test_answers_and_their_ends_are_trained_and_nothing_else(tokenizer, tmp_path, name, texts):
    before, behind = FAMILIES[name]
    messages = talk(*texts)
    expected = [before + answer + behind for answer in texts[1::2]]
    assert runs(tokenizer, tmp_path, name, messages) == [expected]
    assert runs(tokenizer, tmp_path, name, messages, train_on="completion") == [expected[-1:]]
    [example] = examples(tokenizer, tmp_path, name, messages, train_on="all")
    assert example.trained.all()
    assert tokenizer.decode(example.ids) == rendered(tokenizer, name, messages)


@pytest.mark.parametrize("name", ["LLAMA2", "LLAMA3", "GEMMA3", "PHI3", "CHATML", "DEEPSEEK"])
def test_a_system_changes_nothing_of_what_is_trained(tokenizer, tmp_path, name):
    messages = talk("q1", "a1", "q2", "a2")
    with_system = runs(tokenizer, tmp_path, name, [SYSTEM, *messages])
    assert with_system == runs(tokenizer, tmp_path, name, messages)


def test_a_system_that_moves_on_is_trained_turn_by_turn_on_request(tokenizer, tmp_path):
    messages = [SYSTEM, *talk("q1", "a1", "q2", "a2")]
    with pytest.raises(RowError, match=r"message 2 .* --config\.data\.thinking=keep"):
        runs(tokenizer, tmp_path, "MISTRAL", messages)
    first, second = examples(tokenizer, tmp_path, "MISTRAL", messages, thinking="keep")
    assert tokenizer.decode(first.ids) == rendered(tokenizer, "MISTRAL", messages[:3])
    assert tokenizer.decode(second.ids) == rendered(tokenizer, "MISTRAL", messages)


def test_prompts_that_count_their_messages_are_those_that_are_trained(tokenizer, tmp_path):
    messages = talk("q1", "a1", "q2", "a2")
    first, second = examples(tokenizer, tmp_path, "COUNTED", messages, thinking="keep")
    assert tokenizer.decode(first.ids[:1]) == "1"
    assert tokenizer.decode(second.ids[:1]) == "3"


def test_systems_behind_the_answer_are_refused_unless_all_is_trained(tokenizer, tmp_path):
    messages = [SYSTEM, *talk("q1", "a1")]
    with pytest.raises(RowError, match="message 2 cannot be trained"):
        runs(tokenizer, tmp_path, "SYSTEM_LAST", messages)
    [example] = examples(tokenizer, tmp_path, "SYSTEM_LAST", messages, train_on="all")
    assert tokenizer.decode(example.ids) == rendered(tokenizer, "SYSTEM_LAST", messages)


@pytest.mark.parametrize(
    ("name", "called", "answer"),
    [
        (
            "LLAMA3",
            '{"name": "time", "parameters": {"zone": "UTC"}}<|eot_id|>',
            "Noon.<|eot_id|>",
        ),
        (
            "MISTRAL",
            f'[TOOL_CALLS][{{"name": "time", "arguments": {{"zone": "UTC"}}}}]{END}',
            f" Noon.{END}",
        ),
    ],
)
def test_calls_are_trained_and_results_are_not(tokenizer, tmp_path, name, called, answer):
    messages = [
        *talk("q1", "")[:1],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '"12:00"'},
        *talk("", "Noon.")[1:],
    ]
    assert runs(tokenizer, tmp_path, name, messages, tools=TOOLS) == [[called, answer]]


@pytest.mark.parametrize("name", ["GEMMA", "PHI3", "CHATML", "DEEPSEEK", "LLAMA2"])
def test_tools_without_a_place_are_refused(tokenizer, tmp_path, name):
    with pytest.raises(RowError, match="leaves out the tool 'time'"):
        runs(tokenizer, tmp_path, name, talk("q1", "a1"), tools=TOOLS)


def test_what_a_template_raises_is_said(tokenizer, tmp_path):
    with pytest.raises(RowError, match="System role not supported"):
        runs(tokenizer, tmp_path, "GEMMA", [SYSTEM, *talk("q1", "a1")])
    messages = talk("q1", "")
    messages[1]["tool_calls"] = [CALL, CALL]
    with pytest.raises(RowError, match="one call at a time"):
        runs(tokenizer, tmp_path, "LLAMA3", messages, tools=TOOLS)
