"""Marks in place of texts, names and arguments, to find where a template writes them."""

import json
from typing import Any

from jaxft.data.formats import tool_name
from jaxft.data.template import MARK
from jaxft.data.thinking import (
    THINKING_KEYS,
)


def mark_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with marks in place of the texts that a template writes last."""
    if calls := message.get("tool_calls"):
        marked = [
            {**call, "function": {**call["function"], "arguments": json.dumps({MARK: MARK})}}
            for call in calls
        ]
        return {**message, "tool_calls": marked}
    if message["content"].strip():
        return {**message, "content": MARK}
    return {**message, **{key: MARK for key in THINKING_KEYS if message.get(key)}}


def mark_tools(
    messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, dict[str, str]]:
    """Returns messages and tools with marks for names and arguments, and what each stands for.

    Tools that are called need no mark: that some templates tell of them by their calls alone is
    the template's way.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        name = f"{MARK}n{len(marks)}n"
        marks[name] = what
        return name

    def mark_call(call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        what = f"the call of {function['name']!r} in message {number}"
        arguments = json.dumps({"mark": mark(what)})
        return {**call, "function": {**function, "name": mark(what), "arguments": arguments}}

    marked = [
        {**message, "tool_calls": [mark_call(call, i) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for i, message in enumerate(messages)
    ]
    called = {c["function"]["name"] for m in messages for c in m.get("tool_calls") or ()}
    offered = [
        tool if tool_name(tool) in called else _renamed(tool, mark(f"the tool {tool_name(tool)!r}"))
        for tool in tools or ()
    ]
    return marked, offered or None, marks


def _renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def common_length(a: str, b: str) -> int:
    """Returns how many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_end(a: str, b: str) -> str:
    """Returns what two texts end with alike."""
    return a[len(a) - common_length(a[::-1], b[::-1]) :]
