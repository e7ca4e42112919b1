"""Answers of a chat model to problems that can be checked, item by item, for several ways of computing it.

    python benchmarks/evaluate_tasks.py MODEL DATA --task gsm8k --points full,topk@0.5,dynamic+topk@0.75 -o tasks.csv
    python benchmarks/evaluate_tasks.py MODEL-Q3_K_M.gguf DATA --task gsm8k --points full --label Q3_K_M -o tasks.csv
    python benchmarks/evaluate_tasks.py --summary -o tasks.csv

A point is `full`, or a selection and its density. Several problems are answered together, each with experts of its own.
Every answer is appended to the file as a row when it is there, so the command can be stopped and started again, and
several models can fill one file. Answers are greedy.

Tasks: gsm8k (the last number of the answer), humaneval (pass@1; the code runs in a process of its own with limits of
time, memory and file size, in a folder that is deleted; it is not kept from the network) and long (1,000 tokens drawn
after a short prompt, scored by the model whole: the mean negative log likelihood of every hundred tokens, and the share
of 4-grams that occurred before).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from texts import json_lines, kinds
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from griffin import GriffinConfig
from griffin.analysis.bootstrap import mean_interval, paired_interval

COLUMNS = ("task", "item", "label", "point", "score", "tokens", "seconds", "ids", "nll")
TOKENS = {"gsm8k": 400, "humaneval": 512, "long": 1000}
_SECONDS, _MEMORY, _FILE = 10, 2**31, 2**20  # of a program that is checked
_PROMPT = 32  # tokens before a long text
_GRAM, _BIN = 4, 100


@dataclass(frozen=True)
class Item:
    """A problem: what is asked, and what the answer is checked with."""

    prompt: Any
    row: dict[str, Any]


def items(task: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
    """A task's problems, in the order of its file."""
    if task == "gsm8k":
        for row in json_lines(data / "gsm8k" / "test_first660.jsonl"):
            ask = f"{row['question']}\n\nThink step by step, and end with the line '#### ' and the number."
            yield Item([{"role": "user", "content": ask}], row)
    elif task == "humaneval":
        for row in json_lines(data / "humaneval" / "HumanEval.jsonl.gz"):
            ask = "Complete this function. Answer with the whole function in one code block."
            ask = f"{ask}\n\n```python\n{row['prompt']}```"
            yield Item([{"role": "user", "content": ask}], row)
    else:
        texts = kinds(data)
        for number in range(10):
            for kind, text in texts.items():
                ids = tokenizer(text[number * 7000 :][:1000], add_special_tokens=False)["input_ids"][:_PROMPT]
                yield Item(tokenizer.decode(ids), {"kind": kind, "seed": number})


def score(task: str, text: str, ids: tuple[int, ...], row: dict[str, Any]) -> float:
    """1 for a right answer, else 0; of a long text the share of 4-grams that occurred before in it."""
    if task == "gsm8k":
        return float(number(text) is not None and number(text) == number(row["answer"]))
    if task == "humaneval":
        return float(passes(program(text, row)))
    grams = [ids[at : at + _GRAM] for at in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / max(1, len(grams))


def number(text: str) -> float | None:
    """The last number of a text."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def program(text: str, row: dict[str, Any]) -> str:
    """The answer's first code block, or all of it, behind the problem's imports and before its test."""
    block = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    code = block[1] if block else text
    if f"def {row['entry_point']}" not in code:  # the body alone
        code = row["prompt"] + code
    head = row["prompt"][: row["prompt"].index(f"def {row['entry_point']}")]
    return f"{head}\n{code}\n{row['test']}\ncheck({row['entry_point']})\n"


def passes(code: str) -> bool:
    """Whether a program ends without an error, in a process with limits."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory(prefix="griffin-program-") as folder:
        file = Path(folder) / "program.py"
        file.write_text(code, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", file], cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=6 * _SECONDS, preexec_fn=limits, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def config_of(point: str) -> GriffinConfig:
    """The config of `full`, or of a selection and its density: "planes+topk@0.5"."""
    if point == "full":
        return GriffinConfig(density=1.0, selection="topk")
    selection, _, density = point.partition("@")
    return GriffinConfig(density=float(density), selection=selection)


@torch.no_grad()
def likelihoods(model: PreTrainedModel, prompt: list[int], ids: tuple[int, ...]) -> list[float]:
    """Negative log likelihood of a text by the whole model: the mean of every hundred tokens."""
    tokens = torch.tensor([[*prompt, *ids]])
    logits = model(tokens[:, :-1]).logits[0, len(prompt) - 1 :].float()
    nll = F.cross_entropy(logits, torch.tensor(ids), reduction="none")
    return [float(part.mean()) for part in torch.split(nll, _BIN)]


def run(args: argparse.Namespace) -> None:
    model, tokenizer = griffin.load(args.model)
    there = {(row["task"], row["item"], row["label"], row["point"]) for row in rows_of(args.output)}
    chosen = list(itertools.islice(enumerate(items(args.task, args.data, tokenizer)), args.limit))
    size = 1 if args.task == "long" else args.batch  # each long text is drawn with a seed of its own
    for at in range(0, len(chosen), size):
        for point in args.points.split(","):
            part = [
                (index, item)
                for index, item in chosen[at : at + size]
                if (args.task, str(index), args.label, point) not in there
            ]
            if part:
                answer(args, model, tokenizer, point, part)


def answer(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    point: str,
    part: list[tuple[int, Item]],
) -> None:
    """Answer some problems together and append the rows."""
    first = part[0][1]
    sampling = {"temperature": 1.0, "seed": first.row["seed"], "stop": ()} if args.task == "long" else {}
    begin = time.perf_counter()
    results = griffin.generate(
        model, tokenizer, [item.prompt for _, item in part],
        griffin=replace(config_of(point), batch="per_sequence"), max_tokens=TOKENS[args.task], **sampling,
    )  # fmt: skip
    seconds = (time.perf_counter() - begin) / len(part)
    for (index, item), result in zip(part, results, strict=True):
        nll: list[float] = []
        if args.task == "long" and result.tokens:
            nll = likelihoods(model, tokenizer(item.prompt)["input_ids"], result.tokens)
        row = {
            "task": args.task,
            "item": index,
            "label": args.label,
            "point": point,
            "score": score(args.task, result.text, result.tokens, item.row),
            "tokens": len(result.tokens),
            "seconds": round(seconds, 2),
            "ids": " ".join(map(str, result.tokens)),
            "nll": " ".join(f"{value:.4f}" for value in nll),
        }
        append(args.output, row)
        print(f"{args.task} {index} {args.label} {point}: {row['score']:g}, {row['tokens']} tokens", flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def first_difference(ids: str, others: str) -> int:
    """The place of the first token that differs; the length where none does."""
    a, b = ids.split(), others.split()
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def summary(path: Path, label: str) -> None:
    """Every point beside the label's full model, on the items that both have."""
    by_point: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows_of(path):
        by_point.setdefault((row["task"], row["label"], row["point"]), {})[row["item"]] = row
    for (task, own, point), found in sorted(by_point.items()):
        full = by_point.get((task, label, "full"), {})
        both = [item for item in found if item in full]
        if not both:
            continue
        mine, theirs = ([float(rows[item]["score"]) for item in both] for rows in (found, full))
        value, difference = mean_interval(mine), paired_interval(mine, theirs)
        flips = sum(a != b for a, b in zip(mine, theirs, strict=True)) / len(both)
        places = sorted(first_difference(found[item]["ids"], full[item]["ids"]) for item in both)
        print(
            f"{task:9} {own:8} {point:22} n {len(both):4}  {value.value:.3f} ({value.low:.3f} to {value.high:.3f})  "
            f"minus full {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})  flips {flips:.3f}  "
            f"first differing token, median {places[len(places) // 2]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--task", choices=TOKENS, default="gsm8k")
    parser.add_argument("--points", default="full,topk@0.5,dynamic+topk@0.75,dynamic+topk@0.5")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="problems answered together (default: %(default)s)")
    parser.add_argument("--label", default="source", help="what the rows call the model's file")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.summary:
        summary(args.output, args.label)
    elif args.model is None or args.data is None:
        parser.error("MODEL and DATA are needed, but for --summary")
    else:
        run(args)


if __name__ == "__main__":
    main()
