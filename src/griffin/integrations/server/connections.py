"""Bounds on connections: how many there are, how long they may be silent, and how long they may read nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from griffin.integrations.server.errors import error_response

_OTHER_FILES = 32  # descriptors that are left for files, beside those that are open already


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may hold.

    Args:
        most: connections at a time; further ones are answered with 503.
        request_s: seconds within which a request's head must arrive, from the connection or the last answer on.
        reading_s: seconds for which a client may read nothing of an answer that it is sent.
    """

    most: int = 256
    request_s: float = 30.0
    reading_s: float = 60.0


def bounded_protocol(limits: ConnectionLimits, count: Callable[[int], None]) -> type[H11Protocol]:
    """Uvicorn's protocol with these limits.

    Args:
        limits: the limits.
        count: called with the status of each answer that the application has not given.
    """

    class Bounded(H11Protocol):
        _request_timer: asyncio.TimerHandle | None = None
        _reading_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.most:
                self._answer(503, f"{limits.most} clients are connected, which is all that this server takes")
            else:
                self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop(self._request_timer)
            self._stop(self._reading_timer)
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop(self._request_timer)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._await_request()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stop(self._reading_timer)
            self._reading_timer = self.loop.call_later(limits.reading_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop(self._reading_timer)

        def send_400_response(self, msg: str) -> None:
            self._answer(400, "this is not an HTTP request")

        def _await_request(self) -> None:
            self._stop(self._request_timer)
            self._request_timer = self.loop.call_later(
                limits.request_s, self._answer, 408, f"no request came within {limits.request_s:g} seconds"
            )

        def _answer(self, status: int, message: str) -> None:
            """Answer without the application, and close."""
            if self.transport.is_closing():
                return
            count(status)
            response = error_response(status, message)
            response.headers["Connection"] = "close"
            head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
            self.transport.write(b"HTTP/1.1 %d \r\n%s\r\n%s" % (status, head, response.body))
            self.transport.close()

        @staticmethod
        def _stop(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Bounded


def possible(connections: int) -> int:
    """How many of so many connections the system allows this process, after its limit was raised as far as it goes."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    try:
        opened = len(list(Path("/dev/fd").iterdir()))
    except OSError:
        opened = _OTHER_FILES
    return max(1, min(connections, soft - opened - _OTHER_FILES))


class Complaints:
    """The event loop's handler of errors, which reports one error once. If the system is out of descriptors, every try
    to accept a connection fails, hundreds of times a second."""

    def __init__(self) -> None:
        self._reported: set[int] = set()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in self._reported:
                return
            self._reported.add(error.errno)
        loop.default_exception_handler(context)
