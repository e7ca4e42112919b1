"""The fields of requests to the OpenAI API's completions. What cannot be done is refused with the field's name.

A field that is null asks for nothing, and neither does an unknown field that is empty. Fields of the API that are not
supported are accepted with the values that turn them off, and hints that have no effect here with any value.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

# Fields of the OpenAI API that are accepted only with the value that turns them off.
UNSUPPORTED = (
    *("functions", "function_call", "modalities", "store", "service_tier", "best_of", "suffix", "verbosity"),
    *("reasoning_effort", "background", "reasoning", "truncation", "include", "images", "think"),
)
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 256

Int = StrictInt
Text = Annotated[StrictStr, Field(min_length=1)]
Json = dict[str, Any]
_Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
_Tokens = Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
_TokenLists = Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
_Penalty = Annotated[float, Field(ge=-2, le=2, strict=True)]


_EMPTY: tuple[object, ...] = ("", [], {})


@cache
def _names(fields: type[Fields]) -> frozenset[str]:
    """The names that the fields of an object of a request have in JSON."""
    return frozenset(field.alias or name for name, field in fields.model_fields.items())


class Fields(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, json_schema_extra={"additionalProperties": {"enum": [None, "", [], {}]}}
    )

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, given: Any) -> Any:
        known = _names(cls)
        if not isinstance(given, dict) or (given.keys() <= known and None not in given.values()):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and (name in known or not any(value == nothing for nothing in _EMPTY))
        }


class GriffinSettings(Fields):
    """Fields of `GriffinConfig` that a request may set, which are checked by it, and whether to draft."""

    density: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None, description="share of the FF neurons to keep; 1 is the full model"
    )
    selection: StrictStr | None = Field(None, description="how experts are selected")
    layers: Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="layers to prune; the others stay whole"
    )
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = Field(None, description="seed of a random selection")
    loss: Annotated[float, Field(gt=0)] | None = Field(
        None, description="instead of a density: the least bytes at which the profile says that KL is at most this"
    )
    lossless: StrictBool | None = Field(
        None, description="the full model, with lossless drafts while no other answer runs beside this one"
    )


class StreamOptions(Fields):
    include_usage: StrictBool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(Fields):
    """How an answer is generated: the fields that all endpoints of the OpenAI API share, and this server's own."""

    model: StrictStr
    griffin: GriffinSettings | None = Field(None, description="GRIFFIN for this request")
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = Field(
        None, description="0 is greedy; default 1, as in the OpenAI API"
    )
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = Field(None, description="0 and -1 are off")
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, strict=True)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        Field(None, description="token ids, each with what is added to its logit")
    )
    stop: StrictStr | Annotated[list[Text], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[Int, Field(ge=-1, lt=2**62)] | None = Field(None, description="-1 draws a new one each time")
    stream: StrictBool | None = None
    user: StrictStr | None = None
    metadata: dict[str, StrictStr] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    safety_identifier: StrictStr | None = None


class _Completion(Generation):
    """The fields of both endpoints of completions."""

    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None


class TextPart(Fields):
    type: Literal["text"]
    text: StrictStr


class CalledFunction(Fields):
    name: Text
    arguments: StrictStr = Field(description="a JSON object, as text")


class SentCall(Fields):
    """A call of a tool, as an answer has it."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[SentCall], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} has no tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("the message has no content")
        return self

    def plain(self) -> Json:
        """The message in the form that chat templates expect."""
        given = self.content or ""
        message: Json = {
            "role": "system" if self.role == "developer" else self.role,
            "content": given if isinstance(given, str) else "".join(part.text for part in given),
        }
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}
            message |= {"name": self.name} if self.name is not None else {}
        return message


def arguments_of(text: str) -> Any:
    """Arguments of a call as templates expect them: an object; a text that is none as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class FunctionTool(Fields):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: Json | None = Field(None, description="the JSON schema of the arguments")
    strict: StrictBool | None = Field(None, description="whether arguments are held to the schema")

    def plain(self) -> Json:
        """The tool in the form that chat templates expect."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters or {}}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class Tool(Fields):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Fields):
    name: Text


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Fields):
    type: Literal["text"]


class JsonObjectFormat(Fields):
    type: Literal["json_object"]


class JsonSchema(Fields):
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Json = Field(alias="schema")
    strict: StrictBool | None = None


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(_Completion):
    messages: Messages
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    reasoning_effort: Literal["none", "minimal", "medium"] | None = None
    verbosity: Literal["medium"] | None = None


class CompletionRequest(_Completion):
    prompt: Text | _Texts | _Tokens | _TokenLists
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: StrictBool | None = Field(None, description="whether answers begin with their prompts")
    best_of: Annotated[Int, Field(ge=1)] | None = None
    suffix: Literal[""] | None = None


class FlockingRequest(Fields):
    model: StrictStr
    prompt: Text | None = None
    messages: Messages | None = None
    layer: Annotated[Int, Field(ge=0)] | None = None
    griffin: GriffinSettings | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The shape of every error of the OpenAI API."""

    error: ErrorBody


class OllamaError(BaseModel):
    """The shape of every error of Ollama's API."""

    error: str
