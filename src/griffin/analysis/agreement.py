"""How close GRIFFIN's predictions are to the full model's, on the same text."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from griffin.attachment import Griffin


def teacher_forced_logits(
    model: PreTrainedModel, prompt_ids: Tensor, continuation_ids: Tensor, handle: Griffin | None = None
) -> Tensor:
    """Logits for every token of a given continuation, computed by one generation-phase pass (teacher forcing).

    The prompt runs in the prompt phase, and its last position predicts the first continuation token. The generation
    phase predicts the others, each from the text before it.

    Shapes:
        prompt_ids: (B, P). continuation_ids: (B, G). Returns (B, G, V), float32.
    """
    with nullcontext() if handle is None else handle.prompt_phase():
        cache, first_logits = run_prompt(model, prompt_ids)
    with nullcontext() if handle is None else handle.generation_phase():
        return run_continuation(model, continuation_ids, cache, first_logits).float()


@torch.no_grad()
def run_prompt(model: PreTrainedModel, prompt_ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """Run a prompt in the phase the caller has entered; returns the key/value cache and the last position's logits.

    Shapes:
        prompt_ids: (B, P). The logits are (B, 1, V), in the model's dtype.
    """
    cache = DynamicCache(config=model.config)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return cache, model(prompt_ids, past_key_values=cache, use_cache=True, **last).logits[:, -1:]


@torch.no_grad()
def run_continuation(
    model: PreTrainedModel, continuation_ids: Tensor, cache: DynamicCache, first_logits: Tensor
) -> Tensor:
    """Run a given continuation after `run_prompt`, in the phase the caller has entered; this extends the cache.

    Shapes:
        continuation_ids: (B, G). first_logits: (B, 1, V). Returns (B, G, V), in the model's dtype.
    """
    if continuation_ids.shape[1] == 1:
        return first_logits
    rest = model(continuation_ids[:, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([first_logits, rest], dim=1)


def top1_agreement(logits: Tensor, others: Tensor) -> float:
    """Share of positions at which both models predict the same token.

    Shapes:
        logits, others: (..., V), of the same shape.
    """
    return float((logits.argmax(dim=-1) == others.argmax(dim=-1)).double().mean())
