"""Metrics of the server, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin.integrations.server.engine import Engine
from griffin.integrations.server.types import Summary

_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = own = CollectorRegistry()
        gauges = {
            "griffin_running": ("answers being generated, and prompts being run", lambda: engine.running),
            "griffin_waiting": ("prompts in the queue", lambda: engine.waiting),
            "griffin_cache_bytes": ("bytes of keys and values that are spoken for", lambda: engine.cache_bytes),
            "griffin_cache_limit_bytes": ("most of them", lambda: engine.limits.cache_bytes),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=own).set_function(value)
        self.requests = Counter("griffin_requests", "requests by endpoint and status", ["path", "status"], registry=own)
        self._prompt = Counter("griffin_prompt_tokens", "prompt tokens run", registry=own)
        self._generated = Counter("griffin_generated_tokens", "tokens generated", registry=own)
        self._first = Histogram(
            "griffin_first_token_seconds", "from arrival to the first token", buckets=_SECONDS, registry=own
        )
        self._each = Histogram(
            "griffin_token_seconds", "from one token of an answer to the next", buckets=_TOKEN_SECONDS, registry=own
        )
        self._waited = Histogram("griffin_queue_seconds", "seconds in the queue", buckets=_SECONDS, registry=own)
        self._density = Histogram(
            "griffin_density",
            "densities of requests",
            buckets=tuple(tenth / 10 for tenth in range(1, 11)),
            registry=own,
        )

    def finished(self, summary: Summary) -> None:
        """A request was answered."""
        self._prompt.inc(summary.prompt_tokens)
        self._generated.inc(summary.completion_tokens)
        self._waited.observe(summary.waited_s)
        self._first.observe(summary.waited_s + summary.prompt_s)
        self._density.observe(summary.density)
        if summary.generation_tokens_per_s > 0:
            self._each.observe(1 / summary.generation_tokens_per_s)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class Counted:
    """Count requests by what they were answered, and tell browsers that pages may load nothing from elsewhere."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, str(message["status"])).inc()
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, noted)
