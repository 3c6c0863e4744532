"""Turns raw rows of the known formats into conversations or text documents."""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.data.json_text import loads as load_json
from jaxft.data.problems import Problems, RowError
from jaxft.data.sources import Row, Source
from jaxft.data.specs import SourceSpec
from jaxft.data.thinking import THINKING_KEYS
from jaxft.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")

EXAMPLES = {
    "messages": '{"messages": [{"role": "user", "content": "Is it open?"}, '
    '{"role": "assistant", "content": "Yes, until six."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "Is it open?"}, '
    '{"from": "gpt", "value": "Yes, until six."}]}',
    "alpaca": '{"instruction": "Name the colour.", "input": "grass", "output": "green"}',
    "prompt_completion": '{"prompt": "Is it open?", "completion": "Yes, until six."}',
    "columns": "with --config.data.columns=prompt=question,completion=answer: "
    '{"question": "Is it open?", "answer": "Yes, until six."}',
    "text": '{"text": "A document."}',
}

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *THINKING_KEYS)
_ROLE_NAMES = {"developer": "system", "function": "tool"}
"""Roles under other names: of newer and older servers."""
_TRAIN_KEYS = ("weight", "loss_weight", "loss", "train", "training", "trainable")
"""Keys that say whether a turn is trained: true or 1, false or 0."""
_MASK_KEYS = ("mask", "masked", "loss_mask", "ignore", "exclude", "train_detail")
"""Keys that say so in ways that differ from tool to tool."""
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_PREFERENCE_COLUMNS = ("chosen", "rejected", "label")
_PAIRS = (("question", "answer"), ("query", "response"), ("input", "output"), ("source", "target"))
_TEXT_COLUMNS = {
    "alpaca": ("instruction", "input", "context", "output", "response", "system"),
    "prompt_completion": ("prompt", "completion", "response", "system"),
}
"""Columns of the formats with fixed names whose cells are read as text."""
_LABEL_COLUMNS = ("label", "labels", "category", "class", "intent", "target")


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


@dataclass(frozen=True, slots=True)
class Format:
    """How the rows of one source are read.

    Attributes:
      name: One of the choices of `data.format`.
      convert: From (row value, origin) to an item; raises `RowError`.
      description: What was found, for the log.
      columns: Columns whose cells are read as text, numbers included.
    """

    name: str
    convert: Callable[[Any, str], Conversation | Document]
    description: str
    columns: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether rows become conversations, of which only answers are trained."""
        return self.name != "text"


def read_items(
    source: Source,
    problems: Problems,
    *,
    on_format: Callable[[Format], None],
    chosen: Collection[int] | None = None,
) -> Iterator[tuple[Row, Conversation | Document]]:
    """Yields rows and what they are of a source; bad rows go to `problems`.

    Args:
      source: What is read; it names the format, or leaves it to be found out from the first row.
      problems: Raises by itself when it is full; the caller checks it at the end.
      on_format: Called once, before the first item.
      chosen: Numbers of the rows that are read; by default all.

    Raises:
      DataError: If no row is in a known format, or the columns that are named do not exist.
    """
    row_format, unknown = None, None
    rows = source.rows(problems)
    if chosen is not None:
        rows = itertools.islice((row for row in rows if row.number in chosen), len(chosen))
    for row in rows:
        origin = source.origin(row.line)
        if row_format is None:
            try:
                row_format = choose_format(row, source.spec, origin)
            except DataError as error:
                if not problems.are_skipped:
                    raise
                unknown = unknown or error
                problems.add(origin, error.problems[0].removeprefix(f"{origin}: "), raw=row.value)
                continue
            except RowError as error:
                problems.add(origin, str(error), raw=row.value, example=EXAMPLES["messages"])
                continue
            description = row_format.description + source.remark()
            description += _describe_numbers(row.value, row_format.columns)
            row_format = dataclasses.replace(row_format, description=description)
            on_format(row_format)
        try:
            item = _convert(row.value, row_format, origin, named=source.spec.format != "auto")
        except RowError as error:
            problems.add(origin, str(error), raw=row.value, example=EXAMPLES[row_format.name])
        else:
            yield row, item
    if row_format is None and unknown is not None:
        raise unknown


def _convert(
    value: Any, row_format: Format, origin: str, *, named: bool
) -> Conversation | Document:
    _check_meaning(value, row_format, named=named)
    try:
        item = row_format.convert(value, origin)
        _check_characters(item)
    except RecursionError:
        raise RowError("the row is nested too deeply.") from None
    return item


def choose_format(row: Row, spec: SourceSpec, origin: str) -> Format:
    """Returns the named format, or the one that the first row is in.

    Raises:
      DataError: If the row is in none of the formats, or in more than one.
      RowError: If the row is not even an object, which says nothing of the other rows.
    """
    if isinstance(row.value, str):
        if spec.format in ("auto", "text"):
            return Format("text", _document, f"plain text, one document a {spec.text_split}")
        raise DataError(
            f"{origin}: this is plain text, but the format of the source is {spec.format!r}. If "
            f"text is meant, write so after its name: '{spec.name}:format=text'."
        )
    columns = list(_columns(row.value))
    if spec.format in ("columns", "text"):
        _check_columns(spec.mapping, columns, origin)
        return _mapped_format(spec.format, spec.mapping, columns)
    if spec.format == "auto":
        return _detect(row.value, origin)
    return Format(
        spec.format,
        _CONVERTERS[spec.format],
        "as the configuration says",
        _TEXT_COLUMNS.get(spec.format, ()),
    )


def _check_characters(item: Conversation | Document) -> None:
    """Raises RowError for text that no encoding can write, whichever way it came into a row."""
    if isinstance(item, Document):
        text = item.text
    else:
        text = json.dumps([item.messages, item.tools], ensure_ascii=False, default=repr)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise RowError(
            f"the row has half of a character, \\u{ord(found):04x} without its pair; an emoji was "
            "probably cut in two. Remove it."
        ) from None


def _check_meaning(value: Any, row_format: Format, *, named: bool) -> None:
    """Raises RowError for columns without which a row means something else.

    Args:
      value: The row.
      row_format: How it is read.
      named: Whether the user chose that format, and with it what is left out.
    """
    if not isinstance(value, dict):
        return
    media = [column for column in _MEDIA_COLUMNS if value.get(column) not in (None, "", [], {})]
    if media:
        raise RowError(
            f"the row has {_quoted(media)}, which no model here takes: only text is read. Remove "
            "the row, or the column if the text is complete without it."
        )
    preferred = [column for column in _PREFERENCE_COLUMNS if _is_preference(value, column)]
    if preferred and row_format.is_chat and not named:
        raise RowError(
            f"the row has {_quoted(preferred)}, which tells good answers from bad ones; training "
            "on the other columns alone leaves that out. If it is meant, name the format: "
            f"--config.data.format={row_format.name}."
        )


def _is_preference(value: dict[str, Any], column: str) -> bool:
    if column == "label":
        return isinstance(value.get(column), bool)
    return value.get(column) not in (None, "", [], {})


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _check_columns(mapping: Mapping[str, str], columns: list[str], origin: str) -> None:
    problems = [
        f"{origin}: there is no column {column!r}; the columns are {', '.join(columns)}."
        f"{nearest(column, columns)} Name columns that exist with --config.data.columns=…."
        for column in mapping.values()
        if column not in columns
    ]
    if problems:
        raise DataError(problems)


def _detect(value: dict[str, Any], origin: str) -> Format:
    columns = list(value)
    name, used = _detected_name(value)
    if name == "text":
        labels = [column for column in columns if column in _LABEL_COLUMNS]
        if labels:
            raise DataError(
                f"{origin}: the columns {', '.join(columns)} can be read in two ways. To train the "
                f"label as the answer: --config.data.format=columns --config.data.columns="
                f"prompt=text,completion={labels[0]}. To train the text alone: "
                "--config.data.format=text. Or after the name of this source alone: "
                f"':prompt=text:completion={labels[0]}' or ':format=text'."
            )
        return _mapped_format("text", {"text": "text"}, columns)
    if name == "columns":
        return _mapped_format("columns", {"prompt": used[0], "completion": used[1]}, columns)
    if not name:
        raise DataError(
            [
                f"{origin}: the columns {', '.join(columns)} are in no known format.",
                "Name the two that hold prompt and answer: --config.data.format=columns "
                "--config.data.columns=prompt=…,completion=…, or after the name of this source "
                "alone ':prompt=…:completion=…'; or write rows in one of these forms:",
                *EXAMPLES.values(),
            ]
        )
    description = f"columns {', '.join(used)}{_unused(used, columns)}"
    return Format(name, _CONVERTERS[name], description, _TEXT_COLUMNS.get(name, ()))


def told_columns(names: Iterable[str], spec: SourceSpec) -> list[str]:
    """Returns the columns that make something with these names a row; none if they make no row."""
    if spec.mapping:
        return list(spec.mapping.values()) if {*spec.mapping.values()} <= {*names} else []
    return _detected_name(dict.fromkeys(names))[1]


def _detected_name(value: dict[str, Any]) -> tuple[str, list[str]]:
    """Returns the format and the columns that told it apart; an empty name if none fits."""
    if "messages" in value:
        return "messages", _present(value, "messages", "system", "tools", "functions")
    if "conversations" in value or "conversation" in value:
        column = "conversations" if "conversations" in value else "conversation"
        return "sharegpt", _present(value, column, "system", "tools", "functions")
    if "instruction" in value and ("output" in value or "response" in value):
        return "alpaca", _present(
            value, "instruction", "input", "context", "output", "response", "system", "history"
        )
    if "prompt" in value and ("completion" in value or "response" in value):
        return "prompt_completion", _present(
            value, "prompt", "completion", "response", "system", "tools", "functions"
        )
    for pair in _PAIRS:
        if all(column in value for column in pair):
            return "columns", list(pair)
    if "text" in value:
        return "text", ["text"]
    return "", []


def _present(value: dict[str, Any], *columns: str) -> list[str]:
    return [column for column in columns if column in value]


def _unused(used: list[str], columns: list[str]) -> str:
    rest = [column for column in columns if column not in used]
    return f" (not used: {', '.join(rest)})" if rest else ""


def _mapped_format(name: str, mapping: dict[str, str], columns: list[str]) -> Format:
    used = list(mapping.values())
    pairs = ", ".join(f"{part} = column {column!r}" for part, column in mapping.items())
    description = f"{pairs}{_unused(used, columns)}"
    if name == "text":
        return Format(
            name,
            lambda value, origin: _document(_text(_columns(value), mapping["text"]), origin),
            description,
            tuple(used),
        )

    def convert(value: Any, origin: str) -> Conversation:
        row = _columns(value)
        system = _optional_text(row, mapping["system"]) if "system" in mapping else ""
        return _pair(
            _text(row, mapping["prompt"]), _text(row, mapping["completion"]), origin, system=system
        )

    return Format(name, convert, description, tuple(used))


def _columns(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"the row is {_show(value)}; expected an object with named columns.")
    return value


def _text(row: dict[str, Any], key: str) -> str:
    """Returns a cell as text, numbers included; an absent, empty or missing one is an error."""
    if key not in row:
        raise RowError(f"key {key!r} is missing; the row has {', '.join(row)}.{nearest(key, row)}")
    value = row[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{key!r} is {value}, a missing number; expected text.")
    if isinstance(value, bool | int | float):
        return _number_text(value, key)
    if not isinstance(value, str):
        raise RowError(f"{key!r} is {_show(value)}; expected a string.")
    if not value.strip():
        raise RowError(f"{key!r} is empty; expected text.")
    return value


def _describe_numbers(value: Any, columns: Iterable[str]) -> str:
    """Returns what a log should say of cells that are no text but become one; mostly ''."""
    row, found = _columns(value) if columns else {}, ""
    for column in columns:
        if isinstance(row.get(column), bool | int | float):
            with contextlib.suppress(RowError):  # which is told with the row
                kind = "true or false" if isinstance(row[column], bool) else "numbers"
                text = _text(row, column)
                found += f"; {column!r} holds {kind}, which become text such as {text!r}"
    return found


def _number_text(value: bool | int | float, key: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        raise RowError(f"{key!r} is an integer of too many digits; expected text.") from None


def _optional_text(row: dict[str, Any], key: str) -> str:
    """Returns a cell as text, or '' where it is absent, empty or missing."""
    value = row.get(key)
    is_missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return "" if is_missing else _text(row, key)


def _document(value: Any, origin: str) -> Document:
    if not isinstance(value, str):
        raise RowError(f"the row is {_show(value)}; expected text.")
    return Document(value, origin)


def _pair(prompt: str, completion: str, origin: str, *, system: str = "") -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": completion})
    return Conversation(messages, None, origin)


def _from_messages(value: Any, origin: str) -> Conversation:
    row = _columns(value)
    if "messages" not in row:
        raise RowError(
            f"key 'messages' is missing; the row has {', '.join(row)}.{nearest('messages', row)}"
        )
    return _conversation(row["messages"], "messages", row, origin)


def _from_sharegpt(value: Any, origin: str) -> Conversation:
    row = _columns(value)
    column = next((name for name in ("conversations", "conversation") if name in row), None)
    if column is None:
        raise RowError(f"key 'conversations' is missing; the row has {', '.join(row)}.")
    turns = row[column]
    if not isinstance(turns, list):
        raise RowError(f"{column!r} is {_show(turns)}; expected a list of turns.")
    messages = [_sharegpt_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]
    return _conversation(messages, column, row, origin)


def _sharegpt_message(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RowError(f"{where} is {_show(turn)}; expected an object with 'from' and 'value'.")
    name = turn["from"]
    if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
        raise RowError(
            f"{where}.from is {_show(name)}; expected one of {', '.join(_SHAREGPT_ROLES)}."
            f"{nearest(str(name), _SHAREGPT_ROLES)}"
        )
    message = {key: item for key, item in turn.items() if key not in ("from", "value")}
    said: dict[str, Any] = {"role": _SHAREGPT_ROLES[name]}
    if name == "function_call":
        said["tool_calls"] = [_function_call(turn["value"], where)]
    else:
        said["content"] = turn["value"]
    twice = [key for key in said if message.get(key) not in (None, "", [])]
    if twice:
        raise RowError(f"{where} has {_quoted(twice)} beside 'from' and 'value'; remove it.")
    return message | said


def _function_call(text: Any, where: str) -> dict[str, Any]:
    try:
        call = load_json(text) if isinstance(text, str) else text
        return {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
    except (TypeError, ValueError, KeyError) as error:
        raise RowError(
            f"{where}.value is {_show(text)}; expected JSON with 'name' and 'arguments'."
        ) from error


def _from_alpaca(value: Any, origin: str) -> Conversation:
    row = _columns(value)
    _check_one_of(row, "output", "response")
    _check_one_of(row, "input", "context")
    answer = "response" if "response" in row and "output" not in row else "output"
    context = _optional_text(row, "input") or _optional_text(row, "context")
    prompt = _text(row, "instruction")
    pair = _pair(
        f"{prompt}\n\n{context}" if context else prompt,
        _text(row, answer),
        origin,
        system=_optional_text(row, "system"),
    )
    begin = 1 if pair.messages[0]["role"] == "system" else 0
    messages = [*pair.messages[:begin], *_history(row), *pair.messages[begin:]]
    return dataclasses.replace(pair, messages=messages)


def _check_one_of(row: dict[str, Any], one: str, other: str) -> None:
    """Raises RowError for two columns of which one alone would be read."""
    if row.get(one) not in (None, "", []) and row.get(other) not in (None, "", [], row[one]):
        raise RowError(f"the row has both {one!r} and {other!r}; expected one of them.")


def _history(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the earlier turns of an Alpaca row: a list of pairs of instruction and answer."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise RowError(
            f"'history' is {_show(history)}; expected a list of pairs of instruction and answer."
        )
    for number, pair in enumerate(history):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise RowError(f"history[{number}] has {_show(text)}; expected two texts.")
            yield {"role": role, "content": text}


def _from_prompt_completion(value: Any, origin: str) -> Conversation:
    row = _columns(value)
    _check_one_of(row, "completion", "response")
    answer = "response" if "response" in row and "completion" not in row else "completion"
    prompt, completion = row.get("prompt"), row.get(answer)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, "prompt + completion", row, origin)
    pair = _pair(_text(row, "prompt"), _text(row, answer), origin)
    return _conversation(pair.messages, "prompt + completion", row, origin)


_CONVERTERS: dict[str, Callable[[Any, str], Conversation | Document]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _conversation(messages: Any, where: str, row: dict[str, Any], origin: str) -> Conversation:
    if isinstance(messages, str):
        messages = _parsed(messages, where)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"{where!r} is {_show(messages)}; expected a list of messages.")
    cleaned = [_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    if system := _optional_text(row, "system"):
        cleaned.insert(0, {"role": "system", "content": system})
    _check_order(cleaned, where)
    known = (*_MESSAGE_KEYS, *_TRAIN_KEYS, "function_call")
    unused = {
        str(key): None
        for message in messages
        for key, item in message.items()
        if key not in known and item not in (None, "", [], {})
    }
    return Conversation(cleaned, _tools(row), origin, tuple(unused))


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """Returns the tools of a row, of which each has a name."""
    _check_one_of(row, "tools", "functions")
    where = "tools" if row.get("tools") else "functions"
    tools = row.get(where) or None
    if isinstance(tools, str):
        tools = _parsed(tools, where) or None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(f"{where!r} is {_show(tools)}; expected a list of function descriptions.")
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict) or not _is_name(tool_name(tool)):
            raise RowError(
                f"{where}[{number}] is {_show(tool)}; expected "
                '{"type": "function", "function": {"name": "…", "parameters": {…}}}.'
            )
    if where == "functions":
        return [{"type": "function", "function": tool} for tool in tools]
    return tools


def tool_name(tool: Mapping[str, Any]) -> Any:
    """Returns the name of a function description, which may lie under 'function'."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Says whether a turn, in the form of messages or of ShareGPT, is the assistant's."""
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and _SHAREGPT_ROLES.get(role) == "assistant"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _parsed(text: str, where: str) -> Any:
    try:
        return load_json(text)
    except ValueError as error:
        raise RowError(f"{where!r} is {_show(text)}; expected JSON: {error}.") from error


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {_show(message)}; expected an object.")
    role = message.get("role")
    if not isinstance(role, str) or role not in (*ROLES, *_ROLE_NAMES):
        raise RowError(
            f"{where}.role is {_show(role)}; expected one of {', '.join(ROLES)}."
            f"{nearest(str(role), ROLES)}"
        )
    cleaned = {name: message[name] for name in _MESSAGE_KEYS if message.get(name)}
    cleaned |= {"role": _ROLE_NAMES.get(role, role), "content": _content(message, where)}
    for key in (*THINKING_KEYS, "name", "tool_call_id"):
        if not isinstance(cleaned.get(key, ""), str):
            raise RowError(f"{where}.{key} is {_show(cleaned[key])}; expected a string.")
    _check_one_thinking(cleaned, where)
    if calls := _calls(message, where):
        cleaned["tool_calls"] = _tool_calls(calls, where)
    if weight := _weight(message, where):
        cleaned["weight"] = weight[0]
    has_reasoning = any(cleaned.get(key) for key in THINKING_KEYS)
    if not cleaned["content"].strip() and not cleaned.get("tool_calls") and not has_reasoning:
        kind = "an answer" if cleaned["role"] == "assistant" else "text"
        raise RowError(f"{where}.content is empty; expected {kind}.")
    return cleaned


def _check_one_thinking(message: dict[str, Any], where: str) -> None:
    """Servers repeat reasoning under two keys; templates would read one of them."""
    found = {key: message[key] for key in THINKING_KEYS if key in message}
    if found and message["role"] != "assistant":
        raise RowError(
            f"{where} is from {message['role']!r} and has {_quoted(found)}; expected reasoning "
            "in assistant turns alone."
        )
    if len(set(found.values())) > 1:
        raise RowError(f"{where} has {_quoted(found)} with unlike texts; expected one of them.")


def _weight(message: dict[str, Any], where: str) -> list[int]:
    """Returns whether a turn is trained, 0 or 1; an empty list if the message does not say."""
    refused = [key for key in _MASK_KEYS if message.get(key) is not None]
    if refused:
        raise RowError(
            f"{where}.{refused[0]} is {_show(message[refused[0]])}, which tools read in unlike "
            'ways; write "weight": 0 for a turn that is not trained, "weight": 1 for one that is.'
        )
    given = {key: message[key] for key in _TRAIN_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{where}.{key} is {_show(value)}; expected 0 or 1.")
        if value and key != "weight" and message["role"] != "assistant":
            raise RowError(
                f"{where}.{key} is {_show(value)} on a turn of {message['role']!r}; only assistant "
                "turns are trained. Remove the key, or train on everything with "
                "--config.data.train_on=all."
            )
    values = {int(value) for value in given.values()}
    if len(values) > 1:
        raise RowError(f"{where} has {_quoted(given)}, which contradict each other.")
    return list(values)


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RowError(f"{where}.content is {_show(content)}; expected a string.")
    return content


def _part(part: Any, where: str) -> str:
    kinds = ("text", "input_text", "output_text")
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise RowError(
            f"{where} is {_show(part)}; expected a part with a 'text': only text is read."
        )
    if part.get("type", "text") not in kinds:
        raise RowError(
            f"{where}.type is {_show(part['type'])}; expected one of {', '.join(kinds)}."
        )
    return part["text"]


def _calls(message: dict[str, Any], where: str) -> list[Any]:
    """Returns the calls of a message, in their old form too; an empty list if there are none."""
    calls, old = message.get("tool_calls") or [], message.get("function_call")
    if (calls or old) and message["role"] != "assistant":
        raise RowError(f"{where} is from {message['role']!r} and has calls; expected 'assistant'.")
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls is {_show(calls)}; expected a list.")
    if calls and old:
        raise RowError(f"{where} has both 'tool_calls' and 'function_call'; expected one of them.")
    return [old] if old else calls


def _tool_calls(calls: list[Any], where: str) -> list[dict[str, Any]]:
    """Returns calls with arguments as the raw JSON text, in which no schema adds keys."""
    cleaned = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise RowError(
                f"{where}.tool_calls[{number}] is {_show(call)}; expected "
                '{"type": "function", "function": {"name": "…", "arguments": {…}}}.'
            )
        arguments = _arguments(function, f"{where}.tool_calls[{number}].arguments")
        cleaned.append(
            {
                **{key: call[key] for key in ("id",) if call.get(key) is not None},
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return cleaned


def _arguments(function: dict[str, Any], where: str) -> str:
    """Returns the arguments of a call as JSON text: as written, or '{}' where there are none."""
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return "{}"
    text = arguments
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where)
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, dict):
        raise RowError(f"{where!r} is {_show(arguments)}; expected an object of named arguments.")
    return text


_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant with tool_calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def _check_order(messages: list[dict[str, Any]], where: str) -> None:
    before = "start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            expected = " or ".join(repr(name) for name in _MAY_FOLLOW[before])
            place = "comes first" if before == "start" else f"follows {before!r}"
            raise RowError(f"{where}[{number}].role is {role!r} and {place}; expected {expected}.")
        before = role
        if message.get("tool_calls") and number < len(messages) - 1:
            before = "assistant with tool_calls"
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"{where}[{len(messages) - 1}].role is {messages[-1]['role']!r} and comes last; "
            "expected 'assistant', whose answer is what is learnt."
        )


def _content_for_comparison(message: dict[str, Any]) -> list[Any]:
    return [message["role"], " ".join(message["content"].split()), message.get("tool_calls")]


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (RecursionError, ValueError):
        text = "(a value that cannot be written)"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}…"
