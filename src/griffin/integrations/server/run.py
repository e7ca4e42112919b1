"""Run the server for a loaded model until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from types import FrameType

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.config import GriffinConfig
from griffin.integrations.server.app import make_app
from griffin.integrations.server.connections import Complaints, ConnectionLimits, bounded_protocol, possible
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.logs import Log
from griffin.integrations.server.types import Limits
from griffin.integrations.server.validation import Settings

_BACKLOG = 128  # connections that the system holds until they are accepted
_SWITCH_S = 0.001  # that the event loop waits for another thread's Python, several times for an answer; usual are 0.005
_LAST_EVENTS_S = 5  # for clients to read the last event of a stream that has been ended


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GriffinConfig,
    limits: Limits,
    settings: Settings,
    listening: socket.socket,
    drain_s: int,
    connections: int,
    log: Log,
) -> int:
    """Serve until SIGTERM or Ctrl-C; running answers then have `drain_s` seconds to finish. A second signal ends them.

    Returns:
        The exit code: 0; 1 after a failure of the engine; 128 + the signal after a second one.

    Raises:
        ValueError: the model cannot be served.
    """
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)  # numbers with more digits take long to read
    sys.setswitchinterval(_SWITCH_S)
    with listening:
        engine = Engine(model, tokenizer, config, limits)
        app = make_app(engine, settings)
        app.state.grammars.prepare()
        gc.collect()
        gc.freeze()  # what is there by now stays: to look through it again takes a collection 200 ms
        most = ConnectionLimits(possible(connections))
        server = DrainingServer(
            uvicorn.Config(
                app,
                http=bounded_protocol(most, app.state.metrics.count_other),
                ws="none",
                log_config=log.for_uvicorn,
                log_level="error",  # warnings would be one line for each malformed request
                backlog=_BACKLOG,
                timeout_graceful_shutdown=drain_s + _LAST_EVENTS_S,
                lifespan="on",
            ),
            engine,
            drain_s,
        )
        address, bound_port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        log.say(
            f"{settings.model} at http://{shown}:{bound_port}: API at /v1, page at / "
            f"(density {config.density:g}, {config.selection}{', lossless drafts' if settings.lossless else ''}; "
            f"step: {engine.step_name}; "
            f"{limits.max_sequences} places, {limits.cache_bytes / 1e9:.1f} GB of keys and values, "
            f"{limits.prefix_bytes / 1e9:.1f} GB of kept prompts, {most.most} connections)"
        )
        if settings.lossless and engine.step_name != "native":
            log.say("nothing will be drafted, as lossless drafts need the native step; answers are the same")
        try:
            server.run(sockets=[listening])
        finally:
            engine.close()
            gc.unfreeze()  # the interpreter's end frees it
    if server.forced_by is not None:
        return 128 + server.forced_by
    return 0 if engine.failure is None else 1


class DrainingServer(uvicorn.Server):
    """A server that lets running answers finish when it is told to stop, and ends each stream with an event.

    Args:
        config: Uvicorn's.
        engine: what gives the answers.
        drain_s: seconds that they have.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_s: float) -> None:
        super().__init__(config)
        self._engine, self._drain_s = engine, drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self.forced_by: int | None = None
        """The signal that ended the answers before their time; `None` if they had it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(Complaints())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, wait for the answers, end those that are left."""
        self._engine.refuse()
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._engine.stop)
        await super().shutdown(sockets)
        timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second ends all answers, the third does not wait for their clients."""
        if not self.should_exit:
            self.should_exit = True
        elif self.forced_by is None and self._loop is not None:
            self.forced_by = signal.Signals(sig).value
            self._loop.call_soon_threadsafe(self._engine.stop)
        else:
            self.force_exit = True


def bound(host: str, port: int) -> socket.socket:
    """Listen at an address, so that a taken one is reported before the model is loaded. Clients that come while it is
    loaded wait.

    Raises:
        ValueError: the address is taken or does not exist.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = candidates[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # with SO_REUSEADDR another process could bind as long as nobody listens
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another --port") from error
    listening.set_inheritable(True)
    return listening
