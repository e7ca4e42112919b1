"""Verify a backend against the reference, with the same experts, before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.attachment import Statistics, attach
from griffin.config import GriffinConfig
from griffin.engine.decoders import Decoders, new_cache
from griffin.engine.forward import Forward
from griffin.errors import GriffinError
from griffin.layouts import find_ff_blocks

STEPS = 4
_PROMPT_TOKENS = 64  # with only 16, the output at density 0.25 is so flat that rounding alone can change it

# Difference of the logits as a share of their spread, over all steps. For comparison: without one expert in ten it is
# 0.25 and more (SmolLM2 at 0.5 and 0.25, all formats), so each of these tolerances detects that.
TOLERANCES = {
    torch.float64: 1e-9,  # only the order of summation differs
    torch.float32: 1e-3,  # the same: errors of 2^-24 over sums of some thousand terms, layer after layer
    torch.float16: 2e-2,  # the reference rounds z and every output to 11 bits, a fused kernel sums in float32
    torch.bfloat16: 6e-2,  # the same with 8 bits, in every layer: measured 0.02 over 30 layers
}
# Integer kernels also round their inputs to 8 bits: measured 0.033 over 30 layers. Dynamic selection with a quantised
# copy of the gates does the same, and a rounded gate can also change which neurons are chosen: measured 0.006 to 0.009
# at density 0.75 and 0.018 to 0.071 at 0.5 (SmolLM2, float32), with kernels that match rounded inputs to 3e-7.
QUANTISED_TOLERANCE = 8e-2


def verify(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor) -> float:
    """Compare the logits of a few generation steps with the reference backend's, for the same experts and tokens.

    Args:
        model: the model, or one of the same width with fewer layers.
        config: density, selection, batch and the backend to be timed.
        prompts: prompts; only their first tokens are run.

    Returns:
        The difference of the logits; see `difference`.

    Shapes:
        prompts: (B, S).

    Raises:
        GriffinError: the logits differ by more than the dtype's tolerance, or are not finite.
    """
    prompts = prompts[:, :_PROMPT_TOKENS]
    expected = _run(model, replace(config, backend="reference"), prompts)
    actual = _run(model, config, prompts, expected)
    ours, right = torch.stack(actual.logits), torch.stack(expected.logits)
    if not bool(torch.isfinite(ours).all() & torch.isfinite(right).all()):
        raise GriffinError(f"backend {actual.backend}: the logits hold inf or nan; nothing was timed")
    worst = difference(ours, right)
    tolerance = TOLERANCES[model.dtype]
    if actual.sketched or any(block.quantised for block in find_ff_blocks(model)):
        tolerance = max(tolerance, QUANTISED_TOLERANCE)
    if worst > tolerance:
        raise GriffinError(
            f"backend {actual.backend} is wrong at density {config.density:g}: its logits differ from the reference's "
            f"by {worst:.1%} of their spread, allowed are {tolerance:.1%} for these weights; nothing was timed"
        )
    return worst


def difference(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the differences, as a share of the expected logits' spread around their mean.

    A constant added to all logits of a token changes no probability, so the mean is subtracted from both sides.

    Shapes:
        actual, expected: (..., V).
    """
    ours, right = (logits - logits.mean(dim=-1, keepdim=True) for logits in (actual, expected))
    return float((ours - right).norm() / right.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class _Run:
    backend: str
    logits: list[Tensor]
    tokens: list[Tensor]
    statistics: Statistics
    sketched: bool  # quantised kernels computed the gates from a quantised copy


@torch.no_grad()
def _run(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor, like: _Run | None = None) -> _Run:
    """Run a prompt and a few greedy steps; with `like`, use the tokens and the statistics of that run.

    Both runs select from the same statistics, as a backend that stores weights in another order rounds differently in
    the prompt phase and may select other experts.
    """
    with attach(model, config) as handle:
        cache = new_cache(model)
        with handle.gather() as statistics:
            logits = [Forward(model, cache, None)(prompts)]
        selections = handle.plan.select(statistics if like is None else like.statistics)
        handle.use(selections)
        decoder = Decoders(model, handle).decoder([cache], selections)
        tokens = []
        for step in range(STEPS):
            tokens.append(logits[-1].argmax(dim=-1) if like is None else like.tokens[step])
            logits.append(decoder(tokens[-1]))
        sketched = any(split.gate is not None for split in handle.splits.values())
        return _Run(handle.backend.name, logits, tokens, statistics, sketched)
