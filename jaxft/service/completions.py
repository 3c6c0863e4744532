"""Text from models by name: /v1/chat/completions and /v1/completions, at once or as a stream."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxft.service.bodies import read_body
from jaxft.service.completion_bodies import ChatBody, CompletionBody, TextBody
from jaxft.service.errors import ApiError
from jaxft.service.generator.client import Generator
from jaxft.service.generator.protocol import Generate
from jaxft.service.ids import letters
from jaxft.service.tool_calls import find_calls, ready_text

_NEAR = 2  # characters of which no token tells

type Line = dict[str, Any]


async def chat(request: Request) -> Response:
    """Answers a conversation."""
    body = await read_body(request, ChatBody)
    body.check()
    served = await request.app.state.models.find(body.model)
    return await _respond(request, body, body.request(served.path, served.step), _Chat(body))


async def complete(request: Request) -> Response:
    """Continues texts."""
    body = await read_body(request, CompletionBody)
    body.check()
    served = await request.app.state.models.find(body.model)
    return await _respond(request, body, body.request(served.path, served.step), _Completion(body))


ROUTES = [
    Route("/chat/completions", chat, methods=["POST"]),
    Route("/completions", complete, methods=["POST"]),
]


@dataclass
class _Choice:
    """One answer as far as it is known.

    Attributes:
      text: All of it.
      shown: Characters of it that a stream has sent.
      scores: Scores of its tokens that were not sent, as the generator gives them.
      tokens: Number of its tokens.
      ended: `stop` or `length`, once it has ended.
      begun: Whether a stream has told of it.
    """

    text: str = ""
    shown: int = 0
    scores: list[Any] = field(default_factory=list)
    tokens: int = 0
    ended: str = ""
    begun: bool = False

    def add(self, line: Line) -> None:
        self.text += line["text"]
        self.tokens = line["tokens"]
        self.scores += line.get("prompt", ())
        self.scores += line.get("scores", ())
        self.ended = line.get("ended", "")


class _Form:
    """The objects of one kind of request.

    Attributes:
      kind: Name of the object, and of one of a stream.
    """

    kind = chunk_kind = ""

    def __init__(self, body: TextBody, prefix: str):
        self.body = body
        self._id, self._created = prefix + letters(24), int(time.time())
        self.choices: list[_Choice] = []
        self.prompt_tokens = 0

    def begin(self, line: Line) -> None:
        """Takes the generator's first line."""
        self.prompt_tokens = sum(line["prompt_tokens"])
        count = len(line["prompt_tokens"]) * self.body.choices
        self.choices = [_Choice() for _ in range(count)]

    def add(self, line: Line) -> _Choice:
        """Takes a further line; returns the choice that it is of."""
        choice = self.choices[line["index"]]
        choice.add(line)
        return choice

    def object(self, kind: str, choices: list[Line], **others: Any) -> Line:
        """Returns an object with choices."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.body.model,
            "choices": choices,
            **others,
        }

    def whole(self) -> Line:
        """Returns the object of all that was written."""
        choices = [self.choice(i, choice) for i, choice in enumerate(self.choices)]
        return self.object(self.kind, choices, usage=self.usage())

    def usage(self) -> Line:
        """Returns the numbers of tokens."""
        written = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def choice(self, index: int, choice: _Choice) -> Line:
        """Returns a choice that is complete."""
        raise NotImplementedError

    def parts(self, index: int, choice: _Choice) -> Iterator[Line]:
        """Yields choices of a stream, of what is new of one."""
        raise NotImplementedError


class _Chat(_Form):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody):
        super().__init__(body, "chatcmpl-")
        self.names = {tool["function"]["name"] for tool in body.offered}
        self.scored = bool(body.logprobs)

    def choice(self, index: int, choice: _Choice) -> Line:
        reply = find_calls(choice.text, self.names)
        message: Line = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.calls:
            message |= {"content": reply.content or None, "tool_calls": reply.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.scores),
            "finish_reason": "tool_calls" if reply.calls else choice.ended,
        }

    def parts(self, index: int, choice: _Choice) -> Iterator[Line]:
        if not choice.begun:
            choice.begun = True
            yield self._part(index, {"role": "assistant", "content": ""})
        until, ended, calls = len(choice.text), choice.ended, []
        if self.names and not ended:
            until = max(choice.shown, ready_text(choice.text))
        elif self.names and (calls := find_calls(choice.text, self.names).calls):
            until = max(choice.shown, len(find_calls(choice.text, self.names).content))
        text, choice.shown = choice.text[choice.shown : until], until
        if text or choice.scores:
            scores, choice.scores = choice.scores, []
            yield self._part(index, {"content": text}, scores=scores)
        if calls:
            indexed = [{"index": number, **call} for number, call in enumerate(calls)]
            yield self._part(index, {"tool_calls": indexed})
            ended = "tool_calls"
        if ended:
            yield self._part(index, {}, ended=ended)

    def _part(self, index: int, delta: Line, *, scores: Any = (), ended: str = "") -> Line:
        logprobs = self._logprobs(scores) if scores else None
        reason = ended or None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scores: Any) -> Line | None:
        if not self.scored:
            return None

        def one(token: str, value: float, raw: Any) -> Line:
            return {"token": token, "logprob": value, "bytes": raw}

        content = [
            {**one(token, value, raw), "top_logprobs": [one(*other) for other in likely]}
            for token, value, raw, likely in scores
        ]
        return {"content": content, "refusal": None}


class _Completion(_Form):
    kind = chunk_kind = "text_completion"

    def __init__(self, body: CompletionBody):
        super().__init__(body, "cmpl-")
        self.scored = body.logprobs is not None
        self.only_prompt = body.max_tokens == 0  # of which the generator then writes a token

    def begin(self, line: Line) -> None:
        super().begin(line)
        for i, choice in enumerate(self.choices):
            choice.text = line["echo"][i // self.body.choices] if "echo" in line else ""

    def add(self, line: Line) -> _Choice:
        if self.only_prompt:
            line = {**line, "text": "", "tokens": 0, "scores": []}
            line |= {"ended": "length"} if "ended" in line else {}
        return super().add(line)

    def choice(self, index: int, choice: _Choice) -> Line:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice, 0),
            "finish_reason": choice.ended,
        }

    def parts(self, index: int, choice: _Choice) -> Iterator[Line]:
        text, at = choice.text[choice.shown :], choice.shown
        if text or choice.scores or choice.ended:
            yield {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(choice, at) if choice.scores else None,
                "finish_reason": choice.ended or None,
            }
        choice.shown, choice.scores = len(choice.text), []

    def _logprobs(self, choice: _Choice, at: int) -> Line | None:
        if not self.scored:
            return None
        scores, offsets = choice.scores, []
        for token, *_ in scores:
            # Control tokens and parts of characters are not in the text.
            place = choice.text.find(token, at, at + len(token) + _NEAR)
            offsets.append(at if place < 0 else place)
            at = at if place < 0 else place + len(token)
        return {
            "tokens": [token for token, *_ in scores],
            "token_logprobs": [value for _, value, *_ in scores],
            "top_logprobs": [
                None if own is None else {token: value for token, value, _ in likely}
                for _, own, _, likely in scores
            ],
            "text_offset": offsets,
        }


async def _respond(request: Request, body: TextBody, asked: Generate, form: _Form) -> Response:
    generator: Generator = request.app.state.generator
    lines = generator.generate(asked)
    if not body.stream:
        return await _while_connected(request, _whole(lines, form))
    # What is refused is refused with a status of its own, before the stream begins.
    form.begin(await anext(lines))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(lines, form), media_type="text/event-stream", headers=headers)


async def _whole(lines: AsyncGenerator[Line], form: _Form) -> Response:
    async with contextlib.aclosing(lines):
        form.begin(await anext(lines))
        async for line in lines:
            form.add(line)
    return JSONResponse(form.whole())


async def _while_connected(request: Request, work: Any) -> Response:
    """Returns the response that is being made; ends the work if the client has gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=499)  # which nobody reads
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(lines: AsyncGenerator[Line], form: _Form) -> AsyncGenerator[str]:
    """Yields server-sent events, the last of which is `[DONE]`."""
    usage: Line = {"usage": None} if form.body.wants_usage else {}
    async with contextlib.aclosing(lines):
        try:
            async for line in lines:
                choice = form.add(line)
                for part in form.parts(line["index"], choice):
                    yield _event(form.object(form.chunk_kind, [part], **usage))
        except ApiError as error:
            yield _event(error.body())
            return
    if form.body.wants_usage:
        yield _event(form.object(form.chunk_kind, [], usage=form.usage()))
    yield "data: [DONE]\n\n"


def _event(value: Line) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
