"""The endpoint /v1/responses: items in, items out, and the conversations that previous_response_id goes on with."""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from griffin.integrations.server import schema_responses as schema
from griffin.integrations.server.answering import CLIENT_GONE, Answering, Tools, tools_of, unless_gone
from griffin.integrations.server.errors import ApiError
from griffin.integrations.server.openai_chunks import token_bytes
from griffin.integrations.server.response_events import ResponseEvents
from griffin.integrations.server.schema import JsonObjectFormat, arguments_of
from griffin.integrations.server.types import Piece, Summary
from griffin.integrations.server.validation import encoded, sampling_of, tokens_of

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """A response, and the conversation up to and with it, without instructions."""

    response: dict[str, Any]
    messages: Messages
    nbytes: int


class Store:
    """The last responses; the least recently used are dropped.

    Args:
        count: the most responses.
        nbytes: the most bytes of their text, roughly.
    """

    def __init__(self, count: int = 1000, nbytes: int = 64_000_000) -> None:
        self._count, self._nbytes, self._used = count, nbytes, 0
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def put(self, response: dict[str, Any], messages: Messages, new: int) -> None:
        """Keep a response. Its last `new` messages are its own; the others are shared with the response before."""
        nbytes = len(json.dumps(response)) + len(json.dumps(messages[-new:])) + 8 * len(messages)
        self._stored[response["id"]] = Stored(response, messages, nbytes)
        self._used += nbytes
        while len(self._stored) > self._count or self._used > self._nbytes:
            self._used -= self._stored.popitem(last=False)[1].nbytes

    def get(self, name: str) -> Stored | None:
        """The response of this id, if it is still there."""
        if name in self._stored:
            self._stored.move_to_end(name)
        return self._stored.get(name)

    def drop(self, name: str) -> bool:
        """Forget a response; returns whether it was there."""
        stored = self._stored.pop(name, None)
        self._used -= 0 if stored is None else stored.nbytes
        return stored is not None


class Responses:
    """The endpoints.

    Args:
        answering: puts requests to the engine.
        store: keeps responses.
    """

    def __init__(self, answering: Answering, store: Store | None = None) -> None:
        self._answering, self._store = answering, store or Store()

    async def create(self, body: schema.ResponsesRequest, http: Request) -> Response:
        """Answer items with items."""
        answering, engine = self._answering, self._answering.engine
        answering.check_model(body.model)
        before: Messages = []
        if body.previous_response_id is not None:
            stored = self._store.get(body.previous_response_id)
            if stored is None:
                message = (
                    f"there is no response {body.previous_response_id[:80]!r} here: it was not stored, or it is among "
                    "the oldest, which are dropped, or the server has been started anew; send the conversation as input"
                )
                raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
            before = stored.messages
        messages = [*before, *messages_of(body.input)]
        tools = _tools_of(body)
        answering.check_tools(tools, messages, "input")
        constraint = await answering.constraint(tools, _schema_of(body.text), "text.format")
        instructions = [] if not body.instructions else [{"role": "system", "content": body.instructions}]
        prompts = await encoded(engine, answering.settings, [[*instructions, *messages]], "input", tools.shown)
        tokens = tokens_of(engine, answering.settings, prompts, body.max_output_tokens)
        wanted = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
        events = answering.start(
            prompts,
            body.griffin,
            sampling_of(engine, body, tokens),
            logprobs=(body.top_logprobs or 0) if wanted else None,
            constraint=constraint,
            calls=bool(tools.shown),
        )
        made = ResponseEvents(
            _response_of(body, tokens), lambda token: token_bytes(engine.tokenizer, token), answering.about
        )
        stream = self._events(body, events, made, messages)
        if not body.stream:
            collected = await unless_gone(http, _last(stream))
            return CLIENT_GONE if collected is None else JSONResponse(collected["response"])
        first = await unless_gone(http, anext(stream))
        if first is None:
            return CLIENT_GONE
        return StreamingResponse(_server_sent(first, stream, made), media_type="text/event-stream")

    async def retrieve(self, response_id: str) -> dict[str, Any]:
        """A stored response."""
        stored = self._store.get(response_id)
        if stored is None:
            raise _not_found(response_id)
        return stored.response

    async def delete(self, response_id: str) -> dict[str, Any]:
        """Forget a stored response."""
        if not self._store.drop(response_id):
            raise _not_found(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def _events(
        self,
        body: schema.ResponsesRequest,
        pieces: AsyncIterator[Piece | Summary],
        made: ResponseEvents,
        messages: Messages,
    ) -> AsyncIterator[dict[str, Any]]:
        opened = False
        async for piece in pieces:
            events = [*([] if opened else made.opening()), *made.of(piece)]
            opened = True
            if isinstance(piece, Summary) and body.store is not False:
                answer = messages_of([_ITEMS[item["type"]].model_validate(item) for item in made.output])
                new = len(answer) + (1 if isinstance(body.input, str) else len(body.input))
                self._store.put(made.response, [*messages, *answer], new)
            for event in events:
                yield event


_ITEMS: dict[str, type[schema.MessageItem | schema.CallItem]] = {
    "message": schema.MessageItem,
    "function_call": schema.CallItem,
}


def messages_of(given: str | Sequence[schema.Item]) -> Messages:
    """The messages that items stand for; calls belong to the assistant's message before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: Messages = []
    for item in given:
        if isinstance(item, schema.CallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": arguments_of(item.arguments)}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}
        elif isinstance(item, schema.ResultItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})
    return messages


def _text(content: str | Sequence[schema.Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tools_of(body: schema.ResponsesRequest) -> Tools:
    given, choice = body.tools or [], body.tool_choice
    return tools_of(
        [tool.plain() for tool in given],
        None if isinstance(choice, schema.ResponsesNamedTool) else choice,
        choice.name if isinstance(choice, schema.ResponsesNamedTool) else None,
        strict=any(tool.strict for tool in given),
        many=body.parallel_tool_calls,
    )


def _schema_of(text: schema.TextConfig | None) -> dict[str, Any] | None:
    form = None if text is None else text.format
    if isinstance(form, schema.ResponsesJsonSchema):
        return form.schema_
    return {"type": "object"} if isinstance(form, JsonObjectFormat) else None


def _response_of(body: schema.ResponsesRequest, tokens: int) -> dict[str, Any]:
    """The response before there is an answer: the request's settings."""
    settings = body.model_dump(by_alias=True, exclude_none=True)
    choice = settings.get("tool_choice", "auto")
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": tokens,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": settings.get("text", {}).get("format", {"type": "text"})},
        "tool_choice": choice,
        "tools": [{"parameters": None, "strict": None, **tool} for tool in settings.get("tools", ())],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _not_found(name: str) -> ApiError:
    message = f"there is no response {name[:80]!r} here; the oldest ones are dropped"
    return ApiError(404, message, "response_id", "response_not_found")


async def _last(stream: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return [event async for event in stream][-1]


async def _server_sent(
    first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], made: ResponseEvents
) -> AsyncIterator[str]:
    yield _data(first)
    try:
        async for event in rest:
            yield _data(event)
    except ApiError as error:  # the HTTP status has already been sent
        yield _data(made.failed(error.message))


def _data(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
