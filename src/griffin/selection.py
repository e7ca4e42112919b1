"""From a statistic to experts: which k neurons of an FF block are kept. Pure functions on tensors.

`SELECTIONS` maps a name to a function `(scores (D_ff,), k, generator) -> (k,) int64, ascending`. All randomness is
drawn on the CPU from the generator given, so that a seed means the same experts on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Selection = Callable[[Tensor, int, torch.Generator], Tensor]


def topk(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The k neurons of largest score; of equals, those with the lower index. The paper's selection.

    Shapes:
        scores: (D_ff,). Returns (k,), int64, ascending.
    """
    return _largest(scores, k)


def sample(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k neurons drawn without replacement, with probability proportional to their score (the paper's sampling variant).

    Drawn by the Gumbel top-k trick (Kool et al., arXiv 1903.06059): the k largest of `log s + Gumbel noise` are
    distributed exactly so. Neurons with score zero come last.

    Shapes:
        scores: (D_ff,), not negative. Returns (k,), int64, ascending.
    """
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    return _largest(scores.double().log() + gumbel.to(scores.device), k)


def topk_sample(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Half of the k by top-k, the rest sampled from the other neurons (the paper's mixed variant).

    An odd k gives the larger half to sampling.

    Shapes:
        scores: (D_ff,), not negative. Returns (k,), int64, ascending.
    """
    best = _largest(scores, k // 2)
    rest = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    rest[best] = False
    others = rest.nonzero().squeeze(1)
    drawn = others[sample(scores[others], k - k // 2, generator)]
    return torch.cat([best, drawn]).sort().values


def random(scores: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k neurons drawn uniformly, whatever their score: the control that shows what the statistic is worth.

    Shapes:
        scores: (D_ff,). Returns (k,), int64, ascending.
    """
    order = torch.randperm(scores.shape[0], generator=generator)
    drawn: Tensor = order[:k].sort().values
    return drawn.to(scores.device)


SELECTIONS: dict[str, Selection] = {
    "topk": topk,
    "sample": sample,
    "topk_sample": topk_sample,
    "random": random,
    "magnitude": topk,  # top-k of `magnitude_scores`, which stand in for the statistic
}


def magnitude_scores(norms: list[Tensor]) -> Tensor:
    """Static scores of the paper's magnitude baseline: `||W_g[j]||_2 * ||W_1[j]||_2`, ungated `||W_1[j]||_2`.

    Shapes:
        norms: the L2 norms of the input projections' rows, each (D_ff,). Returns (D_ff,), float32.
    """
    scores = torch.ones(norms[0].shape[0], device=norms[0].device)
    for norm in norms:
        scores = scores * norm.float()
    return scores


def select(scores: Tensor, k: int, selection: str, generator: torch.Generator) -> Tensor:
    """Experts of one FF block for one set of scores.

    Shapes:
        scores: (D_ff,), float. Returns (k,), int64, ascending.

    Raises:
        ValueError: the selection is unknown, k is outside 1..D_ff, or the scores are not all finite.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}; expected one of {', '.join(SELECTIONS)}")
    if scores.dim() != 1 or not 1 <= k <= scores.shape[0]:
        raise ValueError(f"cannot select k = {k} experts from scores of shape {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            "the scores hold inf or nan, which come from the model's FF activations; float16 overflows in some models: "
            "load it in bfloat16 or float32"
        )
    return SELECTIONS[selection](scores, k, generator)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, ascending; of equal ones at the edge, those with the lower index."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    least = scores.topk(k, sorted=False).values.min()
    above = (scores > least).nonzero().squeeze(1)
    at_the_edge = (scores == least).nonzero().squeeze(1)[: k - above.shape[0]]
    return torch.cat([above, at_the_edge]).sort().values
