"""Items that rows become: documents, conversations, two answers to compare, labelled answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxft.data.thinking import THINKING_KEYS


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

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the answer."""
        return self.messages[:-1]

    @property
    def prompt_text(self) -> str:
        """The messages before the answer, white space evened out, for comparing prompts."""
        return json.dumps([_content_for_comparison(message) for message in self.prompt])

    @property
    def answer(self) -> dict[str, Any]:
        """The last message."""
        return self.messages[-1]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, all of which is trained."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, one better than the other.

    Attributes:
      chosen: The conversation with the better answer at its end.
      rejected: The same conversation with the worse answer.
    """

    chosen: Conversation
    rejected: Conversation

    @property
    def origin(self) -> str:
        """`file:line`."""
        return self.chosen.origin

    @property
    def text(self) -> str:
        """The prompt and both answers, white space evened out, for comparing pairs."""
        return json.dumps([self.chosen.text, _content_for_comparison(self.rejected.answer)])

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Both conversations, the chosen one first."""
        return self.chosen, self.rejected

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of messages that nobody reads."""
        return tuple(dict.fromkeys(self.chosen.unused + self.rejected.unused))


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer that is marked as good or bad by itself.

    Attributes:
      conversation: The conversation with the answer at its end.
      desirable: Whether the answer is a good one.
    """

    conversation: Conversation
    desirable: bool

    @property
    def origin(self) -> str:
        """`file:line`."""
        return self.conversation.origin

    @property
    def text(self) -> str:
        """The prompt and the answer, white space evened out, for comparing rows."""
        return self.conversation.text

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """The conversation alone."""
        return (self.conversation,)

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of messages that nobody reads."""
        return self.conversation.unused


Item = Document | Conversation | Preference | Labelled


@dataclass(frozen=True, slots=True)
class Format:
    """The way the rows of one source are read.

    Attributes:
      name: One of the choices of `data.format`.
      convert: Function from (row value, origin) to an item; raises `RowError`.
      description: Findings in words, for the log.
      columns: Columns whose cells are read as text, numbers included.
    """

    name: str
    convert: Callable[[Any, str], Item]
    description: str
    columns: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether rows become conversations, of which only answers are trained."""
        return self.name != "text"


def conversations_of(item: Item) -> tuple[Conversation, ...]:
    """Returns the conversations of an item; none of a document."""
    if isinstance(item, Document):
        return ()
    return (item,) if isinstance(item, Conversation) else item.conversations


def answer_text(message: dict[str, Any]) -> str:
    """Returns what an answer says, white space evened out, for comparing answers."""
    thinking = [message[key] for key in THINKING_KEYS if message.get(key)]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [message["content"], *thinking, *(json.dumps(call) for call in calls)]
    return " ".join(" ".join(said).split())


def _content_for_comparison(message: dict[str, Any]) -> list[Any]:
    return [message["role"], " ".join(message["content"].split()), message.get("tool_calls")]
