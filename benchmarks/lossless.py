"""Lossless drafts beside plain generation of the full model: the same tokens, and how much faster.

    python benchmarks/lossless.py --data DIR -m MODEL [--weights int8] [--each 25] [-o results/MACHINE/lossless.csv]

Prompts of four kinds from the evaluation data's folder, read at run time: edits of code (humaneval), summaries with
quotations (cnn_dailymail), free text (mt_bench's writing and roleplay, and stories), chat (mt_bench's others). Each
prompt is answered by both, one after the other, in turns the other way round. A line for each prompt, and for each kind
the number of equal answers, the median of the prompts' speed-ups, and that of all the kind's tokens over all its time.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

from texts import book, json_lines

import griffin
from griffin.analysis import files, machine
from griffin.generation.text import Prompt

EDITS = (
    "Add a comment above the first line of the function's body. Change nothing else. Repeat the whole code:",
    "Rename the function to `solve`. Change nothing else. Repeat the whole code:",
    "Add type hints where they are missing. Change nothing else. Repeat the whole code:",
)


def user(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def prompts(data: Path, each: int) -> dict[str, list[Prompt]]:
    code = json_lines(data / "humaneval" / "HumanEval.jsonl.gz")
    csv.field_size_limit(2**30)
    with (data / "cnn_dailymail" / "cnn_dailymail_test.csv").open(encoding="utf-8", newline="") as file:
        news = [row["article"] for row in csv.DictReader(file)]
    questions = json_lines(data / "mt_bench" / "question.jsonl")
    written = [row["turns"][0] for row in questions if row["category"] in ("writing", "roleplay")]
    others = [row["turns"][0] for row in questions if row["category"] not in ("writing", "roleplay")]
    story = book(data / "books" / "war_and_peace_2600-0.txt")[100_000:]
    free: list[Prompt] = [user(text) for text in written]
    free += [story[at * 20_000 :][:600] for at in range(max(0, each - len(free)))]  # to be continued
    sources = [row["prompt"] + row["canonical_solution"] for row in code]
    quoting = (
        "Quote the three most important sentences of this article word for word, then summarise it in one sentence."
    )
    return {
        "code edit": [user(f"{EDITS[n % 3]}\n```python\n{sources[n]}```") for n in range(each)],
        "quotations": [user(f"{quoting}\n\n{text[:2000]}") for text in news[:each]],
        "free text": free[:each],
        "chat": [user(text) for text in others[:each]],
    }


def compare(kind: str, number: int, prompt: Prompt, model: Any, tokenizer: Any, args: Any) -> dict[str, Any]:
    found: dict[bool, griffin.Result] = {}
    with griffin.attach(model, density=1.0) as handle:
        for lossless in (False, True) if number % 2 else (True, False):
            result = griffin.generate(
                model, tokenizer, prompt, griffin=handle, lossless=lossless, max_tokens=args.max_tokens
            )
            assert isinstance(result, griffin.Result)
            found[lossless] = result
    plain, ours = found[False], found[True]
    timed = ours.generated_tokens > 1
    return {
        "kind": kind, "prompt": number, "prompt_tokens": ours.prompt_tokens, "tokens": ours.generated_tokens,
        "equal": ours.tokens == plain.tokens, "plain_tokens_per_s": round(plain.generation_tokens_per_s, 2),
        "lossless_tokens_per_s": round(ours.generation_tokens_per_s, 2),
        "speedup": round(ours.generation_tokens_per_s / plain.generation_tokens_per_s, 3) if timed else None,
        "drafted": ours.drafted, "accepted": ours.accepted, "tokens_per_verify": ours.tokens_per_verify,
        "off": ours.lossless_off or "",
    }  # fmt: skip


def summary(kind: str, rows: list[dict[str, Any]]) -> str:
    timed = [row for row in rows if row["speedup"] is not None]
    tokens = [row["tokens"] - 1 for row in timed]
    seconds = [
        sum(n / row[f"{side}_tokens_per_s"] for n, row in zip(tokens, timed, strict=True))
        for side in ("plain", "lossless")
    ]
    drafted, accepted = (sum(row[name] for row in rows) for name in ("drafted", "accepted"))
    ratios = sorted(row["speedup"] for row in timed)
    return (
        f"{kind}: {sum(row['equal'] for row in rows)} of {len(rows)} equal, speed-up {statistics.median(ratios):.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), of all tokens {seconds[0] / seconds[1]:.2f}x, accepted {accepted} of "
        f"{drafted} drafted for {sum(tokens)} tokens, off at the end {sum(bool(row['off']) for row in rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation data")
    parser.add_argument("-m", "--model", default="smollm2-135m")
    parser.add_argument("--weights")
    parser.add_argument("--dtype")
    parser.add_argument("--each", type=int, default=25, help="prompts of each kind")
    parser.add_argument("--kinds", help="only these, separated by commas")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = griffin.load(args.model, weights=args.weights, dtype=args.dtype)
    rows: list[dict[str, Any]] = []
    for kind, given in prompts(args.data, args.each).items():
        if args.kinds is not None and kind not in args.kinds.split(","):
            continue
        for number, prompt in enumerate(given):
            rows.append(compare(kind, number, prompt, model, tokenizer, args))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        print(summary(kind, [row for row in rows if row["kind"] == kind]), flush=True)
        if args.output is not None:
            about = machine.versions() | {name: machine.machine()[name] for name in ("cpu", "native_library")}
            about |= {"model": Path(args.model).name, "weights": args.weights or "as stored"}
            files.write_text(args.output, files.csv_text(rows, about))


if __name__ == "__main__":
    main()
