"""Tokens/s of griffin serve with 1, 4, 8 and 16 requests at a time, density 1.0 against 0.5, in turns.

    python benchmarks/serving.py MODEL [--weights W] [--selection S] [--tokens N] [--rounds R] [-o FILE.csv]
    python benchmarks/serving.py MODEL --behind 1500 [-o FILE.csv]  # seconds of a short prompt behind a long one

The server is a process of its own, asked by HTTP with streams. Before anything is timed, all answers are compared with
those that the same requests get alone; bfloat16 answers may part where two tokens are nearly as likely, so it is told
how many do.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from griffin.analysis import files
from griffin.analysis.machine import machine, versions

TEXTS = (
    "The lighthouse at the end of the bay was built",
    "A recipe for bread needs flour, water and",
    "In the year of the great storm the harbour",
    "The theory of evolution says that",
    "To repair a bicycle tyre, first",
    "The orchestra began to play when the",
    "Prices rose last year because",
    "My grandmother's garden had a",
    "The function returns the sum of",
    "Whales are mammals that",
    "The train to the mountains leaves",
    "Old maps show the river where",
    "She opened the letter and",
    "The committee decided to",
    "Volcanoes form where",
    "The painter mixed blue with",
)


async def answers(
    url: str, model: str, prompts: Sequence[str], density: float, tokens: int, repeat: int = 12
) -> tuple[float, list[str]]:
    """Generated tokens a second of requests at once, from the first token of the last one on, and their texts."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:
        stamps: list[float] = []
        firsts: list[float] = []

        async def one(text: str) -> str:
            stream = await client.completions.create(
                model=model,
                prompt=" ".join([text] * repeat),
                max_tokens=tokens,
                temperature=0,
                stream=True,
                logprobs=0,
                extra_body={"griffin": {"density": density}},
            )
            found, first = [], True
            async for chunk in stream:
                choice = chunk.choices[0]
                if choice.logprobs and choice.logprobs.tokens:
                    stamps.append(time.perf_counter())
                    if first:
                        firsts.append(stamps[-1])
                        first = False
                    found += choice.logprobs.tokens
            return "".join(found)

        texts = await asyncio.gather(*map(one, prompts))
    begin = max(firsts)  # all prompts have run
    within = [stamp for stamp in stamps if stamp > begin]
    return len(within) / (max(within) - begin), texts


async def behind(url: str, model: str, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds to the first token of a short prompt: alone, and while a prompt of so many tokens runs."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:

        async def first_token_s(prompt: str | list[int]) -> float:
            start = time.perf_counter()
            await client.completions.create(model=model, prompt=prompt, max_tokens=1, temperature=0)
            return time.perf_counter() - start

        alone, waited, long = [], [], []
        for number in range(rounds):
            alone.append(await first_token_s(f"{number}: {TEXTS[number % 8]}"))
            ids = [1000 + (number * 7919 + at * 31) % 20_000 for at in range(tokens)]  # begins like no earlier one
            running = asyncio.create_task(first_token_s(ids))
            await asyncio.sleep(0.5)
            waited.append(await first_token_s(f"{number}: {TEXTS[8 + number % 8]}"))
            if running.done():
                sys.exit("the long prompt was over before the short one; ask for more tokens")
            long.append(await running)
    alone_s, waited_s, long_s = map(statistics.median, (alone, waited, long))
    print(f"alone {alone_s:.2f} s, behind {tokens} tokens {waited_s:.2f} s; the long prompt itself {long_s:.2f} s")
    return {"behind_tokens": tokens, "alone_s": alone_s, "behind_s": waited_s, "most_s": max(waited), "long_s": long_s}


def save(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, with the machine and the versions, if there is a file for them."""
    if path is not None:
        files.write_text(path, files.csv_text(rows, machine(), versions()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--selection", default="topk")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--behind", type=int, metavar="N", help="time a short prompt behind one of N tokens instead")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "griffin", "serve", "-m", args.model, "--weights", args.weights, "--port", "0"]
    command += ["--selection", args.selection]
    rows = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.]+:\d+", line))) + "/v1"
            if args.behind is not None:
                found = asyncio.run(behind(url, args.model, args.behind, args.rounds))
                settings = {"model": args.model, "weights": args.weights, "selection": args.selection}
                save(args.output, [{**settings, **found, "rounds": args.rounds}])
                return
            known = {
                density: [asyncio.run(answers(url, args.model, [text], density, args.tokens))[1][0] for text in TEXTS]
                for density in (1.0, 0.5)
            }
            for n in (1, 4, 8, 16):
                speeds: dict[float, list[float]] = {1.0: [], 0.5: []}
                parted = 0
                for _ in range(args.rounds):
                    for density, own in speeds.items():
                        speed, texts = asyncio.run(answers(url, args.model, TEXTS[:n], density, args.tokens))
                        own.append(speed)
                        parted += sum(a != b for a, b in zip(texts, known[density][:n], strict=True))
                full, half = (statistics.median(own) for own in speeds.values())
                ratio = statistics.median(b / a for a, b in zip(speeds[1.0], speeds[0.5], strict=True))
                print(f"{n:3d} requests: {full:7.1f} -> {half:7.1f} tokens/s, {ratio:.2f}x; {parted} answers parted")
                rows.append(
                    {
                        **{"model": args.model, "weights": args.weights, "selection": args.selection, "requests": n},
                        **{"full_tokens_per_s": full, "half_tokens_per_s": half, "ratio": ratio, "parted": parted},
                        **{"tokens": args.tokens, "rounds": args.rounds},
                    }
                )
        finally:
            server.terminate()
    save(args.output, rows)


if __name__ == "__main__":
    main()
