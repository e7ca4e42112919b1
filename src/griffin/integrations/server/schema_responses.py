"""The fields of requests to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from griffin.integrations.server.schema import (
    MAX_TOP_LOGPROBS,
    Fields,
    FunctionTool,
    Generation,
    Int,
    Json,
    JsonObjectFormat,
    StreamOptions,
    Text,
    TextFormat,
)


class Part(Fields):
    """Text of a message or of a tool's result; an answer's own part has annotations and log-probabilities, too."""

    type: Literal["input_text", "output_text", "text"]
    text: StrictStr
    logprobs: list[Any] | None = None


Content = StrictStr | Annotated[list[Part], Field(min_length=1, fail_fast=True)]


class _Item(Fields):
    id: StrictStr | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    phase: StrictStr | None = None


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: StrictStr
    name: Text
    arguments: StrictStr


class ResultItem(_Item):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: Content


_KINDS = {None: "Message", "message": "Message", "function_call": "Call", "function_call_output": "Result"}


def _kind(item: Any) -> str | None:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return _KINDS.get(given) if given is None or isinstance(given, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("Message")] | Annotated[CallItem, Tag("Call")] | Annotated[ResultItem, Tag("Result")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="Input should be an item of type 'message', 'function_call' or 'function_call_output'",
    ),
]


class ResponsesTool(FunctionTool):
    type: Literal["function"]


class ResponsesNamedTool(Fields):
    type: Literal["function"]
    name: Text


class ResponsesJsonSchema(Fields):
    type: Literal["json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Json = Field(alias="schema")
    strict: StrictBool | None = None


class TextConfig(Fields):
    format: Annotated[TextFormat | JsonObjectFormat | ResponsesJsonSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Fields):
    effort: Literal["none", "minimal", "medium"] | None = None
    summary: Literal["auto"] | None = None


class ResponsesRequest(Generation):
    input: Text | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[Int, Field(ge=1)] | None = Field(None, description="of built-in tools: there are none")
    previous_response_id: Text | None = None
    store: StrictBool | None = Field(
        None, description="whether previous_response_id may name this response; default true"
    )
    stream_options: StreamOptions | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesNamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
