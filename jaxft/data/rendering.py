"""Renders conversations by their chat template and finds where answers lie in the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.control_tokens import ControlTokens
from jaxft.data.formats import Conversation, tool_name
from jaxft.data.marking import common_end, common_length, mark_texts, mark_tools
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
class Turn:
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
class View:
    """One rendering of a conversation or of its beginning, and the turns that it trains."""

    text: str
    turns: list[Turn]
    all_trained: bool
    thinking_blocks: int
    lost_blocks: int
    rewritten_turns: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """A turn as it is generated: at the end of a conversation.

    Attributes:
      prompt: The text before it.
      text: Prompt, answer, and what the template writes behind it.
      end: Position in it after the control token that ends the answer.
    """

    prompt: str
    text: str
    end: int

    @property
    def generated(self) -> str:
        """The text up to and with the control token that ends the answer."""
        return self.text[: self.end]


def escape_messages(
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


class Renderer:
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
        self.messages = escape_messages(messages, template.control)
        self.tools = template.control.escape(conversation.tools)
        self.turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self._answers: dict[int, _Answer] = {}
        self._texts: dict[int, str] = {}
        self._marked_texts: dict[tuple[int, int], str] = {}
        self._written_out: set[int] = set()

    def views(self) -> list[View]:
        """Returns the renderings that train each wanted turn once.

        Raises:
          RowError: If an answer cannot be found in the rendered text, or the text lacks something.
        """
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

    def _views_as_generated(self, turns: list[int]) -> list[View]:
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

    def _view(self, last: int, turns: list[int]) -> View:
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
        return View(text, found, self.train_on == "all", blocks, lost, rewritten)

    def _turn(self, text: str, prompt: str, end: int, *, trained: bool) -> Turn:
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
        return Turn(prompt, len(control), control[-1][0] in self.template.stops, trained)

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
        marked = [*self.messages[: turn - 1], mark_texts(self.messages[turn - 1])]
        try:
            marked_prompt = self._render(marked, generation_prompt=True)
        except Exception:  # a template may take only certain texts
            return ""
        behind_prompt = common_end(prompt, marked_prompt)
        behind_text = common_end(text, self._marked_text(turn, turn - 1))
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
        return max(start, len(text) - len(common_end(text, self._marked_text(last, turn))))

    def _text_begin(self, text: str, last: int, number: int, start: int) -> int:
        """Returns a position within the first text of a message, or where it begins."""
        content = self.messages[number]["content"].strip()
        found = text.find(content, start)
        if content and found >= 0 and text.find(content, found + 1) < 0:
            return found
        return max(start, common_length(text, self._marked_text(last, number)))

    def _text(self, last: int) -> str:
        """Renders up to and with a turn."""
        if last not in self._texts:
            self._texts[last] = self._render_up_to(self.messages, last)
        return self._texts[last]

    def _marked_text(self, last: int, number: int) -> str:
        """Renders up to and with `last`, with marks in place of what one message says."""
        if (last, number) not in self._marked_texts:
            messages = list(self.messages)
            messages[number] = mark_texts(messages[number])
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
        marked, tools, marks = mark_tools(self.messages, self.tools)
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
        same = common_length(prompt, text)
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
