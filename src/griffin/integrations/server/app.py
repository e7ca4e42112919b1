"""The HTTP side: OpenAI-compatible endpoints, the page, health and metrics. Nothing here computes with the model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from griffin.config import GriffinConfig
from griffin.generation.step import Sampling
from griffin.generation.text import encode
from griffin.integrations.server import engine as engines
from griffin.integrations.server import schema
from griffin.integrations.server.answers import Chunks, fold, token_bytes
from griffin.integrations.server.engine import Engine, Event, LateError, StoppedError, Summary
from griffin.integrations.server.errors import ApiError, answer
from griffin.integrations.server.flocking import picture
from griffin.integrations.server.limits import Gate
from griffin.integrations.server.metrics import Counted, Metrics
from griffin.version import __version__

logger = logging.getLogger("griffin")

_T = TypeVar("_T")

PAGE = Path(__file__).parent / "page"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "malformed JSON, or a prompt that is too long",
        401: "no API key, or the wrong one",
        404: "unknown model",
        413: "the body is too large",
        422: "a field that is not supported or has a wrong value",
        429: "the queue is full",
        500: "the answer has failed",
        503: "the server is stopping",
        504: "not finished in time",
    }.items()
}
_NOBODY = Response(status_code=499)  # nobody reads it
_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "the answer, whole or in chunks"}
}


@dataclass(frozen=True)
class Settings:
    """How the server answers.

    Args:
        model: the model's name.
        max_tokens: most tokens of a chat's answer that says no number.
        prompt_tokens: most tokens of a prompt; `None`: the model's context.
        body_bytes: most bytes of a request.
        api_key: what requests must carry; `None`: nothing.
    """

    model: str
    max_tokens: int = 1024
    prompt_tokens: int | None = None
    body_bytes: int = 4_000_000
    api_key: str | None = None


def make_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application. The engine is closed when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="griffin",
        version=__version__,
        summary="OpenAI-compatible generation with GRIFFIN",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    server = _Server(engine, settings)
    app.add_middleware(Counted, metrics=server.metrics)
    app.add_middleware(Gate, api_key=settings.api_key, body_bytes=settings.body_bytes)
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)

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
    """The endpoints."""

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
        self._known(model)
        return self._model_object()

    async def health(self) -> JSONResponse:
        """Whether requests are being answered."""
        if not self._engine.alive:
            return answer(503, f"the engine has stopped: {self._engine.failure or 'the server is stopping'}")
        return JSONResponse({"status": "ok", "running": self._engine.running, "waiting": self._engine.waiting})

    async def metrics_text(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def chat(self, body: schema.ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        self._known(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(422, "top_logprobs needs logprobs: true", "top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(422, "max_tokens and max_completion_tokens mean the same; give one", "max_tokens")
        prompts = await self._encoded([[message.plain() for message in body.messages]], "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await self._answer(
            body, http, prompts, body.max_tokens or body.max_completion_tokens, logprobs, chat=True
        )

    async def completions(self, body: schema.CompletionRequest, http: Request) -> Response:
        """Continue a text."""
        self._known(body.model)
        prompts = await self._encoded(_prompts(body.prompt), "prompt")
        if len(prompts) * (body.n or 1) > schema.MAX_CHOICES:
            raise ApiError(422, f"at most {schema.MAX_CHOICES} answers to a request; send several requests", "n")
        return await self._answer(body, http, prompts, body.max_tokens or 16, body.logprobs, chat=False)

    async def flocking(self, body: schema.FlockingRequest) -> dict[str, Any]:
        """Relative activations of a prompt's tokens in one layer."""
        self._known(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(422, "give a prompt or messages", "prompt")
        prompt: Any = body.prompt if body.messages is None else [message.plain() for message in body.messages]
        layers = len(self._engine.handle.blocks)
        if body.layer >= layers:
            raise ApiError(422, f"there is no layer {body.layer}; this model has layers 0 to {layers - 1}", "layer")
        ids = (await self._encoded([prompt], "prompt"))[0]
        config = self._config(body.griffin)
        try:
            return await asyncio.to_thread(self._engine.call, lambda: picture(self._engine, ids, body.layer, config))
        except StoppedError as error:
            raise ApiError(503, str(error)) from error

    # -- inside -----------------------------------------------------------------------------------------------------

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

    def _known(self, model: str) -> None:
        if model != self._settings.model:
            message = f"there is no model {model[:80]!r} here; this server has {self._settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def _encoded(self, prompts: Sequence[Any], param: str) -> list[list[int]]:
        """Token ids of texts, messages or token ids."""
        engine, most = self._engine, self._settings.prompt_tokens
        found: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, list) and isinstance(prompt[0], int):
                size = engine.vocabulary
                if max(prompt) >= size:
                    raise ApiError(422, f"there is no token {max(prompt)}; this model has {size}", param)
                ids = prompt
            else:
                try:
                    ids = (await asyncio.to_thread(encode, engine.model, engine.tokenizer, [prompt]))[0]
                except ValueError as error:
                    code = "context_length_exceeded" if "context" in str(error) else None
                    raise ApiError(400, str(error), param, code) from error
                except Exception as error:  # a chat template refuses in ways of its own
                    raise ApiError(400, f"the chat template refuses these messages: {error}", param) from error
            limits = (most, None if engine.context is None else engine.context - 1)
            limit = min((own for own in limits if own is not None), default=len(ids))
            if len(ids) > limit:
                message = f"the prompt has {len(ids)} tokens, this server takes at most {limit}; shorten it"
                raise ApiError(400, message, param, "context_length_exceeded")
            found.append(ids)
        return found

    def _config(self, given: schema.GriffinSettings | None) -> GriffinConfig:
        """The server's config with what the request says."""
        base = self._engine.config
        said = {} if given is None else given.model_dump(exclude_none=True)
        try:
            if "loss" in said:
                base = replace(base, density=GriffinConfig.density, selection=GriffinConfig.selection)
            elif "density" in said or "selection" in said:
                base = replace(base, loss=None)
            layers = len(self._engine.handle.blocks)
            if said.get("layers") and max(said["layers"]) >= layers:
                raise ValueError(f"layers names layer {max(said['layers'])}; this model has layers 0 to {layers - 1}")
            config = replace(base, **said)
            if config.selection == "wanda":
                raise ValueError("selection wanda masks the weights of all requests, so it cannot be served")
            return config
        except ValueError as error:
            named = next((name for name in said if str(error).startswith(name)), None)
            raise ApiError(422, str(error), "griffin" if named is None else f"griffin.{named}") from error

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
        engine = self._engine
        if body.stream_options is not None and not body.stream:
            raise ApiError(422, "stream_options needs stream: true", "stream_options")
        longest = max(map(len, prompts))
        left = None if engine.context is None else engine.context - longest
        if tokens is None:
            tokens = self._settings.max_tokens if left is None else min(self._settings.max_tokens, left)
        elif left is not None and tokens > left:
            message = (
                f"the prompt has {longest} tokens and the answer may have {tokens}, but the model's context is "
                f"{engine.context}; ask for at most {left} tokens"
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = engines.Request(
            prompts=prompts,
            config=self._config(body.griffin),
            sampling=_sampling(body, tokens),
            n=body.n or 1,
            logprobs=logprobs,
            emit=emit,
        )
        try:
            engine.submit(request)
        except ValueError as error:
            raise ApiError(422, str(error), "max_tokens") from error
        except engines.FullError as error:
            raise ApiError(429, f"{error}; try again later", code="queue_full", retry_after_s=5) from error
        except StoppedError as error:
            raise ApiError(503, str(error)) from error
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
            whole = await _unless_gone(http, _collected(stream))
            return _NOBODY if whole is None else JSONResponse(fold(whole))
        # An error before the first token is an answer with its own status.
        first = await _unless_gone(http, anext(stream))
        if first is None:
            return _NOBODY
        return StreamingResponse(_server_sent(first, stream), media_type="text/event-stream")

    async def _stream(
        self, request: engines.Request, events: asyncio.Queue[Event], chunks: Chunks
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks as they come. Whoever stops reading cancels the request."""
        try:
            event = await events.get()
            if isinstance(event, Exception):
                raise _refusal(event)
            for chunk in chunks.first():
                yield chunk
            while not isinstance(event, Summary):
                if isinstance(event, Exception):
                    raise _refusal(event)
                for chunk in chunks.of(event):
                    yield chunk
                event = await events.get()
            self.metrics.finished(event)
            for chunk in chunks.of(event):
                yield chunk
        finally:
            request.cancel()  # nothing happens where it is finished
            self._engine.wake()


async def _collected(stream: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk async for chunk in stream]


async def _unless_gone(http: Request, work: Awaitable[_T]) -> _T | None:
    """What the work gives, or `None` if the client goes away before; the work is then cancelled."""

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


def _sampling(body: schema.ChatRequest | schema.CompletionRequest, tokens: int) -> Sampling:
    stop = body.stop or ()
    given = {name: getattr(body, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed")}
    return Sampling(
        max_tokens=tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **{name: value for name, value in given.items() if value is not None},
    )


def _prompts(given: Any) -> list[Any]:
    """Texts or lists of token ids, from the four forms that the API allows."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


async def _server_sent(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield _data(first)
    try:
        async for chunk in rest:
            yield _data(chunk)
    except ApiError as error:  # the status has been sent already
        yield _data(error.body())
        return
    yield "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, LateError):
        return ApiError(504, str(error), code="deadline_exceeded")
    if isinstance(error, StoppedError):
        return ApiError(503, str(error))
    if isinstance(error, ValueError):  # a config that this model refuses
        return ApiError(422, str(error), "griffin")
    return ApiError(500, f"the answer has failed: {type(error).__name__}: {error}")


def _invalid(_: Request, error: Exception) -> JSONResponse:
    """Name the field that is wrong."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    # Of a field's alternatives the one that went furthest is the one that was meant.
    first = max((own for own in errors if own["loc"][:2] == errors[0]["loc"][:2]), key=lambda own: len(own["loc"]))
    if first["type"] == "json_invalid":
        return answer(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or not _is_branch(part)]
    name = ".".join(place)
    if not name:
        return answer(422, f"the body is not what is expected: {first['msg']}")
    neutral = name.split(".")[0] in schema.UNSUPPORTED
    unsupported = neutral or first["type"] == "extra_forbidden"
    text = f"{name} is not supported" if unsupported else f"{name}: {first['msg']}"
    if neutral:
        text += "; leave it out"
    elif not unsupported and isinstance(first.get("input"), str | int | float | bool):
        text += f" (found {_short(first['input'])})"
    return answer(422, text, name, "unsupported_parameter" if unsupported else None)


def _is_branch(part: str) -> bool:
    """Whether a part of an error's place names an alternative of a type, not a field."""
    return not part.isidentifier() or part in ("str", "int", "float", "bool", "list")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return answer(404, f"there is nothing at {request.url.path[:80]}; the API is at /v1, the page at /")
    if error.status_code == 405:
        response = answer(405, f"{request.method} is not allowed here")
        response.headers.update(error.headers or {})
        return response
    return answer(error.status_code, str(error.detail))


def _failed(_: Request, error: Exception) -> JSONResponse:
    return answer(500, f"this server has failed: {type(error).__name__}")


async def _page() -> FileResponse:
    return FileResponse(PAGE / "index.html")
