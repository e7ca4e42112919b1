"""Is what will be timed also right? A backend beside the reference, on the same experts."""

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

# Difference of the logits as a share of their spread, over all steps. For comparison: one expert in ten missing gives
# 0.25 and more (SmolLM2 at 0.5 and 0.25, all formats), so each of these finds it.
TOLERANCES = {
    torch.float64: 1e-9,  # another order of summation, alone
    torch.float32: 1e-3,  # the same: errors of 2^-24 over sums of some thousand terms, layer after layer
    torch.float16: 2e-2,  # the reference rounds z and every output to 11 bits, a fused kernel sums in float32
    torch.bfloat16: 6e-2,  # the same with 8 bits, in every layer: 0.02 was found over 30
}
# Integer kernels round their inputs to 8 bits as well: 0.033 was found over 30 layers. So do dynamic selection's gates
# if they are of a quantised copy, where a rounded gate also moves neurons across the edge of the choice: 0.006 to 0.009
# was found at density 0.75 and 0.018 to 0.071 at 0.5 (SmolLM2, float32), with kernels that equal rounded inputs to
# 3e-7.
QUANTISED_TOLERANCE = 8e-2


def verify(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor) -> float:
    """Compare the logits of a few generation steps with the reference backend's, for the same experts and tokens.

    Args:
        model: the model, or one of the same width with fewer layers.
        config: density, selection, batch and the backend that is to be timed.
        prompts: their first tokens are run as the prompts.

    Returns:
        The difference found: see `difference`.

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

    A constant added to all logits of a token changes no probability, so it counts on neither side.

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
    sketched: bool  # gates came from a quantised copy, by the kernels of quantised weights


@torch.no_grad()
def _run(model: PreTrainedModel, config: GriffinConfig, prompts: Tensor, like: _Run | None = None) -> _Run:
    """A prompt and a few greedy steps; with `like`, that run's tokens, and experts from its statistics.

    A backend may store weights in another order, so that its prompt phase rounds differently and selects other experts
    at the edge: so both runs select from the same statistics.
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
