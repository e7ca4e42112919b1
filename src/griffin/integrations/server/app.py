"""The HTTP endpoints: the OpenAI-compatible API, the page, health and metrics. This module never runs the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from griffin.config import GriffinConfig
from griffin.engine.step import Sampling
from griffin.integrations.server import schema
from griffin.integrations.server.bounds import most_marks
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.errors import ApiError, error_response, failed, invalid, of_http, refusal
from griffin.integrations.server.flocking import TOKENS, picture
from griffin.integrations.server.metrics import Counted, Metrics
from griffin.integrations.server.middleware import Gate, Hosts
from griffin.integrations.server.openai_chunks import Chunks, token_bytes, whole_response
from griffin.integrations.server.types import (
    Activations,
    Event,
    FullError,
    GenerationRequest,
    Piece,
    StoppedError,
    Summary,
)
from griffin.integrations.server.validation import (
    Settings,
    config_of,
    encoded,
    prompt_limit,
    prompts_of,
    sampling_of,
    tokens_of,
)
from griffin.version import __version__

_T = TypeVar("_T")

PAGE = Path(__file__).parent / "page"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "malformed JSON, or a prompt that is too long",
        401: "no API key, or the wrong one",
        403: "another host's name in the Host header",
        404: "unknown model",
        413: "the body is too large, or has too many values",
        422: "a field that is not supported or has a wrong value",
        429: "the queue is full",
        500: "the answer has failed",
        503: "the server is stopping",
        504: "not finished in time",
    }.items()
}
_CLIENT_GONE = Response(status_code=499)  # the client has disconnected and does not receive it
_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, whole or in chunks"}
}


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """Build the application. It closes the engine at shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="griffin",
        version=__version__,
        summary="OpenAI-compatible generation with GRIFFIN",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's documentation pages load scripts from another host
        redoc_url=None,
    )
    server = _Server(engine, settings)
    app.state.metrics = server.metrics
    marks = most_marks(prompt_limit(engine, settings))
    app.add_middleware(Gate, api_key=settings.api_key, body_bytes=settings.body_bytes, marks=marks)
    app.add_middleware(Hosts, allowed=settings.allowed_hosts)
    app.add_middleware(Counted, metrics=server.metrics)  # added last, it is the first that a request meets
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, failed)

    app.get("/v1/models", responses={401: _ERRORS[401]})(server.models)
    app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})(server.model)
    app.post("/v1/chat/completions", responses=_STREAMS | _ERRORS)(server.chat)
    app.post("/v1/completions", responses=_STREAMS | _ERRORS)(server.completions)
    app.post("/v1/griffin/flocking", responses=_ERRORS)(server.flocking)
    app.get("/health", responses={503: _ERRORS[503]})(server.health)
    app.get("/metrics", response_class=Response)(server.metrics_text)
    app.get("/", include_in_schema=False)(_page)
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
    return app


class _Server:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self.metrics = Metrics(engine)
        self._about = {"backend": engine.handle.backend.name, "step": engine.step_name}

    # -- endpoints --------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [self._model_object()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model, by its name."""
        self._check_model(model)
        return self._model_object()

    async def health(self) -> JSONResponse:
        """Whether requests are being answered."""
        if not self._engine.alive:
            return error_response(503, f"the engine has stopped: {self._engine.failure or 'the server is stopping'}")
        return JSONResponse({"status": "ok", "running": self._engine.running, "waiting": self._engine.waiting})

    async def metrics_text(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(422, "top_logprobs needs logprobs: true", "top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(422, "max_tokens and max_completion_tokens mean the same; give one", "max_tokens")
        prompts = await encoded(self._engine, self._settings, [[m.plain() for m in body.messages]], "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._answer(
            body, http, prompts, body.max_tokens or body.max_completion_tokens, logprobs, chat=True
        )

    async def completions(self, body: schema.CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        self._check_model(body.model)
        prompts = await encoded(self._engine, self._settings, prompts_of(body.prompt), "prompt")
        if len(prompts) * (body.n or 1) > schema.MAX_CHOICES:
            raise ApiError(422, f"at most {schema.MAX_CHOICES} answers to a request; send several requests", "n")
        return await self._answer(body, http, prompts, body.max_tokens or 16, body.logprobs, chat=False)

    async def flocking(self, body: schema.FlockingRequest, http: Request) -> Response:
        """Relative activations of a prompt's tokens in one layer."""
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(422, "give a prompt or messages", "prompt")
        prompt: Any = body.prompt if body.messages is None else [message.plain() for message in body.messages]
        engine = self._engine
        layers = len(engine.handle.blocks)
        if body.layer >= layers:
            raise ApiError(422, f"there is no layer {body.layer}; this model has layers 0 to {layers - 1}", "layer")
        ids = (await encoded(engine, self._settings, [prompt], "prompt"))[0][-TOKENS:]
        config = config_of(engine, body.griffin)
        request, events = self._submitted([ids], config, Sampling(max_tokens=1), activations_of=body.layer)
        event = await _unless_gone(http, self._event(request, events))
        if event is None:
            return _CLIENT_GONE
        assert isinstance(event, Activations)
        try:
            return JSONResponse(await engine.pool.run(picture, engine, ids, body.layer, config, event.values))
        except FullError as error:
            raise refusal(error) from error

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _model_object(self) -> dict[str, Any]:
        engine, config = self._engine, self._engine.config
        return {
            "id": self._settings.model,
            "object": "model",
            "created": 0,
            "owned_by": "griffin",
            "griffin": {
                "density": config.density,
                "selection": config.selection,
                "layers": len(engine.handle.blocks),
                "context_length": engine.context,
                "chat": engine.tokenizer.chat_template is not None,
                **self._about,
            },
        }

    def _check_model(self, model: str) -> None:
        if model != self._settings.model:
            message = f"there is no model {model[:80]!r} here; this server has {self._settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def _answer(
        self,
        body: schema.ChatRequest | schema.CompletionRequest,
        http: Request,
        prompts: list[list[int]],
        tokens: int | None,
        logprobs: int | None,
        *,
        chat: bool,
    ) -> Response:
        """Submit a request to the engine and respond with its events, streamed or joined into one response."""
        engine = self._engine
        if body.stream_options is not None and not body.stream:
            raise ApiError(422, "stream_options needs stream: true", "stream_options")
        sampling = sampling_of(body, tokens_of(engine, self._settings, prompts, tokens))
        config = config_of(engine, body.griffin)
        request, events = self._submitted(prompts, config, sampling, n=body.n or 1, logprobs=logprobs)
        usage_apart = bool(body.stream_options and body.stream_options.include_usage)
        chunks = Chunks(
            chat=chat,
            model=self._settings.model,
            bytes_of=lambda token: token_bytes(engine.tokenizer, token),
            usage_apart=usage_apart,
            answers=len(prompts) * request.n,
            about=self._about,
        )
        stream = self._stream(request, events, chunks)
        if not body.stream:
            collected = await _unless_gone(http, _collected(stream))
            return _CLIENT_GONE if collected is None else JSONResponse(whole_response(collected))
        # Wait for the first chunk: an error before it is sent with its own HTTP status.
        first_chunk = await _unless_gone(http, anext(stream))
        if first_chunk is None:
            return _CLIENT_GONE
        return StreamingResponse(_server_sent(first_chunk, stream), media_type="text/event-stream")

    def _submitted(
        self, prompts: list[list[int]], config: GriffinConfig, sampling: Sampling, **more: Any
    ) -> tuple[GenerationRequest, asyncio.Queue[Event]]:
        """A request in the engine's queue, and where its events will come.

        Raises:
            ApiError: the request could never run, the queue is full, or the server is stopping.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = GenerationRequest(prompts=prompts, config=config, sampling=sampling, emit=emit, **more)
        try:
            self._engine.submit(request)
        except ValueError as error:
            raise ApiError(422, str(error), "max_tokens") from error
        except (FullError, StoppedError) as error:
            raise refusal(error) from error
        return request, events

    async def _event(self, request: GenerationRequest, events: asyncio.Queue[Event]) -> Event:
        """The only event of a request without answers. Cancelling the wait cancels the request."""
        try:
            event = await events.get()
        finally:
            request.cancel()  # has no effect on a finished request
            self._engine.wake()
        if isinstance(event, Exception):
            raise refusal(event)
        return event

    async def _stream(
        self, request: GenerationRequest, events: asyncio.Queue[Event], chunks: Chunks
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks as events arrive. Closing the generator cancels the request."""
        try:
            event = await events.get()
            if isinstance(event, Exception):
                raise refusal(event)
            for chunk in chunks.opening():
                yield chunk
            while not isinstance(event, Summary):
                if isinstance(event, Exception):
                    raise refusal(event)
                assert isinstance(event, Piece)
                for chunk in chunks.of(event):
                    yield chunk
                event = await events.get()
            self.metrics.finished(event)
            for chunk in chunks.of(event):
                yield chunk
        finally:
            request.cancel()  # has no effect on a finished request
            self._engine.wake()


async def _collected(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in stream]


async def _unless_gone(http: Request, work: Awaitable[_T]) -> _T | None:
    """The result of `work`, or `None` if the client disconnects first; `work` is then cancelled."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _server_sent(first_chunk: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield _data(first_chunk)
    try:
        async for chunk in rest:
            yield _data(chunk)
    except ApiError as error:  # the HTTP status has already been sent
        yield _data(error.body())
        return
    yield "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html")
