"""Turns raw rows of the known formats into conversations or text documents."""

from jaxft.data.formats.detection import EXAMPLES, Format, choose_format, told_columns
from jaxft.data.formats.items import Conversation, Document
from jaxft.data.formats.messages import is_answer, tool_name
from jaxft.data.formats.reading import read_items

__all__ = [
    "EXAMPLES",
    "Conversation",
    "Document",
    "Format",
    "choose_format",
    "is_answer",
    "read_items",
    "told_columns",
    "tool_name",
]
