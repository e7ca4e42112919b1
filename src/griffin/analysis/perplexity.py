"""Perplexity of the generation phase on real text, beside the full model's.

A text is cut into windows. In each window the prompt runs through the full model and selects the experts; one
teacher-forced pass then scores the tokens after it with those experts. A test verifies that this equals generating them
token by token. As in generation, the full model predicts the first token after the prompt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from griffin.analysis.agreement import run_continuation, run_prompt
from griffin.analysis.benchmark import check_length, laid_out_once
from griffin.analysis.bootstrap import Interval, mean_interval, paired_interval
from griffin.analysis.wanda import attach_any
from griffin.attachment import GATHER_ONLY, attach
from griffin.config import GriffinConfig

_VALUES_AT_A_TIME = 2**24  # float32 logits, 64 MB; several such tensors are alive at once


@dataclass(frozen=True)
class Scored:
    """Scores of the tokens of N continuations of G tokens, with one config and with the full model.

    Args:
        config: the config.
        nll: negative log likelihood of every token, in nats.
        full_nll: the same with the full model.
        kl: KL divergence KL(full || griffin) of the next token's distribution, in nats.
        agreement: whether both have the same most likely token.

    Shapes:
        all (N, G), float32 on the CPU; agreement is bool.
    """

    config: GriffinConfig
    nll: Tensor
    full_nll: Tensor
    kl: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class PerplexityRow:
    """The figures of one config for one length of prompt and continuation; intervals are over the sequences.

    Args:
        density, selection: fields of the config.
        prompt_tokens, generated_tokens: tokens of each sequence.
        sequences: number of sequences N.
        perplexity: `exp` of the mean negative log likelihood of all tokens.
        full_perplexity: the full model's perplexity on the same tokens.
        log_ratio: `ln(perplexity / full_perplexity)`, in nats per token; its interval is paired.
        kl: mean KL(full || griffin), in nats per token.
        agreement: share of the tokens at which both have the same most likely token.
    """

    density: float
    selection: str
    prompt_tokens: int
    generated_tokens: int
    sequences: int
    perplexity: Interval
    full_perplexity: Interval
    log_ratio: Interval
    kl: Interval
    agreement: Interval

    def flat(self) -> dict[str, float | int | str | None]:
        """The row for a table. An interval becomes three columns, `x`, `x_low` and `x_high`; nan ends become `None`."""
        cells: dict[str, float | int | str | None] = {}
        for name, value in vars(self).items():
            if not isinstance(value, Interval):
                cells[name] = value
                continue
            ends = {f"{name}_low": value.low, f"{name}_high": value.high}
            cells |= {name: value.value} | {at: None if math.isnan(end) else end for at, end in ends.items()}
        return cells


def cases(densities: Iterable[float], selections: Sequence[str], backend: str, seed: int) -> list[GriffinConfig]:
    """The configs of every density with every selection; density 1.0 comes once, as it selects nothing.

    Raises:
        ValueError: a density, a selection, the backend or the seed is not valid.
    """
    wanted = [
        (density, selections[0] if density == 1.0 else selection) for selection in selections for density in densities
    ]
    return [
        GriffinConfig(density=density, selection=selection, backend=backend, seed=seed)
        for density, selection in dict.fromkeys(wanted)
    ]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int | None]:
    """Token ids of a text, and the beginning-of-sequence token if the tokenizer adds one to every text.

    Raises:
        ValueError: the text is empty.
    """
    if not text.strip():
        raise ValueError("the text is empty; give one that is longer than a prompt and its continuation")
    start: Any = tokenizer(text[:100], verbose=False)["input_ids"]
    plain: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [int(token) for token in plain], bos if isinstance(bos, int) and list(start[:1]) == [bos] else None


def windows(ids: Sequence[int], bos: int | None, prompts: Sequence[int], generate: int, sequences: int) -> list[Tensor]:
    """Cut a text into sequences that do not overlap, for every length of prompt.

    A window holds the longest prompt and the continuation. A shorter prompt is the end of the longest, so that every
    length scores the same continuations, and differences between lengths do not come from different texts.

    Args:
        ids: the text's tokens, without special ones.
        bos: the token that the model expects at the beginning of a sequence, counted as part of the prompt.
        prompts: tokens of the prompt.
        generate: tokens of the continuation.
        sequences: number of windows, spread evenly over the text.

    Returns:
        The sequences for each prompt length P.

    Shapes: each (sequences, P + generate), int64.

    Raises:
        ValueError: a length is not positive, or the text is too short.
    """
    for name, value in (("prompt", min(prompts)), ("generate", generate), ("sequences", sequences)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a whole number from 1")
    prefix = [] if bos is None else [bos]
    size = max(max(prompts) - len(prefix), 0) + generate
    if len(ids) < sequences * size:
        raise ValueError(
            f"the text has {len(ids)} tokens, but {sequences} sequences of {max(prompts)} + {generate} tokens that do "
            f"not overlap need {sequences * size}; it is enough for {len(ids) // size}: give a longer text, fewer "
            "sequences or shorter ones"
        )
    step = len(ids) // sequences
    text = torch.tensor([list(ids[at * step : at * step + size]) for at in range(sequences)])
    beginning = torch.tensor(prefix, dtype=torch.int64).expand(sequences, -1)
    return [torch.cat([beginning, text[:, size - generate - (p - len(prefix)) :]], dim=1) for p in prompts]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    ids: Tensor,
    prompt: int,
    configs: Sequence[GriffinConfig],
    *,
    progress: Callable[[], None] = lambda: None,
) -> list[Scored]:
    """Score the continuations of N prompts with the full model and with every config.

    Each sequence's prompt runs once; the full model and every config use its statistic and its key/value cache.

    Args:
        model: the model, in eval mode, without GRIFFIN attached.
        ids: the sequences.
        prompt: P, the number of prompt tokens at the start of each sequence.
        configs: the configs to measure.
        progress: called after every sequence with every config.

    Shapes:
        ids: (N, P + G), int64.

    Raises:
        ValueError: there is no prompt or no continuation, a sequence is longer than the model's context, or a config
            does not fit the model.
    """
    if ids.dim() != 2 or not 1 <= prompt < ids.shape[1]:
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected (N, {prompt} + G) with G at least 1")
    check_length(model, prompt, ids.shape[1] - prompt)
    scores: list[list[_Scores]] = [[] for _ in configs]
    full_nll: list[Tensor] = []
    needs = frozenset().union(*(config.needs for config in configs))
    backends = dict.fromkeys(config.backend for config in configs)
    with laid_out_once(model, *backends):
        for row in ids.to(model.device):
            continuation = row[None, prompt:]
            with attach(model, GATHER_ONLY) as gathering, gathering.gather(needs=needs) as statistics:
                cache, first_logits = run_prompt(model, row[None, :prompt])
            full = run_continuation(model, continuation, copy.deepcopy(cache), first_logits)[0]
            full_nll.append(_scores(full, full, continuation[0]).nll)
            for config_scores, config in zip(scores, configs, strict=True):
                with attach_any(model, config) as handle:
                    handle.select(statistics)
                    with handle.generation_phase():
                        logits = run_continuation(model, continuation, copy.deepcopy(cache), first_logits)[0]
                config_scores.append(_scores(logits, full, continuation[0]))
                progress()
    return [
        Scored(
            config,
            torch.stack([score.nll for score in config_scores]),
            torch.stack(full_nll),
            torch.stack([score.kl for score in config_scores]),
            torch.stack([score.agreement for score in config_scores]),
        )
        for config, config_scores in zip(configs, scores, strict=True)
    ]


def summary(measured: Scored, prompt: int, generate: int, seed: int = 0) -> PerplexityRow:
    """The figures of the first `generate` tokens of every continuation.

    Raises:
        ValueError: `generate` exceeds the number of measured tokens, or a figure is not finite.
    """
    n, longest = measured.nll.shape
    if not 1 <= generate <= longest:
        raise ValueError(f"generate is {generate}; {longest} tokens were measured")
    nll, full, kl, agreement = (
        values[:, :generate].double().mean(dim=1)
        for values in (measured.nll, measured.full_nll, measured.kl, measured.agreement)
    )
    return PerplexityRow(
        density=measured.config.density,
        selection=measured.config.selection,
        prompt_tokens=prompt,
        generated_tokens=generate,
        sequences=n,
        perplexity=mean_interval(nll, seed=seed).exp(),
        full_perplexity=mean_interval(full, seed=seed).exp(),
        log_ratio=paired_interval(nll, full, seed=seed),
        kl=mean_interval(kl, seed=seed),
        agreement=mean_interval(agreement, seed=seed),
    )


@dataclass(frozen=True)
class _Scores:
    nll: Tensor  # each (G,)
    kl: Tensor
    agreement: Tensor


def _scores(logits: Tensor, full: Tensor, tokens: Tensor) -> _Scores:
    """Shapes: logits, full (G, V), any float dtype; tokens (G,)."""
    nll, kl, agreement = [], [], []
    rows = max(1, _VALUES_AT_A_TIME // logits.shape[1])
    for ours, theirs, token in zip(*(torch.split(each, rows) for each in (logits, full, tokens)), strict=True):
        q, p = ours.float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
        nll.append(-q.gather(1, token[:, None])[:, 0].cpu())
        kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).cpu())
        agreement.append((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).cpu())
    return _Scores(torch.cat(nll), torch.cat(kl), torch.cat(agreement))
