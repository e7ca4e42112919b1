"""/v1/responses as the openai client speaks it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from griffin.integrations.server.responses import Store
from griffin.integrations.server.types import Limits
from test_server import NAME, Loaded, Server, post, served, small
from test_server_api import SCHEMA, TEMPLATE, TIME, WEATHER

TOOLS: Any = [{"type": "function", **WEATHER}, {"type": "function", **TIME}]


@pytest.fixture(scope="module")
def server(smollm2: Loaded) -> Iterator[Server]:
    model, tokenizer = small(smollm2)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    with served((model, tokenizer), Limits(queue=400)) as running_server:
        yield running_server


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": NAME, "input": "How is the sky?", "max_output_tokens": 6, "temperature": 0, **fields}


@pytest.mark.model
def test_a_response_is_what_a_chat_answers(server: Server) -> None:
    client = server.client()
    got = client.responses.create(**asked(instructions="Be short.", metadata={"a": "b"}))
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How is the sky?"}]
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, temperature=0)
    assert got.output_text == chat.choices[0].message.content
    assert got.status == "incomplete"
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"
    assert got.metadata == {"a": "b"}
    assert got.usage is not None
    assert chat.usage is not None
    assert (got.usage.input_tokens, got.usage.output_tokens) == (chat.usage.prompt_tokens, 6)
    assert got.model_extra["griffin"]["density"] == 0.5  # type: ignore[index]


@pytest.mark.model
def test_streamed_events_build_the_response(server: Server) -> None:
    client = server.client()
    whole = client.responses.create(**asked(top_logprobs=2))
    with client.responses.stream(**asked(top_logprobs=2)) as stream:
        events: Any = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.incomplete"),
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text
    logprobs: Any = whole.output[0]
    assert len(logprobs.content[0].logprobs) == 6
    assert len(logprobs.content[0].logprobs[0].top_logprobs) == 2


@pytest.mark.model
def test_a_conversation_by_previous_response_id_and_by_items(server: Server) -> None:
    client = server.client()
    first = client.responses.create(**asked(instructions="Not carried over."))
    second = client.responses.create(**asked(input="And then?", previous_response_id=first.id))
    items: Any = [
        {"role": "user", "content": "How is the sky?"},
        *first.output,
        {"role": "user", "content": "And then?"},
    ]
    by_items = client.responses.create(**asked(input=items, store=False))
    assert second.output_text == by_items.output_text
    assert second.usage == by_items.usage
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    for name in (first.id, by_items.id, "resp_0"):
        with pytest.raises(openai.BadRequestError, match="send the conversation as input") as refused:
            client.responses.create(**asked(previous_response_id=name))
        assert refused.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
    third = client.responses.create(**asked(input="And?", previous_response_id=second.id))  # needs the second alone
    assert third.usage is not None
    assert second.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens


def test_the_store_is_bounded_and_drops_what_was_used_longest_ago() -> None:
    store = Store(count=3, nbytes=2_000)
    for name in "abc":
        store.put({"id": name}, [{"content": name}], 1)
    assert store.get("a") is not None
    store.put({"id": "d"}, [{"content": "d"}], 1)
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    store.put({"id": "e"}, [{"content": "x" * 1_955}], 1)
    assert [name for name in "abcde" if store.get(name)] == ["e"]
    assert store.drop("e")
    assert not store.drop("e")
    store.put({"id": "f"}, [{"content": "x" * 3_000}], 1)
    assert store.get("f") is None
    assert store._used == 0


@pytest.mark.model
def test_calls_and_their_results_are_items(server: Server) -> None:
    client = server.client()
    fields = asked(tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"}, max_output_tokens=200)
    got = client.responses.create(**fields)
    call: Any = got.output[0]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    with client.responses.stream(**fields) as stream:
        events = [event for event in stream if "function_call" in event.type or "output_item" in event.type]
    assert [event.type for event in events] == [
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done"),
    ]
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    after = client.responses.create(**asked(tools=TOOLS, previous_response_id=got.id, input=result))
    items: Any = [{"role": "user", "content": "How is the sky?"}, *got.output, *result]
    assert client.responses.create(**asked(tools=TOOLS, input=items)).output_text == after.output_text


@pytest.mark.model
def test_text_of_a_form(server: Server) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "sky", "schema": SCHEMA, "strict": True}}
    with server.client().responses.stream(**asked(text=form, temperature=1.2, max_output_tokens=200)) as stream:
        got = stream.get_final_response()
    assert json.loads(got.output_text)["sky"] in ("blue", "grey")
    assert got.status == "completed"


@pytest.mark.model
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content", "string or a valid list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "should be an item of type 'message'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "required"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text.format", "."),
        ({"background": True}, "background", "background is not supported; leave it out"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "."),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"conversation": "c"}, "conversation", "conversation is not supported"),
    ],
)
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str, message: str) -> None:
    status, body = post(server.url, json.dumps(asked(**fields)).encode(), "/v1/responses")
    assert status == 422, body
    assert body["error"]["param"].startswith(param), body
    assert re.search(message, body["error"]["message"])
