"""Serve a model: an OpenAI-compatible API, and a page at / that shows the full model and GRIFFIN side by side."""

from __future__ import annotations

import argparse
import ipaddress
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from griffin.cli.arguments import (
    add_config_arguments,
    add_lossless_argument,
    add_model_arguments,
    config_from,
    load_model,
)
from griffin.config import AUTO

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    add_config_arguments(parser, without=("batch",), selection=AUTO, compact=False)
    add_lossless_argument(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    group.add_argument("--name", metavar="NAME", help="the model's name in the API (default: the one given by -m)")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="what requests must carry (default: GRIFFIN_API_KEY from the environment, which other users cannot see)",
    )
    group.add_argument("--places", type=int, default=16, metavar="N", help="most answers at a time (default: 16)")
    group.add_argument("--queue", type=int, default=64, metavar="N", help="most prompts that wait (default: 64)")
    group.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="most key/value memory (default: half of what is free on the model's device, or 4)",
    )
    group.add_argument(
        "--prefix-gb",
        type=float,
        metavar="GB",
        help="most memory for the beginnings of prompts, which later prompts need not run again; 0 keeps none "
        "(default: a tenth of what is free on the model's device, or 1)",
    )
    group.add_argument(
        "--prompt-chunk",
        type=int,
        default=64,
        metavar="N",
        help="prompt tokens that run at a time, and that prompts share (default: 64)",
    )
    group.add_argument("--max-prompt", type=int, metavar="N", help="most tokens of a prompt (default: the context)")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="most tokens of a chat's answer if its request says none (default: 1024)",
    )
    group.add_argument(
        "--deadline", type=float, default=600.0, metavar="S", help="most seconds for a request (default: 600)"
    )
    group.add_argument(
        "--max-body", type=float, default=4.0, metavar="MB", help="most megabytes of a request (default: 4)"
    )
    group.add_argument(
        "--drain",
        type=int,
        default=30,
        metavar="S",
        help="seconds that running answers may take after SIGTERM (default: 30)",
    )
    group.add_argument(
        "--connections", type=int, default=256, metavar="N", help="most clients that are connected (default: 256)"
    )
    group.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        help="host names that requests may be for, with commas between, or * for all (default: at a loopback address "
        "only its own names, elsewhere all)",
    )
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="text, or one JSON object a line, with one for each answered request (default: text)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command until SIGTERM or Ctrl-C.

    Raises:
        ValueError: wrong arguments, or a model that cannot be served.
        GriffinError: the model cannot be fetched.
    """
    args.batch = "per_sequence"
    config = config_from(args)
    positive = ("places", "queue", "prompt_chunk", "max_tokens", "max_prompt", "deadline", "max_body", "cache_gb")
    for name in (*positive, "connections"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; expected more than 0")
    for name in ("prefix_gb", "drain"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; expected 0 or more")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port is {args.port}; expected 0 to 65535")
    if config.method.select is None:
        raise ValueError(f"selection {config.method} masks the weights of all requests, so it cannot be served")
    if args.api_key == "":
        raise ValueError("--api-key is empty; give a key, or leave it out to serve without one")
    key = args.api_key or os.environ.get("GRIFFIN_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError("the API key has characters that a header cannot carry; use ASCII letters, digits and signs")
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"griffin serve needs {missing[0]}; install the extra: pip install 'griffin-llm[serve]'")

    from griffin.integrations.server.logs import Log
    from griffin.integrations.server.run import bound, serve
    from griffin.integrations.server.types import Limits
    from griffin.integrations.server.validation import Settings

    log = Log(args.log_format)
    listening = bound(args.host, args.port)
    model, tokenizer = load_model(args)
    limits = Limits(
        max_sequences=args.places,
        queue=args.queue,
        cache_bytes=_bytes(args.cache_gb, model.device, share=2, otherwise=2**32),
        prompt_chunk=args.prompt_chunk,
        prefix_bytes=_bytes(args.prefix_gb, model.device, share=10, otherwise=2**30),
        deadline_s=args.deadline,
    )
    settings = Settings(
        model=args.name or args.model,
        max_tokens=args.max_tokens,
        prompt_tokens=args.max_prompt,
        body_bytes=int(args.max_body * 1e6),
        api_key=key,
        allowed_hosts=_allowed_hosts(args.allowed_hosts, listening.getsockname()[0]),
        lossless=args.lossless,
    )
    log.say("loaded; trying a short prompt")
    return serve(model, tokenizer, config, limits, settings, listening, args.drain, args.connections, log)


def _bytes(gb: float | None, device: torch.device, share: int, otherwise: int) -> int:
    """So many gigabytes; or else a share of the device's free memory, or a number of bytes if that is unknown."""
    if gb is not None:
        return int(gb * 1e9)
    from griffin.analysis.machine import available_bytes

    free = available_bytes(device)
    return otherwise if free is None else free // share


def _allowed_hosts(names: str | None, address: str) -> tuple[str, ...] | None:
    """Names that requests may be for, beside the loopback ones; `None` allows all."""
    if names is not None:
        return tuple(name.strip() for name in names.split(",") if name.strip())
    return () if ipaddress.ip_address(address.partition("%")[0]).is_loopback else None
