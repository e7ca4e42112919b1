"""ASGI middleware: the names that the server answers to, the API key, and the size of bodies.

It does not buffer responses, so streaming works.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin.integrations.server.bounds import check_marks, check_values
from griffin.integrations.server.errors import ApiError, error_response

_GUARDED = ("/v1/", "/api/")
# Read and discard up to 25 times the limit before answering 413; a client that is still sending would not see it.
_DISCARD_FACTOR = 25
_BODIES = 16  # bodies of the largest size that are held at a time, or as many bytes of smaller ones


class Hosts:
    """Refuse requests for other hosts than this one. A page of another host could otherwise give its own name this
    machine's address (DNS rebinding), and then ask this server in its reader's browser.

    Args:
        app: the application behind this middleware.
        allowed: names beside `localhost` and the loopback addresses; with `*`, or `None`, all are.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] | None) -> None:
        self._app = app
        self._allowed = None if allowed is None or "*" in allowed else {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._allowed is not None:
            given = next((value for name, value in scope["headers"] if name.lower() == b"host"), b"")
            name = _host_name(given.decode("latin-1"))
            if not (name in self._allowed or _is_loopback(name)):
                text = f"this server does not answer for the host {name[:80]!r}; --allowed-hosts names those it does"
                await error_response(403, text, code="host_not_allowed")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    header = header.strip().lower()
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.rstrip(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Gate:
    """Refuse requests without the key and bodies that are too large, whether or not they declare a length, or that have
    too many values. A body is JSON whatever its type says, as clients such as `curl -d` say otherwise, unless a page in
    a browser sends it.

    Args:
        app: the application behind this middleware.
        api_key: the key that requests under /v1/ must carry; `None` disables the check.
        body_bytes: the largest body in bytes.
        marks: the most commas, brackets, quotes and escapes of a body.
        body_s: the time in seconds within which the body must arrive.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, body_bytes: int, marks: int, body_s: float = 30.0) -> None:
        self._app, self._key, self._max_bytes, self._body_s = app, api_key, body_bytes, body_s
        self._marks = marks
        self._held = 0  # bytes of all bodies
        self._checking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"].startswith(_GUARDED):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):  # constant-time comparison
                refusal = error_response(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        body: list[Message] = []
        try:
            await self._read(body, scope, receive, send)
        finally:
            self._held -= _size(body)

    async def _read(self, body: list[Message], scope: Scope, receive: Receive, send: Send) -> None:
        """Read a body, and hand it on if it is small enough."""
        seen = 0
        try:
            async with asyncio.timeout(self._body_s):
                more = True
                while more and seen <= _DISCARD_FACTOR * self._max_bytes:
                    message = await receive()
                    if message["type"] != "http.request":  # the client has disconnected
                        return
                    size = len(message.get("body", b""))
                    seen += size
                    more = message.get("more_body", False)
                    if seen <= self._max_bytes:
                        body.append(message)
                        self._held += size
                    if self._held > _BODIES * self._max_bytes:
                        text = "this server is receiving all that it can hold; try again later"
                        refusal = ApiError(429, text, code="too_many_bodies", retry_after_s=1).response()
                        await refusal(scope, receive, send)
                        return
        except TimeoutError:
            text = f"the body did not come within {self._body_s:g} seconds"
            await error_response(408, text, code="request_timeout")(scope, receive, send)
            return
        if seen > self._max_bytes:
            text = f"the body is larger than the {self._max_bytes / 1e6:g} MB that this server takes"
            await error_response(413, text, code="request_too_large")(scope, receive, send)
            return
        try:
            await self._check(b"".join(message.get("body", b"") for message in body))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if seen and not _is_json(scope):
            if any(name == b"origin" for name, _ in scope["headers"]):
                # A page of another host may send such bodies to this one, and JSON only if this server allows it.
                text = "this server takes JSON; send the header Content-Type: application/json"
                await error_response(415, text, code="not_json")(scope, receive, send)
                return
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*headers, (b"content-type", b"application/json")]
        buffered = iter(body)

        async def replayed() -> Message:
            return next(buffered, None) or await receive()

        await self._app(scope, replayed, send)

    async def _check(self, body: bytes) -> None:
        """Refuse a body with too much in it. One at a time is checked, in steps, between which other requests run.

        Raises:
            ApiError: it has too much in it.
        """
        if body:
            async with self._checking:
                check_marks(body, self._marks)
                await asyncio.sleep(0)
                check_values(body)
                await asyncio.sleep(0)


def _is_json(scope: Scope) -> bool:
    given: bytes = dict(scope["headers"]).get(b"content-type", b"")
    kind = given.partition(b";")[0].strip().lower()
    return kind == b"application/json" or kind.endswith(b"+json")


def _size(body: list[Message]) -> int:
    return sum(len(message.get("body", b"")) for message in body)
