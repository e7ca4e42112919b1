"""The fields of requests. Unknown fields and unsupported values are refused with an error that names the field.

Unsupported fields of the OpenAI API are accepted if they have the value that turns them off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

# Unsupported fields of the OpenAI API, which are accepted with the value that turns them off.
UNSUPPORTED = (
    *("frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice"),
    *("modalities", "store", "service_tier", "echo", "best_of", "suffix"),
)
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20

_Int = StrictInt
_Stop = Annotated[list[Annotated[StrictStr, Field(min_length=1)]], Field(max_length=16)]
_Text = Annotated[StrictStr, Field(min_length=1)]
_Tokens = Annotated[list[Annotated[_Int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]  # one error, not thousands


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GriffinSettings(_Strict):
    """Fields of `GriffinConfig` that a request may set; they are checked by it."""

    density: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None, description="share of the FF neurons to keep; 1 is the full model"
    )
    selection: StrictStr | None = Field(None, description="how experts are selected")
    layers: Annotated[list[Annotated[_Int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="layers to prune; the others stay whole"
    )
    seed: Annotated[_Int, Field(ge=0, lt=2**63)] | None = Field(None, description="seed of a random selection")
    loss: Annotated[float, Field(gt=0)] | None = Field(
        None, description="instead of a density: the least bytes at which the profile says that KL is at most this"
    )


class StreamOptions(_Strict):
    include_usage: StrictBool | None = None
    include_obfuscation: Literal[False] | None = None


class _Completion(_Strict):
    """The fields of both endpoints."""

    model: StrictStr
    griffin: GriffinSettings | None = Field(None, description="GRIFFIN for this request")
    max_tokens: Annotated[_Int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = Field(
        None, description="0 is greedy; default 1, as in the OpenAI API"
    )
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    top_k: Annotated[_Int, Field(ge=0)] | None = Field(None, description="0 is off")
    min_p: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, strict=True)] | None = None
    n: Annotated[_Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[StrictStr, Field(min_length=1)] | _Stop | None = None
    seed: Annotated[_Int, Field(ge=0, lt=2**62)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    metadata: dict[str, StrictStr] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: StrictStr | None = None

    def plain(self) -> dict[str, str]:
        """The message in the form that chat templates expect."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Completion):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[_Int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[_Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: StrictBool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class ResponseFormat(_Strict):
    type: Literal["text"]


class CompletionRequest(_Completion):
    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: Annotated[_Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class FlockingRequest(_Strict):
    model: StrictStr
    prompt: _Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    layer: Annotated[_Int, Field(ge=0)] = 0
    griffin: GriffinSettings | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorBody


ChatRequest.model_rebuild()
