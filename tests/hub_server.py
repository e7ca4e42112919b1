"""A server that speaks as much of the Hugging Face Hub's protocol as fetching a model takes, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
# What the Hub answers for a repository that is none or is out of order: status, X-Error-Code.
PROBLEMS = {"org/nothing": (401, "RepoNotFound"), "org/broken": (500, ""), "org/busy": (429, "")}


class Hub(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]
    down = False  # answers nothing but that it is out of order

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.down:
            return self.refuse(503, "")
        words = self.path.partition("?")[0].strip("/").split("/")
        is_api = words[0] == "api"
        repo, rest = "/".join(words[2:4] if is_api else words[:2]), words[4:] if is_api else words[2:]
        if repo == "org/private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "RepoNotFound")
        if repo == "org/gated" and not is_api:  # its page is public, its files are not
            return self.refuse(403, "GatedRepo")
        if repo in PROBLEMS:
            return self.refuse(*PROBLEMS[repo])
        if rest and rest[1] not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if is_api and (not rest or rest[0] == "revision"):
            return self.answer(json.dumps({"id": repo, "sha": COMMIT, "tags": [], "siblings": []}).encode())
        path = self.folder / "/".join(rest[2:])
        if is_api or not path.is_file():
            return self.refuse(404, "EntryNotFound")
        return self.answer(path.read_bytes())

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Hub]]]:
    """The server's address, and the server: what it is asked, and whether it is down."""
    hub = type("Own", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
