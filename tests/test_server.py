"""griffin serve, as its users meet it: the real openai client, the served schema, many clients, faults."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from conftest import tiny_llama
from evaluation_data import bytes_model, bytes_tokenizer, save_bytes_model, special_model
from forked import Griffin
from griffin.config import GriffinConfig
from griffin.integrations.server.app import make_app
from griffin.integrations.server.connections import ConnectionLimits, bounded_protocol
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.types import Limits
from griffin.integrations.server.validation import Settings
from griffin.native import library

NAME = "smollm2-135m"
SIZES = {"vocab_size": 49152, "max_position_embeddings": 8192}  # the real model's
TEXTS = (
    "The history of the city of Rome begins",
    "def fibonacci(n):",
    "Once upon a time there was a little dog who lived in a big house with",
    "Water boils at",
)
TOKENS = 12


class Server:
    """A server in a thread of this process."""

    def __init__(
        self, model: Any, tokenizer: Any, limits: Limits, connections: ConnectionLimits | None = None, **settings: Any
    ) -> None:
        self.engine = Engine(model, tokenizer, GriffinConfig(density=0.5, selection="topk"), limits)
        app = make_app(self.engine, Settings(NAME, **settings))
        self.app = app
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        protocol = bounded_protocol(connections or ConnectionLimits(), app.state.metrics.count_other)
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", http=protocol))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connected(self) -> int:
        return len(self._server.server_state.connections)

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def served(loaded: Any, limits: Limits | None = None, **settings: Any) -> Iterator[Server]:
    server = Server(*loaded, limits or Limits(), **settings)
    try:
        yield server
    finally:
        server.stop()


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def server(smollm2: Loaded) -> Iterator[Server]:
    with served(smollm2) as running_server:
        yield running_server


@pytest.fixture
def tiny(smollm2: Loaded) -> Loaded:
    return small(smollm2)


@pytest.fixture(scope="module")
def quick(smollm2: Loaded) -> Iterator[Server]:
    with served(small(smollm2), Limits(queue=400)) as running_server:
        yield running_server


def small(loaded: Loaded) -> Loaded:
    """A random model of the real one's vocabulary: what is not about its answers does not wait for them."""
    return tiny_llama(torch.float32, num_hidden_layers=6, **SIZES), loaded[1]


@pytest.fixture(scope="module")
def expected(smollm2: Loaded) -> dict[tuple[str, float], str]:
    """What griffin.generate answers to two texts at each density; asked before the server has the model."""
    return answers_to(TEXTS[:2], smollm2)


def answers_to(texts: Sequence[str], loaded: Loaded) -> dict[tuple[str, float], str]:
    answers = {}
    for text in texts:
        for density in (1.0, 0.75, 0.5):
            config = GriffinConfig(density=density, selection="topk")
            result = griffin.generate(*loaded, text, griffin=config, max_tokens=TOKENS)
            assert isinstance(result, griffin.Result)
            answers[text, density] = result.text
    return answers


def post(url: str, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@contextlib.contextmanager
def asking(server: Server, body: bytes) -> Iterator[None]:
    """A client that asks, and goes away when the block is left."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


def ask(**fields: Any) -> bytes:
    return json.dumps({"model": NAME, "prompt": "The sky is", "max_tokens": 4, "temperature": 0, **fields}).encode()


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_answers_equal_the_library(expected: dict[tuple[str, float], str], server: Server) -> None:
    client = server.client()
    for (text, density), answer in expected.items():
        got = client.completions.create(
            model=NAME, prompt=text, max_tokens=TOKENS, temperature=0, extra_body={"griffin": {"density": density}}
        )
        assert got.choices[0].text == answer
        assert got.usage is not None
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
        about = got.model_extra["griffin"]  # type: ignore[index]
        assert about["density"] == density
        assert about["selection"] == ("full" if density == 1.0 else "topk")
    assert len(set(expected.values())) == len(expected)  # the densities do answer differently


@pytest.mark.model
def test_chat_streams_what_it_answers_whole(server: Server) -> None:
    client = server.client()
    asked: dict[str, Any] = {
        **{"model": NAME, "temperature": 0, "max_completion_tokens": 24, "logprobs": True, "top_logprobs": 3},
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Name a river. 東京"}],
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    streamed = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
    tokens = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert tokens == streamed
    assert tokens is not None
    assert whole.usage is not None
    assert len(tokens) == whole.usage.completion_tokens
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy: the likeliest
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
        assert token.token == token.top_logprobs[0].token


@pytest.mark.model
def test_without_stream_options_usage_comes_with_the_last_choice(server: Server) -> None:
    chunks = list(
        server.client().completions.create(model=NAME, prompt="One two", max_tokens=3, temperature=0, stream=True)
    )
    assert all(chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.model
def test_several_answers_differ_and_a_seed_repeats_them(quick: Server) -> None:
    client = quick.client()
    asked: dict[str, Any] = {"model": NAME, "prompt": ["Once", "A dog"], "n": 3, "max_tokens": 12, "seed": 5}
    answers, repeated = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in answers.choices]
    assert [choice.index for choice in answers.choices] == list(range(6))
    assert texts == [choice.text for choice in repeated.choices]
    assert len(set(texts)) == 6
    other = client.completions.create(**{**asked, "seed": 99})
    assert [choice.text for choice in other.choices] != texts
    single = client.completions.create(**{**asked, "prompt": "A dog", "n": 1})
    assert single.choices[0].text == texts[3]


@pytest.mark.model
def test_a_stop_text_ends_the_answer(quick: Server) -> None:
    client = quick.client()
    asked: dict[str, Any] = {"model": NAME, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**asked).choices[0]
    stop = whole.text[8:11]
    ended = client.completions.create(**asked, stop=["@@@", stop]).choices[0]
    assert ended.finish_reason == "stop"
    assert ended.text == whole.text[: whole.text.index(stop)]


def test_special_tokens_as_stop_texts_and_the_offsets_of_tokens() -> None:
    model, before, special, after = special_model(torch.float32)
    with served((model, bytes_tokenizer())) as server:
        asked: dict[str, Any] = {"model": NAME, "prompt": "The river", "temperature": 0, "max_tokens": 12}
        asked["extra_body"] = {"griffin": {"density": 1.0}}
        client = server.client()
        for stop in (special, special + after):
            ended = client.completions.create(**asked, stop=["@@@", stop]).choices[0]
            assert (ended.text, ended.finish_reason) == (before, "stop")
        whole = client.completions.create(**asked, logprobs=1).choices[0]
        assert whole.logprobs is not None
        tokens, offsets = whole.logprobs.tokens, whole.logprobs.text_offset
        assert tokens is not None
        assert offsets is not None
        assert special in tokens
        assert any(token.startswith("bytes:") for token in tokens)
        for token, start, end in zip(tokens, offsets, [*offsets[1:], len(whole.text)], strict=True):
            if token == special:
                assert start == end == len(before)  # a special token is no text
            elif not token.startswith("bytes:"):
                assert whole.text[start : start + len(token)] == token
            assert start <= end <= start + 2


@pytest.mark.model
def test_tokens_for_text(smollm2: Loaded, quick: Server) -> None:
    client, text = quick.client(), TEXTS[0]
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(**asked, prompt=text).choices[0].text
    ids = smollm2[1](text)["input_ids"]
    assert client.completions.create(**asked, prompt=ids).choices[0].text == by_text
    both = client.completions.create(**asked, prompt=[ids, [5, 6]]).choices
    assert both[0].text == by_text


@pytest.mark.model
def test_tokens_that_are_part_of_a_character_are_told_by_their_bytes(smollm2: Loaded) -> None:
    from griffin.integrations.server.openai_chunks import shown, token_bytes

    for text in ("naïve 東京 🤷🏽‍♀️\t\n ok", "plain text"):
        pieces = [token_bytes(smollm2[1], token) for token in smollm2[1](text)["input_ids"]]
        assert b"".join(pieces) == text.encode()
    assert shown("é".encode()) == "é"
    assert shown(b"\xe6\x9d") == "bytes:\\xe6\\x9d"


@pytest.mark.model
def test_models_health_and_metrics(quick: Server) -> None:
    client = quick.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).model_extra["griffin"]["layers"] == 6  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    client.completions.create(model=NAME, prompt="One", max_tokens=2)
    with urllib.request.urlopen(f"{quick.url}/health") as answer:
        assert json.loads(answer.read())["status"] == "ok"
    with urllib.request.urlopen(f"{quick.url}/metrics") as answer:
        text = answer.read().decode()
    assert 'griffin_requests_total{path="/v1/completions",status="200"}' in text
    assert re.search(r"griffin_generated_tokens_total [1-9]", text)
    assert re.search(r"griffin_ff_bytes_total [1-9]", text)
    assert "griffin_cache_bytes 0.0" in text


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_every_answer_under_load_equals_the_same_request_alone(tiny: Loaded, quick: Server) -> None:
    expected = answers_to(TEXTS, tiny)
    assert len(set(expected.values())) == len(expected)

    async def run() -> list[tuple[tuple[str, float], str]]:
        async with openai.AsyncOpenAI(base_url=f"{quick.url}/v1", api_key="x", max_retries=0, timeout=300) as client:

            async def one(key: tuple[str, float], number: int) -> tuple[tuple[str, float], str]:
                asked: dict[str, Any] = {
                    **{"model": NAME, "prompt": key[0], "max_tokens": TOKENS, "temperature": 0},
                    "extra_body": {"griffin": {"density": key[1]}},
                }
                if number % 2:
                    stream = await client.completions.create(**asked, stream=True)
                    return key, "".join([chunk.choices[0].text async for chunk in stream])
                return key, (await client.completions.create(**asked)).choices[0].text

            return await asyncio.gather(*(one(key, number) for number, key in enumerate([*expected] * 4)))

    for key, text in asyncio.run(run()):
        assert text == expected[key]
    assert quick.engine.cache_bytes == 0


@pytest.mark.model
def test_two_hundred_clients_and_the_memory_comes_back(quick: Server) -> None:
    def one(number: int) -> int:
        return post(quick.url, ask(max_tokens=3, prompt=f"Number {number} is", griffin={"density": 0.5}))[0]

    def burst() -> None:
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            assert set(pool.map(one, range(200))) == {200}

    burst()
    gc.collect()
    before = psutil.Process().memory_info().rss
    burst()
    gc.collect()
    assert quick.engine.cache_bytes == quick.engine.running == quick.engine.waiting == 0
    grown = psutil.Process().memory_info().rss - before
    assert grown < 60e6  # bytes; the model has 700 MB, a leak of the caches would be 200 times a megabyte and more


@pytest.mark.model
def test_a_long_prompt_does_not_hold_up_a_running_answer(quick: Server) -> None:
    client = quick.client()
    stream = client.completions.create(
        model=NAME, prompt="The sky", max_tokens=60, temperature=0, stream=True, logprobs=0
    )
    times, long = [], None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number, _ in enumerate(stream):
            times.append(time.monotonic())
            if number == 3:
                long = pool.submit(post, quick.url, ask(prompt="word " * 1500, max_tokens=1))
        assert long is not None
        during = times[4:]
        status, answer = long.result()
        done = time.monotonic()
    assert status == 200
    assert answer["usage"]["prompt_tokens"] >= 1500
    assert len(during) > 40
    assert during[10] < done  # tokens came while the prompt ran


# -- lossless drafts ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
@pytest.mark.parametrize("asked_by", ["the request", "the server"])
def test_drafts_change_no_answer(asked_by: str) -> None:
    loaded = tiny_llama(torch.float32, vocab_size=300, max_position_embeddings=512), bytes_tokenizer()
    with served(loaded, lossless=asked_by == "the server") as server:

        def answer(number: int, **own: Any) -> dict[str, Any]:
            status, body = post(
                server.url,
                ask(
                    prompt=f"{number}: abcd abcd abcd",
                    max_tokens=120,
                    temperature=number % 3 / 4,
                    seed=number,
                    logprobs=2,
                    n=1 + number % 2,
                    logit_bias={"97": 100, "98": 98},  # answers that repeat themselves
                    griffin={"density": 1.0, **own},
                ),
            )
            assert status == 200, body
            return body

        def choices(number: int) -> Any:
            return answer(number, lossless=False)["choices"]

        plain = [choices(number) for number in range(6)]
        asked = {"lossless": True} if asked_by == "the request" else {}
        alone = [answer(number, **asked) for number in range(6)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda number: answer(number, **asked), range(6)))
        for own, by_itself, among in zip(plain, alone, together, strict=True):
            assert own == by_itself["choices"] == among["choices"]
        about = [body["griffin"] for body in (*alone, *together)]
        assert all(0 <= each["accepted_tokens"] <= each["drafted_tokens"] for each in about)
        assert sum(each["accepted_tokens"] for each in about) > 0
        assert answer(0, density=0.5)["griffin"]["drafted_tokens"] == 0
        with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
            text = metrics.read().decode()
        for name in ("drafted", "accepted"):
            total = sum(each[f"{name}_tokens"] for each in about)
            assert f"griffin_{name}_tokens_total {float(total)}" in text


def test_drafts_are_of_the_full_model_only() -> None:
    loaded = tiny_llama(vocab_size=300), bytes_tokenizer()  # float64: no native step, so nothing is drafted
    with served(loaded) as server:
        for settings, says in (({"density": 0.5}, "density is 0.5"), ({"loss": 0.1}, "loss is 0.1")):
            status, body = post(server.url, ask(griffin={"lossless": True, **settings}))
            assert (status, body["error"]["param"]) == (422, "griffin.lossless"), body
            assert f"lossless gives the tokens of the full model, and {says}" in body["error"]["message"]
        status, body = post(server.url, ask(griffin={"lossless": True}))  # the server's density is 0.5
        assert status == 200
        assert (body["griffin"]["density"], body["griffin"]["drafted_tokens"]) == (1.0, 0)
        assert post(server.url, ask(griffin={"density": 1.0}))[1]["choices"] == body["choices"]


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"griffin": {"density": 7}}, 422, "griffin.density", "less than or equal to 1"),
        ({"griffin": {"density": 0}}, 422, "griffin.density", "greater than 0"),
        ({"griffin": {"densty": 0.5}}, 422, "griffin.densty", "griffin.densty is not supported"),
        ({"griffin": {"selection": "tpk"}}, 422, "griffin.selection", "did you mean 'topk'"),
        ({"griffin": {"selection": "wanda"}}, 422, "griffin.selection", "cannot be served"),
        ({"griffin": {"layers": [99]}}, 422, "griffin.layers", "this model has layers 0 to 5"),
        ({"griffin": {"loss": 0.1, "density": 0.5}}, 422, None, "griffin.density|there are a loss|loss"),
        ({"suffix": "x"}, 422, "suffix", "suffix is not supported; leave it out"),
        ({"frequency_penalty": 2.5}, 422, "frequency_penalty", "less than or equal to 2"),
        ({"no_such": 1}, 422, "no_such", "no_such is not supported"),
        ({"max_tokens": "many"}, 422, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, 422, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 9000}, 400, "max_tokens", "ask for at most"),
        ({"temperature": -1}, 422, "temperature", "greater than or equal to 0"),
        ({"n": 17}, 422, "n", "less than or equal to 16"),
        ({"n": 9, "prompt": ["a", "b"]}, 422, "n", "at most 16 answers"),
        ({"prompt": ""}, 422, "prompt", "at least 1"),
        ({"prompt": " \n"}, 400, "prompt", "the prompt is empty"),
        ({"prompt": "word " * 9000}, 400, "prompt", "the model's context is 8192"),
        ({"prompt": [10**6]}, 422, "prompt", "there is no token 1000000"),
        ({"model": "gpt-4"}, 404, "model", "this server has 'smollm2-135m'"),
        ({"stream_options": {"include_usage": True}}, 422, "stream_options", "needs stream"),
        ({"stop": [""]}, 422, "stop", "at least 1"),
    ],
)
def test_what_is_refused_says_why(
    quick: Server, fields: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    got, body = post(quick.url, ask(**fields))
    error = body["error"]
    assert got == status, error
    assert re.search(message, error["message"]), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if param is not None:
        assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert post(quick.url, ask())[0] == 200  # and it goes on


@pytest.mark.model
def test_what_is_no_request_at_all(quick: Server) -> None:
    assert post(quick.url, b"{nonsense")[0] == 400
    assert post(quick.url, b"[1, 2]")[0] == 422
    assert post(quick.url, b"\xff\xfe")[0] == 400
    status, body = post(quick.url, b'{"model": "' + b"x" * 10_000_000 + b'"}')
    assert status == 413
    assert "larger than the 4 MB" in body["error"]["message"]
    assert post(quick.url, ask(), "/v1/nothing")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{quick.url}/v1/completions")
    with socket.create_connection(("127.0.0.1", quick.port)) as client:  # a body that was not announced
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                client.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert b"413" in client.recv(100)
    assert post(quick.url, ask())[0] == 200


@pytest.mark.model
def test_who_goes_away_frees_the_place(quick: Server) -> None:
    engine = quick.engine
    stream = quick.client().completions.create(model=NAME, prompt="The", max_tokens=8000, stream=True)
    next(iter(stream))
    assert engine.running == 1
    stream.close()
    until(lambda: engine.running == 0)
    with asking(quick, ask(max_tokens=8000)):  # an answer that is not streamed
        until(lambda: engine.running == 1)
    until(lambda: engine.running == 0)
    assert engine.cache_bytes == 0
    assert engine.alive


@pytest.mark.model
def test_a_slow_reader_holds_nobody_up(quick: Server) -> None:
    with asking(quick, ask(max_tokens=200, stream=True, logprobs=5)):  # and reads nothing
        assert post(quick.url, ask())[0] == 200
        until(lambda: quick.engine.running == 0)


@pytest.mark.model
def test_a_full_queue_says_when_to_come_back(tiny: Loaded) -> None:
    with served(tiny, Limits(max_sequences=1, queue=1)) as server, concurrent.futures.ThreadPoolExecutor(3) as pool:
        client = server.client()
        running = client.completions.create(model=NAME, prompt="A", max_tokens=4000, stream=True)
        next(iter(running))
        waiting = pool.submit(post, server.url, ask())
        until(lambda: server.engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=NAME, prompt="B", max_tokens=2)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        running.close()
        assert waiting.result()[0] == 200


@pytest.mark.model
def test_who_leaves_the_queue_is_not_waited_for(tiny: Loaded) -> None:
    with served(tiny, Limits(max_sequences=1)) as server:
        running = server.client().completions.create(model=NAME, prompt="A", max_tokens=8000, stream=True)
        next(iter(running))
        for stream in (True, False):
            with asking(server, ask(stream=stream)):
                until(lambda: server.engine.waiting == 1)
            until(lambda: server.engine.waiting == 0)
        assert server.engine.running == 1
        running.close()


@pytest.mark.model
def test_deadline_memory_and_key(tiny: Loaded) -> None:
    limits = Limits(cache_bytes=2_000_000, deadline_s=0.5)
    with served(tiny, limits, api_key="secret", prompt_tokens=100) as server:
        key = {"Authorization": "Bearer secret"}
        assert post(server.url, ask())[0] == 401
        assert post(server.url, ask(), Authorization="Bearer secreT")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        assert [model.id for model in server.client(api_key="secret").models.list()] == [NAME]
        status, body = post(server.url, ask(max_tokens=8000), **key)
        assert status == 422
        assert "MB of key/value memory, this server has 2.0 MB" in body["error"]["message"]
        status, body = post(server.url, ask(prompt="word " * 200), **key)
        assert status == 400
        assert "this server takes at most 100" in body["error"]["message"]
        status, body = post(server.url, ask(max_tokens=1500), **key)
        assert (status, body["error"]["code"]) in ((504, "deadline_exceeded"),)
        with urllib.request.urlopen(f"{server.url}/health") as answer:  # needs no key
            assert answer.status == 200


@pytest.mark.model
def test_an_exception_in_one_request_ends_no_other(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from griffin.integrations.server import engine as engines

    with served(tiny) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        true = engines._info

        def broken(token: int, logits: torch.Tensor, top: int, *rest: Any) -> Any:
            if top == 7:
                raise RuntimeError("made up")
            return true(token, logits, top, *rest)

        monkeypatch.setattr(engines, "_info", broken)
        good = [pool.submit(post, server.url, ask(max_tokens=30, logprobs=2)) for _ in range(2)]
        status, body = post(server.url, ask(logprobs=7))
        assert status == 500
        assert body["error"]["message"] == "the answer has failed: RuntimeError: made up"
        assert body["error"]["type"] == "server_error"
        assert [answer.result()[0] for answer in good] == [200, 200]
        assert server.engine.alive


@pytest.mark.model
def test_the_model_is_as_before(tiny: Loaded) -> None:
    model, tokenizer = tiny
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    model_forwards = [module for module in model.modules() if "forward" in vars(module)]
    with torch.no_grad():
        before = model(ids).logits
    with served(tiny) as server:
        post(server.url, ask())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert [module for module in model.modules() if "forward" in vars(module)] == model_forwards


@pytest.mark.model
def test_flocking_picture(quick: Server) -> None:
    import base64

    body = json.dumps({"model": NAME, "prompt": TEXTS[2], "layer": 1}).encode()
    status, picture = post(quick.url, body, "/v1/griffin/flocking")
    assert status == 200
    values = torch.frombuffer(bytearray(base64.b64decode(picture["values"])), dtype=torch.uint8)
    assert values.numel() == picture["width"] * picture["height"]
    assert len(picture["tokens"]) == picture["width"]
    assert len(picture["neurons"]) == picture["height"] == len(picture["experts"]["shown"])
    assert 0 < sum(picture["experts"]["shown"]) < picture["height"]
    assert values.max() == 255
    status, refused = post(
        quick.url, json.dumps({"model": NAME, "prompt": "a", "layer": 30}).encode(), "/v1/griffin/flocking"
    )
    assert status == 422
    assert "layers 0 to 5" in refused["error"]["message"]


@pytest.mark.model
def test_the_page_against_this_server(browser: Any, quick: Server) -> None:
    from test_page import check_answers, opened

    with opened(browser, quick.url) as page:
        check_answers(page, timeout_s=60)


@pytest.mark.model
def test_the_example_of_the_readme(quick: Server, capsys: pytest.CaptureFixture[str]) -> None:
    source = (Path(__file__).parents[1] / "examples" / "client.py").read_text()
    exec(source.replace("http://127.0.0.1:8000", quick.url), {})
    assert "CompletionUsage(completion_tokens=" in capsys.readouterr().out


# -- the schema --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_requests_of_the_served_schema_are_answered_as_it_says() -> None:
    import schemathesis
    from hypothesis import HealthCheck, settings

    tokenizer = bytes_tokenizer()  # 259 tokens: a grammar takes seconds with 49,152
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with served((bytes_model(torch.float32), tokenizer)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 16
        for operation in operations:

            @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @schemathesis_given(operation)
            def check(case: Any) -> None:
                if isinstance(case.body, dict):
                    if "model" in case.body and isinstance(case.body["model"], str):
                        case.body["model"] = NAME  # else all are 404
                    if isinstance(case.body.get("max_tokens"), int):
                        case.body["max_tokens"] = min(case.body["max_tokens"], 3)
                # What fields mean together no schema says, so a valid one may be refused, with 400 or 422 as documented
                case.call_and_validate(
                    timeout=60, excluded_checks=[schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
                )

            check()
        assert server.engine.alive


def schemathesis_given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())


# -- the process -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(model: str, *words: str, **environment: str) -> Iterator[tuple[Griffin, str]]:
    command = ["serve", "-m", model, "--name", NAME, "--port", "0", *words]
    with Griffin(command, "stderr", **environment) as server:
        said = ""
        try:
            for line in server.stderr:
                said += line
                if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield server, address[0]
                    break
            else:
                pytest.fail(f"the server said no address: {said}")
        finally:
            server.kill()


def test_sigterm_drains_and_sigkill_leaves_nothing(tmp_path: Path) -> None:
    model = save_bytes_model(tmp_path / "tiny")
    with process(model) as (server, url):
        port = url.rpartition(":")[2]
        server.kill()
        server.wait(10)
    started = process(model, "--port", port, GRIFFIN_API_KEY="k")  # at the same port
    with started as (server, again), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert again == url
        assert post(again, ask())[0] == 401
        assert post(again, ask(), Authorization="Bearer k")[0] == 200
        answer = pool.submit(post, url, ask(max_tokens=600), Authorization="Bearer k")

        def running() -> bool:
            with urllib.request.urlopen(f"{url}/health") as health:
                return bool(json.loads(health.read())["running"])

        until(running)
        server.send_signal(signal.SIGTERM)
        status, body = answer.result(60)
        assert status == 200  # what was running is answered
        assert body["usage"]["completion_tokens"] == 600
        server.wait(30)
        assert server.returncode in (0, -signal.SIGTERM)


def test_the_log_as_json(tmp_path: Path) -> None:
    with process(save_bytes_model(tmp_path / "tiny"), "--log-format", "json") as (server, url):
        assert post(url, ask())[0] == 200
        assert post(url, b"{")[0] == 400
        server.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in server.stderr]
    answered = [(line["method"], line["path"], line["status"]) for line in lines if "status" in line]
    assert answered == [("POST", "/v1/completions", 200), ("POST", "/v1/completions", 400)]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert all(line["seconds"] > 0 for line in lines if "status" in line)


def test_wrong_usage_is_one_line() -> None:
    for words, message in (
        (["--port", "99999"], "--port is 99999; expected 0 to 65535"),
        (["--places", "0"], "--places is 0; expected more than 0"),
        (["--selection", "wanda"], "cannot be served"),
        (["--density", "7"], "density is 7.0"),
        (["--api-key", "ä"], "characters that a header cannot carry"),
        (["--api-key", ""], "--api-key is empty"),
    ):
        with Griffin(["serve", *words], "stdout", "stderr") as refused:
            out, error = refused.stdout.read(), refused.stderr.read()
            assert refused.wait(60) == 2
        assert out == ""
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.model
def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with Griffin(["serve", "-m", NAME, "--port", port], "stderr") as refused:
            error = refused.stderr.read()
            assert refused.wait(60) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in error
