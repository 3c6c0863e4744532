"""What a row becomes: a conversation or a text document."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form that chat templates take.

    Attributes:
      messages: Dicts with role, content and, where the row has them, tool_calls, tool_call_id,
        name, reasoning and weight (0: a turn that is not trained).
      tools: Function descriptions offered to the model, or None.
      origin: `file:line`.
      unused: Keys of messages that nobody reads.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    origin: str
    unused: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Roles and contents, white space evened out, for comparing conversations."""
        return json.dumps([_content_for_comparison(message) for message in self.messages])


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, all of which is trained."""

    text: str
    origin: str


def _content_for_comparison(message: dict[str, Any]) -> list[Any]:
    return [message["role"], " ".join(message["content"].split()), message.get("tool_calls")]
