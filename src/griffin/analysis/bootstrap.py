"""Confidence intervals of means over examples, by resampling the examples.

Source: Efron, Bootstrap Methods: Another Look at the Jackknife (1979); the percentile interval. Examples are drawn with
replacement as often as there are examples; the interval holds the middle `level` of the resampled means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Values = Sequence[float] | Tensor

_DRAWS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval.

    Args:
        value: the mean over the examples themselves.
        low, high: ends of the interval; nan for a single example, which has no spread.
    """

    value: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Convert an interval of logarithms to one of their exponentials; an overflow becomes infinite."""
        logarithms = torch.tensor([self.value, self.low, self.high], dtype=torch.float64)
        return Interval(*logarithms.exp().tolist())


def mean_interval(
    values: Values,
    *,
    weights: Values | None = None,
    groups: Sequence[int] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of the examples' values, with its interval.

    Args:
        values: one number an example.
        weights: weight of each example, such as its number of tokens: `sum(w v) / sum(w)`. `None`: equal weights.
        groups: group number of each example, such as the paper a question is about. Whole groups are then drawn, as
            the examples of a group are not independent. `None`: every example is independent.
        resamples: number of resamples.
        level: share of the resampled means inside the interval.
        seed: the same seed draws the same resamples.

    Shapes:
        values, weights, groups: (N,).

    Raises:
        ValueError: no example, a value that is not finite, weights or groups that do not fit, or `level` outside 0..1.
    """
    rows, weight = _checked(values, weights, resamples, level)
    return _interval(*_grouped(rows, weight, groups), resamples, level, seed)


def geometric_interval(values: Values, **settings: Any) -> Interval:
    """Geometric mean of the examples' values, with its interval. For perplexities it is the perplexity of all tokens.

    Args:
        values: one number an example, above 0.
        settings: keyword arguments of `mean_interval`.

    Shapes:
        values: (N,).

    Raises:
        ValueError: as `mean_interval`, also for values that are not above 0.
    """
    return mean_interval(torch.as_tensor(values, dtype=torch.float64).log(), **settings).exp()


def paired_interval(
    values: Values,
    others: Values,
    *,
    weights: Values | None = None,
    groups: Sequence[int] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Difference of two means over the same examples, `mean(values) - mean(others)`, with its interval.

    Both values of an example are drawn together, so an example's difficulty cancels and the interval is as narrow as
    the data allow. If the interval does not contain 0, the difference is significant.

    Args:
        values, others: one number an example, in the same order.
        weights, groups, resamples, level, seed: as in `mean_interval`.

    Shapes:
        values, others, weights, groups: (N,).

    Raises:
        ValueError: as `mean_interval`, or the two are not of the same length.
    """
    rows, weight = _checked(values, weights, resamples, level)
    against, _ = _checked(others, weights, resamples, level)
    if rows.shape != against.shape:
        raise ValueError(f"cannot pair {rows.shape[0]} values with {against.shape[0]}; give both for the same examples")
    return _interval(*_grouped(rows - against, weight, groups), resamples, level, seed)


def _grouped(rows: Tensor, weight: Tensor, groups: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Means and weights of the groups; the overall mean is unchanged."""
    if groups is None:
        return rows, weight
    if len(groups) != rows.shape[0]:
        raise ValueError(f"there are {len(groups)} groups for {rows.shape[0]} values; expected one for each")
    _, at = torch.unique(torch.tensor(groups), return_inverse=True)
    counts = torch.zeros(int(at.max()) + 1, dtype=torch.float64).index_add(0, at, weight)
    sums = torch.zeros_like(counts).index_add(0, at, weight * rows)
    return sums / counts.clamp_min(torch.finfo(torch.float64).tiny), counts


def _interval(rows: Tensor, weight: Tensor, resamples: int, level: float, seed: int) -> Interval:
    value = float((weight * rows).sum() / weight.sum())
    n = rows.shape[0]
    if n == 1:
        return Interval(value, float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, max(1, _DRAWS_AT_A_TIME // n)):
        count = min(resamples - start, max(1, _DRAWS_AT_A_TIME // n))
        drawn = torch.randint(n, (count, n), generator=generator)
        means.append((weight * rows)[drawn].sum(dim=1) / weight[drawn].sum(dim=1))
    ends = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    # A resample of examples with weight zero only has no mean.
    low, high = torch.cat(means).nanquantile(ends).tolist()
    return Interval(value, low, high)


def _checked(values: Values, weights: Values | None, resamples: int, level: float) -> tuple[Tensor, Tensor]:
    rows = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if rows.dim() != 1 or rows.shape[0] == 0:
        raise ValueError(f"values have shape {tuple(rows.shape)}; expected one number for each of at least one example")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("values hold inf or nan, which have no mean; leave those examples out, and say how many")
    if resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"resamples is {resamples} and level {level}; expected at least 1, and a share inside 0..1")
    weight = torch.ones_like(rows) if weights is None else torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    fits = weight.shape == rows.shape and bool(torch.isfinite(weight).all() & (weight >= 0).all()) and weight.sum() > 0
    if not fits:
        raise ValueError("weights do not fit: expected one finite number, not negative, an example, not all zero")
    return rows, weight
