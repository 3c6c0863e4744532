"""Pictures, audio and video in rows: refused, as text alone is tuned."""

from collections.abc import Mapping
from typing import Any

from jaxft.data.formats.cells import quoted
from jaxft.data.problems import RowError

TEXT_ONLY = "jaxft tunes text only: no pictures, audio, video or files."
_SENSES = ("image", "audio", "video")
_COLUMNS = (*_SENSES, *(f"{sense}s" for sense in _SENSES))
# Keys of messages and of their parts in OpenAI's, Anthropic's and Hugging Face's forms; columns of
# such names may say where a text is from.
_KEYS = (*_COLUMNS, *(form.format(sense) for sense in _SENSES for form in ("{}_url", "input_{}")))
_TYPES = (*_KEYS, "document", "file", "input_file")


def check_text_only(value: Mapping[str, Any], where: str, kind: str) -> None:
    """Raises RowError if a row, a message or a part of one holds something else than text.

    Args:
      value: It.
      where: What it is called.
      kind: `column` of a row, `key` of a message, or `part`, which may say its type.
    """
    keys = _COLUMNS if kind == "column" else _KEYS
    found = [key for key in keys if value.get(key) not in (None, "", [], {})]
    what = f"has {quoted(found)}"
    if not found and kind == "part" and value.get("type") in _TYPES:
        found, what = ["type"], f"is of type {value['type']!r}"
    if found:
        raise RowError(
            f"{where} {what}: {TEXT_ONLY} Remove the row, or the {kind} if the text is complete "
            "without it."
        )
