"""Ollama's API at griffin serve, with the ollama client."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from griffin.integrations.server.types import Limits
from test_server import NAME, Loaded, Server, post, served, small
from test_server_api import SCHEMA, TEMPLATE, TOOLS, USER

GREEDY = {"temperature": 0, "num_predict": 6}


@pytest.fixture(scope="module")
def server(smollm2: Loaded) -> Iterator[Server]:
    model, tokenizer = small(smollm2)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    with served((model, tokenizer), Limits(queue=400)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    return ollama.Client(server.url)


@pytest.mark.model
def test_the_model_is_found(client: ollama.Client, server: Server) -> None:
    listed = client.list().models
    assert [model.model for model in listed] == [f"{NAME}:latest"]
    assert listed[0].details is not None
    assert listed[0].details.family == "llama"
    shown = client.show(NAME)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    count = sum(parameter.numel() for parameter in server.engine.model.parameters())
    assert shown.modelinfo["general.parameter_count"] == count
    assert [model.model for model in client.ps().models] == [f"{NAME}:latest"]
    with pytest.raises(ollama.ResponseError, match="there is no model 'llama3' here") as refused:
        client.show("llama3")
    assert refused.value.status_code == 404


@pytest.mark.model
def test_chat_and_generate_answer_as_the_openai_api(client: ollama.Client, server: Server) -> None:
    by_openai = server.client()
    chat = by_openai.chat.completions.create(model=NAME, messages=USER, max_tokens=6, temperature=0)
    whole = client.chat(NAME, messages=USER, options=GREEDY)
    assert whole.message.content == chat.choices[0].message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 6)
    assert chat.usage is not None
    assert whole.prompt_eval_count == chat.usage.prompt_tokens
    assert whole.total_duration is not None
    assert whole.total_duration > 0
    lines = list(client.chat(f"{NAME}:latest", messages=USER, options=GREEDY, stream=True))
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert client.generate(NAME, USER[0]["content"], options=GREEDY).response == whole.message.content
    text = by_openai.completions.create(model=NAME, prompt="The sky is", max_tokens=6, temperature=0).choices[0].text
    assert client.generate(NAME, "The sky is", raw=True, options=GREEDY).response == text
    streamed = client.generate(NAME, "The sky is", raw=True, options=GREEDY, stream=True)
    assert "".join(line.response for line in streamed) == text
    assert client.generate(NAME).done_reason == "load"


@pytest.mark.model
def test_options_forms_and_calls(client: ollama.Client) -> None:
    sampled = {"seed": 3, "num_predict": 200, "num_ctx": 4096, "repeat_penalty": 1.1, "stop": ["@@@"], "mirostat": 0}
    for _ in range(2):
        got = client.chat(NAME, messages=USER, format=SCHEMA, options=sampled)
        assert json.loads(got.message.content or "")["sky"] in ("blue", "grey")
    assert client.generate(NAME, "Hi", format="json", options=GREEDY).response.startswith("{")
    answers = [client.chat(NAME, messages=USER, options={"seed": 3, "num_predict": 8}) for _ in range(2)]
    assert answers[0].message.content == answers[1].message.content
    called: Any = {"role": "assistant", "tool_calls": [{"function": {"name": "time", "arguments": {}}}]}
    messages = [*USER, called, {"role": "tool", "tool_name": "time", "content": "noon"}]
    with_tools = client.chat(NAME, messages=messages, tools=TOOLS, options=GREEDY)
    without = client.chat(NAME, messages=USER, options=GREEDY)
    assert (with_tools.prompt_eval_count or 0) > (without.prompt_eval_count or 0) + 50


@pytest.mark.model
def test_what_is_refused_says_why_in_ollamas_shape(client: ollama.Client, server: Server) -> None:
    for fields, message in (
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"tempreature": 2}}, "options.tempreature is not supported"),
        ({"think": True}, "think is not supported; leave it out"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
    ):
        body = json.dumps({"model": NAME, "messages": USER, **fields}).encode()
        status, answer = post(server.url, body, "/api/chat")
        assert status == 422
        assert list(answer) == ["error"]
        assert message in answer["error"]
    with pytest.raises(ollama.ResponseError, match="gives no embeddings"):
        client.embed(NAME, "a")


@pytest.mark.model
def test_the_key_guards_it(smollm2: Loaded) -> None:
    with served(small(smollm2), api_key="k") as server:
        with pytest.raises(ollama.ResponseError):
            ollama.Client(server.url).list()
        assert ollama.Client(server.url, headers={"Authorization": "Bearer k"}).list().models
