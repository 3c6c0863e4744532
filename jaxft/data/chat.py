"""The one path from rows to token ids, for training, evaluation and generation alike.

Which tokens are trained is found in rendered text: an answer begins where the prompt ends that
generation would see, and it ends with the control token that the template writes behind its last
text. Control tokens that rows spell are plain text throughout.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.data.control_tokens import ControlTokens
from jaxft.data.formats import Conversation
from jaxft.data.problems import RowError
from jaxft.data.rendering import Renderer, View, escape_messages
from jaxft.data.template import Template, render
from jaxft.data.thinking import (
    THINKING_TOKENS,
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
        escape_messages(shown, template.control),
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


def _try_views(
    tokenizer: Any, conversation: Conversation, template: Template, train_on: str, thinking: str
) -> list[View] | RowError:
    try:
        _check_tools(conversation, template)
        views = Renderer(tokenizer, conversation, template, train_on, thinking).views()
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


def _example(
    view: View, encoded: dict[str, list[int]], template: Template, tokenizer: Any
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
