"""The server's connections, the hosts it answers for, kept prompts as clients see them, and the ends of its life."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from evaluation_data import bytes_model, bytes_tokenizer, save_bytes_model
from griffin.integrations.server.connections import ConnectionLimits
from griffin.integrations.server.run import bound
from griffin.integrations.server.types import Limits
from test_server import NAME, Loaded, Server, ask, post, process, served, until


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model, tokenizer = bytes_model(torch.float32), bytes_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # greedy answers do not end by themselves
    return model, tokenizer


def metrics(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        return str(answer.read().decode())


def head_of(port: int, sent: bytes, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes, until it closes or nothing comes any more."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(seconds)
        client.sendall(sent)
        got = b""
        while part := client.recv(10_000):
            got += part
    return got


# -- connections -------------------------------------------------------------------------------------------------------


def test_silent_and_surplus_clients_are_told_so_and_counted(loaded: Loaded) -> None:
    with served(loaded, connections=ConnectionLimits(most=3, request_s=1.0)) as server:
        start = time.monotonic()
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        surplus = head_of(server.port, b"")
        assert surplus.startswith(b"HTTP/1.1 503 ")
        assert json.loads(surplus.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("3 clients are connected")
        silent[0].sendall(b"GET /health HTTP/1.1\r\nHo")  # it begins, and says no more
        for client in silent:
            client.settimeout(20)
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
            client.close()
        assert time.monotonic() - start >= 1.0
        until(lambda: post(server.url, ask())[0] == 200)
        assert head_of(server.port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert post(server.url, b"x" * 5_000_000)[0] == 413
        text = metrics(server)
        assert re.search(r'griffin_requests_total\{path="other",status="408"\} 3', text)
        assert re.search(r'griffin_requests_total\{path="other",status="503"\} [1-9]', text)
        assert re.search(r'griffin_requests_total\{path="other",status="400"\} 1', text)
        assert 'griffin_requests_total{path="/v1/completions",status="413"} 1' in text


def test_who_reads_nothing_is_cut_off(loaded: Loaded) -> None:
    with served(loaded, connections=ConnectionLimits(reading_s=0.5)) as server:
        body = ask(max_tokens=1500, stream=True, logprobs=20)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: bool(server.connected))
            until(lambda: not server.connected, 60)


def test_other_hosts_are_refused(loaded: Loaded) -> None:
    with served(loaded, allowed_hosts=("lab.example",)) as server:

        def status(host: str) -> int:
            return int(
                head_of(server.port, f"GET /health HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode()).split()[1]
            )

        for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "lab.example", "Lab.Example.:80"):
            assert status(f"Host: {name}\r\n") == 200, name
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "192.168.0.1", ""):
            assert status(f"Host: {name}\r\n") == 403, name
        got, answer = post(server.url, ask(), Host="evil.example")
        assert got == 403
        assert answer["error"]["code"] == "host_not_allowed"


def test_a_body_is_json_whatever_its_type_says_but_not_from_a_page(loaded: Loaded) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what `curl -d` says
    page = {"Origin": "http://evil.example"}
    with served(loaded) as server:
        ollama = json.dumps({"model": NAME, "prompt": "The sky", "stream": False}).encode()
        assert post(server.url, ask(), **form)[0] == 200
        assert post(server.url, ollama, "/api/generate", **form)[0] == 200
        status, answer = post(server.url, ask(), **form, **page)  # a browser sends this without asking the server
        assert status == 415
        assert "Content-Type: application/json" in answer["error"]["message"]
        assert post(server.url, ask(), **page)[0] == 200  # and this only if the server has allowed it


def test_which_of_several_errors_is_told(loaded: Loaded) -> None:
    with served(loaded) as server:
        status, answer = post(server.url, ask(stop=["a"] * 17))
        assert status == 422
        assert "at most 16 items" in answer["error"]["message"]
        assert "valid string" in post(server.url, ask(stop=[1]))[1]["error"]["message"]


# -- kept prompts ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_begins_like_an_earlier_one_runs_its_rest_only(loaded: Loaded) -> None:
    text = "The river and the sea met where the old mill stood, and nobody knew for how long. " * 4
    with served(loaded, Limits(prefix_bytes=0)) as server:
        expected = [post(server.url, ask(prompt=text[:length]))[1] for length in (100, 300)]
        assert {answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in expected} == {0}
    with served(loaded) as server:
        for length, answer, cached in zip((100, 300), expected, (0, 64), strict=True):
            got = post(server.url, ask(prompt=text[:length]))[1]
            assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            assert got["choices"] == answer["choices"]
        again = post(server.url, ask(prompt=text[:300], griffin={"density": 1.0}))[1]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
        text = metrics(server)
        assert "griffin_prefix_tokens_total 320.0" in text
        assert re.search(r"griffin_prefix_bytes [1-9]", text)


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_short_prompt_overtakes_a_long_one(loaded: Loaded) -> None:
    with served(loaded, Limits(prompt_chunk=4)) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(lambda: (post(server.url, ask(prompt="x" * 2000, max_tokens=1)), time.monotonic()))
        until(lambda: server.engine.running == 1)
        assert post(server.url, ask(max_tokens=1))[0] == 200
        short_at = time.monotonic()
        (status, _), long_at = long.result()
        assert status == 200
        assert short_at < long_at


# -- the ends of its life ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_bytes_model(tmp_path_factory.mktemp("model"))


def events(url: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream; the first when it has begun."""
    request = urllib.request.Request(
        f"{url}/v1/completions", ask(stream=True, logprobs=0, **fields), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


@pytest.mark.parametrize(
    ("drain", "signals", "code"),
    [("1", [signal.SIGTERM], 0), ("600", [signal.SIGINT, signal.SIGINT], 130)],
    ids=["after the drain", "a second signal"],
)
def test_streams_that_are_left_at_the_end_get_their_event(
    model: str, drain: str, signals: list[signal.Signals], code: int
) -> None:
    slow = {"max_tokens": 2000, "n": 8}  # takes longer than the drain
    with process(model, "--drain", drain) as (server, url):
        stream = events(url, **slow)
        next(stream)
        for number in signals:
            server.send_signal(number)
            time.sleep(0.5)
        last = list(stream)[-1]
        assert last["error"]["message"] == "the server is stopping"
        assert server.wait(60) == code
        assert server.stderr.read() == ""


def test_a_port_is_taken_from_the_moment_of_listening() -> None:
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at 127\.0\.0\.1:{port}"):
            bound("127.0.0.1", port)
    with bound("127.0.0.1", port):  # and free again
        pass


def test_no_request_is_taken_while_the_server_stops(loaded: Loaded) -> None:
    with served(loaded) as server:
        server.engine.refuse()
        assert post(server.url, ask())[0] == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{server.url}/health")
