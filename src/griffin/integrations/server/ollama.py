"""Ollama's API, so that its clients find the server: chats, texts, and what model there is."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from griffin.engine.step import Sampling
from griffin.integrations.server import schema_ollama as schema
from griffin.integrations.server.answering import CLIENT_GONE, Answering, Tools, tools_of, unless_gone
from griffin.integrations.server.errors import ApiError, error_response
from griffin.integrations.server.schema import arguments_of
from griffin.integrations.server.tools import why_no_calls
from griffin.integrations.server.types import Piece, Summary
from griffin.integrations.server.validation import encoded, tokens_of
from griffin.version import __version__
from griffin.weights.quantised import parameter_count

PREFIX = "/api/"
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}  # Ollama's
Part = Callable[[str, list[dict[str, Any]]], dict[str, Any]]


def add_ollama(app: FastAPI, answering: Answering, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the endpoints to the application."""
    ollama = _Ollama(answering)
    app.post("/api/chat", responses=responses)(ollama.chat)
    app.post("/api/generate", responses=responses)(ollama.generate)
    app.get("/api/tags")(ollama.tags)
    app.get("/api/ps")(ollama.running)
    app.post("/api/show", responses=responses)(ollama.show)
    app.get("/api/version")(ollama.version)
    for path in ("/api/embed", "/api/embeddings"):
        app.post(path, include_in_schema=False)(no_embeddings)


async def no_embeddings() -> Response:
    """Refuse, with the reason."""
    message = "this server gives no embeddings: it generates text, with the neurons that a prompt selects"
    return error_response(404, message, code="unsupported_endpoint")


def in_ollamas_shape(request: Request, response: Response) -> Response:
    """An error as the API of the request's path writes it: under /api/ as `{"error": MESSAGE}`."""
    if not request.url.path.startswith(PREFIX):
        return response
    headers = {"Retry-After": response.headers["Retry-After"]} if "Retry-After" in response.headers else None
    return JSONResponse({"error": json.loads(bytes(response.body))["error"]["message"]}, response.status_code, headers)


class _Ollama:
    def __init__(self, answering: Answering) -> None:
        self._answering, self._engine = answering, answering.engine
        name = answering.settings.model
        self._name = name if ":" in name else f"{name}:latest"
        tensors = [*self._engine.model.parameters(), *self._engine.model.buffers()]
        self._bytes = sum(tensor.nbytes for tensor in tensors)
        self._started = datetime.now(UTC).isoformat()

    # -- endpoints --------------------------------------------------------------------------------------------------

    async def chat(self, body: schema.OllamaChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        self._check(body.model)
        tools = tools_of([tool.function.plain() for tool in body.tools or ()], None, None, strict=False, many=None)
        messages = [message.plain() for message in body.messages or ()]
        self._answering.check_tools(tools, messages)

        def part(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            return {"message": {**message, "tool_calls": calls} if calls else message}

        if not messages:
            return self._loaded(part)
        return await self._answer(body, http, messages, "messages", part, tools)

    async def generate(self, body: schema.GenerateRequest, http: Request) -> Response:
        """Answer a prompt, or continue it."""
        self._check(body.model)

        def part(text: str, _: list[dict[str, Any]]) -> dict[str, Any]:
            return {"response": text}

        if not body.prompt:
            return self._loaded(part)
        prompt: Any = body.prompt
        if not body.raw and self._engine.tokenizer.chat_template is not None:
            system = [{"role": "system", "content": body.system}] if body.system else []
            prompt = [*system, {"role": "user", "content": body.prompt}]
        elif body.system:
            raise ApiError(
                422, "system needs a chat template, and raw leaves it out; write it into the prompt", "system"
            )
        return await self._answer(body, http, prompt, "prompt", part, Tools())

    async def tags(self) -> dict[str, Any]:
        """The model that is served."""
        return {"models": [self._model()]}

    async def running(self) -> dict[str, Any]:
        """The model that is served, which stays loaded."""
        return {"models": [{**self._model(), "size_vram": 0, "expires_at": "9999-12-31T23:59:59Z"}]}

    async def show(self, body: schema.ShowRequest) -> dict[str, Any]:
        """What the model is."""
        self._check(body.model)
        config, tokenizer = self._engine.model.config.get_text_config(), self._engine.tokenizer
        kind = config.model_type
        capabilities = ["completion", *(["tools"] if why_no_calls(tokenizer) is None else [])]
        return {
            "modelfile": "",
            "parameters": "",
            "template": tokenizer.chat_template or "",
            "details": self._details(),
            "model_info": {
                "general.architecture": kind,
                "general.parameter_count": parameter_count(self._engine.model),
                f"{kind}.context_length": self._engine.context,
                f"{kind}.block_count": config.num_hidden_layers,
                f"{kind}.embedding_length": config.hidden_size,
            },
            "capabilities": capabilities,
            "modified_at": self._started,
        }

    async def version(self) -> dict[str, str]:
        """The version of the server."""
        return {"version": __version__}

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _check(self, model: str) -> None:
        self._answering.check_model(model, self._name)

    def _details(self) -> dict[str, Any]:
        kind = self._engine.model.config.get_text_config().model_type
        count = parameter_count(self._engine.model)
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
        return {
            **{"parent_model": "", "format": "", "family": kind, "families": [kind]},
            **{"parameter_size": size, "quantization_level": ""},
        }

    def _model(self) -> dict[str, Any]:
        model = self._engine.model
        about = f"{self._name} {model.config.to_json_string()}"
        return {
            **{
                "name": self._name,
                "model": self._name,
                "modified_at": self._started,
                "size": self._bytes,
            },
            **{"digest": hashlib.sha256(about.encode()).hexdigest(), "details": self._details()},
        }

    def _line(self, **fields: Any) -> dict[str, Any]:
        return {"model": self._name, "created_at": datetime.now(UTC).isoformat(), **fields}

    def _loaded(self, part: Part) -> Response:
        """The answer to a request without a prompt, which asks for the model to be loaded."""
        return JSONResponse(self._line(**part("", []), done=True, done_reason="load"))

    async def _answer(
        self,
        body: schema.OllamaChatRequest | schema.GenerateRequest,
        http: Request,
        prompt: Any,
        param: str,
        part: Part,
        tools: Tools,
    ) -> Response:
        form = {"type": "object"} if body.format == "json" else body.format or None
        assert not isinstance(form, str)
        constraint = await self._answering.constraint(tools, form, "format")
        settings = self._answering.settings
        prompts = await encoded(self._engine, settings, [prompt], param, tools.shown)
        options = body.options or schema.Options.model_validate({})
        asked = options.num_predict if (options.num_predict or 0) > 0 else None
        sampling = _sampling(options, tokens_of(self._engine, settings, prompts, asked))
        pieces = self._answering.start(prompts, body.griffin, sampling, constraint=constraint, calls=bool(tools.shown))
        lines = self._lines(pieces, part)
        if body.stream is False:
            collected = await unless_gone(http, _collected(lines))
            return CLIENT_GONE if collected is None else JSONResponse(_joined(collected))
        first = await unless_gone(http, anext(lines))
        if first is None:
            return CLIENT_GONE
        return StreamingResponse(_sent(first, lines), media_type="application/x-ndjson")

    async def _lines(self, pieces: AsyncIterator[Piece | Summary], part: Part) -> AsyncIterator[dict[str, Any]]:
        arrived, reason = time.monotonic(), None
        async for piece in pieces:
            if isinstance(piece, Piece):
                reason = piece.finish_reason
                if piece.text or piece.calls:
                    calls = [
                        {"id": call.id, "function": {"name": call.name, "arguments": arguments_of(call.arguments)}}
                        for call in piece.calls
                    ]
                    yield self._line(**part(piece.text, calls), done=False)
                continue
            total = time.monotonic() - arrived
            spent = {
                "total_duration": total,
                "load_duration": piece.waited_s,
                "prompt_eval_duration": piece.prompt_s,
                "eval_duration": max(total - piece.waited_s - piece.prompt_s, 0.0),
            }
            yield self._line(
                **part("", []),
                done=True,
                done_reason="length" if reason == "length" else "stop",
                prompt_eval_count=piece.prompt_tokens,
                eval_count=piece.completion_tokens,
                **{name: int(seconds * 1e9) for name, seconds in spent.items()},
            )


def _sampling(options: schema.Options, tokens: int) -> Sampling:
    """The sampling settings of a request, with Ollama's defaults."""
    stop = options.stop or ()
    given = options.model_dump(exclude_none=True)
    top_p = given.get("top_p", _DEFAULTS["top_p"])
    return Sampling(
        max_tokens=tokens,
        temperature=given.get("temperature", _DEFAULTS["temperature"]),
        top_p=top_p if top_p > 0 else 1.0,
        top_k=max(int(given.get("top_k", _DEFAULTS["top_k"])), 0),
        min_p=given.get("min_p", 0.0),
        repetition_penalty=given.get("repeat_penalty", 1.0),
        frequency_penalty=given.get("frequency_penalty", 0.0),
        presence_penalty=given.get("presence_penalty", 0.0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=None if given.get("seed", -1) < 0 else given["seed"],
    )


async def _collected(lines: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line async for line in lines]


def _joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of a stream's lines."""
    whole = lines[-1]
    if "message" not in whole:
        return {**whole, "response": "".join(line["response"] for line in lines)}
    messages = [line["message"] for line in lines]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    text = "".join(message["content"] for message in messages)
    return {**whole, "message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


async def _sent(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield json.dumps(first, ensure_ascii=False) + "\n"
    try:
        async for line in rest:
            yield json.dumps(line, ensure_ascii=False) + "\n"
    except ApiError as error:  # the HTTP status has already been sent
        yield json.dumps({"error": error.message}) + "\n"
