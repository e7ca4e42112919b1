"""What neurons are ranked by: one function a kind of score, as `griffin.methods.Method.scores` wants them.

Each takes FF blocks of one width, what the prompt tokens added up to, and the config's `batch`, and returns the scores
of every layer and set of experts, (layers, sets, D_ff), float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.layouts import FFBlock
from griffin.method import statistic
from griffin.method.statistics import Statistics


def flocking(blocks: Sequence[FFBlock], statistics: Statistics, batch: str) -> Tensor:
    """The flocking statistic (GRIFFIN, section 4): of each sequence, or the paper's weighted sum for a shared batch.

    Shapes:
        Returns (layers, B, D_ff) with `batch` "per_sequence", else (layers, 1, D_ff).

    Raises:
        ValueError: no prompt token came.
    """
    if any(block.layer not in statistics.energies for block in blocks):
        raise ValueError("no prompt token came: call the model inside handle.prompt_phase()")
    energies = torch.stack([statistics.energies[block.layer] for block in blocks])
    if batch == "per_sequence":
        return statistic.flocking(energies)
    tokens = torch.stack([statistics.tokens[block.layer] for block in blocks])
    return statistic.shared(energies, tokens)[:, None]


def magnitude(blocks: Sequence[FFBlock], statistics: Statistics, batch: str) -> Tensor:
    """The paper's magnitude baseline: `||W_g[j]||_2 * ||W_1[j]||_2`, ungated `||W_1[j]||_2`, whatever the prompt.

    Shapes:
        Returns (layers, 1, D_ff).
    """
    return torch.stack([magnitude_of(block.input_norms()) for block in blocks])[:, None]


def magnitude_of(norms: Sequence[Tensor]) -> Tensor:
    """The product of the L2 norms of a neuron's rows in the input projections.

    Shapes:
        norms: each (D_ff,). Returns (D_ff,), float32.
    """
    scores = torch.ones(norms[0].shape[0], device=norms[0].device)
    for norm in norms:
        scores = scores * norm.float()
    return scores
