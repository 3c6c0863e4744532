"""Reasoning of assistant turns: under a key of its own, or in a <think> block of the content."""

from typing import Any

THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold reasoning, as templates and servers call it."""
THINKING_TOKENS = ("<think>", "</think>")


def has_thinking(message: dict[str, Any]) -> bool:
    """Says whether a message carries reasoning, in its content or under a key of its own."""
    return "</think>" in message["content"] or any(message.get(key) for key in THINKING_KEYS)


def shows_thinking(text: str, message: dict[str, Any]) -> bool:
    """Says whether a rendered answer has the reasoning of its message."""
    reasoning = _reasoning(message)
    return reasoning in text if reasoning else "</think>" in text


def with_thinking(message: dict[str, Any]) -> str:
    """Returns the content with its block written out, as reasoning models generate it."""
    if "</think>" not in message["content"]:
        return f"<think>\n{_reasoning(message)}\n</think>\n\n{message['content']}"
    opening = "" if "<think>" in message["content"] else "<think>\n"
    return opening + message["content"]


def without_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """Returns an assistant's message without reasoning; others as they are."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in THINKING_KEYS}
    return {**kept, "content": without_block(message["content"])}


def without_block(content: str) -> str:
    """Returns a text without its <think> blocks; the opening of the first may be missing."""
    kept, rest = [], content
    while "</think>" in rest:
        before, _, after = rest.partition("</think>")
        outside, opening, _ = before.rpartition("<think>")
        if kept and not opening:
            break
        kept.append(outside)
        rest = after.lstrip()
    return "".join(kept) + rest


def _reasoning(message: dict[str, Any]) -> str:
    separate = next((message[key] for key in THINKING_KEYS if message.get(key)), "")
    before, closing, _ = message["content"].partition("</think>")
    return (separate or (before.rpartition("<think>")[2] if closing else "")).strip()
