"""Texts of four kinds to measure on, and other ones for a prior, from the evaluation data's folder."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from griffin.analysis.perplexity import encode_text, windows

_CHARACTERS = 400_000  # of a text at most


def kinds(data: Path) -> dict[str, str]:
    """News, fiction, encyclopedia and code."""
    csv.field_size_limit(2**31 - 1)
    with (data / "cnn_dailymail/cnn_dailymail_test.csv").open(encoding="utf-8", newline="") as file:
        news = "\n\n".join(row["article"] for row in csv.DictReader(file))
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        code = "\n\n".join(row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines))
    found = {
        "news": news,
        "fiction": _book(data / "books/war_and_peace_2600-0.txt"),
        "encyclopedia": (data / "wikitext2/wiki.valid.raw").read_text(encoding="utf-8"),
        "code": code,
    }
    return {kind: text[:_CHARACTERS] for kind, text in found.items()}


def sequences(
    tokenizer: PreTrainedTokenizerBase, data: Path, prompt: int, generate: int, each: int
) -> tuple[list[str], Tensor]:
    """So many sequences of each kind, spread evenly over its text.

    Shapes:
        Returns the kind of every sequence, and (4 * each, prompt + generate), int64.
    """
    names, rows = [], []
    for kind, text in kinds(data).items():
        ids, bos = encode_text(tokenizer, text)
        rows.append(windows(ids, bos, [prompt], generate, each)[0])
        names += [kind] * each
    return names, torch.cat(rows)


def _book(path: Path) -> str:
    """A book of Project Gutenberg without what is not the book."""
    text = path.read_text(encoding="utf-8")
    begin, end = text.index("*** START OF"), text.index("*** END OF")
    return text[text.index("\n", begin) : end].strip()
