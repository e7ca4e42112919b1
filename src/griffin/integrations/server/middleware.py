"""ASGI middleware that checks the API key and caps the body size. It does not buffer responses, so streaming works."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin.integrations.server.errors import error_response

_GUARDED = ("/v1/", "/api/")
# Read and discard up to 25 times the limit before answering 413; a client that is still sending would not see it.
_DISCARD_FACTOR = 25


class Gate:
    """Refuse requests without the key and bodies that are too large, whether or not they declare a length.

    Args:
        app: the application behind this middleware.
        api_key: the key that requests under /v1/ must carry; `None` disables the check.
        body_bytes: the largest body in bytes.
        body_s: the time in seconds within which the body must arrive.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, body_bytes: int, body_s: float = 30.0) -> None:
        self._app, self._key, self._max_bytes, self._body_s = app, api_key, body_bytes, body_s

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
        seen = 0
        try:
            async with asyncio.timeout(self._body_s):
                more = True
                while more and seen <= _DISCARD_FACTOR * self._max_bytes:
                    message = await receive()
                    if message["type"] != "http.request":  # the client has disconnected
                        return
                    seen += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if seen <= self._max_bytes:
                        body.append(message)
        except TimeoutError:
            text = f"the body did not come within {self._body_s:g} seconds"
            await error_response(408, text, code="request_timeout")(scope, receive, send)
            return
        if seen > self._max_bytes:
            text = f"the body is larger than the {self._max_bytes / 1e6:g} MB that this server takes"
            await error_response(413, text, code="request_too_large")(scope, receive, send)
            return
        buffered = iter(body)

        async def replayed() -> Message:
            return next(buffered, None) or await receive()

        await self._app(scope, replayed, send)
