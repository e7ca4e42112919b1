"""Seconds to the first token of each turn of a chat, of griffin serve without and with kept beginnings of prompts.

    python benchmarks/prefix.py MODEL [--weights W] [--dtype T] [--selection S] [--turns N] [--rounds R] [-o FILE.csv]

Two servers, asked in turns by HTTP. The answers of both must be equal, as a kept beginning has the same numbers as one
that is run again. A chat's later rounds differ in their first message, so that none begins like an earlier one.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai

from griffin.analysis import files
from griffin.analysis.machine import machine, versions

QUESTION = (
    "Here is the next part of my notes. The lighthouse at the end of the bay was built of grey stone, and its keeper "
    "wrote down the weather of every day: wind from the west, rain before noon, two ships that passed with red sails, "
    "the price of oil and bread in the village, who came by boat and what they told. Part {number} is about the year "
    "of the great storm, when the harbour wall broke and the boats were carried into the fields. What should I ask the "
    "people of the village about it?"
)


@contextmanager
def server(args: argparse.Namespace, *flags: str) -> Iterator[str]:
    """A server of its own; yields its address."""
    command = [sys.executable, "-m", "griffin", "serve", "-m", args.model, "--port", "0"]
    for name in ("weights", "dtype", "selection", "density"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}", str(value)]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        finally:
            process.terminate()


def first_token_s(url: str, model: str, messages: list[Any], tokens: int) -> tuple[float, str, Any]:
    """Seconds to the first token of an answer, the answer, and the usage."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        start = time.perf_counter()
        seconds, text, usage = 0.0, "", None
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True, logprobs=True
        )
        for chunk in stream:
            choice = chunk.choices[0]
            if choice.logprobs and not seconds:
                seconds = time.perf_counter() - start
            text += choice.delta.content or ""
            usage = chunk.usage or usage
    return seconds, text, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--dtype")
    parser.add_argument("--selection")
    parser.add_argument("--density")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    seconds: dict[int, dict[str, list[float]]] = {}
    prompts: dict[int, tuple[int, int]] = {}
    with ExitStack() as stack:
        urls = {"without": stack.enter_context(server(args, "--prefix-gb", "0"))}
        urls["with"] = stack.enter_context(server(args))
        for number in range(args.rounds):
            messages: list[Any] = []
            for turn in range(1, args.turns + 1):
                messages.append({"role": "user", "content": QUESTION.format(number=100 * number + turn)})
                answers = {}
                for name, url in urls.items():
                    first, answers[name], usage = first_token_s(url, args.model, messages, args.tokens)
                    seconds.setdefault(turn, {}).setdefault(name, []).append(first)
                    if name == "with":
                        prompts[turn] = usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens
                if answers["with"] != answers["without"]:
                    sys.exit(f"turn {turn}: the answers differ: {answers}")
                messages.append({"role": "assistant", "content": answers["with"]})
    rows = []
    for turn, of_turn in seconds.items():
        without, kept = (statistics.median(of_turn[name]) for name in ("without", "with"))
        tokens, cached = prompts[turn]
        print(f"turn {turn:2d}: {tokens:5d} tokens, {cached:5d} known: {without:6.2f} s -> {kept:6.2f} s")
        rows.append(
            {
                **{"model": args.model, "weights": args.weights or "", "turn": turn, "prompt_tokens": tokens},
                **{"known_tokens": cached, "without_s": without, "with_s": kept, "rounds": args.rounds},
            }
        )
    if args.output is not None:
        files.write_text(args.output, files.csv_text(rows, machine(), versions()))


if __name__ == "__main__":
    main()
