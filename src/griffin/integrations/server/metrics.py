"""The metrics served at /metrics, in Prometheus' format."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin.integrations.server.engine import Engine
from griffin.integrations.server.logs import log_request
from griffin.integrations.server.types import Summary

_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The counters of one server, in a separate registry."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        gauges = {
            "griffin_running": ("answers being generated, and prompts being run", lambda: engine.running),
            "griffin_waiting": ("prompts in the queue", lambda: engine.waiting),
            "griffin_cache_bytes": ("bytes of keys and values that are spoken for", lambda: engine.cache_bytes),
            "griffin_cache_limit_bytes": ("most of them", lambda: engine.limits.cache_bytes),
            "griffin_prefix_bytes": ("bytes of kept beginnings of prompts", lambda: _nbytes(engine)),
            "griffin_prefix_limit_bytes": ("most of them", lambda: engine.limits.prefix_bytes),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)
        self.requests = Counter(
            "griffin_requests", "requests by endpoint and status", ["path", "status"], registry=registry
        )
        self._prompt = Counter("griffin_prompt_tokens", "prompt tokens of answered requests", registry=registry)
        self._cached = Counter(
            "griffin_prefix_tokens", "those of them that were known from earlier prompts", registry=registry
        )
        self._generated = Counter("griffin_generated_tokens", "tokens generated", registry=registry)
        self._drafted = Counter("griffin_drafted_tokens", "tokens that lossless drafts named", registry=registry)
        self._accepted = Counter("griffin_accepted_tokens", "those of them that were right", registry=registry)
        self._ff_bytes = Counter(
            "griffin_ff_bytes", "bytes of FF weights read for the tokens generated", registry=registry
        )
        self._first_token = Histogram(
            "griffin_first_token_seconds", "from arrival to the first token", buckets=_SECONDS, registry=registry
        )
        self._token = Histogram(
            "griffin_token_seconds",
            "from one token of an answer to the next",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._waited = Histogram("griffin_queue_seconds", "seconds in the queue", buckets=_SECONDS, registry=registry)
        self._density = Histogram(
            "griffin_density",
            "densities of requests",
            buckets=tuple(tenth / 10 for tenth in range(1, 11)),
            registry=registry,
        )

    def finished(self, summary: Summary) -> None:
        """Count a request that has been answered."""
        self._prompt.inc(summary.prompt_tokens)
        self._cached.inc(summary.cached_tokens)
        self._generated.inc(summary.completion_tokens)
        self._drafted.inc(summary.drafted_tokens)
        self._accepted.inc(summary.accepted_tokens)
        self._ff_bytes.inc(summary.completion_tokens * summary.ff_bytes_per_token)
        self._waited.observe(summary.waited_s)
        self._first_token.observe(summary.waited_s + summary.prompt_s)
        self._density.observe(summary.density)
        if summary.generation_tokens_per_s > 0:
            self._token.observe(1 / summary.generation_tokens_per_s)

    def count_other(self, status: int) -> None:
        """Count an answer that the application has not given."""
        self.requests.labels("other", str(status)).inc()

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._registry)


class Counted:
    """ASGI middleware that counts responses by path and status, and forbids pages to load anything from other hosts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", None) or self._path(scope)
                self._metrics.requests.labels(path, str(message["status"])).inc()
                log_request(scope["method"], path, message["status"], time.monotonic() - arrived)
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, send_counted)

    @staticmethod
    def _path(scope: Scope) -> str:
        """The path of a request that was answered before it was routed, if it is one of the application's."""
        known = {getattr(route, "path", None) for route in scope["app"].routes}
        return str(scope["path"]) if scope["path"] in known else "other"


def _nbytes(engine: Engine) -> int:
    return 0 if engine.prefixes is None else engine.prefixes.nbytes
