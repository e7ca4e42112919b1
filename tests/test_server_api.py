"""Today's OpenAI API at griffin serve: neutral fields, penalties, tools, forms of answers; with the openai client."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
import torch

from evaluation_data import bytes_tokenizer
from griffin.engine.step import Draw, Sampling
from griffin.integrations.server import constraints
from griffin.integrations.server.constraints import Grammars
from griffin.integrations.server.tools import Calls
from griffin.integrations.server.types import Limits, Piece
from test_server import NAME, Loaded, Server, ask, post, served, small

# As Qwen's: tools in the system message, calls as JSON in <tool_call>, results as messages of role tool.
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}
For each call return {"name": ..., "arguments": ...} in <tool_call></tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
}
TIME = {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: Any = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
SCHEMA = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}, "stars": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sky", "stars"],
    "additionalProperties": False,
}
USER: Any = [{"role": "user", "content": "How is the sky?"}]


@pytest.fixture(scope="module")
def quick(smollm2: Loaded) -> Iterator[Server]:
    with served(small(smollm2), Limits(queue=400)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def with_tools(smollm2: Loaded) -> Iterator[Server]:
    model, tokenizer = small(smollm2)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    with served((model, tokenizer)) as running_server:
        yield running_server


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": NAME, "messages": USER, "max_tokens": 4, "temperature": 0, **fields}).encode()


# -- what asks for nothing ---------------------------------------------------------------------------------------------

NOTHING = {
    **{
        "tool_calls": [],
        "functions": [],
        "function_call": "none",
        "tool_choice": "auto",
        "tools": [],
        "logprobs": False,
    },
    **{"top_logprobs": 0, "reasoning_effort": "medium", "verbosity": "medium", "prompt_cache_key": "k", "user": "u"},
    **{"safety_identifier": "s", "store": False, "metadata": {}, "service_tier": "auto", "top_k": -1, "seed": -1},
    **{"stream_options": {"include_usage": False}, "stop": "", "logit_bias": {}, "frequency_penalty": 0, "n": 1},
    **{"modalities": ["text"], "audio": None, "prediction": None, "web_search_options": {}, "griffin": {}},
    **{"response_format": {"type": "text"}, "max_completion_tokens": None, "parallel_tool_calls": True},
}


@pytest.mark.model
def test_fields_that_ask_for_nothing_change_nothing(quick: Server) -> None:
    plain = post(quick.url, chat(), "/v1/chat/completions")[1]["choices"]
    for fields in [NOTHING, *({name: value} for name, value in NOTHING.items()), dict.fromkeys(NOTHING)]:
        status, body = post(quick.url, chat(**fields), "/v1/chat/completions")
        assert status == 200, body
        assert body["choices"] == plain
    for fields in ({"best_of": 1, "suffix": "", "echo": False}, {"best_of": None, "suffix": None, "echo": None}):
        assert post(quick.url, ask(**fields))[0] == 200
    message: dict[str, Any] = {**USER[0], "refusal": None, "tool_calls": [], "annotations": [], "audio": None}
    status, body = post(quick.url, chat(messages=[message]), "/v1/chat/completions")
    assert (status, body["choices"]) == (200, plain)


@pytest.mark.model
def test_an_answer_can_be_sent_back(quick: Server) -> None:
    client = quick.client()
    messages = list(USER)
    for _ in range(2):
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5)
        messages += [answer.choices[0].message, {"role": "user", "content": "And then?"}]
    assert len(messages) == 5
    whole = post(quick.url, chat(), "/v1/chat/completions")[1]["choices"][0]["message"]
    assert post(quick.url, chat(messages=[*USER, whole, *USER]), "/v1/chat/completions")[0] == 200


@pytest.mark.model
@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("completions", {"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ("completions", {"stop": 5}, "stop", r"valid string or a valid list"),
        ("completions", {"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ("completions", {"prompt": ["a", 5]}, "prompt.1", "valid string .found 5"),
        ("completions", {"prompt": [[1, "a"]]}, "prompt.0.1", "valid integer"),
        ("completions", {"best_of": 3}, "best_of", "best_of is supported where it is n"),
        ("completions", {"echo": True, "logprobs": 1}, "echo", "leave one out"),
        ("completions", {"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ("completions", {"logit_bias": {"x": 1}}, "logit_bias", "'x' is no token"),
        ("completions", {"logit_bias": {"49152": 1}}, "logit_bias", "token ids 0 to 49151"),
        ("completions", {"logit_bias": {"9" * 5000: 1}}, "logit_bias", "token ids 0 to 49151"),
        ("completions", {"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0", "the message has no content"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string or a valid"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "Input should be 'text'|not supported",
        ),
        ("chat/completions", {"tools": TOOLS}, "tools", "chat template has no tools; leave tools out"),
        ("chat/completions", {"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages", "has no tools"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format", "'json_object', 'json_schema'"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}},
            "response_format",
            "Invalid type: objct",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}}},
            "response_format",
            "Unimplemented keys",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
            "response_format",
            "this server takes at most 65536",
        ),
        ("chat/completions", {"functions": [TIME]}, "functions", "functions is not supported; leave it out"),
        ("chat/completions", {"store": True}, "store", "store is not supported; leave it out"),
    ],
)
def test_the_error_that_helps_most(quick: Server, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    status, body = post(quick.url, (ask if path == "completions" else chat)(**fields), f"/v1/{path}")
    assert status == 422, body
    assert re.search(message, body["error"]["message"]), body
    assert body["error"]["param"].startswith(param), body


@pytest.mark.model
def test_embeddings_are_refused_with_the_reason(quick: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="this server gives no embeddings"):
        quick.client().embeddings.create(model=NAME, input="a")


# -- how tokens are drawn ----------------------------------------------------------------------------------------------


def test_penalties_and_biases_of_logits() -> None:
    prompt, logits = torch.tensor([[0, 0, 1]]), torch.tensor([[5.0, 4.0, 3.0, 2.0]])

    def drawn(steps: int, **settings: Any) -> list[int]:
        draw = Draw(Sampling(**settings), prompt)
        return [int(draw(logits)) for _ in range(steps)]

    assert drawn(3) == [0, 0, 0]
    assert drawn(4, presence_penalty=1.5) == [0, 1, 0, 0]  # 5, 4, then 3.5 > 3 > 2.5: the prompt's tokens do not count
    assert drawn(5, frequency_penalty=0.9) == [0, 0, 1, 0, 1]  # 5; 4.1; 4 > 3.2; 3.2 > 3.1; 3.1 > 3 > 2.3
    assert drawn(2, frequency_penalty=-1.0) == [0, 0]
    assert drawn(2, logit_bias={0: -100, 3: 1.5}) == [1, 1]
    with pytest.raises(ValueError, match="logit_bias names token 7; this model has tokens 0 to 3"):
        drawn(1, logit_bias={7: 1})
    with pytest.raises(ValueError, match="logit_bias"):
        Sampling(logit_bias={1: 101})
    with pytest.raises(ValueError, match="frequency_penalty"):
        Sampling(frequency_penalty=float("nan"))


@pytest.mark.model
def test_penalties_biases_and_echo_by_the_client(quick: Server, smollm2: Loaded) -> None:
    client = quick.client()
    asked: dict[str, Any] = {"model": NAME, "prompt": "The sky is", "max_tokens": 6, "temperature": 0}
    tokenizer = smollm2[1]
    forced = client.completions.create(**asked, logit_bias={"338": 100}, logprobs=0).choices[0]
    assert forced.text == tokenizer.decode([338] * 6)
    spread = client.completions.create(**asked, logit_bias={"338": 100, "339": 99}, frequency_penalty=2).choices[0]
    assert {338, 339} == set(tokenizer(spread.text)["input_ids"])
    plain = client.completions.create(**asked).choices[0].text
    echoed = client.completions.create(**{**asked, "prompt": ["The sky is", "Rome"]}, n=2, echo=True, seed=1).choices
    assert [choice.text.startswith(("The sky is", "Rome")[choice.index // 2]) for choice in echoed] == [True] * 4
    assert echoed[0].text == "The sky is" + plain
    stream = client.completions.create(**asked, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "The sky is" + plain
    ids = tokenizer("The sky is")["input_ids"]
    assert client.completions.create(**{**asked, "prompt": ids}, echo=True).choices[0].text == "The sky is" + plain


# -- the form of answers -----------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_are_what_the_schema_says(quick: Server, temperature: float) -> None:
    client = quick.client()
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True}}
    answers = client.chat.completions.create(
        model=NAME, messages=USER, response_format=form, n=3, temperature=temperature, seed=3, max_tokens=200
    )
    for choice in answers.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert list(value) == ["sky", "stars"]
        assert value["sky"] in ("blue", "grey")
        assert 0 <= value["stars"] <= 99


@pytest.mark.model
def test_parse_of_the_openai_client(quick: Server) -> None:
    import pydantic

    class Sky(pydantic.BaseModel):
        cloudy: bool
        stars: int | None

    answer = quick.client().chat.completions.parse(model=NAME, messages=USER, response_format=Sky, max_tokens=400)
    if answer.choices[0].finish_reason == "stop":  # a random model may write a number without an end
        assert isinstance(answer.choices[0].message.parsed, Sky)


@pytest.mark.model
@pytest.mark.parametrize(
    "form",
    [
        {"$ref": "#"},  # nothing has this form
        {"type": "string", "pattern": "^(a?){1000}a{1000}$"},
    ],
)
def test_a_form_that_no_answer_can_be_held_to(
    quick: Server, form: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The request's fault, not the server's: no 500, and no traceback in the log."""
    wanted = {"type": "json_schema", "json_schema": {"name": "form", "schema": form}}
    with pytest.raises(openai.UnprocessableEntityError, match=r"cannot be held to its form: [^<]*$") as refused:
        quick.client().chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Go"}], max_tokens=8, response_format=cast(Any, wanted)
        )
    assert refused.value.code == "unsupported_form"
    assert not caplog.records


def test_what_a_form_needs_is_made_once_and_without_it_the_server_starts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.backend_tokenizer.enable_padding()  # which is no part of its reading
    grammars = Grammars(tokenizer, 300, [1])
    grammars.prepare()
    monkeypatch.setattr(constraints, "_as_json", lambda _: pytest.fail("the tokenizer is read again"))
    grammars.json({"type": "object"})
    assert tokenizer.backend_tokenizer.padding is not None
    monkeypatch.undo()
    assert not caplog.records
    unread = Grammars(object(), 300, [1])  # type: ignore[arg-type]
    unread.prepare()
    assert "no answer can be held to a form" in caplog.text
    with pytest.raises(ValueError, match="not one of the tokenizers library"):
        unread.json({"type": "object"})


def test_patterns_that_are_joined_are_few() -> None:
    """llguidance takes twice as long for each further one: hours for 32 of them."""
    grammars = Grammars(bytes_tokenizer(), 300, [1])
    texts = [{"type": "string", "pattern": f"a.{{{n}}}b.*c{{{n}}}"} for n in range(1, 60)]
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}", **text} for n, text in enumerate(texts)}
    objects = [{"properties": {"a": text}} for text in texts]
    for schema in ({"allOf": texts}, {"$ref": "#/$defs/d0", "$defs": chain}, {"type": "object", "allOf": objects}):
        with pytest.raises(ValueError, match="at most 12"):
            grammars.json(schema)
    start = time.monotonic()
    with pytest.raises(ValueError, match="Unable to determine"):
        grammars.json({"allOf": texts[:12]})
    assert time.monotonic() - start < 5
    each = {f"p{n}": {"allOf": [{"$ref": "#/$defs/text"}]} for n in range(40)}
    grammars.json({"type": "object", "properties": each, "$defs": {"text": texts[0]}})
    grammars.json({"type": "object", "properties": {f"p{n}": text for n, text in enumerate(texts)}})


@pytest.mark.model
def test_a_json_object_begins_as_one(quick: Server) -> None:
    status, body = post(quick.url, chat(response_format={"type": "json_object"}), "/v1/chat/completions")
    assert status == 200
    assert body["choices"][0]["message"]["content"].startswith("{")


# -- tools -------------------------------------------------------------------------------------------------------------


def read(*texts: str, reason: str = "stop") -> tuple[str, list[tuple[str, str]], str | None]:
    calls, said, made, ended = Calls(), "", [], None
    for number, text in enumerate(texts):
        piece = calls.read(Piece(0, text, None, reason if number == len(texts) - 1 else None))
        said, ended = said + piece.text, piece.finish_reason
        made += [(call.name, call.arguments) for call in piece.calls]
    return said, made, ended


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain", "plain", 0),
        (CALL, "", 1),
        (f"{CALL}\n{CALL}\n", "", 2),
        (f"I look.\n\n{CALL}", "I look.", 1),
        (f"{CALL}\nDone.", "\nDone.", 1),
        (CALL.removesuffix("\n</tool_call>"), "", 1),
        ("<tool_call>\n{not json\n</tool_call> x", "<tool_call>\n{not json\n</tool_call> x", 0),
        ('<tool_call>\n{"name": "f", "arg', '<tool_call>\n{"name": "f", "arg', 0),
        ("a <tool", "a <tool", 0),
        ("a < b  <<tool_call ", "a < b  <<tool_call ", 0),
    ],
)
def test_calls_are_read_however_the_text_comes(text: str, said: str, calls: int) -> None:
    for size in (1, 2, 3, 7, len(text)):
        got = read(*(text[at : at + size] for at in range(0, len(text), size)))
        assert got == (said, [("f", '{"x": 1}')] * calls, "tool_calls" if calls else "stop")
    assert read(text, reason="length")[2] == "length"


@pytest.mark.model
def test_calls_that_are_asked_for(with_tools: Server) -> None:
    client = with_tools.client()
    asked: dict[str, Any] = {"model": NAME, "messages": USER, "tools": TOOLS, "max_tokens": 200, "seed": 0}
    whole = client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    call: Any = whole.message.tool_calls[0]
    assert call.function.name in ("get_weather", "time")
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(client.chat.completions.create(**asked, tool_choice=named, stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in parts if part.function] == ["get_weather"]
    arguments = json.loads(parts[0].function.arguments)  # type: ignore[union-attr,arg-type]
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    # and the call and its result go back
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(**{**asked, "messages": [*USER, whole.message, result], "max_tokens": 3})
    assert after.usage is not None
    assert after.usage.prompt_tokens > 20


@pytest.mark.model
def test_tools_reach_the_template_and_a_choice_of_none_does_not(with_tools: Server) -> None:
    def prompt_tokens(**fields: Any) -> int:
        status, body = post(with_tools.url, chat(**fields), "/v1/chat/completions")
        assert status == 200, body
        return int(body["usage"]["prompt_tokens"])

    plain = prompt_tokens()
    assert prompt_tokens(tools=TOOLS) > plain + 50
    assert prompt_tokens(tools=TOOLS, tool_choice="none") == plain
    strict = copy.deepcopy(TOOLS)
    strict[0]["function"]["strict"] = True
    assert prompt_tokens(tools=strict) == prompt_tokens(tools=TOOLS)
    assert prompt_tokens(tools=TOOLS, parallel_tool_calls=False) == prompt_tokens(tools=TOOLS)
    for fields, message in (
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "the tools are get_weather, time"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two tools have the name 'get_weather'"),
    ):
        status, body = post(with_tools.url, chat(**{"tools": TOOLS, **fields}), "/v1/chat/completions")
        assert status == 422
        assert message in body["error"]["message"]


@pytest.mark.model
def test_a_call_or_json_of_a_schema(with_tools: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    fields = chat(tools=TOOLS, response_format=form, max_tokens=300, temperature=1, seed=4)
    status, body = post(with_tools.url, fields, "/v1/chat/completions")
    assert status == 200, body
    message = body["choices"][0]["message"]
    assert message.get("tool_calls") or json.loads(message["content"])
