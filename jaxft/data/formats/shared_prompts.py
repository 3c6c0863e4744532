"""The prompt that two texts begin with: turns of speakers, or what is the same in both."""

import re
from typing import Any

from jaxft.data.formats.cells import show
from jaxft.data.problems import RowError

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):", re.ASCII)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_ASKING = "human|user|question|q|instruction|input|prompt"
_ANSWERING = "assistant|ai|bot|model|answer|a|response|output"
_MARK = re.compile(
    rf"^[#* \t]*(?:(?P<asks>{_ASKING})|{_ANSWERING})[* \t]*:\**", re.IGNORECASE | re.MULTILINE
)
"""What stands at the beginning of a line before a turn, as in '### Response:' and '**Answer**:'."""


def dialogue(text: str) -> list[dict[str, Any]]:
    """Returns the turns of a text with 'Human:' and 'Assistant:' before each; none of others."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        {"role": _SPEAKERS[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def split_prompt(better: str, worse: str) -> tuple[str, str, str]:
    """Returns the prompt that two texts begin with, and what each goes on with.

    Answers may begin alike as well. So a prompt must end with its line, or with what stands before
    an answer, such as 'Answer:'.

    Raises:
      RowError: If no such prompt is found, or nothing follows it.
    """
    end = _prompt_end(better, worse)
    for name, text in (("chosen", better), ("rejected", worse)):
        if not text[end:].strip():
            raise RowError(
                f"{name!r} is only what both texts begin with, which is taken as their prompt; "
                "nothing is left as an answer. Add a column 'prompt'."
            )
        asked = {mark["asks"] for mark in _MARK.finditer(text[:end])} - {None}
        if any(mark["asks"] in asked for mark in _MARK.finditer(text[end:])):
            raise RowError(
                f"{name!r} goes on for several turns; expected one answer behind what both texts "
                "begin with. Write them as lists of messages."
            )
    return better[:end].strip(), better[end:].strip(), worse[end:].strip()


def _prompt_end(better: str, worse: str) -> int:
    marks = [m for m in _MARK.finditer(better) if worse.startswith(better[: m.end()])]
    if marks and not marks[-1]["asks"]:
        return marks[-1].end()
    shared = better[: _shared_words(better, worse)]
    if not shared.strip():
        raise RowError(
            "there is no prompt: 'chosen' and 'rejected' do not begin with the same words. Add a "
            "column 'prompt'."
        )
    if not shared.rstrip(" \t").endswith("\n"):
        raise RowError(
            f"what 'chosen' and 'rejected' begin with is {show(shared)}; expected a prompt, up to "
            "the end of a line or to 'Assistant:', 'Answer:' or the like. Add a column 'prompt'."
        )
    return len(shared)


def _shared_words(a: str, b: str) -> int:
    """Returns how many characters of whole words two texts begin with alike."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if length is None:
        length = min(len(a), len(b))
        longer = a if len(a) > length else b
        if len(longer) == length or longer[length].isspace():
            return length
    while length and not a[length - 1].isspace():
        length -= 1
    return length
