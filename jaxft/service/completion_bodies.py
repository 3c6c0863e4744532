"""Requests for text: what of OpenAI's fields is understood, and what is refused by name.

Fields that the client may send and that cannot change an answer are accepted with the values that
ask for nothing.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxft.service.bodies import Body, Metadata
from jaxft.service.errors import ApiError
from jaxft.service.generator.protocol import MOST_CHOICES, MOST_LIKELY, Generate, Prompt

# Not that of `data/formats/media.py`: what reads data imports jax, which the server never does.
_TEXT_ONLY = "jaxft reads text only: no pictures, audio, video or files."
_MOST_STOPS = 16
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
# Greedy, as the limit is of ever fewer tokens.
_LEAST_TOP_P = 1e-6

Stop = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Zero = Literal[0] | None


class StreamOptions(Body):
    """The options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextBody(Body):
    """The fields that both kinds of requests have.

    Attributes:
      model: Name of a model.
      temperature: 0 takes the most likely token.
      top_p: Only the most likely tokens that together reach this probability.
      top_k: Only the k most likely; 0 for all. OpenAI has no such field: send it as `extra_body`.
      n: Answers.
      seed: Two requests with the same one get the same answers.
      stop: Texts that end an answer.
      stream: Whether the answer is sent as it is written.
    """

    model: Annotated[str, Field(min_length=1, max_length=700)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # These ask for nothing.
    user: str | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuses what fields say against each other."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "stream_options are for a stream; leave them out, or set stream to true.",
                param="stream_options",
            )

    def asks(self, path: str, step: str, prompts: list[Prompt], **others: Any) -> Generate:
        """Returns what is asked of the generator."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Generate(
            path=path,
            step=step,
            prompts=prompts,
            n=self.choices,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else max(_LEAST_TOP_P, float(self.top_p)),
            top_k=self.top_k or 0,
            seed=secrets.randbits(31) if self.seed is None else self.seed % 2**63,
            stop=stop,
            **others,
        )


class Function(Body):
    """A function that the model may ask to be called."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class Call(Body):
    """A call of an earlier answer."""

    class Called(Body):
        """The function and its arguments in JSON."""

        name: Annotated[str, Field(min_length=1)]
        arguments: str

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # An answer of ours or of OpenAI's may be sent back as it came.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """Returns the message as chat templates take it."""
        shown: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        shown["content"] = _text_of(self.content, where)
        if self.content is None and not self.tool_calls:
            raise ApiError(f"{where}.content is missing.", param=f"{where}.content")
        if self.tool_calls:
            if self.role != "assistant":
                raise ApiError(
                    f"{where} is from {self.role!r} and has tool_calls; expected 'assistant'.",
                    param=f"{where}.tool_calls",
                )
            shown["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
            for number, call in enumerate(self.tool_calls):
                _check_arguments(call.function.arguments, f"{where}.tool_calls.{number}")
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        return shown


class ChatBody(TextBody):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # These ask for nothing.
    metadata: Metadata | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: "TextFormat | None" = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the template shows."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    def check(self) -> None:
        """Refuses what fields say against each other."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if None not in (most := (self.max_tokens, self.max_completion_tokens)) and len({*most}) > 1:
            raise ApiError(
                "max_tokens and max_completion_tokens differ; send one of them.",
                param="max_tokens",
            )
        if self.tool_choice == "auto" and not self.tools:
            raise ApiError("tool_choice needs tools.", param="tool_choice")

    def request(self, path: str, step: str) -> Generate:
        """Returns what is asked of the generator: of the model at a path, at a step."""
        messages = [item.plain(f"messages.{i}") for i, item in enumerate(self.messages)]
        return self.asks(
            path,
            step,
            [Prompt(messages=messages, tools=self.offered or None)],
            max_tokens=self.max_completion_tokens or self.max_tokens,
            scored=bool(self.logprobs),
            likely=self.top_logprobs or 0,
        )


class TextFormat(Body):
    """The form of answers: text."""

    type: Literal["text"]


class CompletionBody(TextBody):
    """Texts to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Count | None = None

    @model_validator(mode="after")
    def _has_prompt(self) -> "CompletionBody":
        if self.prompt in ("", []) or (isinstance(self.prompt, list) and [] in self.prompt):
            raise ValueError("expected at least one character or token in each prompt")
        return self

    def check(self) -> None:
        """Refuses what fields say against each other."""
        super().check()
        if self.best_of is not None and self.best_of != self.choices:
            raise ApiError(
                f"best_of is {self.best_of} and n is {self.choices}: answers are not chosen among. "
                "Leave best_of out.",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise ApiError("max_tokens: 0 needs echo: true.", param="max_tokens")

    def request(self, path: str, step: str) -> Generate:
        """Returns what is asked of the generator: of the model at a path, at a step."""
        return self.asks(
            path,
            step,
            self._prompts(),
            max_tokens=_DEFAULT_TOKENS if self.max_tokens is None else max(1, self.max_tokens),
            scored=self.logprobs is not None,
            likely=self.logprobs or 0,
            echo=bool(self.echo),
        )

    def _prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [Prompt(text=self.prompt)]
        if isinstance(self.prompt[0], int):
            return [Prompt(ids=self.prompt)]  # pyright: ignore[reportArgumentType]
        several = [
            Prompt(text=item) if isinstance(item, str) else Prompt(ids=item)  # pyright: ignore
            for item in self.prompt
        ]
        if len(several) * self.choices > MOST_CHOICES:
            raise ApiError(
                f"{len(several)} prompts with {self.choices} answers each are more than "
                f"{MOST_CHOICES} texts; send several requests.",
                param="prompt",
            )
        return several


def _text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """Returns the text of a message that may come in parts."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        path = f"{where}.content.{number}"
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                f"{path} is of type {part.get('type')!r}; expected a part of type 'text' with a "
                f"'text'. {_TEXT_ONLY}",
                param=path,
                code="unsupported_content",
            )
        if unknown := part.keys() - {"type", "text"}:
            name = min(unknown)
            raise ApiError(
                f"Unknown field {path}.{name}.", param=f"{path}.{name}", code="unknown_parameter"
            )
        texts.append(part["text"])
    return "".join(texts)


def _check_arguments(arguments: str, where: str) -> None:
    try:
        known = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise ApiError(
            f"{where}.function.arguments is {arguments[:80]!r}; expected a JSON object as text.",
            param=f"{where}.function.arguments",
        )
