"""The generator's application: a request's texts are continued, and told of as they grow."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxft import console
from jaxft.errors import JaxftError, OutOfMemoryError
from jaxft.hardware.devices import shortage
from jaxft.programs.questions import Question
from jaxft.programs.sampling import Sampling
from jaxft.programs.texts import Piece, Request
from jaxft.service.bodies import read_body
from jaxft.service.errors import ApiError
from jaxft.service.generator.driver import Driver, Text
from jaxft.service.generator.models import Loaded, Models
from jaxft.service.generator.protocol import Generate, Prompt
from jaxft.service.generator.text import Answer, Written

MOST_NEW = 4096
"""New tokens of an answer whose length is not asked for, as far as the context has room."""


@dataclass
class Desk:
    """Takes requests in.

    Attributes:
      driver: The thread of the engines.
      models: The models that are loaded.
      most_texts: Texts that wait or are under way at a time.
      texts: Number of them now.
      last: Time at which the last request came or ended, of `time.monotonic`.
    """

    driver: Driver
    models: Models
    most_texts: int = 256
    texts: int = 0
    last: float = 0.0

    def __post_init__(self) -> None:
        self.last = time.monotonic()
        # One thread: tokenizers are not made to be used by several at once.
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokeniser")

    def routes(self) -> list[Route]:
        """Returns the routes of the application."""
        return [
            Route("/generate", self.generate, methods=["POST"]),
            Route("/status", self.status, methods=["GET"]),
        ]

    async def status(self, request: HttpRequest) -> Response:
        """Says what is loaded and under way."""
        return JSONResponse({"models": self.models.names(), "texts": self.texts})

    async def generate(self, request: HttpRequest) -> Response:
        """Continues texts; the answer is lines of JSON, as `protocol.py` has them."""
        asked = await read_body(request, Generate)
        lines = self._lines(asked)
        first = await anext(lines)  # what is refused is refused with a status of its own

        async def all_lines() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(lines):
                yield first
                async for line in lines:
                    yield line

        return StreamingResponse(all_lines(), media_type="application/x-ndjson")

    async def _lines(self, asked: Generate) -> AsyncGenerator[bytes]:
        with self._counted(len(asked.prompts) * asked.n):
            async with _explained(), self.models.use(asked.path, asked.step) as loaded:
                prompts = await asyncio.get_running_loop().run_in_executor(
                    self._tokeniser, lambda: [_ids(loaded, prompt) for prompt in asked.prompts]
                )
                echo: dict[str, Any] = {}
                if asked.echo:
                    decode = loaded.model.tokenizer.decode
                    echo["echo"] = [decode(ids, skip_special_tokens=True) for ids in prompts]
                requests = _requests(asked, prompts, loaded)
                yield _line({"prompt_tokens": [len(ids) for ids in prompts], **echo})
                async with contextlib.aclosing(self._written(asked, requests, loaded)) as lines:
                    async for line in lines:
                        yield line

    async def _written(
        self, asked: Generate, requests: list[Request], loaded: Loaded
    ) -> AsyncGenerator[bytes]:
        answers = [
            Answer(
                loaded.model.tokenizer,
                after=() if asked.prompts[i // asked.n].messages else request.prompt,
                stops=asked.stop,
                speller=loaded.speller,
                likely=asked.likely if asked.scored else -1,
            )
            for i, request in enumerate(requests)
        ]
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Exception]]()

        def give(index: int) -> Callable[[Piece | Exception], None]:
            def later(piece: Piece | Exception) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the client
                    loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

            return later

        texts = {
            i: Text(loaded.base.engine, request, give(i)) for i, request in enumerate(requests)
        }
        try:
            for text in list(texts.values()):
                self.driver.submit(text)
            while texts:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    yield _line(_described(piece).body())
                    return
                if index not in texts:
                    continue  # of a text that a stop string has ended
                written = answers[index].add(piece)
                if written.ended:
                    self.driver.cancel(texts.pop(index))
                if written.text or written.scores or written.prompt or written.ended:
                    yield _line(_shown(index, answers[index], written))
        finally:
            for text in texts.values():
                self.driver.cancel(text)

    @contextlib.contextmanager
    def _counted(self, count: int):
        """Refuses texts for which there is no place in the queue."""
        self.last = time.monotonic()
        if self.texts and self.texts + count > self.most_texts:
            raise ApiError(
                f"{self.texts} texts are under way or wait, and the server takes "
                f"{self.most_texts} at a time: ask again in a while.",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
            )
        self.texts += count
        try:
            yield
        finally:
            self.texts -= count
            self.last = time.monotonic()


def make_app(desk: Desk) -> Starlette:
    """Returns the application."""

    async def refuse(request: HttpRequest, error: Exception) -> Response:
        found = _described(error)
        return JSONResponse(found.body(), status_code=found.status)

    return Starlette(routes=desk.routes(), exception_handlers={ApiError: refuse})


def _requests(asked: Generate, prompts: list[list[int]], loaded: Loaded) -> list[Request]:
    """Returns a request for each choice of each prompt."""
    model = loaded.model
    limit = model.architecture.config.max_length
    sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
    requests = []
    for ids in prompts:
        room = limit - len(ids)
        if not ids:
            raise ApiError("The prompt has no tokens; write at least one character.")
        new = asked.max_tokens or min(room, MOST_NEW)
        if new > room or new < 1:
            wanted = f" and {asked.max_tokens} new ones" if asked.max_tokens else ""
            raise ApiError(
                f"This model's context has {limit} tokens, and the prompt has {len(ids)}{wanted}. "
                "Shorten the messages, or max_tokens.",
                param="messages" if asked.prompts[0].messages else "prompt",
                code="context_length_exceeded",
            )
        for _ in range(asked.n):
            requests.append(
                Request(
                    ids,
                    new,
                    model.stop_ids,
                    sampling,
                    number=len(requests),
                    columns=loaded.columns,
                    scored=asked.scored,
                    prompt_scored=asked.scored and asked.echo,
                )
            )
    return requests


def _ids(loaded: Loaded, prompt: Prompt) -> list[int]:
    """Returns the tokens of a prompt."""
    model = loaded.model
    if prompt.messages is not None:
        return Question(prompt.messages, prompt.tools).prompt_ids(model)
    if prompt.text is not None:
        return model.prompt_ids(prompt.text)
    ids, vocab = prompt.ids or [], model.architecture.config.vocab
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        raise ApiError(
            f"The prompt has ids from {min(ids)} to {max(ids)}, and the vocabulary has {vocab}.",
            param="prompt",
        )
    return ids


def _shown(index: int, answer: Answer, written: Written) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "text": written.text, "tokens": answer.tokens}
    if written.scores:
        shown["scores"] = written.scores
    if written.prompt:
        shown["prompt"] = written.prompt
    if written.ended:
        shown["ended"] = written.ended
    return shown


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextlib.asynccontextmanager
async def _explained() -> AsyncGenerator[None]:
    """Turns what goes wrong with a model or a prompt into an error of the API."""
    try:
        yield
    except ApiError:
        raise
    except Exception as error:
        raise _described(error) from error


def _described(error: Exception) -> ApiError:
    """Returns an error as the API has it."""
    match error:
        case ApiError():
            return error
        case OutOfMemoryError():
            return ApiError(str(error), status=503, code="out_of_memory", kind="server_error")
        case JaxftError():
            return ApiError(str(error), code="model_error")
    if said := shortage(error):
        return ApiError(said, status=503, code="out_of_memory", kind="server_error")
    console.log(f"{type(error).__name__} while text was generated: {error}", style="red")
    return ApiError(
        f"The generator failed: {type(error).__name__}: {error}", status=500, kind="server_error"
    )
