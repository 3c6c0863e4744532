"""The columns that make a row one of each kind; nothing here reads what is in them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxft.errors import nearest_of

_QUESTION_AND_ANSWER = (
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("source", "target"),
)
_BESIDE = ("system", "tools", "functions")
_ALPACA = ("instruction", "input", "context")
TEXT_PROMPTS = ("prompt", "question", "query", "input")
"""Columns that hold the prompt of a pair, the first one that is there."""
OPENAI_PAIR = ("input", "preferred_output", "non_preferred_output")
LABELS = ("label", "kto_tag")
"""Columns that mark an answer as a good or a bad one."""
_NAMES = (
    *("messages", "conversations", "prompt", "completion", "response", "instruction", "output"),
    *("text", "chosen", "rejected", *OPENAI_PAIR[1:], *LABELS),
    *(name for pair in _QUESTION_AND_ANSWER for name in pair),
)
"""Columns that tell what a row is."""


def single_layout(value: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Returns the format of rows with one answer or none, and the columns that told it apart.

    Returns:
      An empty name if none fits.
    """
    if "messages" in value:
        return "messages", _present(value, "messages", *_BESIDE)
    if "conversations" in value or "conversation" in value:
        return "sharegpt", _present(value, turns_column(value), *_BESIDE)
    if "instruction" in value and ("output" in value or "response" in value):
        return "alpaca", _present(value, *_ALPACA, "output", "response", "system", "history")
    if "prompt" in value and ("completion" in value or "response" in value):
        return "prompt_completion", _present(value, "prompt", "completion", "response", *_BESIDE)
    for pair in _QUESTION_AND_ANSWER:
        if all(column in value for column in pair):
            return "columns", list(pair)
    if "text" in value:
        return "text", ["text"]
    return "", []


def pair_columns(value: Mapping[str, Any]) -> list[str]:
    """Returns the columns that make a row a pair of answers; none if they do not."""
    if all(column in value for column in OPENAI_PAIR):
        return list(OPENAI_PAIR)
    answers = pair_answers(value)
    prompt = prompt_column(value)
    if not answers or (not prompt and answers != ("chosen", "rejected")):
        return []
    beside = (*_ALPACA[1:], "history") if prompt == "instruction" else ()
    return list(dict.fromkeys(_present(value, prompt, *beside, *_BESIDE, *answers)))


def pair_answers(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the columns of the better and the worse answer, or the one that holds both."""
    if "rejected" in value:
        better = ("chosen", "completion", "output", "response")
        return next(((name, "rejected") for name in better if name in value), ())
    if "instruction" in value and isinstance(value.get("output"), list):
        return ("output",)
    return ()


def pair_layout(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the columns in which a pair has its prompt and its answers."""
    if any(name in value for name in OPENAI_PAIR[1:]):
        return OPENAI_PAIR
    prompt = prompt_column(value)
    return (*((prompt,) if prompt else ()), *pair_answers(value))


def prompt_column(value: Mapping[str, Any]) -> str:
    """Returns the column of the prompt that both answers of a pair share; '' if there is none."""
    if "conversations" in value or "conversation" in value:
        return turns_column(value)
    names = ("prompt", "instruction", *TEXT_PROMPTS[1:], "messages")
    return next((name for name in names if name in value), "")


def known_columns(value: Mapping[str, Any]) -> list[str]:
    """Returns the columns that make a row a pair, a single answer or a text; none otherwise."""
    return pair_columns(value) or single_layout(value)[1]


def label_columns(value: Mapping[str, Any]) -> list[str]:
    """Returns the columns that make a row a labelled answer; none if they do not."""
    label = next((name for name in LABELS if name in value), "")
    name, columns = single_layout(value)
    return [*columns, label] if label and name not in ("", "text") else []


def label_layout(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the columns in which a labelled answer lies, or the name of its format."""
    rest = {name: cell for name, cell in value.items() if name not in LABELS}
    name, columns = single_layout(rest)
    return tuple(columns) if name == "columns" else (name,)


def turns_column(value: Mapping[str, Any]) -> str:
    """Returns the name that a ShareGPT row gives to its turns."""
    return "conversation" if "conversations" not in value else "conversations"


def describe_unused(used: Iterable[str], columns: Iterable[str]) -> str:
    """Returns what a log should say of the other columns; '' if there are none."""
    used = set(used)
    rest = [column for column in columns if column not in used]
    return f" (not used: {', '.join(rest)})" if rest else ""


def respelt(value: Mapping[str, Any], told: Callable[[Mapping[str, Any]], list[str]]) -> str:
    """Returns " Did you mean 'messages'?" for columns that make a row if they are spelt so, or ''.

    Args:
      value: The row, which has no known layout.
      told: Returns the columns that make something a row; none if they make no row.
    """
    absent = [name for name in _NAMES if name not in value]
    meant = {name: "" if name in _NAMES else nearest_of(name, absent) for name in value}
    used = told({meant[name] or name: cell for name, cell in value.items()})
    found = [name for name in dict.fromkeys(meant.values()) if name and name in used]
    return f" Did you mean {' and '.join(map(repr, found))}?" if found else ""


def _present(value: Mapping[str, Any], *columns: str) -> list[str]:
    return [column for column in columns if column in value]
