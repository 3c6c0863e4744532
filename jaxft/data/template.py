"""Chat templates: which one is used, what it makes of messages, and where its answers end.

A template turns messages into text with all special tokens; the tokenizer adds none. What is known
of a template is found by rendering short conversations whose texts are marked.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.control_tokens import ControlTokens
from jaxft.data.problems import RowError
from jaxft.data.thinking import THINKING_KEYS, without_block
from jaxft.errors import ConfigError, DataError

BUILT_IN = "built-in default"
DATE = datetime.datetime(2024, 7, 26)
"""The day that it is for every chat template: the one that Llama 3 templates fall back to.

Text with the date of the day would give other tokens tomorrow than today, from the same rows.
"""
MARK = "xqzmarkzqx"
"""A text that takes the place of another one, to find where a template writes it."""

_REASONING = "xqzthoughtzqx"
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
_DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:\\n' }}{%- endif -%}"
)


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and what is known of it.

    Attributes:
      text: The Jinja source; an export writes it beside the weights.
      origin: 'tokenizer', a file, or 'built-in default'.
      control: Control tokens of the tokenizer that it was resolved for.
      tool_text: The Jinja source for rows with tools: the tokenizer's template named `tool_use`,
        if it has one, else the same as `text`.
      ends: Token text -> id of what ends an answer in a rendered conversation, be it the last turn
        or an earlier one.
      stops: Token text -> id of what ends an answer that is generated. Empty if nothing does, and
        then answers cannot be trained. An end that also occurs within answers is not among them.
      earlier_stop: The one of `stops` that the template puts behind earlier answers alone; empty if
        it ends all of them alike.
      lead: Text that the template puts between the prompt and the content of an answer without
        reasoning.
      separator: Text between the reasoning and the content of an answer; empty if the template
        writes no reasoning.
      arguments_as_text: Whether it expects tool-call arguments as JSON text, and not as an object
        that it writes as JSON itself.
    """

    text: str
    origin: str
    control: ControlTokens = field(compare=False, repr=False)
    tool_text: str = ""
    ends: Mapping[str, int] = field(default_factory=dict)
    stops: Mapping[str, int] = field(default_factory=dict)
    earlier_stop: str = ""
    lead: str = ""
    separator: str = ""
    arguments_as_text: bool = True

    @property
    def last_stops(self) -> dict[str, int]:
        """Stop tokens that the last answer of a conversation ends with."""
        return {text: i for text, i in self.stops.items() if text != self.earlier_stop}

    @property
    def is_dated(self) -> bool:
        """Whether it writes the date of the day, in place of which it is given `DATE`."""
        return "strftime_now" in self.text + self.tool_text

    @property
    def built_in(self) -> bool:
        """Whether neither the tokenizer nor `data.template` gave one."""
        return self.origin == BUILT_IN

    def source(self, *, tools: bool) -> str:
        """Returns the Jinja source for a conversation with or without tools."""
        text = self.tool_text if tools and self.tool_text else self.text
        return _fixed_clock() + text if "strftime_now" in text else text

    def find_end(self, text: str, start: int, limit: int | None = None) -> re.Match[str] | None:
        """Returns the control token that ends an answer in a rendered conversation.

        A turn that ends in a token of its own, as a tool call of Harmony does, has none of `ends`
        behind it: then it is the first control token.

        Args:
          text: The rendered conversation.
          start: Position within the last text of the answer, or behind it.
          limit: Position where the next message has begun; None: the answer is the last message.
        """
        limit = len(text) if limit is None else limit
        found = [m for m in self.control.find(text) if start <= m.start() and m.end() <= limit]
        return next((m for m in found if m[0] in self.ends), found[0] if found else None)

    def content_of(self, answer: str) -> str:
        """Returns the content of an answer, without reasoning, control tokens and what leads in.

        Args:
          answer: What was rendered or generated, with its special tokens.
        """
        if self.separator and self.separator in answer:
            content = answer.rpartition(self.separator)[2]
        else:
            content = without_block(answer).removeprefix(self.lead)
        return self.control.remove(content)


def resolve_template(tokenizer: Any, config: DataConfig) -> Template:
    """Returns the template of `data.template`, else the tokenizer's, else the built-in default.

    Raises:
      ConfigError: If the file cannot be read, or the template cannot render a conversation.
    """
    text, tool_text, origin = _template_texts(tokenizer, config)
    kept = config.control_tokens == "keep"
    control = ControlTokens(tokenizer, text + tool_text, kept=kept)
    try:
        return _probe(tokenizer, Template(text, origin, control, tool_text))
    except Exception as error:  # templates raise whatever Jinja and they themselves like
        raise ConfigError(
            f"The chat template ({origin}) cannot render a plain conversation: {error}"
        ) from error


def _template_texts(tokenizer: Any, config: DataConfig) -> tuple[str, str, str]:
    """Returns the source for rows without tools, that for rows with tools, and their origin."""
    if config.template:
        try:
            text = Path(config.template).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config.data.template cannot be read: {error}") from error
        return text, text, config.template
    own: Any = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if named:
        text = named.get("default") or next(iter(named.values()))
        return text, named.get("tool_use") or text, "tokenizer"
    text = ("{{ bos_token }}" if adds_begin_token(tokenizer) else "") + _DEFAULT_TEMPLATE
    return text, text, BUILT_IN


def adds_begin_token(tokenizer: Any) -> bool:
    """Says whether the tokenizer itself puts its BOS before plain text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a").input_ids[:1] == [begin]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A template's rendering of an answer to a short question.

    Attributes:
      text: All that it writes behind the prompt.
      begin: Index in it at which the marked text of the answer begins.
      end: Index at which that text ends.
    """

    text: str
    begin: int
    end: int


def _probe(tokenizer: Any, template: Template) -> Template:
    """Returns the template with what answers of each kind tell of it."""
    plain = _probe_answer(tokenizer, template, content=MARK)
    last = _token(template.find_end(plain.text, plain.end))
    earlier = _token(_find_earlier_end(tokenizer, template))
    template = dataclasses.replace(template, ends=_ids(template, last, earlier))
    template = dataclasses.replace(
        template, arguments_as_text=_takes_text_arguments(tokenizer, template)
    )
    thought = _try_answer(
        tokenizer, template, content=MARK, **dict.fromkeys(THINKING_KEYS, _REASONING)
    )
    called = _try_answer(tokenizer, template, content="", tool_calls=[_probe_call(MARK)])
    of_call = _token(template.find_end(called.text, called.end)) if called else ""
    answers = [answer for answer in (plain, thought, called) if answer]
    if earlier in (last, of_call) or _occurs_within(earlier, answers, template):
        earlier = ""
    return dataclasses.replace(
        template,
        stops=_ids(template, last, of_call, earlier),
        earlier_stop=earlier,
        lead=plain.text[: plain.begin],
        separator=_separator(thought),
    )


def _occurs_within(token: str, answers: Sequence[_Answer], template: Template) -> bool:
    """Whether answers have a control token before their text, where it ends nothing."""
    heads = [answer.text[: answer.begin] for answer in answers]
    return any(match[0] == token for head in heads for match in template.control.find(head))


def _separator(thought: _Answer | None) -> str:
    """Returns the text between reasoning and content; empty if no reasoning is written."""
    head = thought.text[: thought.begin] if thought else ""
    return head.rpartition(_REASONING)[2] if _REASONING in head else ""


def _token(match: re.Match[str] | None) -> str:
    return match[0] if match else ""


def _ids(template: Template, *tokens: str) -> dict[str, int]:
    return {token: template.control.ids[token] for token in tokens if token}


def _probe_answer(tokenizer: Any, template: Template, **message: Any) -> _Answer:
    question = {"role": "user", "content": "a"}
    tools = [_PROBE_TOOL] if "tool_calls" in message else None
    prompt = render(tokenizer, [question], template=template, tools=tools, generation_prompt=True)
    messages = [question, {"role": "assistant", **message}]
    text = render(tokenizer, messages, template=template, tools=tools)
    answer = text[len(prompt) if text.startswith(prompt) else 0 :]
    begin = answer.rfind(MARK)
    if begin < 0:
        raise ValueError("it leaves out what the assistant says")
    return _Answer(answer, begin, begin + len(MARK))


def _try_answer(tokenizer: Any, template: Template, **message: Any) -> _Answer | None:
    """Returns `_probe_answer`, or None from a template that knows no such answer."""
    try:
        return _probe_answer(tokenizer, template, **message)
    except Exception:  # whatever the template raises; rows of this kind say so
        return None


def _find_earlier_end(tokenizer: Any, template: Template) -> re.Match[str] | None:
    """Returns the control token between an answer and the question that follows it."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": MARK},
        {"role": "user", "content": _REASONING},
        {"role": "assistant", "content": "b"},
    ]
    text = render(tokenizer, messages, template=template)
    start = text.find(MARK)
    return template.find_end(text, start, text.find(_REASONING, start)) if start >= 0 else None


_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def _probe_call(argument: str) -> dict[str, Any]:
    function = {"name": "probe", "arguments": json.dumps({"text": argument})}
    return {"id": "probe0001", "type": "function", "function": function}


def _takes_text_arguments(tokenizer: Any, template: Template) -> bool:
    text_taking = dataclasses.replace(template, arguments_as_text=True)
    call = _probe_call(MARK)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        text = render(tokenizer, messages, template=text_taking, tools=[_PROBE_TOOL])
    except Exception:  # the template wants an object, or knows no tools; rows then say so
        return False
    return call["function"]["arguments"] in text


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    template: Template,
    tools: list[Any] | None = None,
    generation_prompt: bool = False,
) -> str:
    """Returns the text that the template makes of messages, special tokens included.

    The date in it is `DATE`, whatever the day.
    """
    return tokenizer.apply_chat_template(
        [_for_template(message, template) for message in messages],
        tools=tools,
        chat_template=template.source(tools=bool(tools)),
        add_generation_prompt=generation_prompt,
        tokenize=False,
    )


@functools.cache
def _fixed_clock() -> str:
    """Returns a Jinja macro that stands in front of `strftime_now`, in a line of its own.

    A macro, because functions given as arguments reach templates only in older transformers.
    """
    directives = [f"%{letter}" for letter in _DIRECTIVES]
    directives += [f"%-{letter}" for letter in _DIRECTIVES]
    known = "".join(f".replace({name!r}, {DATE.strftime(name)!r})" for name in directives)
    return f"{{% macro strftime_now(format) %}}{{{{ format{known} }}}}{{% endmacro %}}\n"


def _for_template(message: dict[str, Any], template: Template) -> dict[str, Any]:
    if not message.get("tool_calls") or template.arguments_as_text:
        return message
    return {**message, "tool_calls": [_with_parsed_arguments(c) for c in message["tool_calls"]]}


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError as error:
        raise RowError(f"the arguments of {function['name']!r} are not JSON: {error}.") from error
    return {**call, "function": {**function, "arguments": arguments}}


def check_can_stop(template: Template, tokenizer: Any) -> None:
    """Refuses a template under which answers would never end.

    Raises:
      DataError: If no special token follows an answer.
    """
    if template.stops:
        return
    if template.built_in and tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has no EOS token, so an answer could never end. Add one to its "
            "tokenizer_config.json ('eos_token'), or set --config.data.template to a chat template "
            "that ends answers with a special token."
        )
    raise DataError(
        f"The chat template ({template.origin}) puts no special token after an answer, so the "
        "model would not learn to stop. Set --config.data.template to one that ends answers with a "
        "stop token."
    )
