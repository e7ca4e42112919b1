"""Texts of four kinds to measure on, and other ones for a prior, from the evaluation data's folder."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from griffin.analysis.perplexity import encode_text, windows

_CHARACTERS = 400_000  # of a text that sequences are spread over


def json_lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def book(path: Path) -> str:
    """The book alone: Project Gutenberg's header ends, and its footer begins, with a line of its own."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("*** START OF THIS PROJECT"))
    end = next(number for number, line in enumerate(lines) if line.startswith("*** END OF THIS PROJECT"))
    return "\n".join(lines[begin + 1 : end])


def kinds(data: Path) -> dict[str, str]:
    """What is measured: news, fiction, encyclopedia and code."""
    csv.field_size_limit(2**30)
    with (data / "cnn_dailymail" / "cnn_dailymail_test.csv").open(encoding="utf-8", newline="") as file:
        news = " ".join(row["article"] for row in csv.DictReader(file))
    code = json_lines(data / "humaneval" / "HumanEval.jsonl.gz")
    return {
        "news": news,
        "fiction": book(data / "books" / "war_and_peace_2600-0.txt"),
        "encyclopedia": (data / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8"),
        "code": "\n\n".join(row["prompt"] + row["canonical_solution"] for row in code),
    }


def prior_texts(data: Path) -> list[str]:
    """What the prior comes from: none of it is measured."""
    passages = dict.fromkeys(row["passage"] for row in json_lines(data / "boolq" / "dev.jsonl"))
    problems = json_lines(data / "gsm8k" / "test_first660.jsonl")
    questions = json_lines(data / "mt_bench" / "question.jsonl")
    return [
        " ".join(passages),
        book(data / "books" / "pride_and_prejudice_1342-0.txt"),
        "\n\n".join(f"{row['question']} {row['answer']}" for row in problems),
        "\n".join(" ".join(row["turns"]) for row in questions),
    ]


def sequences(
    tokenizer: PreTrainedTokenizerBase, data: Path, prompt: int, generate: int, each: int
) -> tuple[list[str], Tensor]:
    """So many sequences of each kind, spread evenly over its text.

    Shapes:
        Returns the kind of every sequence, and (4 * each, prompt + generate), int64.
    """
    names, rows = [], []
    for kind, text in kinds(data).items():
        ids, bos = encode_text(tokenizer, text[:_CHARACTERS])
        rows.append(windows(ids, bos, [prompt], generate, each)[0])
        names += [kind] * each
    return names, torch.cat(rows)
