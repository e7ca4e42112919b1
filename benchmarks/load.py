"""200 clients at once of one griffin serve: every answer must be that of the same request alone, to the bit.

    python benchmarks/load.py MODEL [--clients N] [--places N] [--tokens N] [--rounds R] [-o FILE.csv]

Texts of several lengths, densities and selections, whole answers and streams, in a queue that holds them all. A request
is first asked alone, then by two clients among the others, one of which streams. Texts and logprobs are compared, as
they are written in JSON. Memory is the server process's resident memory: at rest before, the most meanwhile, and at
rest after; a second round shows whether it grows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
from serving import TEXTS, save

DENSITIES = (1.0, 0.75, 0.5, 0.25)
SELECTIONS = ("topk", "auto")
REPEATS = (1, 4, 12)  # of a text: prompts of about 10, 40 and 120 tokens

Answer = tuple[str, tuple[str, ...], tuple[float, ...]]


def requests(count: int) -> list[dict[str, Any]]:
    """So many different requests."""
    made = []
    for number, (text, density, selection) in enumerate(itertools.product(TEXTS, DENSITIES, SELECTIONS)):
        prompt = " ".join([text] * REPEATS[number % len(REPEATS)])
        made.append({"prompt": prompt, "extra_body": {"griffin": {"density": density, "selection": selection}}})
    if count > len(made):
        sys.exit(f"there are {len(made)} different requests, so at most {2 * len(made)} clients")
    return [made[round(at * len(made) / count)] for at in range(count)]


async def answer(
    client: openai.AsyncOpenAI, model: str, request: dict[str, Any], *, tokens: int, stream: bool
) -> tuple[Answer, float]:
    """The answer with its tokens and their logprobs, and seconds until it was there."""
    start = time.perf_counter()
    asked = {"model": model, "max_tokens": tokens, "temperature": 0, "logprobs": 0, **request}
    if stream:
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        choices = [choice for chunk in chunks for choice in chunk.choices]
    else:
        choices = (await client.completions.create(**asked)).choices
    text = "".join(choice.text for choice in choices)
    infos = [choice.logprobs for choice in choices if choice.logprobs]
    names = tuple(token for info in infos for token in info.tokens or ())
    logprobs = tuple(value for info in infos for value in info.token_logprobs or ())
    return (text, names, logprobs), time.perf_counter() - start


async def load(url: str, args: argparse.Namespace, process: psutil.Process) -> list[dict[str, Any]]:
    """Ask alone, then all at once, in rounds; what each round has found."""
    rows = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        asked = requests(args.clients // 2)
        ask = partial(answer, client, args.model, tokens=args.tokens)
        alone = [(await ask(request, stream=False))[0] for request in asked]
        for _ in range(args.rounds):
            rest = most = process.memory_info().rss
            start = time.perf_counter()
            every = asyncio.gather(
                *(ask(request, stream=stream) for request in asked for stream in (False, True)), return_exceptions=True
            )
            while not every.done():
                most = max(most, process.memory_info().rss)
                await asyncio.sleep(0.02)
            seconds = time.perf_counter() - start
            await asyncio.sleep(1)
            got = await every
            for error in {repr(one) for one in got if isinstance(one, BaseException)}:
                print(error, file=sys.stderr)
            known = [one for one in alone for _ in range(2)]
            pairs = [(one, own) for one, own in zip(got, known, strict=True) if not isinstance(one, BaseException)]
            same = sum(one[0] == own for one, own in pairs)
            rows.append(
                {
                    **{"clients": len(got), "answered": len(pairs), "as_alone": same},
                    **{"seconds": seconds, "median_answer_s": statistics.median(one[1] for one, _ in pairs)},
                    **{"rest_mb": rest / 1e6, "most_mb": most / 1e6, "after_mb": process.memory_info().rss / 1e6},
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--places", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "griffin", "serve", "-m", args.model, "--port", "0"]
    command += ["--queue", str(args.clients), "--places", str(args.places)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
            rounds = asyncio.run(load(url, args, psutil.Process(server.pid)))
        finally:
            server.terminate()
    for found in rounds:
        print(
            f"{found['clients']} clients: {found['answered']} answered, {found['as_alone']} as alone, in "
            f"{found['seconds']:.0f} s; {found['rest_mb']:.0f} MB at rest, at most {found['most_mb']:.0f} MB, "
            f"{found['after_mb']:.0f} MB after"
        )
    settings = {"model": args.model, "places": args.places, "tokens": args.tokens}
    save(args.output, [{**settings, **found} for found in rounds])
    return int(any(found["as_alone"] < found["clients"] for found in rounds))


if __name__ == "__main__":
    sys.exit(main())
