"""The fields of requests in Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from griffin.integrations.server.schema import Fields, GriffinSettings, Int, Json, Text, Tool


class Options(Fields):
    """How an answer is generated. Options of how a model is loaded have no effect here and are accepted."""

    num_predict: Annotated[Int, Field(ge=-2)] | None = Field(None, description="below 1: as many as there is room for")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    seed: Annotated[Int, Field(lt=2**62)] | None = Field(None, description="below 0: a new one each time")
    stop: StrictStr | Annotated[list[Text], Field(max_length=16, fail_fast=True)] | None = None
    # Without effect here: the whole text counts for the penalty, and the model is loaded already.
    repeat_last_n: Int | None = None
    num_keep: Int | None = None
    num_ctx: Int | None = None
    num_batch: Int | None = None
    num_gpu: Int | None = None
    main_gpu: Int | None = None
    num_thread: Int | None = None
    numa: StrictBool | None = None
    low_vram: StrictBool | None = None
    f16_kv: StrictBool | None = None
    use_mmap: StrictBool | None = None
    use_mlock: StrictBool | None = None
    penalize_newline: StrictBool | None = None
    # Other ways to draw tokens, with the values that turn them off.
    mirostat: Literal[0] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    typical_p: Annotated[float, Field(ge=1, le=1)] | None = None
    tfs_z: Annotated[float, Field(ge=1, le=1)] | None = None


class _Asked(Fields):
    model: StrictStr
    stream: StrictBool | None = Field(None, description="default true, as in Ollama's API")
    format: Literal["", "json"] | Json | None = Field(None, description="json, or a JSON schema")
    options: Options | None = None
    keep_alive: float | StrictStr | None = Field(None, description="without effect: the model stays")
    think: Literal[False] | None = None
    griffin: GriffinSettings | None = Field(None, description="GRIFFIN for this request")


class OllamaFunction(Fields):
    name: Text
    arguments: Json
    index: StrictInt | None = None
    description: StrictStr | None = None


class OllamaCall(Fields):
    id: StrictStr | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(Fields):
    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(fail_fast=True)] | None = None
    tool_name: StrictStr | None = None
    tool_call_id: StrictStr | None = None

    def plain(self) -> Json:
        """The message in the form that chat templates expect."""
        message: Json = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]
        if self.tool_name is not None:
            message["name"] = self.tool_name
        return message


class OllamaChatRequest(_Asked):
    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None


class GenerateRequest(_Asked):
    prompt: StrictStr | None = None
    system: StrictStr | None = None
    raw: StrictBool | None = Field(None, description="whether the prompt is taken as it is, without the chat template")
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    context: Annotated[list[Any], Field(max_length=0)] | None = None


class ShowRequest(Fields):
    model: StrictStr
    verbose: StrictBool | None = None
