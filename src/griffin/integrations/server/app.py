"""The HTTP endpoints: the OpenAI-compatible API, the page, health and metrics. This module never runs the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from griffin.integrations.server import schema
from griffin.integrations.server.answering import CLIENT_GONE, Answering, Tools, tools_of, unless_gone
from griffin.integrations.server.bounds import most_marks
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.errors import ApiError, error_response, failed, invalid, of_http, refusal
from griffin.integrations.server.flocking import TOKENS, picture
from griffin.integrations.server.metrics import Counted, Metrics
from griffin.integrations.server.middleware import Gate, Hosts
from griffin.integrations.server.ollama import add_ollama, in_ollamas_shape, no_embeddings
from griffin.integrations.server.openai_chunks import Chunks, token_bytes, whole_response
from griffin.integrations.server.responses import Responses
from griffin.integrations.server.tools import why_no_calls
from griffin.integrations.server.types import FullError, Piece, Summary
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

PAGE = Path(__file__).parent / "page"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "malformed JSON, or a prompt that is too long",
        401: "no API key, or the wrong one",
        403: "another host's name in the Host header",
        404: "unknown model",
        413: "the body is too large, or has too many values",
        415: "a page in a browser sends something else than JSON",
        422: "a field that is not supported or has a wrong value",
        429: "the queue is full",
        500: "the answer has failed",
        503: "the server is stopping",
        504: "not finished in time",
    }.items()
}
_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, whole or in chunks"}
}
_LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}, "application/x-ndjson": {}},
        "description": "the answer, whole or in lines",
    }
}
_OLLAMA_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.OllamaError, "description": about["description"]} for status, about in _ERRORS.items()
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
    answering = Answering(engine, settings, Metrics(engine))
    server = _Server(answering)
    app.state.metrics, app.state.grammars = answering.metrics, answering.grammars
    marks = most_marks(prompt_limit(engine, settings))
    app.add_middleware(Gate, api_key=settings.api_key, body_bytes=settings.body_bytes, marks=marks)
    app.add_middleware(Hosts, allowed=settings.allowed_hosts)
    app.add_middleware(Counted, metrics=answering.metrics)  # added last, it is the first that a request meets
    for kind, handler in (
        (ApiError, lambda _, error: error.response()),
        (RequestValidationError, invalid),
        (HTTPException, of_http),
        (Exception, failed),
    ):
        app.add_exception_handler(kind, _shaped(handler))

    app.get("/v1/models", responses={401: _ERRORS[401]})(server.models)
    app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})(server.model)
    app.post("/v1/chat/completions", responses=_STREAMS | _ERRORS)(server.chat)
    app.post("/v1/completions", responses=_STREAMS | _ERRORS)(server.completions)
    app.post("/v1/griffin/flocking", responses=_ERRORS)(server.flocking)
    responses = Responses(answering)
    app.post("/v1/responses", responses=_STREAMS | _ERRORS)(responses.create)
    app.get("/v1/responses/{response_id}", responses={401: _ERRORS[401], 404: _ERRORS[404]})(responses.retrieve)
    app.delete("/v1/responses/{response_id}", responses={401: _ERRORS[401], 404: _ERRORS[404]})(responses.delete)
    app.post("/v1/embeddings", include_in_schema=False)(no_embeddings)
    add_ollama(app, answering, _LINES | _OLLAMA_ERRORS)
    app.get("/health", responses={503: _ERRORS[503]})(server.health)
    app.get("/metrics", response_class=Response)(server.metrics_text)
    app.get("/", include_in_schema=False)(_page)
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
    return app


class _Server:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._engine, self._settings = answering.engine, answering.settings

    # -- endpoints --------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [self._model_object()]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model, by its name."""
        self._answering.check_model(model)
        return self._model_object()

    async def health(self) -> JSONResponse:
        """Whether requests are being answered."""
        if not self._engine.alive:
            return error_response(503, f"the engine has stopped: {self._engine.failure or 'the server is stopping'}")
        return JSONResponse({"status": "ok", "running": self._engine.running, "waiting": self._engine.waiting})

    async def metrics_text(self) -> Response:
        """Counters for Prometheus."""
        return Response(self._answering.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        self._answering.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(422, "top_logprobs needs logprobs: true", "top_logprobs")
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise ApiError(422, "max_tokens and max_completion_tokens mean the same; give one", "max_tokens")
        messages = [message.plain() for message in body.messages]
        tools = _tools_of(body)
        self._answering.check_tools(tools, messages)
        constraint = await self._answering.constraint(tools, _schema_of(body.response_format), "response_format")
        prompts = await encoded(self._engine, self._settings, [messages], "messages", tools.shown)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        tokens = body.max_tokens or body.max_completion_tokens
        start = partial(self._answering.start, constraint=constraint, calls=bool(tools.shown))
        return await self._answer(body, http, prompts, tokens, logprobs, start, chat=True)

    async def completions(self, body: schema.CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        self._answering.check_model(body.model)
        n = body.n or 1
        if body.best_of not in (None, n):
            message = "best_of is supported where it is n, as all answers are returned; leave it out"
            raise ApiError(422, message, "best_of", "unsupported_parameter")
        if body.echo and body.logprobs is not None:
            message = "echo with logprobs is not supported, as those of the prompt are not kept; leave one out"
            raise ApiError(422, message, "echo", "unsupported_parameter")
        given = prompts_of(body.prompt)
        prompts = await encoded(self._engine, self._settings, given, "prompt")
        if len(prompts) * n > schema.MAX_CHOICES:
            raise ApiError(422, f"at most {schema.MAX_CHOICES} answers to a request; send several requests", "n")
        tokens, logprobs, start = body.max_tokens or 16, body.logprobs, self._answering.start
        echo = [self._text(prompt) for prompt in given for _ in range(n)] if body.echo else []
        return await self._answer(body, http, prompts, tokens, logprobs, start, chat=False, echo=echo)

    async def flocking(self, body: schema.FlockingRequest, http: Request) -> Response:
        """Relative activations of a prompt's tokens in one layer."""
        self._answering.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(422, "give a prompt or messages", "prompt")
        prompt: Any = body.prompt if body.messages is None else [message.plain() for message in body.messages]
        engine = self._engine
        layer, layers = body.layer or 0, len(engine.handle.blocks)
        if layer >= layers:
            raise ApiError(422, f"there is no layer {layer}; this model has layers 0 to {layers - 1}", "layer")
        ids = (await encoded(engine, self._settings, [prompt], "prompt"))[0][-TOKENS:]
        config = config_of(engine, body.griffin)
        found = await unless_gone(http, self._answering.activations(ids, config, layer))
        if found is None:
            return CLIENT_GONE
        try:
            return JSONResponse(await engine.pool.run(picture, engine, ids, layer, config, found.values))
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
                "lossless": self._settings.lossless,
                "layers": len(engine.handle.blocks),
                "context_length": engine.context,
                "chat": engine.tokenizer.chat_template is not None,
                "tools": why_no_calls(engine.tokenizer) is None,
                **self._answering.about,
            },
        }

    def _text(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else str(self._engine.tokenizer.decode(prompt))

    async def _answer(
        self,
        body: schema.ChatRequest | schema.CompletionRequest,
        http: Request,
        prompts: list[list[int]],
        tokens: int | None,
        logprobs: int | None,
        start: Callable[..., AsyncIterator[Piece | Summary]],
        *,
        chat: bool,
        echo: Sequence[str] = (),
    ) -> Response:
        """Submit a request to the engine and respond with its events, streamed or joined into one response."""
        engine = self._engine
        usage_apart = bool(body.stream_options and body.stream_options.include_usage)
        if usage_apart and not body.stream:
            raise ApiError(422, "stream_options needs stream: true", "stream_options")
        n = body.n or 1
        sampling = sampling_of(engine, body, tokens_of(engine, self._settings, prompts, tokens))
        events = start(prompts, body.griffin, sampling, n=n, logprobs=logprobs)
        chunks = Chunks(
            chat=chat,
            model=self._settings.model,
            bytes_of=lambda token: token_bytes(engine.tokenizer, token),
            usage_apart=usage_apart,
            answers=len(prompts) * n,
            about=self._answering.about,
            echo=echo,
        )
        stream = _chunks(events, chunks)
        if not body.stream:
            collected = await unless_gone(http, _collected(stream))
            return CLIENT_GONE if collected is None else JSONResponse(whole_response(collected))
        # Wait for the first chunk: an error before it is sent with its own HTTP status.
        first_chunk = await unless_gone(http, anext(stream))
        if first_chunk is None:
            return CLIENT_GONE
        return StreamingResponse(_server_sent(first_chunk, stream), media_type="text/event-stream")


def _tools_of(body: schema.ChatRequest) -> Tools:
    """The tools of a chat request.

    Raises:
        ApiError: as `tools_of`.
    """
    given, choice = body.tools or [], body.tool_choice
    return tools_of(
        [tool.function.plain() for tool in given],
        None if isinstance(choice, schema.NamedTool) else choice,
        choice.function.name if isinstance(choice, schema.NamedTool) else None,
        strict=any(tool.function.strict for tool in given),
        many=body.parallel_tool_calls,
    )


def _schema_of(
    form: schema.TextFormat | schema.JsonObjectFormat | schema.JsonSchemaFormat | None,
) -> dict[str, Any] | None:
    """The JSON schema that an answer is held to; `None` for free text."""
    if isinstance(form, schema.JsonSchemaFormat):
        return form.json_schema.schema_
    return {"type": "object"} if isinstance(form, schema.JsonObjectFormat) else None


async def _chunks(events: AsyncIterator[Piece | Summary], chunks: Chunks) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a response, as its events arrive."""
    opened = False
    async for event in events:
        for chunk in [*([] if opened else chunks.opening()), *chunks.of(event)]:
            yield chunk
        opened = True


async def _collected(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in stream]


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


def _shaped(handler: Callable[[Request, Any], Response]) -> Callable[[Request, Exception], Response]:
    """The handler of an exception with its error in the shape of the API that was called."""
    return lambda request, error: in_ollamas_shape(request, handler(request, error))
