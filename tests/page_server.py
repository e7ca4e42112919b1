"""A server that speaks as much of griffin's API as its page needs, with known answers. Standard library only."""

from __future__ import annotations

import base64
import codecs
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self

PAGE = Path(__file__).parents[1] / "src" / "griffin" / "integrations" / "server" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODEL = "smollm2-135m"
LAYERS, D_FF, ROWS = 30, 1536, 64

# A first space that the text drops, an emoji of two tokens, markup, a line break, a word that no line can hold.
FULL = [b" The", b" tide", b" is", b" the", b" sea", b" \xf0\x9f", b"\x8c\x8a", b" that", b" the", b" moon", b" pulls"]
FULL += [b".", b"\n", b"\n", b"<b>", b"Twice", b"</b>", b" a", b" day", b" it", b" comes", b" and", b" goes", b"."]
NOTHING = "."  # the prompt to which the full model says nothing
CHANGED = {4: b" water", 11: b",", 13: b"<i>", 15: b"\n", 18: b" w" + 60 * b"e" + b"k"}
PRUNED = [CHANGED.get(index, token) for index, token in enumerate(FULL)]


def answer(density: float, length: int) -> list[bytes]:
    """The full answer from density 0.9 on, one that ends early up to 0.2, and one with changed tokens between."""
    tokens = FULL if density >= 0.9 else FULL[:9] if density <= 0.2 else PRUNED
    return tokens[:length]


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    sent: int = 0
    aborted: bool = False


class PageServer(ThreadingHTTPServer):
    """The server, on a free port of this machine. Its settings hold from the next request on.

    Args:
        delay_s: before every event of the full answer; GRIFFIN's come sooner.
        refusal: status and message of every POST.
        fault: what happens after `fault_after` events of GRIFFIN's answer: "error" sends an error, "drop" breaks the
            connection off, "end" ends the answer without [DONE].
        key: the API key.
        chat: whether the model has a chat template.
    """

    daemon_threads = True

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        refusal: tuple[int, str] | None = None,
        fault: str | None = None,
        fault_after: int = 3,
        key: str | None = None,
        chat: bool = True,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.delay_s, self.refusal, self.fault, self.fault_after = delay_s, refusal, fault, fault_after
        self.key, self.chat = key, chat
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def answered(self) -> list[Request]:
        return [request for request in self.requests if request.path.endswith("completions")]

    def pictures(self) -> list[Request]:
        return [request for request in self.requests if request.path.endswith("flocking")]

    def __enter__(self) -> Self:
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error of the test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            griffin = {"density": 0.5, "selection": "topk", "layers": LAYERS, "context_length": 8192}
            model = {"id": MODEL, "object": "model", "griffin": {**griffin, "chat": self.server.chat}}
            if self._admitted():
                self._json(200, {"object": "list", "data": [model]})
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        if name not in {path.name for path in PAGE.iterdir()}:
            self._error(404, f"there is no {self.path}")
            return
        self._send(200, TYPES[Path(name).suffix], (PAGE / name).read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(self.path, dict(self.headers), body)
        self.server.requests.append(request)
        if not self._admitted():
            return
        if self.server.refusal is not None:
            self._error(*self.server.refusal)
        elif self.path.endswith("flocking"):
            self._json(200, flocking(body))
        else:
            self._stream(request)

    def _admitted(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._error(401, "this server wants an API key")
        return False

    def _stream(self, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        fault = self.server.fault if request.body["griffin"]["density"] < 1 else None
        try:
            for event in events(request.body, chat=self.path.endswith("chat/completions")):
                time.sleep(self.server.delay_s * cost(request.body))
                if fault is not None and request.sent == self.server.fault_after:
                    if fault == "error":
                        self._event(json.dumps(error("the model <b>failed</b>")))
                    if fault != "drop":
                        self._chunk(b"")
                    self.close_connection = True
                    return
                request.ended = time.monotonic()  # before the page can know
                self._event(event)
                request.sent += 1
            self._chunk(b"")
        except OSError:
            request.aborted = True
            self.close_connection = True

    def _event(self, data: str) -> None:
        sent = f"data: {data}\n\n".encode()
        middle = next((at for at, byte in enumerate(sent) if byte > 127), None)
        if middle is not None:  # cut it within a character, and let the part before be read alone
            self._chunk(sent[: middle + 1])
            sent = sent[middle + 1 :]
            time.sleep(0.03)
        self._chunk(sent)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _error(self, status: int, message: str) -> None:
        self._json(status, error(message))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.end_headers()
        self.wfile.write(body)


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def cost(body: dict[str, Any]) -> float:
    """The time of a token, as a share of the full model's."""
    return 0.35 + 0.65 * float(body["griffin"]["density"])


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"] if "messages" in body else body["prompt"])


def events(body: dict[str, Any], *, chat: bool) -> Iterator[str]:
    """The events of an answer: the text of a token comes with the next token, as if it had been held back."""
    tokens = answer(body["griffin"]["density"], body["max_tokens"])
    if asked(body) == NOTHING and tokens == FULL:
        tokens = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held, offset = "", 0

    def event(text: str, logprobs: dict[str, Any] | None, finish: str | None = None) -> str:
        said = {"delta": {"content": text} if text else {}} if chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}
        return json.dumps({"choices": [choice], "usage": None, "model": MODEL}, ensure_ascii=False)

    if chat:
        yield json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant"}, "logprobs": None}], "usage": None})
    for token in tokens:
        shown = token.decode("utf-8", "replace")
        if chat:
            logprobs: dict[str, Any] = {"content": [{"token": shown, "logprob": -0.1, "bytes": list(token)}]}
        else:
            shown = shown.lstrip(" ")  # as some tokenizers show a token alone
            if "\ufffd" in shown:
                shown = "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
            logprobs = {"tokens": [shown], "token_logprobs": [-0.1], "top_logprobs": None, "text_offset": [offset]}
        yield event(held, logprobs)
        held = decoder.decode(token) if token != FULL[0] else token.decode().lstrip()
        offset += len(shown)
    yield event(held, None, "length" if len(tokens) == body["max_tokens"] else "stop")
    usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "total_tokens": 9 + len(tokens)}
    griffin = {"density": body["griffin"]["density"], "selection": "topk", "backend": "native", "prompt_s": 0.1}
    speed = 20.0 / cost(body)
    yield json.dumps({"choices": [], "usage": usage, "griffin": {**griffin, "generation_tokens_per_s": speed}})
    yield "[DONE]"


def flocking(body: dict[str, Any]) -> dict[str, Any]:
    """A picture in which every third neuron flocks, another for each layer."""
    words = [f" {word}" for word in asked(body).split()]
    tokens = ["<|im_start|>", "user", "\n", *words, "<|im_end|>", "\n"] if "messages" in body else words
    drawn = random.Random(body["layer"])
    flocks = [row % 3 == body["layer"] % 3 for row in range(ROWS)]
    shades = [drawn.randrange(120, 230) if flock else 10 for flock in flocks]
    values = bytes(min(255, max(0, shade + drawn.randrange(-10, 26))) for shade in shades for _ in tokens)
    density = body["griffin"]["density"]
    neurons = sorted(drawn.sample(range(D_FF), ROWS))
    return {
        "layer": body["layer"],
        "layers": LAYERS,
        "d_ff": D_FF,
        "tokens": tokens,
        "neurons": neurons,
        "width": len(tokens),
        "height": ROWS,
        "values": base64.b64encode(values).decode(),  # roots: 255 is the scale
        "scale": 0.31,
        "experts": {"density": density, "shown": flocks},
    }


if __name__ == "__main__":
    with PageServer(delay_s=0.05) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(60)
