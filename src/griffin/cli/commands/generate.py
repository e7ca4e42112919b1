"""Answer one prompt. The text goes to stdout, a line of measurements to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
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
from griffin.text_files import read_stdin, read_text, without_mark

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from griffin.generation.generate import Result
    from griffin.generation.text import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = "griffin generate [options] [PROMPT]"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt; without it and -f: stdin")
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="give the model the prompt as it is (default: as a user message, if the model has a chat template)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with everything measured instead")
    add_model_arguments(parser)
    add_config_arguments(parser, selection=AUTO)
    add_lossless_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: wrong arguments, no prompt or one that the model cannot take.
        GriffinError: the model cannot be fetched.
    """
    config = config_from(args)
    if args.raw and args.system is not None:
        raise ValueError("--system needs the chat template, which --raw skips; leave one of them out")
    text = _prompt_text(args)
    begin_loading(args)
    sampling = sampling_from(args)

    from griffin.generation.generate import fold, stream_generate

    model, tokenizer = load_model(args)
    prompt = _prompt(args, text, tokenizer)
    pieces = []
    stream = stream_generate(model, tokenizer, prompt, griffin=config, sampling=sampling, lossless=args.lossless)
    with closing(stream):
        for piece in stream:
            pieces.append(piece)
            if not args.json:
                print(piece.text, end="", flush=True)
    result = fold(pieces)
    if args.json:
        made_of = {"model": args.model, "config": asdict(config), "sampling": asdict(sampling)}
        print(json.dumps(asdict(result) | made_of))
    else:
        print(flush=True)
        print(summary(result), file=sys.stderr)
    return 0


def summary(result: Result) -> str:
    """The measurements of an answer on one line."""
    size = result.ff_bytes_per_token
    return " | ".join(
        (
            f"prompt {result.prompt_tokens} tokens, {result.prompt_tokens_per_s:.1f} tokens/s",
            f"selection {result.selection_ms:.1f} ms",
            f"generated {result.generated_tokens} tokens, {result.generation_tokens_per_s:.1f} tokens/s",
            "full model" if result.selection == "full" else f"{result.selection}, density {result.density:g}",
            f"FF {'?' if size is None else f'{size / 1e6:.1f}'} MB/token",
            *_drafts(result),
            f"finish {result.finish_reason or 'interrupted'}",
        )
    )


def _drafts(result: Result) -> list[str]:
    """What lossless drafts measured, and why they are off; nothing without them."""
    found = []
    if result.acceptance is not None:
        found.append(
            f"drafted {result.drafted}, accepted {result.accepted} ({result.acceptance:.0%}), "
            f"{result.tokens_per_verify:.1f} tokens/verification"
        )
    if result.lossless_off is not None:
        found.append(f"lossless drafts off: {result.lossless_off}")
    return found


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise ValueError("there are two prompts, PROMPT and -f; give one of them")
    if args.prompt is not None:
        text = without_mark(args.prompt)
        if not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            raise ValueError("PROMPT is not UTF-8 text; convert it to UTF-8")
    elif args.file is not None:
        text = read_text(args.file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt; give PROMPT, -f FILE or a text on stdin, see `griffin generate --help`")
    else:
        text = read_stdin()
    if not text.strip():
        raise ValueError("the prompt is empty; GRIFFIN selects experts from it, so it needs some text")
    return text


def _prompt(args: argparse.Namespace, text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if args.raw or (tokenizer.chat_template is None and args.system is None):
        return text
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template, so it takes no --system; put it into the prompt")
    messages = [{"role": "user", "content": text}]
    return messages if args.system is None else [{"role": "system", "content": without_mark(args.system)}, *messages]
