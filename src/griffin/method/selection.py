"""From scores to experts: which k neurons of an FF block are kept. Pure functions on tensors.

`griffin.methods.METHODS` names one of these functions for each method. Each has the signature
`(scores (N, D_ff), k, seeds) -> (N, k) int64, ascending`. The N rows are independent selections: the layers of a model,
the sequences of a batch. All layers go into one call, because the cost of a selection is mostly the number of calls.
All randomness is drawn on the CPU from the row's own seed, so that a seed means the same experts on every device and in
every batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from griffin.methods import METHODS


def topk(scores: Tensor, k: int, seeds: Sequence[int] = ()) -> Tensor:
    """The k neurons of largest score; of equals, those with the lower index. The paper's selection.

    Shapes:
        scores: (N, D_ff). Returns (N, k), int64, ascending.
    """
    least = scores.topk(k, sorted=False).values.amin(dim=1, keepdim=True)
    if scores.device.type != "cpu":
        return _kept_columns(_first(scores, least, k), k)
    experts = _true(scores >= least)
    if len(experts) > scores.shape[0] * k:  # equals at the edge: of them the first only
        experts = _true(_first(scores, least, k))
    firsts = torch.arange(0, scores.numel(), scores.shape[1], device=scores.device)
    return experts.view(-1, k) - firsts[:, None]


def sample(scores: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
    """k neurons drawn without replacement, with probability proportional to their score (the paper's sampling variant).

    Drawn by the Gumbel top-k trick (Kool et al., arXiv 1903.06059): the k largest of `log s + Gumbel noise` are
    distributed exactly so. Neurons with score zero come last.

    Shapes:
        scores: (N, D_ff), not negative. Returns (N, k), int64, ascending.
    """
    return topk(_perturbed(scores, seeds), k)


def topk_sample(scores: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
    """Half of the k by top-k, the rest sampled from the other neurons (the paper's mixed variant).

    An odd k gives the larger half to sampling.

    Shapes:
        scores: (N, D_ff), not negative. Returns (N, k), int64, ascending.
    """
    keys = _perturbed(scores, seeds)
    if k > 1:
        keys.scatter_(1, topk(scores, k // 2), torch.inf)
    return topk(keys, k)


def random(scores: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
    """k neurons drawn uniformly, whatever their score: the control that shows what the statistic is worth.

    Shapes:
        scores: (N, D_ff). Returns (N, k), int64, ascending.
    """
    width = scores.shape[1]
    orders = [torch.randperm(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    drawn: Tensor = torch.stack(orders)[:, :k].sort(dim=1).values
    return drawn.to(scores.device)


class Finite:
    """Whether scores were all finite, as the device will know once it has got there.

    Reading that at once would make the host wait for the whole prompt. `check` reads it when the host waits anyway.
    """

    def __init__(self) -> None:
        self._flags: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Scores that must be finite: on a CPU checked now, elsewhere by `check`."""
        if scores.device.type == "cpu":
            if not all(math.isfinite(extreme) for extreme in torch.aminmax(scores)):  # nan becomes either
                raise ValueError(_NOT_FINITE)
            return
        self._flags.append(scores.isfinite().all())

    def check(self) -> None:
        """Raise `ValueError` if scores were not finite."""
        flags, self._flags = self._flags, []
        if flags and not bool(torch.stack(flags).all()):
            self._flags = flags
            raise ValueError(_NOT_FINITE)


_NOT_FINITE = (
    "the scores hold inf or nan, which come from the model's FF activations; float16 overflows in some models: load it "
    "in bfloat16 or float32"
)


def select(scores: Tensor, k: int, selection: str, seeds: Sequence[int], finite: Finite | None = None) -> Tensor:
    """Experts for each of N sets of scores. On an accelerator nothing waits for the device.

    Args:
        scores: what the neurons are ranked by; rows are independent of each other.
        k: number of experts.
        selection: a name of `griffin.METHODS`.
        seeds: one for each row; selections without chance do not look at them.
        finite: is told the scores, and checked by the caller; `None`: checked here.

    Shapes:
        scores: (N, D_ff), float. Returns (N, k), int64, each row ascending.

    Raises:
        ValueError: the selection is unknown, k is outside 1..D_ff, the seeds are not one a row, or the scores are not
            all finite.
    """
    if selection not in METHODS:
        raise ValueError(f"selection is {selection!r}; expected one of {', '.join(METHODS)}")
    if scores.dim() != 2 or not 1 <= k <= scores.shape[1]:
        shape = tuple(scores.shape)
        raise ValueError(f"cannot select k = {k} experts from scores of shape {shape}; expected (N, D_ff)")
    if len(seeds) != scores.shape[0]:
        raise ValueError(f"there are {len(seeds)} seeds for {scores.shape[0]} rows of scores; expected one a row")
    checked = Finite() if finite is None else finite
    checked.add(scores)
    if finite is None:
        checked.check()
    experts: Tensor = METHODS[selection].select_function(scores, k, seeds)
    return experts


def _perturbed(scores: Tensor, seeds: Sequence[int]) -> Tensor:
    """`log s + Gumbel noise`, float64, (N, D_ff)."""
    drawn = [
        torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    gumbel = -torch.log(-torch.log(torch.stack(drawn).clamp(1e-300, 1 - 1e-16)))
    return scores.double().log() + gumbel.to(scores.device)


def _true(mask: Tensor) -> Tensor:
    """Where a mask is true, counted through all its rows, int64, ascending."""
    if mask.device.type == "cpu":  # a third of the time: torch branches at every element
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def _first(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """Which scores are among the k first of a row: those above the least of them, and of its equals the first."""
    edge = scores == least
    room = k - (scores > least).sum(dim=1, keepdim=True)
    return (scores > least) | (edge & (edge.cumsum(dim=1) <= room))


def _kept_columns(mask: Tensor, k: int) -> Tensor:
    """Where the rows of a mask are true, k times each: shapes are known, so that nothing waits for the device.

    Shapes: mask (N, D_ff). Returns (N, k), int64, ascending.
    """
    places = torch.where(mask, mask.cumsum(dim=1) - 1, k)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(places)
    # zeros: fewer than k are true where scores are nan, and the rest must be neurons, too
    return columns.new_zeros(mask.shape[0], k + 1).scatter_(1, places, columns)[:, :k]
