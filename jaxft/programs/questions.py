"""The questions of `jaxft generate`: prompts, or conversations in the forms of training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from jaxft.data import json_text
from jaxft.data.formats import Conversation, choose_format, is_answer, tool_name
from jaxft.data.json_text import JsonError
from jaxft.data.problems import RowError
from jaxft.data.sources import Row
from jaxft.data.specs import SourceSpec
from jaxft.errors import ConfigError, DataError
from jaxft.programs.model import Model

_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that waits for an answer.

    Attributes:
      messages: Dicts with role and content; the last one is not from the assistant.
      tools: Function descriptions offered to the model, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None

    @property
    def text(self) -> str:
        """The content of the last message."""
        return self.messages[-1]["content"]

    def prompt_ids(self, model: Model) -> list[int]:
        """Returns the ids that the model reads before it answers.

        Raises:
          ConfigError: If the chat template refuses the messages, or leaves a tool out.
        """
        try:
            ids = model.prompt_ids(self.messages, tools=self.tools)
        except (jinja2.TemplateError, RowError) as error:
            raise ConfigError(f"The chat template refuses the conversation: {error}") from error
        text = model.tokenizer.decode(ids)
        for tool in self.tools or []:
            name = str(tool_name(tool))
            if name not in text:
                raise ConfigError(
                    f"The tool {name!r} does not occur in the prompt: the model's chat template "
                    "has no place for tools. Use another model, or leave tools out."
                )
        return ids


def from_prompts(
    prompts: Sequence[str], *, system: str = "", tools: list[Any] | None = None
) -> list[Question]:
    """Returns a question for each text.

    Raises:
      DataError: If a text is empty, or `tools` are not function descriptions.
    """
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    origins = [f"prompt {number}" for number in range(1, len(rows) + 1)]
    return _questions(rows, origins, system=system, tools=tools)


def from_file(file: str, *, system: str = "", tools: list[Any] | None = None) -> list[Question]:
    """Reads one conversation, or several, of a JSON or JSONL file.

    A row is `{"messages": […], "tools": […]}` or another form of training data, or a list of
    messages. An answer at its end is left out: it is what is generated.

    Args:
      file: Its path.
      system: A message that goes before each conversation.
      tools: Offered in each conversation that has none of its own.

    Raises:
      ConfigError: If the file cannot be read.
      DataError: For rows that cannot be understood, with file and line.
    """
    values = _read_json_rows(file)
    if values and all(_is_message(value) for _, value in values):
        values = [(values[0][0], [value for _, value in values])]
    rows = [_as_row(value) for _, value in values]
    origins = [f"{file}:{line}" for line, _ in values]
    return _questions(rows, origins, system=system, tools=tools)


def read_tools(file: str) -> list[Any]:
    """Reads function descriptions: a JSON list of them, or an object with such a list as `tools`.

    Raises:
      ConfigError: If the file holds something else.
    """
    values = [value for _, value in _read_json_rows(file)]
    if len(values) == 1 and isinstance(values[0], dict) and "tools" in values[0]:
        values = values[0]["tools"]
    if not isinstance(values, list) or not values or not all(isinstance(v, dict) for v in values):
        raise ConfigError(
            f'{file}: expected a list of function descriptions, such as [{{"type": "function", '
            '"function": {"name": "…", "parameters": {…}}}].'
        )
    return values


def _read_json_rows(file: str) -> list[tuple[int, Any]]:
    """Returns (line, value) of the rows of a file: the items of a list, or a value a line."""
    try:
        text = Path(file).expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_json(lines[0][1]):
        return [(number, _parse(line, f"{file}:{number}")) for number, line in lines]
    value = _parse(text, file)
    return [(1, item) for item in value] if isinstance(value, list) else [(1, value)]


def _parse(text: str, origin: str) -> Any:
    try:
        return json_text.loads(text)
    except JsonError as error:
        raise DataError(f"{origin}: {error}.") from error


def _is_json(text: str) -> bool:
    try:
        json_text.loads(text)
    except JsonError:
        return False
    return True


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"}.isdisjoint(value)


def _as_row(value: Any) -> Any:
    return {"messages": value} if isinstance(value, list) else value


def _questions(
    rows: Sequence[Any], origins: Sequence[str], *, system: str, tools: list[Any] | None
) -> list[Question]:
    found, problems = [], []
    for row, origin in zip(rows, origins, strict=True):
        try:
            found.append(_question(row, origin, system=system, tools=tools))
        except RowError as error:
            problems.append(f"{origin}: {error}")
    if problems:
        raise DataError(problems)
    return found


def _question(row: Any, origin: str, *, system: str, tools: list[Any] | None) -> Question:
    """Reads a row as training does, with an answer in the place where it has none yet."""
    if not isinstance(row, dict):
        raise RowError('expected an object such as {"messages": […]}, or a list of messages.')
    column = next((name for name in _COLUMNS if name in row), "")
    turns = row.get(column)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        before = [{"role": "system", "content": system}] if system else []
        answer = [] if is_answer(turns[-1]) else [{"role": "assistant", "content": "-"}]
        row = {**row, column: [*before, *turns, *answer]}
    elif system:
        raise RowError("--system goes with rows of messages; leave it out.")
    if tools:
        if row.get("tools"):
            raise RowError("the row has tools of its own; leave --tools out.")
        row = {**row, "tools": tools}
    item = choose_format(Row(row, 1), SourceSpec(name=origin), origin).convert(row, origin)
    if not isinstance(item, Conversation):
        raise RowError("the row is plain text; expected messages.")
    return Question(item.messages[:-1], item.tools)
