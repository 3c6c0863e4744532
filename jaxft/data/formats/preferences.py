"""The ways from a row to two answers, one of them preferred, or to one labelled good or bad.

The last turn is what is compared, and what is before it is the prompt, which both answers share.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxft.data.formats.cells import (
    as_row,
    cell_text,
    check_one_of,
    is_empty,
    missing,
    mistyped,
    optional_text,
    parsed,
    quoted,
    show,
)
from jaxft.data.formats.converters import CONVERTERS, alpaca_prompt, sharegpt_message, single_turn
from jaxft.data.formats.items import Conversation, Labelled, Preference, answer_text
from jaxft.data.formats.layouts import (
    LABELS,
    OPENAI_PAIR,
    label_columns,
    label_layout,
    pair_answers,
    pair_columns,
    pair_layout,
    prompt_column,
    respelt,
    single_layout,
    turns_column,
)
from jaxft.data.formats.messages import is_answer, make_conversation
from jaxft.data.formats.shared_prompts import dialogue, split_prompt
from jaxft.data.problems import RowError

_VERDICTS = (*LABELS, "preference", "preferred", "winner")
"""Columns that say of two answers which one is better, and may contradict their names."""
_YES_OR_NO = {"true": True, "false": False, "1": True, "0": False}


def read_pair(value: Any, origin: str, *, layout: tuple[str, ...]) -> Preference:
    """Returns the two answers of a row.

    Args:
      value: The row.
      origin: `file:line`.
      layout: From `pair_layout` of the first row, which all others have.

    Raises:
      RowError: If the row is no pair whose answers differ and whose prompts do not.
    """
    row = as_row(value)
    verdicts = [name for name in _VERDICTS if not is_empty(row.get(name))]
    if verdicts:
        raise RowError(
            f"the row has {quoted(verdicts)} beside two answers, which may say otherwise which of "
            "them is better. Remove it."
        )
    found = pair_layout(row)
    if found == layout == OPENAI_PAIR:
        return _from_openai(row, origin)
    names = pair_answers(row)
    if not names and found != OPENAI_PAIR:
        raise RowError(
            f"the row has no pair of answers but {', '.join(row) or 'no columns'}; expected "
            f"'chosen' and 'rejected'.{mistyped(row, 'chosen', 'rejected')} A row with one answer "
            "is for --config.objective.name=sft, or with a label for kto."
        )
    _check_layout(found, layout)
    better, worse = _two_answers(row, names)
    prompt = _prompt(row)
    if prompt is None and isinstance(better, str) and isinstance(worse, str):
        return _from_texts(better, worse, row, origin)
    return _checked(
        *(
            _with_answer(prompt, answer, name, row, origin)
            for name, answer in (("chosen", better), ("rejected", worse))
        ),
        is_whole=prompt is None,
    )


def read_labelled(value: Any, origin: str, *, layout: tuple[str, ...]) -> Labelled:
    """Returns the answer of a row and whether it is a good one.

    Args:
      value: The row.
      origin: `file:line`.
      layout: From `label_layout` of the first row, which all others have.

    Raises:
      RowError: If the row has no answer, no question or no label.
    """
    row = as_row(value)
    pair = [name for name in ("chosen", "rejected") if not is_empty(row.get(name))]
    if pair:
        raise RowError(
            f"the row has {quoted(pair)} beside a label; expected one answer and its label, or two "
            "answers."
        )
    label = _label(row)
    rest = {name: cell for name, cell in row.items() if name not in LABELS}
    name, columns = single_layout(rest)
    if not name:
        raise RowError(
            f"the row has {', '.join(row)}; expected a prompt, an answer and a label."
            f"{respelt(row, label_columns)}"
        )
    _check_layout(label_layout(row), layout)
    if name == "columns":
        question, answer = columns
        system = optional_text(rest, "system")
        texts = cell_text(rest, question), cell_text(rest, answer)
        talk = single_turn(*texts, origin, system=system)
    else:
        talk = CONVERTERS[name](rest, origin)
    assert isinstance(talk, Conversation)
    _check_answer(talk, "the answer", is_whole=name in ("messages", "sharegpt"))
    return Labelled(talk, label)


def _check_layout(found: tuple[str, ...], first: tuple[str, ...]) -> None:
    if found != first:
        raise RowError(
            f"the row is told by {quoted(found)}, but the first row by {quoted(first)}; expected "
            "the same columns in all rows."
        )


def renamed(row: Any, mapping: Mapping[str, str]) -> dict[str, Any]:
    """Returns a row of columns of any names as one with those that are read."""
    cells = as_row(row)
    absent = [column for column in mapping.values() if column not in cells]
    if absent:
        raise missing(absent[0], cells)
    return {part: cells[column] for part, column in mapping.items()}


def _label(row: dict[str, Any]) -> bool:
    check_one_of(row, *LABELS)
    name = next((name for name in LABELS if not is_empty(row.get(name))), "")
    if not name and (named := next((name for name in LABELS if name in row), "")):
        raise RowError(f"{named!r} is {show(row[named])}; expected true or false.")
    if not name:
        raise RowError(
            f"the row has no label but {', '.join(row)}; expected 'label', true for a good answer "
            f"and false for a bad one.{mistyped(row, 'label')} Rows without labels are for "
            "--config.objective.name=sft."
        )
    value = row[name]
    text = value.strip().lower() if isinstance(value, str) else str(value).lower()
    text = text.removesuffix(".0")  # integers of some tables
    if text not in _YES_OR_NO:
        raise RowError(
            f"{name!r} is {show(value)}; expected true or false. Write true in place of good, yes "
            "or the like, and false in place of bad or no."
        )
    return _YES_OR_NO[text]


def _from_openai(row: dict[str, Any], origin: str) -> Preference:
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise RowError(f"'input' is {show(asked)}; expected an object with 'messages'.")
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError(f"input.messages is {show(messages)}; expected a list of messages.")
    beside = {name: row[name] for name in ("tools", "functions", "system") if name in row}
    beside |= {name: cell for name, cell in asked.items() if not is_empty(cell)}
    unused = [f"input.{name}" for name in asked if name not in ("messages", "tools", "functions")]
    talks = []
    for name in OPENAI_PAIR[1:]:
        if name not in row:
            raise missing(name, row)
        answer = _as_answer(row, name)
        talks.append(_with_answer(messages, answer, name, beside, origin, unused=unused))
    return _checked(*talks, is_whole=False)


def _two_answers(row: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, Any]:
    """Returns the better and the worse answer: texts, or lists of messages."""
    if len(names) == 2:
        return _as_answer(row, names[0]), _as_answer(row, names[1])
    both = row[names[0]]
    if not isinstance(both, list) or len(both) != 2:
        raise RowError(f"{names[0]!r} is {show(both)}; expected a better and a worse answer.")
    found = {f"{names[0]}[{number}]": answer for number, answer in enumerate(both)}
    better, worse = (_as_answer(found, name) for name in found)
    return better, worse


def _as_answer(row: dict[str, Any], name: str) -> str | list[Any]:
    value = row[name]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        if not value:
            raise RowError(f"{name!r} is []; expected an answer.")
        if all(isinstance(answer, str) for answer in value):
            count = f"{len(value)} texts" if len(value) > 1 else "a text"
            raise RowError(
                f"{name!r} is a list of {count}; expected one answer. Write a row for each pair of "
                "a better and a worse answer, with the prompt in all of them."
            )
        return value
    text = cell_text(row, name)
    if re.match(r'\[\s*\{\s*"(role|from|content|value)"', text):
        return parsed(text, name)  # a table's cell with messages
    return text


def _prompt(row: dict[str, Any]) -> list[Any] | str | None:
    """Returns the prompt that stands by itself: messages, a text, or None if there is none."""
    name = prompt_column(row)
    if not name:
        return None
    if name == "instruction":
        return alpaca_prompt(row)
    value = row[name]
    if isinstance(value, str) and (name in (turns_column(row), "messages")):
        value = parsed(value, name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return cell_text(row, name)
    if not value:
        raise RowError(f"{name!r} is []; expected the messages of the prompt.")
    if isinstance(value[-1], dict) and is_answer(value[-1]):
        raise RowError(
            f"{name!r} ends with an answer of the assistant; expected it to end with what 'chosen' "
            "and 'rejected' answer."
        )
    return value


def _with_answer(
    prompt: list[Any] | str | None,
    answer: list[Any] | str,
    name: str,
    row: dict[str, Any],
    origin: str,
    *,
    unused: list[str] | None = None,
) -> Conversation:
    """Returns the conversation of a prompt and an answer, which may repeat the prompt."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    is_whole = not (isinstance(answer[0], dict) and is_answer(answer[0]))
    if not is_whole and len(answer) > 1:
        raise RowError(
            f"{name!r} has {len(answer)} turns; expected one answer of the assistant. What comes "
            "before the last turn belongs to the prompt of both answers."
        )
    if not is_whole and not asked:
        raise RowError(
            f"{name!r} has no prompt before the answer. Add a column 'prompt', or write whole "
            "conversations that begin alike."
        )
    turns = answer if is_whole else asked + answer
    where = name if is_whole or not asked else f"prompt + {name}"
    messages = [
        sharegpt_message(t, f"{where}[{i}]") if _is_turn(t) else t for i, t in enumerate(turns)
    ]
    talk = make_conversation(messages, where, row, origin)
    if is_whole and asked:
        _check_repeated(talk, asked, name)
    return Conversation(talk.messages, talk.tools, origin, (*talk.unused, *(unused or ())))


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and "from" in value


def _check_repeated(talk: Conversation, asked: list[Any], name: str) -> None:
    """Raises RowError if a whole conversation does not hold the prompt that stands beside it."""
    said = [message["content"].split() for message in talk.prompt]
    for turn in asked:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
        if not isinstance(content, str) or content.split() not in said:
            raise RowError(
                f"{name!r} is a whole conversation in which {show(content)} of the prompt does not "
                "occur."
            )


def _from_texts(better: str, worse: str, row: dict[str, Any], origin: str) -> Preference:
    """Returns the pair of two texts that begin with their prompt, as turns or as plain text."""
    talks = [dialogue(text) for text in (better, worse)]
    if all(talks):
        return _checked(
            *(
                make_conversation(talk, name, row, origin)
                for talk, name in zip(talks, ("chosen", "rejected"), strict=True)
            ),
            is_whole=True,
        )
    _check_prompt_column(row)
    prompt, *answers = split_prompt(better, worse)
    system = optional_text(row, "system")
    return _checked(
        *(single_turn(prompt, answer, origin, system=system) for answer in answers),
        is_whole=True,
    )


def _check_prompt_column(row: dict[str, Any]) -> None:
    """Raises RowError for a column that may hold the prompt, which texts then do not begin with."""
    used = pair_columns(row)
    unused = [name for name, cell in row.items() if name not in used and _may_be_prompt(cell)]
    if unused:
        guess = next((name for name in unused if "prompt" in name.lower()), unused[0])
        flags = "--config.data.format=preference --config.data.columns="
        answers = "chosen=chosen,rejected=rejected"
        raise RowError(
            f"the row has {quoted(unused)} beside two texts, and the prompt may be there. Name its "
            f"column: {flags}prompt={guess},{answers} or none, if both texts begin with it: "
            f"{flags}{answers}"
        )


def _may_be_prompt(cell: Any) -> bool:
    if isinstance(cell, list):
        return any(isinstance(item, dict) for item in cell)
    return isinstance(cell, str) and bool(cell.strip())


def _checked(chosen: Conversation, rejected: Conversation, *, is_whole: bool) -> Preference:
    """Returns the pair if its prompts are equal and its answers are not.

    Args:
      chosen: The conversation with the better answer.
      rejected: That with the worse one.
      is_whole: Whether the row has no prompt by itself, so that both answers begin with it.
    """
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    alike = [_is_alike(a, b) for a, b in pairs]
    shared = alike.index(False) if False in alike else len(alike)
    lengths = len(chosen.messages), len(rejected.messages)
    if lengths[0] == lengths[1] == shared:
        raise RowError("'chosen' and 'rejected' are equal; expected answers that differ.")
    if lengths[0] != lengths[1] or shared < lengths[0] - 1:
        _refuse_prompts(chosen, rejected, shared)
    for name, talk in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(talk, repr(name), is_whole=is_whole)
    if answer_text(chosen.answer) == answer_text(rejected.answer):
        raise RowError("'chosen' and 'rejected' are equal; expected answers that differ.")
    return Preference(chosen, rejected)


def _is_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two messages are equal but for what says whether they are trained."""
    first, second = ({k: v for k, v in message.items() if k != "weight"} for message in (a, b))
    return first == second


def _refuse_prompts(chosen: Conversation, rejected: Conversation, shared: int) -> None:
    """Raises RowError for two conversations that part before their last turns."""
    sides = [talk.messages[shared : shared + 1] for talk in (chosen, rejected)]
    if all(side and side[0]["role"] == "assistant" for side in sides):
        counts = [len(talk.messages) - shared for talk in (chosen, rejected)]
        raise RowError(
            f"'chosen' and 'rejected' part at message {shared} and go on for {counts[0]} and "
            f"{counts[1]} messages; expected one final answer of the assistant each."
        )
    told = [show(side[0]["content"]) if side else "nothing" for side in sides]
    raise RowError(
        f"'chosen' and 'rejected' have unlike prompts: message {shared} is {told[0]} and "
        f"{told[1]}; expected the same conversation but for the last turn."
    )


def _check_answer(talk: Conversation, name: str, *, is_whole: bool) -> None:
    """Raises RowError for an answer that cannot be compared."""
    if not talk.answer.get("weight", 1):
        raise RowError(
            f"{name} ends with a turn of weight 0, but the last turn is what is compared. Remove "
            "the weight."
        )
    # An answer in a column of its own may repeat its prompt. A whole conversation in which the
    # prompt stands twice lacks its answer.
    asked = " ".join(talk.prompt[-1]["content"].split())
    if is_whole and answer_text(talk.answer) == asked != "":
        raise RowError(
            f"{name} ends with {show(talk.answer['content'])} twice, as prompt and as answer; "
            "expected an answer to the prompt."
        )


def describe_pairs(row: Mapping[str, Any]) -> str:
    """Returns what a log should add on how the prompt of the pairs is found; mostly ''."""
    if prompt_column(row) or any(name in row for name in OPENAI_PAIR[1:]):
        return ""
    texts = [row.get(name) for name in ("chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        return "; the prompt is all but the last turn"
    if all(dialogue(str(text)) for text in texts):
        return "; texts of turns by 'Human:' and 'Assistant:'"
    return "; the prompt is what both texts begin with"
