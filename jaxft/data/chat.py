"""The one path from rows to token ids, for training, evaluation and generation alike.

Which tokens are trained is found in rendered text: an answer begins where the prompt ends that
generation would see, and it ends with the control token that the template writes behind its last
text. Control tokens that rows spell are plain text throughout.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.data.control_tokens import ControlTokens
from jaxft.data.formats import Conversation, tool_name
from jaxft.data.problems import RowError
from jaxft.data.template import MARK, Template, render
from jaxft.data.thinking import (
    THINKING_KEYS,
    THINKING_TOKENS,
    has_thinking,
    shows_thinking,
    with_thinking,
    without_block,
    without_thinking,
)


@dataclass(frozen=True, slots=True)
class Example:
    """One document as tokens.

    Attributes:
      ids: int32 `[tokens]`.
      trained: bool `[tokens]`: whether predicting this token carries loss.
      thinking_blocks: Number of reasoning blocks among the trained turns.
      lost_blocks: Number of those that the template left out.
      rewritten_turns: Number of trained turns that stand in the text otherwise than they are
        generated, because the template changes turns once they are history.
      control_tokens: Control token -> how often the row spells it; they are plain text.
    """

    ids: np.ndarray
    trained: np.ndarray
    thinking_blocks: int = 0
    lost_blocks: int = 0
    rewritten_turns: int = 0
    control_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as the model sees it, and the answer that is expected.

    Attributes:
      ids: Token ids that generation begins with.
      text: Content of the last message before the answer.
      answer: Content of the answer as it is trained, without reasoning; of tool calls, the
        rendered calls.
      tokens: Number of tokens of the whole answer, with the one that ends it.
    """

    ids: list[int]
    text: str
    answer: str
    tokens: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn in a rendered text.

    Attributes:
      prompt: The text before it.
      control_tokens: Number of control tokens in the text up to its end, which is one.
      ends: Whether generation ends with that one, so that it is trained too.
      trained: Whether the turn is trained.
    """

    prompt: str
    control_tokens: int
    ends: bool
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


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: Template,
    tools: Sequence[Any] | None = None,
    thinking: str = "template",
) -> list[int]:
    """Returns the ids that the model sees before it answers: exactly those seen in training.

    Args:
      tokenizer: The tokenizer of the model.
      messages: What was said so far; the last one is not from the assistant.
      template: From `resolve_template`.
      tools: Function descriptions offered to the model.
      thinking: `data.thinking`; only 'drop' makes a difference, to the turns before.

    Raises:
      RowError: If messages spell a control token that the tokenizer cannot encode as plain text.
    """
    shown = [without_thinking(dict(item)) if thinking == "drop" else item for item in messages]
    text = render(
        tokenizer,
        _escape_messages(shown, template.control),
        template=template,
        tools=template.control.escape(list(tools)) if tools else None,
        generation_prompt=True,
    )
    return template.control.encode([text])[0]


def text_ids(text: str, control: ControlTokens) -> list[int]:
    """Returns the ids of a text as it stands, with the tokens that the tokenizer puts around it.

    Raises:
      RowError: If it spells a control token that the tokenizer cannot encode as plain text.
    """
    return control.encode([control.escape(text)], add_special_tokens=True)[0]


def text_examples(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    control: ControlTokens,
    end: bool,
    refuse: bool = False,
) -> Iterator[Example | RowError]:
    """Yields documents as tokens, with the special tokens that the tokenizer itself adds.

    Args:
      tokenizer: The tokenizer of the model.
      texts: Documents; all of their tokens are trained.
      control: Control tokens of the tokenizer, which are plain text in documents.
      end: Append EOS, so that the model learns where documents stop.
      refuse: Refuse documents that spell a control token.
    """
    counts = [control.count([text]) for text in texts]
    problems = [
        _control_problem(count, control, refuse=refuse, where="the text") for count in counts
    ]
    good = [control.escape(t) for t, problem in zip(texts, problems, strict=True) if not problem]
    encoded = iter(control.encode(good, add_special_tokens=True))
    stop = tokenizer.eos_token_id
    for problem, count in zip(problems, counts, strict=True):
        if problem:
            yield problem
            continue
        ids = next(encoded)
        if end and stop is not None and ids[-1:] != [stop]:
            ids = [*ids, stop]
        yield Example(
            np.asarray(ids, np.int32), np.ones(len(ids), bool), control_tokens=dict(count)
        )


def chat_examples(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    template: Template,
    train_on: str,
    thinking: str,
    refuse_control: bool = False,
) -> Iterator[list[Example] | RowError]:
    """Yields for each conversation its examples, usually one, or what is wrong with it.

    Args:
      tokenizer: The tokenizer of the model.
      conversations: Tokenised together, which is several times faster than one by one.
      template: From `resolve_template`.
      train_on: `data.train_on`.
      thinking: `data.thinking`.
      refuse_control: Refuse conversations that spell a control token.
    """
    counts = [_count_control_tokens(item, template.control) for item in conversations]
    views = [
        _control_problem(count, template.control, refuse=refuse_control, where="the conversation")
        or _try_views(tokenizer, conversation, template, train_on, thinking)
        for conversation, count in zip(conversations, counts, strict=True)
    ]
    found = [view for item in views if not isinstance(item, RowError) for view in item]
    texts = dict.fromkeys(
        text for view in found for text in (view.text, *(turn.prompt for turn in view.turns))
    )
    encoded = dict(zip(texts, template.control.encode(list(texts)), strict=True))
    for item, count in zip(views, counts, strict=True):
        if isinstance(item, RowError):
            yield item
            continue
        try:
            examples = [_example(view, encoded, template, tokenizer) for view in item]
        except RowError as error:
            yield error
            continue
        # Counted once for a row, however many examples it makes.
        yield [dataclasses.replace(examples[0], control_tokens=dict(count)), *examples[1:]]


def question(
    tokenizer: Any, conversation: Conversation, *, template: Template, thinking: str
) -> Question:
    """Returns the last answer of a conversation as something to be asked.

    Raises:
      RowError: If the answer cannot be trained either.
    """
    last = len(conversation.messages) - 1
    messages = [*conversation.messages[:-1], {**conversation.messages[-1], "weight": 1}]
    asked = dataclasses.replace(conversation, messages=messages)
    views = _try_views(tokenizer, asked, template, "completion", thinking)
    if isinstance(views, RowError):
        raise views
    [view] = views
    [turn] = view.turns
    texts = [view.text, turn.prompt]
    encoded = dict(zip(texts, template.control.encode(texts), strict=True))
    example = _example(view, encoded, template, tokenizer)
    end = list(template.control.find(view.text))[turn.control_tokens - 1].start()
    answer = template.control.unescape(view.text[len(turn.prompt) : end])
    return Question(
        ids=encoded[turn.prompt],
        text=str(conversation.messages[last - 1]["content"]),
        answer=template.content_of(answer),
        tokens=int(example.trained.sum()),
    )


def _count_control_tokens(
    conversation: Conversation, control: ControlTokens
) -> collections.Counter[str]:
    counts = control.count(_texts(conversation.tools))
    for message in conversation.messages:
        found = control.count(_texts(message))
        if message["role"] == "assistant":
            for token in THINKING_TOKENS:
                found.pop(token, None)
        counts += found
    return counts


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in nested lists and dicts, the names of members included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _control_problem(
    count: Mapping[str, int], control: ControlTokens, *, refuse: bool, where: str
) -> RowError | None:
    if not count:
        return None
    if refuse:
        return RowError(
            f"{where} spells {', '.join(map(repr, count))}, which the tokenizer "
            "reserves for control. Remove it from the row, or encode it as plain text with "
            "--config.data.control_tokens=text."
        )
    try:
        control.require_plain_text()
    except RowError as error:
        return error
    return None


def _escape_messages(
    messages: Sequence[Mapping[str, Any]], control: ControlTokens
) -> list[dict[str, Any]]:
    """Returns messages with stand-ins for control tokens; the <think> blocks of answers stay."""
    return [
        {
            key: item
            if key == "role"
            else control.escape(
                item, keep=THINKING_TOKENS if message["role"] == "assistant" else ()
            )
            for key, item in message.items()
        }
        for message in messages
    ]


def _try_views(
    tokenizer: Any, conversation: Conversation, template: Template, train_on: str, thinking: str
) -> list[_View] | RowError:
    try:
        _check_tools(conversation, template)
        views = _Renderer(tokenizer, conversation, template, train_on, thinking).views()
        for view in views:
            view.text.encode()  # arguments in JSON may escape half of a surrogate pair
        return views
    except RowError as error:
        return error
    except UnicodeEncodeError as error:
        return RowError(f"a text of the row is no Unicode: {error}. Remove that character.")
    except Exception as error:  # raised by the template, on purpose or not
        return RowError(
            f"the chat template ({template.origin}) fails on this row: {error}. If the row is "
            "right, set --config.data.template to a template that takes it."
        )


def _check_tools(conversation: Conversation, template: Template) -> None:
    called = any(message.get("tool_calls") for message in conversation.messages)
    if template.built_in and (conversation.tools or called):
        raise RowError(
            "the row has tools, for which the built-in chat template has no form. "
            "Set --config.data.template to a template with tools."
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """A turn as it is generated: at the end of a conversation.

    Attributes:
      prompt: The text before it.
      text: That text, the answer, and what the template writes behind it.
      end: Position in it after the control token that ends the answer.
    """

    prompt: str
    text: str
    end: int

    @property
    def generated(self) -> str:
        """The text up to and with the control token that ends the answer."""
        return self.text[: self.end]


class _Renderer:
    """Renders one conversation, whole or up to a turn, and finds where its answers lie."""

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
        self.thinking = thinking
        self.train_on = train_on
        messages = conversation.messages
        if thinking == "drop":
            messages = [without_thinking(message) for message in messages]
        self.messages = _escape_messages(messages, template.control)
        self.tools = template.control.escape(conversation.tools)
        self.turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self._answers: dict[int, _Answer] = {}
        self._texts: dict[int, str] = {}
        self._marked_texts: dict[tuple[int, int], str] = {}
        self._written_out: set[int] = set()

    def views(self) -> list[_View]:
        last = len(self.messages) - 1
        self._check_messages()
        self._require_all_is_rendered()
        if self.train_on == "all":
            return [self._view(last, [turn for turn in self.turns if not self._is_trained(turn)])]
        turns = self.turns[-1:] if self.train_on == "completion" else self.turns
        turns = [turn for turn in turns if self._is_trained(turn)]
        if self.thinking != "keep" or not turns:
            return [self._view(last, turns)]
        return self._views_as_generated(turns)

    def _views_as_generated(self, turns: list[int]) -> list[_View]:
        """One view for the last turn, and one for each turn that later views write otherwise."""
        views = []
        while turns:
            last = turns[-1]
            text = self._answer(last).text
            shown = [turn for turn in turns[:-1] if text.startswith(self._answer(turn).generated)]
            views.append(self._view(last, [*shown, last]))
            turns = [turn for turn in turns[:-1] if turn not in shown]
        return views[::-1]

    def _check_messages(self) -> None:
        """Raises RowError for messages that are not to be trained as they stand."""
        for number, message in enumerate(self.messages):
            if message["role"] == "assistant":
                if not (
                    message["content"].strip() or message.get("tool_calls") or has_thinking(message)
                ):
                    raise RowError(
                        f"message {number} is reasoning alone, which --config.data.thinking=drop "
                        "leaves out. Remove the message, or set --config.data.thinking=keep."
                    )
            elif self.train_on == "all" and not self._is_trained(number):
                raise RowError(
                    f"message {number} is from {message['role']!r} and not to be trained, but "
                    "--config.data.train_on=all trains all but answers. Remove the weight, or "
                    "train on answers alone with --config.data.train_on=assistant."
                )

    def _is_trained(self, turn: int) -> bool:
        return bool(self.messages[turn].get("weight", 1))

    def _view(self, last: int, turns: list[int]) -> _View:
        """Renders up to and with the answer `last`, and finds these turns in it."""
        text = self._answer(last).text if turns or self.thinking == "keep" else self._text(last)
        found, blocks, lost, rewritten = [], 0, 0, 0
        for turn in turns:
            answer = self._answer(turn)
            if not text.startswith(answer.prompt):
                raise RowError(self._prompt_problem(answer.prompt, text, turn))
            same = text.startswith(answer.generated)
            end = answer.end if same else self._end_in_history(text, last, turn)
            trained = self._is_trained(turn)
            found.append(self._turn(text, answer.prompt, end, trained=trained))
            if trained and has_thinking(self.messages[turn]):
                blocks += 1
                lost += not shows_thinking(text[len(answer.prompt) : end], self.messages[turn])
            rewritten += trained and not same
        return _View(text, found, self.train_on == "all", blocks, lost, rewritten)

    def _turn(self, text: str, prompt: str, end: int, *, trained: bool) -> _Turn:
        control = [m for m in self.template.control.find(text) if m.end() <= end]
        within = {m[0] for m in control[:-1] if m.start() >= len(prompt)}
        if trained and not text[len(prompt) : control[-1].start()].strip():
            raise RowError(
                "the chat template leaves nothing of an answer but its stop token; with reasoning "
                "and no text after it, set --config.data.thinking=keep."
            )
        if trained and within & self.template.stops.keys():
            raise RowError(
                f"an answer has the stop token {next(iter(within))!r} before its end, where "
                "generation would stop. Set --config.data.template to a template that ends "
                "answers with a token of its own."
            )
        return _Turn(prompt, len(control), control[-1][0] in self.template.stops, trained)

    def _answer(self, turn: int) -> _Answer:
        """Returns a turn as it is generated.

        Raises:
          RowError: If the prompt does not begin the text, or if nothing ends the answer.
        """
        if turn not in self._answers:
            prompt, text = self._text_as_generated(turn)
            start = self._last_text_end(text, turn, turn, len(prompt))
            end = self.template.find_end(text, start)
            if end is None:
                raise RowError(
                    "an answer does not end with a stop token of the chat template "
                    f"({', '.join(self.template.stops) or 'it has none'}), so the model would not "
                    "learn to stop."
                )
            self._answers[turn] = _Answer(prompt, text, end.end())
        return self._answers[turn]

    def _text_as_generated(self, turn: int) -> tuple[str, str]:
        """Returns a prompt, and the text that the answer makes of it.

        A template may write what comes before an answer otherwise once the answer is there: gpt-oss
        drops the reasoning of calls when a final message follows. What is generated follows the
        prompt; so the answer is taken from behind the message before it, where both agree.
        """
        prompt = self._render(self.messages[:turn], generation_prompt=True)
        answer = self._behind(prompt, turn)
        message = self.messages[turn]
        if (
            self.thinking == "keep"
            and has_thinking(message)
            and not shows_thinking(answer, message)
        ):
            self._write_out(turn)
            answer = self._behind(prompt, turn)
        if not answer:
            raise RowError(self._prompt_problem(prompt, self._text(turn), turn))
        return prompt, prompt + answer

    def _behind(self, prompt: str, turn: int) -> str:
        """Returns what an answer adds to its prompt; empty if the two do not fit together."""
        text = self._text(turn)
        if text.startswith(prompt):
            return text.removeprefix(prompt)
        marked = [*self.messages[: turn - 1], _mark(self.messages[turn - 1])]
        try:
            marked_prompt = self._render(marked, generation_prompt=True)
        except Exception:  # a template may take only certain texts
            return ""
        behind_prompt = _common_end(prompt, marked_prompt)
        behind_text = _common_end(text, self._marked_text(turn, turn - 1))
        if not behind_prompt or not behind_text.startswith(behind_prompt):
            return ""
        return behind_text.removeprefix(behind_prompt)

    def _end_in_history(self, text: str, last: int, turn: int) -> int:
        """Returns where an answer ends that the template writes otherwise than it is generated."""
        prompt = len(self._answer(turn).prompt)
        start = self._last_text_end(text, last, turn, prompt)
        end = self.template.find_end(text, start, self._text_begin(text, last, turn + 1, start))
        if end is None:
            raise RowError(
                f"message {turn} cannot be trained: the chat template puts no control token "
                "between it and the next message. --config.data.thinking=keep trains each turn as "
                "it is generated."
            )
        return end.end()

    def _last_text_end(self, text: str, last: int, turn: int, start: int) -> int:
        """Returns a position within the last text of an answer, or at its end.

        What stands behind it in the rendered text is then all the template's own.
        """
        message = self.messages[turn]
        content = message["content"].strip()
        if content and not message.get("tool_calls"):
            found = text.find(content, start)
            if found >= 0 and text.find(content, found + 1) < 0:
                return found + len(content)
        return max(start, len(text) - len(_common_end(text, self._marked_text(last, turn))))

    def _text_begin(self, text: str, last: int, number: int, start: int) -> int:
        """Returns a position within the first text of a message, or where it begins."""
        content = self.messages[number]["content"].strip()
        found = text.find(content, start)
        if content and found >= 0 and text.find(content, found + 1) < 0:
            return found
        return max(start, _common_length(text, self._marked_text(last, number)))

    def _text(self, last: int) -> str:
        """Renders up to and with a turn."""
        if last not in self._texts:
            self._texts[last] = self._render_up_to(self.messages, last)
        return self._texts[last]

    def _marked_text(self, last: int, number: int) -> str:
        """Renders up to and with `last`, with marks in place of what one message says."""
        if (last, number) not in self._marked_texts:
            messages = list(self.messages)
            messages[number] = _mark(messages[number])
            try:
                text = self._render_up_to(messages, last)
            except Exception:  # a template may take only certain texts; then nothing is told apart
                text = ""
            self._marked_texts[last, number] = text
        return self._marked_texts[last, number]

    def _write_out(self, turn: int) -> None:
        """Renders a turn from now on with its reasoning written out."""
        self._written_out.add(turn)
        self._texts.clear()
        self._marked_texts.clear()

    def _render_up_to(self, messages: list[dict[str, Any]], last: int) -> str:
        """Renders up to and with a turn, with its reasoning written out where that is kept."""
        messages = messages[: last + 1]
        if last not in self._written_out:
            return self._render(messages)
        answer = messages[-1]
        bare = {key: item for key, item in answer.items() if key not in THINKING_KEYS}
        marked = self._render([*messages[:-1], {**bare, "content": MARK}])
        return marked.replace(MARK, with_thinking(answer))

    def _render(self, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer,
            messages,
            template=self.template,
            tools=self.tools,
            generation_prompt=generation_prompt,
        )

    def _require_all_is_rendered(self) -> None:
        """Raises RowError where the template leaves out what the row says."""
        text = self._text(len(self.messages) - 1)
        spoken = [_spoken(message) for message in self.messages]
        lost = [
            f"message {number}"
            for number, said in enumerate(spoken)
            # What several messages say must be there as often as they say it.
            if said and text.count(said) < sum(other.count(said) for other in spoken)
            if not self._shows_mark(number)
        ]
        if self.tools or any(message.get("tool_calls") for message in self.messages):
            lost += self._lost_tools()
        if lost:
            raise RowError(
                f"the chat template ({self.template.origin}) leaves out {', '.join(lost)}. Set "
                "--config.data.template to a template that has a place for it, or remove it from "
                "the row."
            )

    def _shows_mark(self, number: int) -> bool:
        return MARK in self._marked_text(len(self.messages) - 1, number)

    def _lost_tools(self) -> list[str]:
        """Names the calls, and the tools that are not called, which are not in the text."""
        marked, tools, marks = _mark_tools(self.messages, self.tools)
        try:
            text = render(self.tokenizer, marked, template=self.template, tools=tools)
        except Exception:  # a template may take only certain names or arguments
            text = self._text(len(self.messages) - 1)
            names = [tool_name(tool) for tool in self.tools or ()]
            calls = [call for message in self.messages for call in message.get("tool_calls") or ()]
            names += [call["function"]["name"] for call in calls]
            return [f"the name {name!r}" for name in dict.fromkeys(names) if name not in text]
        return list(dict.fromkeys(what for mark, what in marks.items() if mark not in text))

    def _prompt_problem(self, prompt: str, text: str, turn: int) -> str:
        same = _common_length(prompt, text)
        unescape = self.template.control.unescape
        told = (
            f"message {turn} cannot be trained: generation would begin with "
            f"…{unescape(prompt[same:])[:40]!r}, but the rendered conversation has "
            f"…{unescape(text[same:])[:40]!r} in that place."
        )
        if self.thinking != "keep":
            if "<think>" in prompt[same:]:
                told += (
                    " The chat template opens a <think> block that the answer lacks once rendered."
                )
            else:
                told += " The chat template changes earlier turns."
            return (
                f"{told} --config.data.thinking=keep trains each turn as it is generated; "
                "otherwise set another --config.data.template."
            )
        return f"{told} Set another --config.data.template."


def _spoken(message: Mapping[str, Any]) -> str:
    """Returns what must be in the rendered text: the content, without reasoning."""
    content = message["content"]
    return (without_block(content) if message["role"] == "assistant" else content).strip()


def _mark(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with marks in place of the texts that a template writes last."""
    if calls := message.get("tool_calls"):
        marked = [
            {**call, "function": {**call["function"], "arguments": json.dumps({MARK: MARK})}}
            for call in calls
        ]
        return {**message, "tool_calls": marked}
    if message["content"].strip():
        return {**message, "content": MARK}
    return {**message, **{key: MARK for key in THINKING_KEYS if message.get(key)}}


def _mark_tools(
    messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[dict[str, Any]], list[Any] | None, dict[str, str]]:
    """Returns messages and tools with marks for names and arguments, and what each stands for.

    Tools that are called need no mark: that some templates tell of them by their calls alone is
    the template's way.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        name = f"{MARK}n{len(marks)}n"
        marks[name] = what
        return name

    def mark_call(call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        what = f"the call of {function['name']!r} in message {number}"
        arguments = json.dumps({"mark": mark(what)})
        return {**call, "function": {**function, "name": mark(what), "arguments": arguments}}

    marked = [
        {**message, "tool_calls": [mark_call(call, i) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for i, message in enumerate(messages)
    ]
    called = {c["function"]["name"] for m in messages for c in m.get("tool_calls") or ()}
    offered = [
        tool if tool_name(tool) in called else _renamed(tool, mark(f"the tool {tool_name(tool)!r}"))
        for tool in tools or ()
    ]
    return marked, offered or None, marks


def _renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def _common_length(a: str, b: str) -> int:
    """Returns how many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(a: str, b: str) -> str:
    """Returns what two texts end with alike."""
    return a[len(a) - _common_length(a[::-1], b[::-1]) :]


def _example(
    view: _View, encoded: dict[str, list[int]], template: Template, tokenizer: Any
) -> Example:
    ids = np.asarray(encoded[view.text], np.int32)
    trained = np.full(len(ids), view.all_trained)
    control = np.flatnonzero(np.isin(ids, template.control.counted_ids))
    if len(control) != sum(1 for _ in template.control.find(view.text)):
        raise RowError(
            "the tokenizer gives other control tokens than the chat template writes; their texts "
            "are not encoded as one token each. Set --config.data.template to a template that is "
            "made for this tokenizer."
        )
    for turn in view.turns:
        prompt = encoded[turn.prompt]
        if ids[: len(prompt)].tolist() != prompt:
            spaced = view.text[len(turn.prompt) :][:1].isspace()
            raise RowError(_boundary_problem(ids, prompt, tokenizer, spaced=spaced))
        trained[len(prompt) : control[turn.control_tokens - 1] + turn.ends] = turn.trained
    return Example(ids, trained, view.thinking_blocks, view.lost_blocks, view.rewritten_turns)


def _boundary_problem(ids: np.ndarray, prompt: list[int], tokenizer: Any, *, spaced: bool) -> str:
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(ids))
    pieces = [tokenizer.decode(part[same : same + 3]) for part in (prompt, ids.tolist())]
    remedy = "Remove white space at the start of the answer, or set" if spaced else "Set"
    return (
        f"the tokens of the prompt are not the first tokens of prompt and answer: {pieces[0]!r} "
        f"became {pieces[1]!r}, because the tokenizer merges across the boundary. {remedy} a "
        "--config.data.template whose prompt ends with a special token."
    )
