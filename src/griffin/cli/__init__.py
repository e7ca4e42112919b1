"""The command line. Each command is a module with `add_arguments(parser)` and `run(args)`.

Text goes to stdout, everything else to stderr. Exit codes: 0 success, 1 an external failure (`GriffinError`), 2 wrong
usage (`ValueError`), 130 interrupted, 141 stdout was closed by its reader. `GRIFFIN_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence

from griffin.cli.parser import Parser
from griffin.errors import GriffinError
from griffin.version import __version__

COMMANDS = {
    "generate": "answer one prompt",
    "chat": "talk with a model",
    "serve": "an OpenAI-compatible server, with a page to try it",
    "info": "this machine, and a model's FF blocks",
    "bench": "how fast, beside the ceiling and the memory's bandwidth",
    "eval": "what is lost: tasks of lm-evaluation-harness",
    "profile": "measure a model once, for short prompts and for a target loss",
    "perplexity": "what the generation phase costs on real text",
    "flocking": "which neurons a sequence agrees on, and whether others do",
    "sweep": "methods, densities and tasks in one resumable run",
    "report": "one HTML page of a sweep",
    "demo": "the full model and GRIFFIN side by side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # do not fail on a terminal that is not UTF-8
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, GriffinError, OSError, RuntimeError, MemoryError) as error:
        failure = _code(error)
        if failure is None or os.environ.get("GRIFFIN_DEBUG", "0") not in ("", "0"):
            raise
        print(f"griffin: error: {' '.join(str(error).split())}", file=sys.stderr)
        _drop_stdout()  # otherwise the flush at exit would fail again
        return failure
    finally:
        gc.unfreeze()
        gc.enable()  # which a command that fails while it loads has left off


def _run(argv: list[str]) -> int:
    parser = Parser(prog="griffin", usage="griffin COMMAND [options]", description="Faster LLM generation by GRIFFIN.")
    parser.add_argument("--version", action="version", version=f"griffin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    takes_others = False
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, prog=f"griffin {name}", usage=f"griffin {name} [options]")
        if name in argv:  # import only the module of the requested command
            module = importlib.import_module(f"griffin.cli.commands.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            takes_others = getattr(module, "TAKES_OTHER_FLAGS", False)
    try:
        args, others = parser.parse_known_args(argv)
        if others and not takes_others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        args.others = others
        code: int = args.run(args)
    except SystemExit as stop:  # --help, --version, wrong usage
        return int(stop.code or 0)
    return code


def _code(error: BaseException) -> int | None:
    """The exit code of an expected error; `None` for a defect of this program."""
    if isinstance(error, GriffinError | OSError | MemoryError):
        return 1
    if isinstance(error, ValueError):
        return 2
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return 1 if any(word in str(error) for word in words) else None


def _drop_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
