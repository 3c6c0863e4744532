"""The ways from a row of each format to a conversation or a document."""

from collections.abc import Callable, Iterator
from typing import Any

from jaxft.data.formats.cells import (
    as_row,
    cell_text,
    check_one_of,
    missing,
    mistyped,
    optional_text,
    quoted,
    show,
)
from jaxft.data.formats.items import Conversation, Document, Item
from jaxft.data.formats.layouts import turns_column
from jaxft.data.formats.messages import SHAREGPT_ROLES, make_conversation
from jaxft.data.json_text import loads as load_json
from jaxft.data.problems import RowError
from jaxft.errors import nearest


def make_document(value: Any, origin: str) -> Document:
    """Returns a text as a document."""
    if not isinstance(value, str):
        raise RowError(f"the row is {show(value)}; expected text.")
    return Document(value, origin)


def single_turn(prompt: str, completion: str, origin: str, *, system: str = "") -> Conversation:
    """Returns a question and its answer as a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": completion})
    return Conversation(messages, None, origin)


def _from_messages(value: Any, origin: str) -> Conversation:
    row = as_row(value)
    if "messages" not in row:
        raise missing("messages", row)
    return make_conversation(row["messages"], "messages", row, origin)


def _from_sharegpt(value: Any, origin: str) -> Conversation:
    row = as_row(value)
    column = turns_column(row)
    if column not in row:
        raise missing("conversations", row)
    turns = row[column]
    if not isinstance(turns, list):
        raise RowError(f"{column!r} is {show(turns)}; expected a list of turns.")
    messages = [sharegpt_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]
    return make_conversation(messages, column, row, origin)


def sharegpt_message(turn: Any, where: str) -> dict[str, Any]:
    """Returns a turn of ShareGPT in the form of messages, which it may have already."""
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RowError(
            f"{where} is {show(turn)}; expected an object with 'from' and 'value'."
            f"{mistyped(turn, 'from', 'value')}"
        )
    name = turn["from"]
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        raise RowError(
            f"{where}.from is {show(name)}; expected one of {', '.join(SHAREGPT_ROLES)}."
            f"{nearest(str(name), SHAREGPT_ROLES)}"
        )
    message = {key: item for key, item in turn.items() if key not in ("from", "value")}
    said: dict[str, Any] = {"role": SHAREGPT_ROLES[name]}
    if name == "function_call":
        said["tool_calls"] = [_function_call(turn["value"], where)]
    else:
        said["content"] = turn["value"]
    twice = [key for key in said if message.get(key) not in (None, "", [])]
    if twice:
        raise RowError(f"{where} has {quoted(twice)} beside 'from' and 'value'; remove it.")
    return message | said


def _function_call(text: Any, where: str) -> dict[str, Any]:
    try:
        call = load_json(text) if isinstance(text, str) else text
        return {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
    except (TypeError, ValueError, KeyError) as error:
        raise RowError(
            f"{where}.value is {show(text)}; expected JSON with 'name' and 'arguments'."
        ) from error


def _from_alpaca(value: Any, origin: str) -> Conversation:
    row = as_row(value)
    check_one_of(row, "output", "response")
    answer = "response" if "response" in row and "output" not in row else "output"
    messages = [*alpaca_prompt(row), {"role": "assistant", "content": cell_text(row, answer)}]
    if system := optional_text(row, "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, None, origin)


def alpaca_prompt(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the earlier turns of an Alpaca row and its instruction, without a system prompt."""
    check_one_of(row, "input", "context")
    context = optional_text(row, "input") or optional_text(row, "context")
    prompt = cell_text(row, "instruction")
    asked = f"{prompt}\n\n{context}" if context else prompt
    return [*_earlier_turns(row), {"role": "user", "content": asked}]


def _earlier_turns(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the earlier turns of an Alpaca row: a list of pairs of instruction and answer."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise RowError(
            f"'history' is {show(history)}; expected a list of pairs of instruction and answer."
        )
    for number, pair in enumerate(history):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise RowError(f"history[{number}] has {show(text)}; expected two texts.")
            yield {"role": role, "content": text}


def _from_prompt_completion(value: Any, origin: str) -> Conversation:
    row = as_row(value)
    check_one_of(row, "completion", "response")
    answer = "response" if "response" in row and "completion" not in row else "completion"
    prompt, completion = row.get("prompt"), row.get(answer)
    if isinstance(prompt, list) and isinstance(completion, list):
        return make_conversation(prompt + completion, "prompt + completion", row, origin)
    pair = single_turn(cell_text(row, "prompt"), cell_text(row, answer), origin)
    return make_conversation(pair.messages, "prompt + completion", row, origin)


CONVERTERS: dict[str, Callable[[Any, str], Item]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}
