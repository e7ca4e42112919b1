"""Run the server for a loaded model until it is told to stop."""

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
    """Serve until SIGTERM or Ctrl-C; running answers then have `drain_s` seconds to finish. Returns the exit code.

    Raises:
        ValueError: the model cannot be served.
    """
    with listening:
        engine = Engine(model, tokenizer, config, limits)
        app = make_app(engine, settings)
        logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # keep stdout free for text
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=logs, log_level="warning", timeout_graceful_shutdown=drain_s, lifespan="on")
        )
        listening.listen(2048)  # from here on, clients can connect and wait for an answer
        address, bound_port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(
            f"{settings.model} at http://{shown}:{bound_port}: API at /v1, page at / "
            f"(density {config.density:g}, {config.selection}; step: {engine.step_name}; "
            f"{limits.max_sequences} places, {limits.cache_bytes / 1e9:.1f} GB of keys and values)",
            file=sys.stderr,
            flush=True,
        )
        server.run(sockets=[listening])
    return 0 if engine.failure is None else 1


def bound(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, so that a taken address is reported before the model is loaded.

    Raises:
        ValueError: the address is taken or does not exist.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = candidates[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another --port") from error
    listening.set_inheritable(True)
    return listening
