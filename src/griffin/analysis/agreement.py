"""How close GRIFFIN's predictions are to the full model's, on the same text."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from griffin.attachment import Griffin


@torch.no_grad()
def teacher_forced_logits(
    model: PreTrainedModel, prompt_ids: Tensor, continuation_ids: Tensor, handle: Griffin | None = None
) -> Tensor:
    """Logits for every continuation token, the text given: the generation phase of a known text in one pass.

    The prompt is the prompt phase. Its last position predicts the first continuation token; the others are predicted in
    the generation phase, each from the text before it.

    Shapes:
        prompt_ids: (B, P). continuation_ids: (B, G). Returns (B, G, V), float32.
    """
    cache = DynamicCache(config=model.config)
    with nullcontext() if handle is None else handle.prompt_phase():
        first = model(prompt_ids, past_key_values=cache, use_cache=True).logits[:, -1:]
    with nullcontext() if handle is None else handle.generation_phase():
        rest = model(continuation_ids[:, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([first, rest], dim=1).float()


def top1_agreement(logits: Tensor, others: Tensor) -> float:
    """Share of positions at which both predict the same token.

    Shapes:
        logits, others: (..., V), of the same shape.
    """
    return float((logits.argmax(dim=-1) == others.argmax(dim=-1)).double().mean())
