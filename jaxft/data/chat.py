"""The one path from messages to token ids, for training, evaluation and generation alike.

A chat template turns messages into text with all special tokens; the tokenizer adds none. Which
tokens are trained is found by rendering the conversation turn by turn: what follows the prompt that
generation would see, up to the stop token, is the answer.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.formats import THINKING_KEYS, Conversation, RowError
from jaxft.errors import ConfigError, DataError

BUILT_IN = "built-in default"
DATE = datetime.datetime(2024, 7, 26)
"""The day that it is for every chat template: the one that Llama 3 templates fall back to.

Text with the date of the day would give other tokens tomorrow than today, from the same rows.
"""

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
_MARK = "xqzmarkzqx"
_THINKING = re.compile(r"(?:<think>)?(?P<reasoning>(?:(?!<think>).)*?)</think>\s*", re.DOTALL)
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
      stops: Token text -> id of what ends an assistant turn; generation stops there. Empty if
        nothing does, and then answers cannot be trained.
      arguments_as_text: Whether the template expects tool-call arguments as JSON text, and not as
        an object that it writes as JSON itself.
    """

    text: str
    origin: str
    stops: dict[str, int]
    arguments_as_text: bool

    @property
    def is_dated(self) -> bool:
        """Whether it writes the date of the day, in place of which it is given `DATE`."""
        return "strftime_now" in self.text

    @property
    def built_in(self) -> bool:
        """Whether neither the tokenizer nor `data.template` gave one."""
        return self.origin == BUILT_IN


@dataclass(frozen=True, slots=True)
class Example:
    """One document as tokens.

    Attributes:
      ids: int32 `[tokens]`.
      trained: bool `[tokens]`: whether predicting this token carries loss.
      thinking_blocks: Reasoning blocks among the trained turns.
      lost_blocks: How many of them the template left out.
      rewritten_turns: Trained turns that stand in the text otherwise than they are generated,
        because the template changes turns once they are history.
    """

    ids: np.ndarray
    trained: np.ndarray
    thinking_blocks: int = 0
    lost_blocks: int = 0
    rewritten_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn in a text: the prompt before it, and how many stop tokens up to its end."""

    prompt: str
    stops: int
    trained: bool


@dataclass(frozen=True, slots=True)
class _View:
    """One rendering of a conversation or of its beginning, and the turns that it trains."""

    text: str
    turns: list[_Turn]
    all_trained: bool
    thinking_blocks: int
    lost_blocks: int
    rewritten_turns: int


def resolve_template(tokenizer: Any, config: DataConfig) -> Template:
    """Returns the template of `data.template`, else the tokenizer's, else the built-in default.

    Raises:
      ConfigError: If the file cannot be read, or the template cannot render a conversation.
    """
    text, origin = _template_text(tokenizer, config)
    template = Template(text, origin, {}, True)
    try:
        stops = _find_stops(tokenizer, template)
    except Exception as error:  # templates raise whatever Jinja and they themselves like
        raise ConfigError(
            f"The chat template ({origin}) cannot render a plain conversation: {error}"
        ) from error
    return Template(text, origin, stops, _takes_text_arguments(tokenizer, template))


def _template_text(tokenizer: Any, config: DataConfig) -> tuple[str, str]:
    if config.template:
        try:
            return Path(config.template).expanduser().read_text("utf-8"), config.template
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.template cannot be read: {error}") from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    if own:
        return own, "tokenizer"
    begin = "{{ bos_token }}" if adds_begin_token(tokenizer) else ""
    return begin + _DEFAULT_TEMPLATE, BUILT_IN


def adds_begin_token(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS before plain text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a").input_ids[:1] == [begin]


def _find_stops(tokenizer: Any, template: Template) -> dict[str, int]:
    """Finds the special token after an answer, both at the end and within a conversation."""
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": _MARK}
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    stops = {}
    for messages in ([question, answer], [question, answer, question, {**answer, "content": "b"}]):
        tail = render(tokenizer, messages, template=template).partition(_MARK)[2]
        found = next((i for i in _encode(tokenizer, [tail])[0] if i in special), None)
        if found is not None:
            stops[tokenizer.convert_ids_to_tokens(found)] = found
    return stops


def _takes_text_arguments(tokenizer: Any, template: Template) -> bool:
    arguments = '{"probe": 1}'
    call = {"type": "function", "function": {"name": "probe", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return arguments in render(tokenizer, messages, template=template)
    except Exception:  # the template wants an object, or knows no tools; rows then say so
        return False


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
        chat_template=_fixed_clock() + template.text if template.is_dated else template.text,
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


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    template: Template,
    tools: list[Any] | None = None,
    thinking: str = "template",
) -> list[int]:
    """Returns the ids that the model sees before it answers: exactly those seen in training.

    Args:
      tokenizer: The tokenizer of the model.
      messages: What was said so far; the last one is not from the assistant.
      template: From `resolve_template`.
      tools: Function descriptions offered to the model.
      thinking: `data.thinking`; only 'drop' makes a difference, to the turns before.
    """
    shown = [_drop_thinking(item) if thinking == "drop" else item for item in messages]
    text = render(tokenizer, shown, template=template, tools=tools, generation_prompt=True)
    return _encode(tokenizer, [text])[0]


def text_examples(tokenizer: Any, texts: Sequence[str], *, end: bool) -> list[Example]:
    """Tokenises documents with the special tokens that the tokenizer itself adds.

    Args:
      tokenizer: The tokenizer of the model.
      texts: Documents; all of their tokens are trained.
      end: Append EOS, so that the model learns where documents stop.
    """
    begin, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
    examples = []
    for ids in _encode(tokenizer, texts, add_special_tokens=True):
        if begin is not None and ids[:2] == [begin, begin]:
            ids = ids[1:]
        if end and stop is not None and ids[-1:] != [stop]:
            ids = [*ids, stop]
        examples.append(Example(np.asarray(ids, np.int32), np.ones(len(ids), bool)))
    return examples


def chat_examples(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    template: Template,
    train_on: str,
    thinking: str,
) -> Iterator[list[Example] | RowError]:
    """Yields for each conversation its examples, usually one, or what is wrong with it.

    Args:
      tokenizer: The tokenizer of the model.
      conversations: Tokenised together, which is several times faster than one by one.
      template: From `resolve_template`.
      train_on: `data.train_on`.
      thinking: `data.thinking`.
    """
    views = [
        _try_views(tokenizer, conversation, template, train_on, thinking)
        for conversation in conversations
    ]
    found = [view for item in views if not isinstance(item, RowError) for view in item]
    texts = dict.fromkeys(
        text for view in found for text in (view.text, *(turn.prompt for turn in view.turns))
    )
    encoded = dict(zip(texts, _encode(tokenizer, list(texts)), strict=True))
    for item in views:
        if isinstance(item, RowError):
            yield item
            continue
        try:
            yield [_example(view, encoded, template, tokenizer) for view in item]
        except RowError as error:
            yield error


def _encode(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).input_ids


def _try_views(
    tokenizer: Any, conversation: Conversation, template: Template, train_on: str, thinking: str
) -> list[_View] | RowError:
    try:
        _check_contents(conversation, template)
        return _Renderer(tokenizer, conversation, template, train_on, thinking).views()
    except RowError as error:
        return error
    except Exception as error:  # raised by the template, on purpose or not
        return RowError(f"the chat template ({template.origin}) fails on this row: {error}")


def _check_contents(conversation: Conversation, template: Template) -> None:
    if template.built_in and (conversation.tools or _has_tool_calls(conversation)):
        raise RowError(
            "the row has tools, for which the built-in chat template has no form. "
            "Set data.template to a template with tools."
        )
    for number, message in enumerate(conversation.messages):
        for stop in template.stops:
            if stop in message["content"]:
                raise RowError(
                    f"message {number} contains the stop token {stop!r}, which the chat template "
                    "adds by itself. Remove it from the text."
                )


def _has_tool_calls(conversation: Conversation) -> bool:
    return any(message.get("tool_calls") for message in conversation.messages)


class _Renderer:
    """Renders one conversation, whole or up to a turn, and finds where its answers begin."""

    def __init__(
        self,
        tokenizer: Any,
        conversation: Conversation,
        template: Template,
        train_on: str,
        thinking: str,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.tools = conversation.tools
        self.thinking = thinking
        self.messages = conversation.messages
        if thinking == "drop":
            self.messages = [_drop_thinking(message) for message in self.messages]
        self.train_on = train_on
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        self.turns = turns[-1:] if train_on == "completion" else turns

    def views(self) -> list[_View]:
        if self.train_on == "all":
            silent = [turn for turn in self.turns if not self._is_trained(turn)]
            return [self._view(len(self.messages) - 1, silent)]
        if self.thinking != "keep":
            return [self._view(len(self.messages) - 1, self.turns)]
        return self._views_that_keep_thinking()

    def _views_that_keep_thinking(self) -> list[_View]:
        """One view for the last turn, and one for each turn whose thinking later views lack."""
        remaining = [turn for turn in self.turns if self._is_trained(turn)]
        views = []
        while remaining:
            last = remaining[-1]
            text = self._text(last)
            shown = [
                turn
                for turn in remaining[:-1]
                if not has_thinking(self.messages[turn]) or text.startswith(self._text(turn))
            ]
            views.append(self._view(last, [*shown, last]))
            remaining = [turn for turn in remaining[:-1] if turn not in shown]
        return views[::-1]

    def _is_trained(self, turn: int) -> bool:
        return bool(self.messages[turn].get("weight", 1))

    def _view(self, last: int, turns: list[int]) -> _View:
        text = self._text(last)
        prompts = [self._prompt(turn) for turn in turns]
        ends = [*(len(prompt) for prompt in prompts[1:]), len(text)][: len(prompts)]
        found, blocks, lost, rewritten = [], 0, 0, 0
        for turn, prompt, end in zip(turns, prompts, ends, strict=True):
            _check_prompt(prompt, text, turn)
            alone = text if turn == last else self._text(turn)
            same = text.startswith(alone)
            stops = sum(alone.count(stop, len(prompt)) for stop in self.template.stops)
            trained = self._is_trained(turn)
            found.append(_Turn(prompt, stops if same else 1, trained))
            if trained and has_thinking(self.messages[turn]):
                blocks += 1
                lost += not _shows_thinking(text[len(prompt) : end], self.messages[turn])
            rewritten += trained and not same
        return _View(text, found, self.train_on == "all", blocks, lost, rewritten)

    def _prompt(self, turn: int) -> str:
        return self._render(self.messages[:turn], generation_prompt=True)

    def _text(self, last: int) -> str:
        """Renders up to and with a turn; to keep thinking, with the block a template strips."""
        messages = self.messages[: last + 1]
        text = self._render(messages)
        answer = messages[-1]
        if self.thinking != "keep" or not has_thinking(answer):
            return text
        prompt = self._prompt(last)
        if _shows_thinking(text[len(prompt) :], answer) and text.startswith(prompt):
            return text
        bare = {key: item for key, item in answer.items() if key not in THINKING_KEYS}
        marked = self._render([*messages[:-1], {**bare, "content": _MARK}])
        return marked.replace(_MARK, _with_thinking(answer))

    def _render(self, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer,
            messages,
            template=self.template,
            tools=self.tools,
            generation_prompt=generation_prompt,
        )


def has_thinking(message: dict[str, Any]) -> bool:
    """Whether a message carries reasoning, in its content or under a key of its own."""
    return "</think>" in message["content"] or any(message.get(key) for key in THINKING_KEYS)


def _reasoning(message: dict[str, Any]) -> str:
    separate = next((message[key] for key in THINKING_KEYS if message.get(key)), "")
    match = _THINKING.search(message["content"])
    return (separate or (match["reasoning"] if match else "")).strip()


def _shows_thinking(text: str, message: dict[str, Any]) -> bool:
    reasoning = _reasoning(message)
    return reasoning in text if reasoning else "</think>" in text


def _with_thinking(message: dict[str, Any]) -> str:
    """Returns the content with its block written out, as reasoning models generate it."""
    if "</think>" not in message["content"]:
        return f"<think>\n{_reasoning(message)}\n</think>\n\n{message['content']}"
    opening = "" if "<think>" in message["content"] else "<think>\n"
    return opening + message["content"]


def _drop_thinking(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in THINKING_KEYS}
    return {**kept, "content": _THINKING.sub("", message["content"])}


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


def _check_prompt(prompt: str, text: str, turn: int) -> None:
    if text.startswith(prompt):
        return
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b),
        min(len(prompt), len(text)),
    )
    told = (
        f"message {turn} cannot be trained: generation would begin with …{prompt[same:][:40]!r}, "
        f"but the rendered conversation has …{text[same:][:40]!r} in that place."
    )
    if "<think>" in prompt[same:]:
        raise RowError(
            f"{told} The chat template opens a <think> block that the answer lacks once rendered. "
            "data.thinking=keep trains answers with their blocks; answers without one need another "
            "data.template."
        )
    raise RowError(f"{told} The chat template changes earlier turns; set another data.template.")


def _example(
    view: _View, encoded: dict[str, list[int]], template: Template, tokenizer: Any
) -> Example:
    ids = np.asarray(encoded[view.text], np.int32)
    trained = np.full(len(ids), view.all_trained)
    for turn in view.turns:
        prompt = encoded[turn.prompt]
        if ids[: len(prompt)].tolist() != prompt:
            raise RowError(_boundary_problem(ids, prompt, tokenizer))
        start = len(prompt)
        trained[start : _turn_end(ids, start, turn.stops, template)] = turn.trained
    return Example(ids, trained, view.thinking_blocks, view.lost_blocks, view.rewritten_turns)


def _turn_end(ids: np.ndarray, start: int, stops: int, template: Template) -> int:
    """Returns the position after the stop token that ends the answer beginning at `start`."""
    places = np.flatnonzero(np.isin(ids[start:], list(template.stops.values())))
    if not 0 < stops <= len(places):
        raise RowError(
            "an answer does not end with a stop token of the chat template "
            f"({', '.join(template.stops) or 'it has none'}), so the model would not learn to stop."
        )
    if places[0] == 0:
        raise RowError(
            "the chat template leaves nothing of an answer but its stop token; with reasoning and "
            "no text after it, set data.thinking=keep."
        )
    return start + int(places[stops - 1]) + 1


def _boundary_problem(ids: np.ndarray, prompt: list[int], tokenizer: Any) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(ids))
    pieces = [tokenizer.decode(part[same : same + 3]) for part in (prompt, ids.tolist())]
    return (
        f"the tokens of the prompt are not the first tokens of prompt and answer: {pieces[0]!r} "
        f"became {pieces[1]!r}, because the tokenizer merges across the boundary. Remove white "
        "space at the start of the answer, or set a data.template whose prompt ends with a special "
        "token."
    )


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
            "tokenizer_config.json ('eos_token'), or set data.template to a chat template that "
            "ends answers with a special token."
        )
    raise DataError(
        f"The chat template ({template.origin}) puts no special token after an answer, so the "
        "model would not learn to stop. Set data.template to one that ends answers with a stop "
        "token."
    )
