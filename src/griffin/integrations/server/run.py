"""From a loaded model to a listening server, and back down."""

from __future__ import annotations

import copy
import socket
import sys

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.config import GriffinConfig
from griffin.integrations.server.app import make_app
from griffin.integrations.server.engine import Engine
from griffin.integrations.server.types import Limits
from griffin.integrations.server.validation import Settings


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GriffinConfig,
    limits: Limits,
    settings: Settings,
    listening: socket.socket,
    drain_s: int,
) -> int:
    """Serve until SIGTERM or Ctrl-C; running answers then have `drain_s` seconds. Returns the exit code.

    Raises:
        ValueError: the model cannot be served.
    """
    with listening:
        engine = Engine(model, tokenizer, config, limits)
        app = make_app(engine, settings)
        logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # stdout is for text
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=logs, log_level="warning", timeout_graceful_shutdown=drain_s, lifespan="on")
        )
        listening.listen(2048)  # who comes from here on is answered, if not at once
        address, own_port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(
            f"{settings.model} at http://{shown}:{own_port}: API at /v1, page at / "
            f"(density {config.density:g}, {config.selection}; step: {engine.step_name}; {limits.places} places, "
            f"{limits.cache_bytes / 1e9:.1f} GB of keys and values)",
            file=sys.stderr,
            flush=True,
        )
        server.run(sockets=[listening])
    return 0 if engine.failure is None else 1


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, to be known as free before the model is loaded.

    Raises:
        ValueError: it is taken, or there is no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another --port") from error
    own.set_inheritable(True)
    return own
