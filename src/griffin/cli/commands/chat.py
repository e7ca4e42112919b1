"""Talk with a model. Text goes to stdout, everything else to stderr; /help lists the commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from griffin.cli.arguments import (
    add_config_arguments,
    add_lossless_argument,
    add_model_arguments,
    add_sampling_arguments,
    begin_loading,
    config_from,
    load_model,
    sampling_from,
)
from griffin.config import AUTO
from griffin.text_files import stdin_messages, without_mark

if TYPE_CHECKING:
    from griffin.generation.chat import Session

_PROMPT = "> "
_HELP = """\
/density 0.75  keep another share of the FF neurons from now on
/stats         what the last answer measured, and the length of the conversation
/reset         forget the conversation
/help          this list
/exit          leave (also Ctrl-D)
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_model_arguments(parser)
    add_config_arguments(parser, selection=AUTO)
    add_lossless_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, or a model without a chat template.
        GriffinError: the model cannot be fetched.
    """
    config = config_from(args)
    if sys.stdin is None:
        raise ValueError("stdin is closed; griffin chat reads its messages from it")
    begin_loading(args)
    sampling = sampling_from(args)

    from griffin.generation.chat import Session

    model, tokenizer = load_model(args)
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template; use griffin generate")
    system = None if args.system is None else without_mark(args.system)
    with Session(model, tokenizer, config, sampling, system=system, lossless=args.lossless) as session:
        if sys.stdin.isatty():
            _say(f"{args.model}, density {config.density:g}. /help lists the commands.")
        for line in _lines():
            if line.startswith("/"):
                if not _command(session, line):
                    break
            elif line:
                _answer(session, line)
    return 0


def _answer(session: Session, text: str) -> None:
    """Stream one answer. Ctrl-C ends the answer; an error in one message does not end the chat."""
    try:
        with closing(session.ask(text)) as pieces:
            for piece in pieces:
                print(piece.text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        kept = session.last is not None and session.last.finish_reason is None
        _say("stopped" if kept else "stopped before the first token; the message is not kept")
    except ValueError as error:
        _say(f"{error} (/reset forgets the conversation)")


def _command(session: Session, line: str) -> bool:
    """Run one command; returns whether the chat goes on."""
    name, _, value = line.partition(" ")
    actions: dict[str, Callable[[], str]] = {
        "/density": lambda: _density(session, value.strip()),
        "/reset": session.reset,
        "/stats": lambda: _stats(session),
        "/help": lambda: _HELP,
    }
    if name == "/exit":
        return False
    if name in actions:
        _say(actions[name]())
    else:
        _say(f"unknown command {name}; known: {', '.join(actions)}, /exit")
    return True


def _density(session: Session, value: str) -> str:
    if not value:
        return f"density {session.config.density:g}; /density 0.75 changes it"
    try:
        config = replace(session.config, density=float(value), loss=None)
    except ValueError:
        return f"density is {value!r}; expected a number above 0 and at most 1, for example /density 0.75"
    try:
        session.configure(config)
    except ValueError as error:
        return str(error)
    return f"density {session.config.density:g}"


def _stats(session: Session) -> str:
    from griffin.cli.commands.generate import summary

    turns = sum(message["role"] == "user" for message in session.messages)
    lines = [
        f"{turns} turn{'' if turns == 1 else 's'} | {len(session.cached)} tokens in the key/value cache, "
        f"{session.reused} of them reused by the last turn | density {session.config.density:g}"
    ]
    if session.last is not None:
        lines.append(f"last answer: {summary(session.last)}")
    return "\n".join(lines)


def _lines() -> Iterator[str]:
    """Lines of stdin, stripped. On a terminal Ctrl-C clears the current line."""
    if not sys.stdin.isatty():
        yield from stdin_messages()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            yield without_mark(_read_line()).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            _say("\n/exit or Ctrl-D leaves")


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)  # so that readline knows the prompt's width
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
