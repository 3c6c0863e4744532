"""Cleans the messages, calls and tools of a row and checks their order."""

import json
from collections.abc import Mapping
from typing import Any

from jaxft.data.formats.cells import check_one_of, mistyped, optional_text, parsed, quoted, show
from jaxft.data.formats.items import Conversation
from jaxft.data.formats.media import TEXT_ONLY, check_text_only
from jaxft.data.problems import RowError
from jaxft.data.thinking import THINKING_KEYS
from jaxft.errors import nearest

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *THINKING_KEYS)
_ROLE_NAMES = {"developer": "system", "function": "tool"}
"""Roles under other names: of newer and older servers."""
_TRAIN_KEYS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
"""Keys that say whether a turn is trained: true or 1, false or 0."""
_MASK_KEYS = ("mask", "masked", "loss_mask", "ignore", "exclude", "train_detail")
"""Keys that say so in ways that differ from tool to tool."""
_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool_calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def make_conversation(messages: Any, where: str, row: dict[str, Any], origin: str) -> Conversation:
    """Returns cleaned messages with the system prompt and the tools of their row.

    Args:
      messages: A list of messages, or JSON text of one.
      where: The column they are from, for errors.
      row: The columns beside it.
      origin: `file:line`.

    Raises:
      RowError: If they are no conversation that ends with an answer.
    """
    if isinstance(messages, str):
        messages = parsed(messages, where)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{where!r} is {show(messages)}; expected a list of messages.")
    cleaned = [_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    if system := optional_text(row, "system"):
        cleaned.insert(0, {"role": "system", "content": system})
    _check_order(cleaned, where)
    known = (*_MESSAGE_KEYS, *_TRAIN_KEYS, "function_call")
    unused = {
        str(key): None
        for message in messages
        for key, item in message.items()
        if key not in known and item not in (None, "", [], {})
    }
    return Conversation(cleaned, _tools(row), origin, tuple(unused))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {show(message)}; expected an object.")
    check_text_only(message, where, "key")
    role = message.get("role")
    if not isinstance(role, str) or role not in (*ROLES, *_ROLE_NAMES):
        raise RowError(
            f"{where}.role is {show(role)}; expected one of {', '.join(ROLES)}."
            f"{mistyped(message, 'role') or nearest(str(role), ROLES)}"
        )
    cleaned = {name: message[name] for name in _MESSAGE_KEYS if message.get(name)}
    cleaned |= {"role": _ROLE_NAMES.get(role, role), "content": _content(message, where)}
    for key in (*THINKING_KEYS, "name", "tool_call_id"):
        if not isinstance(cleaned.get(key, ""), str):
            raise RowError(f"{where}.{key} is {show(cleaned[key])}; expected a string.")
    _check_one_thinking(cleaned, where)
    if calls := _calls(message, where):
        cleaned["tool_calls"] = _tool_calls(calls, where)
    if weight := _weight(message, where):
        cleaned["weight"] = weight[0]
    has_reasoning = any(cleaned.get(key) for key in THINKING_KEYS)
    if not cleaned["content"].strip() and not cleaned.get("tool_calls") and not has_reasoning:
        kind = "an answer" if cleaned["role"] == "assistant" else "text"
        hint = mistyped(message, "content", "tool_calls")
        raise RowError(f"{where}.content is empty; expected {kind}.{hint}")
    return cleaned


def _check_one_thinking(message: dict[str, Any], where: str) -> None:
    """Servers repeat reasoning under two keys; templates would read one of them."""
    found = {key: message[key] for key in THINKING_KEYS if key in message}
    if found and message["role"] != "assistant":
        raise RowError(
            f"{where} is from {message['role']!r} and has {quoted(found)}; expected reasoning "
            "in assistant turns alone."
        )
    if len(set(found.values())) > 1:
        raise RowError(f"{where} has {quoted(found)} with unlike texts; expected one of them.")


def _weight(message: dict[str, Any], where: str) -> list[int]:
    """Returns whether a turn is trained, 0 or 1; an empty list if the message does not say."""
    refused = [key for key in _MASK_KEYS if message.get(key) is not None]
    if refused:
        raise RowError(
            f"{where}.{refused[0]} is {show(message[refused[0]])}, which tools read in unlike "
            'ways; write "weight": 0 for a turn that is not trained, "weight": 1 for one that is.'
        )
    given = {key: message[key] for key in _TRAIN_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{where}.{key} is {show(value)}; expected 0 or 1.")
        if value and key != "weight" and message["role"] != "assistant":
            raise RowError(
                f"{where}.{key} is {show(value)} on a turn of {message['role']!r}; only assistant "
                "turns are trained. Remove the key, or train on everything with "
                "--config.data.train_on=all."
            )
    values = {int(value) for value in given.values()}
    if len(values) > 1:
        raise RowError(f"{where} has {quoted(given)}, which contradict each other.")
    return list(values)


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RowError(f"{where}.content is {show(content)}; expected a string.")
    return content


def _part(part: Any, where: str) -> str:
    kinds = ("text", "input_text", "output_text")
    if isinstance(part, dict):
        check_text_only(part, where, "part")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise RowError(f"{where} is {show(part)}; expected a part with a 'text'. {TEXT_ONLY}")
    if part.get("type", "text") not in kinds:
        raise RowError(f"{where}.type is {show(part['type'])}; expected one of {', '.join(kinds)}.")
    return part["text"]


def _calls(message: dict[str, Any], where: str) -> list[Any]:
    """Returns the calls of a message, in their old form too; an empty list if there are none."""
    calls, old = message.get("tool_calls") or [], message.get("function_call")
    if (calls or old) and message["role"] != "assistant":
        raise RowError(f"{where} is from {message['role']!r} and has calls; expected 'assistant'.")
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls is {show(calls)}; expected a list.")
    if calls and old:
        raise RowError(f"{where} has both 'tool_calls' and 'function_call'; expected one of them.")
    return [old] if old else calls


def _tool_calls(calls: list[Any], where: str) -> list[dict[str, Any]]:
    """Returns calls with arguments as the raw JSON text, in which no schema adds keys."""
    cleaned = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise RowError(
                f"{where}.tool_calls[{number}] is {show(call)}; expected "
                '{"type": "function", "function": {"name": "…", "arguments": {…}}}.'
            )
        arguments = _arguments(function, f"{where}.tool_calls[{number}].arguments")
        cleaned.append(
            {
                **{key: call[key] for key in ("id",) if call.get(key) is not None},
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return cleaned


def _arguments(function: dict[str, Any], where: str) -> str:
    """Returns the arguments of a call as JSON text: as written, or '{}' where there are none."""
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return "{}"
    text = arguments
    if isinstance(arguments, str):
        arguments = parsed(arguments, where)
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, dict):
        raise RowError(f"{where!r} is {show(arguments)}; expected an object of named arguments.")
    return text


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """Returns the tools of a row, of which each has a name."""
    check_one_of(row, "tools", "functions")
    where = "tools" if row.get("tools") else "functions"
    tools = row.get(where) or None
    if isinstance(tools, str):
        tools = parsed(tools, where) or None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(f"{where!r} is {show(tools)}; expected a list of function descriptions.")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not _is_name(tool_name(tool)):
            raise RowError(
                f"{where}[{number}] is {show(tool)}; expected "
                '{"type": "function", "function": {"name": "…", "parameters": {…}}}.'
            )
    if where == "functions":
        return [{"type": "function", "function": tool} for tool in tools]
    return tools


def tool_name(tool: Mapping[str, Any]) -> Any:
    """Returns the name of a function description, which may lie under 'function'."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Says whether a turn, in the form of messages or of ShareGPT, is the assistant's."""
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_order(messages: list[dict[str, Any]], where: str) -> None:
    before = "start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            expected = " or ".join(repr(name) for name in _MAY_FOLLOW[before])
            place = "comes first" if before == "start" else f"follows {before!r}"
            raise RowError(f"{where}[{number}].role is {role!r} and {place}; expected {expected}.")
        before = role
        if message.get("tool_calls") and number < len(messages) - 1:
            before = "assistant with tool_calls"
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"{where}[{len(messages) - 1}].role is {messages[-1]['role']!r} and comes last; "
            "expected 'assistant', whose answer is what is learnt."
        )
