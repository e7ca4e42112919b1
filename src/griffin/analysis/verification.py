"""Is what will be timed also right? A backend beside the reference, on the same experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.attachment import Conversation, attach
from griffin.config import GriffinConfig
from griffin.errors import GriffinError
from griffin.generation.step import generate_step

STEPS = 3
_PROMPT_TOKENS = 16

# Largest difference of any logit, as a share of the largest logit. For comparison: one expert in ten missing gives 0.2
# and more (tinyllama-1.1b, opt-6.7b, SmolLM2), so each of these finds it.
TOLERANCES = {
    torch.float64: 1e-9,  # another order of summation, alone
    torch.float32: 1e-3,  # the same: errors of 2^-24 over sums of some thousand terms, layer after layer
    torch.float16: 3e-2,  # the reference rounds z and every output to 11 bits, a fused kernel sums in float32
    torch.bfloat16: 1.2e-1,  # the same with 8 bits, in every layer: 0.01 was found over 2 layers, 0.056 over 30
}


def verify(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor) -> float:
    """Compare the logits of a few generation steps with the reference backend's, for the same experts and tokens.

    Args:
        model: the model, or one of the same width with fewer layers.
        config: density, selection, batch and the backend that is to be timed.
        prompts: their first tokens are run as the prompts.

    Returns:
        The largest difference found, as a share of the largest logit.

    Shapes:
        prompts: (B, S).

    Raises:
        GriffinError: the logits differ by more than the dtype's tolerance, or are not finite.
    """
    prompts = prompts[:, :_PROMPT_TOKENS]
    expected = _run(model, replace(config, backend="reference"), prompts)
    found = _run(model, config, prompts, expected)
    worst = 0.0
    for ours, right in zip(found.logits, expected.logits, strict=True):
        if not bool(torch.isfinite(ours).all() & torch.isfinite(right).all()):
            raise GriffinError(f"backend {found.backend}: the logits hold inf or nan; nothing was timed")
        worst = max(worst, difference(ours, right))
    tolerance = TOLERANCES[model.dtype]
    if worst > tolerance:
        raise GriffinError(
            f"backend {found.backend} is wrong at density {config.density:g}: its logits differ from the reference's "
            f"by {worst:.1%} of the largest, allowed are {tolerance:.1%} in {str(model.dtype).removeprefix('torch.')}; "
            "nothing was timed"
        )
    return worst


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@dataclass(frozen=True)
class _Run:
    backend: str
    logits: list[Tensor]
    tokens: list[Tensor]
    conversation: Conversation


def _run(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor, like: _Run | None = None) -> _Run:
    """A prompt and a few steps; with `like` for that run's tokens and for experts from its statistic."""
    logits, tokens = [], []
    with attach(model, config) as handle:
        for number, step in enumerate(islice(generate_step(model, prompts, handle=handle), STEPS + 1)):
            conversation = handle.conversation.copy()
            if like is not None and number == 0:
                # A backend may store weights in another order, so that its prompt phase rounds in another way, and the
                # last of the experts may be others: they are selected again, from the same statistic.
                with handle.prompt_phase(conversation=like.conversation):
                    pass
            if like is not None:
                step.tokens.copy_(like.tokens[number])  # what the next step runs
            logits.append(step.logits)
            tokens.append(step.tokens.clone())
        return _Run(handle.backend.name, logits, tokens, conversation)
