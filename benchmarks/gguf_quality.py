"""Perplexity by griffin and by llama.cpp on one GGUF file and the same tokens; see `compare_llamacpp.py`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_programs
import numpy as np
import torch
from llama_gguf import format_of
from llama_programs import LlamaBench
from rich.table import Table
from row_table import made
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import griffin
from griffin.analysis.perplexity import cases, encode_text, measure
from griffin.errors import GriffinError

WINDOW = 512  # tokens; llama-perplexity scores the second half of every window
_CHARACTERS = 12  # most a token has on average, in any text worth measuring
_ROWS = 64  # distributions compared at a time


@dataclass(frozen=True)
class QualityRow:
    """One engine on one file at one density, on the second halves of the same windows.

    Args:
        perplexity, standard_error: of the scored tokens, the error as llama-perplexity computes it.
        log_ratio: `ln(perplexity / llama.cpp's)`, in nats per token.
        kl: mean KL divergence from llama.cpp's distributions to griffin's full model's, in nats per token; the other
            densities' is from griffin's full model's. llama.cpp stores its distributions in 16 bits.
        agreement: share of the tokens at which both have the same most likely token.
        same_tokens: whether griffin's tokenizer cuts the text as llama.cpp's; llama.cpp's tokens are scored anyway.
    """

    file: str
    engine: str
    format: str
    density: float
    windows: int
    scored_tokens: int
    perplexity: float
    standard_error: float
    log_ratio: float
    kl: float
    agreement: float
    same_tokens: bool


def quality(
    file: Path, text: Path, tokens: int, densities: Sequence[float], bench: LlamaBench
) -> tuple[list[QualityRow], list[str]]:
    """The rows of a file, llama.cpp's first, and what is to be told about them."""
    count = tokens // WINDOW
    if count < 2:
        raise ValueError(f"--tokens is {tokens}; expected at least {2 * WINDOW}: two windows of {WINDOW}")
    told: list[str] = []
    with tempfile.TemporaryDirectory(prefix="griffin-logits-") as folder:
        logits = Path(folder) / "logits"
        theirs, error = llama_programs.perplexity(bench, file, text, WINDOW, count, logits)
        ids, stored = _read_logits(logits)
        if len(ids) < count:
            told.append(f"the text has {len(ids)} windows of {WINDOW} tokens, not {count}")
        model, tokenizer = griffin.load(file)
        same = _same_tokens(tokenizer, text, ids, told)
        if int(ids[0, 0]) == tokenizer.bos_token_id:  # llama.cpp's tokenizer adds one, and puts it before every window
            ids[:, 0] = ids[0, 0]
        kl, agreement = _against(model, ids, stored)
        del stored
    configs = cases(densities, ["topk"], "auto", seed=0)
    name, kind, scored = file.name, format_of(file), ids.shape[0] * (WINDOW // 2 - 1)
    rows = [QualityRow(name, "llama.cpp", kind, 1.0, len(ids), scored, theirs, error, 0.0, 0.0, 1.0, True)]
    for own in measure(model, ids, WINDOW // 2 + 1, configs):
        nll, full = own.nll.double().flatten(), own.config.density == 1.0
        value = float(nll.mean().exp())
        rows.append(
            QualityRow(
                file=name,
                engine="griffin",
                format=kind,
                density=own.config.density,
                windows=len(ids),
                scored_tokens=nll.numel(),
                perplexity=value,
                standard_error=value * float(nll.std()) / math.sqrt(nll.numel()),
                log_ratio=math.log(value / theirs),
                kl=kl if full else float(own.kl.double().mean()),
                agreement=agreement if full else float(own.agreement.double().mean()),
                same_tokens=same,
            )
        )
    return rows, told


def table(rows: Sequence[QualityRow]) -> Table:
    """The rows, for a person."""
    return made(
        f"{rows[0].windows} windows of {WINDOW} tokens, {rows[0].scored_tokens} scored",
        ("file", "engine"),
        ("density", "perplexity", "ln of the ratio\nto llama.cpp", "KL", "same likeliest\ntoken"),
        [
            (
                row.file,
                row.engine,
                f"{row.density:g}",
                f"{row.perplexity:.4f} ± {row.standard_error:.3f}",
                f"{row.log_ratio:+.5f}",
                f"{row.kl:.5f}",
                f"{row.agreement:.2%}",
            )
            for row in rows
        ],
    )


def _read_logits(path: Path) -> tuple[Tensor, np.ndarray[tuple[int, int], np.dtype[np.uint16]]]:
    """The windows of llama-perplexity, and the distributions it stored of the scored tokens, one a row.

    A row has two float32, the step and the least logarithm of a probability, then the multiples of the step.
    """
    with path.open("rb") as file:
        if file.read(8) != b"_logits_":
            raise GriffinError("llama-perplexity stored no logits in the known form; expected llama.cpp b11434")
        window, vocabulary, windows = (int(number) for number in np.fromfile(file, dtype="<i4", count=3))
        ids = np.fromfile(file, dtype="<i4", count=windows * window).reshape(windows, window)
        begin = file.tell()
    row = 2 * ((vocabulary + 1) // 2) + 4
    shape = (windows * (window - 1 - window // 2), row)
    stored = np.memmap(path, dtype="<u2", mode="r", offset=begin, shape=shape)
    return torch.from_numpy(ids.astype(np.int64)), stored[:, : vocabulary + 4]


def _same_tokens(tokenizer: PreTrainedTokenizerBase, text: Path, ids: Tensor, told: list[str]) -> bool:
    head = text.read_text(encoding="utf-8")[: ids.numel() * _CHARACTERS]
    plain, bos = encode_text(tokenizer, head)
    own = torch.tensor(([] if bos is None else [bos]) + plain)[: ids.numel()]
    expected = ids.flatten()[: len(own)]
    differ = (own != expected).nonzero()
    if not len(differ) and len(own) == ids.numel():
        return True
    at = int(differ[0]) if len(differ) else len(own)
    piece = slice(max(0, at - 3), at + 4)
    told.append(
        f"the tokenizers differ from token {at} of {ids.numel()} on: griffin {own[piece].tolist()}, llama.cpp "
        f"{expected[piece].tolist()}; both are scored on llama.cpp's tokens"
    )
    return False


@torch.no_grad()
def _against(
    model: PreTrainedModel, ids: Tensor, stored: np.ndarray[tuple[int, int], np.dtype[np.uint16]]
) -> tuple[float, float]:
    """Mean KL divergence from llama.cpp's distributions to the full model's, and how often the likeliest token agrees.

    Shapes:
        ids: (N, WINDOW). stored: (N * scored tokens of a window, 4 + V).
    """
    divergence = agreed = 0.0
    first, scored = WINDOW // 2, len(stored) // len(ids)
    for number, window in enumerate(ids):
        own = model(window[None]).logits[0, first : first + scored]
        rows = stored[number * scored : (number + 1) * scored]
        for at in range(0, scored, _ROWS):
            part = np.ascontiguousarray(rows[at : at + _ROWS])
            step, least = torch.from_numpy(part[:, :4].copy().view("<f4")).T[:, :, None]
            steps = torch.from_numpy(part[:, 4:].astype(np.float32))
            theirs = (steps * step + least).log_softmax(dim=-1)
            ours = own[at : at + _ROWS, : theirs.shape[1]].float().log_softmax(dim=-1)
            divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
            agreed += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
    return divergence / len(stored), agreed / len(stored)
