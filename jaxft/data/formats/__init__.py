"""Turns raw rows of the known formats into conversations, pairs of them, or text documents."""

from jaxft.data.formats.detection import EXAMPLES, choose_format, told_columns
from jaxft.data.formats.items import (
    Conversation,
    Document,
    Format,
    Item,
    Labelled,
    Preference,
    answer_text,
    conversations_of,
)
from jaxft.data.formats.messages import is_answer, tool_name
from jaxft.data.formats.reading import read_items
from jaxft.data.formats.units import UNIT_EXAMPLES

__all__ = [
    "EXAMPLES",
    "UNIT_EXAMPLES",
    "Conversation",
    "Document",
    "Format",
    "Item",
    "Labelled",
    "Preference",
    "answer_text",
    "choose_format",
    "conversations_of",
    "is_answer",
    "read_items",
    "told_columns",
    "tool_name",
]
