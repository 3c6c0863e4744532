"""Calls of tools in what a model wrote: the forms that chat templates teach, as JSON.

`<tool_call>{"name": …, "arguments": {…}}</tool_call>` is that of Hermes, Qwen and others; an object
or a list of them as the whole answer that of Llama 3 and Mistral, whose control tokens are not part
of the text. What is in no such form, or calls what was not offered, stays text.
"""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from jaxft.service.ids import letters

_OPEN = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


class Reply(NamedTuple):
    """An answer whose calls are told from its text.

    Attributes:
      content: Text before the calls.
      calls: The calls, as clients read them.
    """

    content: str
    calls: list[dict[str, Any]]


def find_calls(text: str, names: Collection[str]) -> Reply:
    """Returns the calls of an answer.

    Args:
      text: The whole answer.
      names: Tools that were offered.
    """
    content, tag, _ = text.partition(_OPEN)
    if tag:
        written = [match[1] for match in _TAGGED.finditer(text)]
        calls = [call for item in written for call in _calls(item, names)]
        # One that is not understood makes all of it text: no call is lost.
        if len(calls) >= len(written) and calls:
            return Reply(content.rstrip(), calls)
        return Reply(text, [])
    if calls := _calls(text.strip(), names):
        return Reply("", calls)
    return Reply(text, [])


def ready_text(text: str) -> int:
    """Returns how many characters of an unfinished answer cannot be part of a call."""
    if text.lstrip()[:1] in ("{", "["):
        return 0
    place = text.find(_OPEN)
    if place < 0:
        sizes = (n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n]))
        place = len(text) - next(sizes, 0)
    # Space before a call is not part of the content.
    return len(text[:place].rstrip())


def _calls(written: str, names: Collection[str]) -> list[dict[str, Any]]:
    """Returns the calls of a JSON object or list; none if any of it is something else."""
    try:
        values = json.loads(written)
    except (ValueError, RecursionError):
        return []
    values = values if isinstance(values, list) else [values]
    found = []
    for value in values:
        value = value if isinstance(value, dict) else {}
        arguments = value.get("arguments", value.get("parameters"))
        name = value.get("name")
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict | str):
            return []
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": arguments}
        found.append({"id": f"call_{letters(24)}", "type": "function", "function": function})
    return found
