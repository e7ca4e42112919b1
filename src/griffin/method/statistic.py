"""The flocking statistic: how much the tokens of a prompt agree on each FF neuron. Pure functions on tensors.

Source: GRIFFIN (arXiv 2404.01365), section 4. `Z` holds the FF activations of the prompt's tokens. Every row of `Z` is
scaled to unit L2 norm, giving `Zbar`; the statistic of neuron j is the L2 norm of column j: `s_j = ||Zbar[:, j]||_2`.

The energy `A_j = s_j**2 = sum over tokens of Zbar[t, j]**2` is what is kept, because it adds up: over the chunks of a
prompt, over the turns of a conversation, over sequences. Everything here is float32, whatever the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row whose norm is below this counts as zero: it adds nothing instead of dividing by it.
EPS = 1e-12

# Values handled at a time: the float32 copies of so many (4 MB) stay in a CPU's last cache. A quarter of it, for a
# core's own cache, took twice the time, as every operation is a parallel region.
_VALUES_AT_A_TIME = 2**20


def energy(z: Tensor, mask: Tensor | None = None, squared_norms: Tensor | None = None) -> Tensor:
    """Energy `A` that the tokens of `z` add: `A[b, j] = sum_t mask[b, t] * z[b, t, j]**2 / ||z[b, t]||**2`.

    Padding never counts, and a row of zeros adds nothing. Where `z` holds only some of the neurons (a rank of tensor
    parallel), `squared_norms` are those of the whole rows.

    Shapes:
        z: (B, S, D_ff), any float dtype. mask: (B, S), true or 1 where a token is real; `None` means all are.
        squared_norms: (B, S), float32; `None` means those of `z`.
        Returns (B, D_ff), float32.

    Raises:
        ValueError: `z` is not three-dimensional, or `mask` does not have its first two dimensions.
    """
    if z.dim() != 3:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected (B, S, D_ff)")
    if mask is not None and mask.shape != z.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(z.shape[:2])}, as z has")
    total = z.new_zeros((z.shape[0], 1, z.shape[2]), dtype=torch.float32)
    tokens = max(1, _VALUES_AT_A_TIME // (z.shape[0] * z.shape[2]))
    for start in range(0, z.shape[1], tokens):
        squares = z[:, start : start + tokens].to(torch.float32, copy=True).square_()
        if squared_norms is None:
            norms = squares.sum(dim=-1, keepdim=True)
        else:
            norms = squared_norms[:, start : start + tokens, None]
        weights = torch.where(norms > EPS**2, norms.reciprocal(), 0.0)
        if mask is not None:
            keep = mask[:, start : start + tokens].to(device=z.device, dtype=torch.bool)
            weights = torch.where(keep[..., None], weights, 0.0)
            squares = torch.where(keep[..., None], squares, 0.0)  # a padded row may hold inf or nan
        total += torch.bmm(weights.transpose(1, 2), squares)
    return total.squeeze(1)


def input_energy(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared L2 norm of every input of a projection over the tokens, `sum_t mask[b, t] * x[b, t, j]**2` (Wanda's X).

    It adds up as `energy` does, but its rows are not scaled.

    Shapes:
        x: (B, S, D), any float dtype. mask: (B, S), true or 1 where a token is real; `None` means all are.
        Returns (B, D), float32.
    """
    total = x.new_zeros((x.shape[0], x.shape[2]), dtype=torch.float32)
    tokens = max(1, _VALUES_AT_A_TIME // (x.shape[0] * x.shape[2]))
    for start in range(0, x.shape[1], tokens):
        squares = x[:, start : start + tokens].to(torch.float32, copy=True).square_()
        if mask is not None:
            keep = mask[:, start : start + tokens].to(device=x.device, dtype=torch.bool)
            squares = torch.where(keep[..., None], squares, 0.0)  # a padded row may hold inf or nan
        total += squares.sum(dim=1)
    return total


def flocking(energies: Tensor) -> Tensor:
    """The flocking statistic `s = sqrt(A)`.

    Shapes:
        energies: (..., D_ff), float32. Returns the same shape.
    """
    return energies.sqrt()


def shared(energies: Tensor, tokens: Tensor) -> Tensor:
    """One statistic for a batch that shares its experts: `s = sum_i s_i / sqrt(S_i)` over the sequences i.

    The paper's weighted sum: every sequence counts the same, however long its prompt is. A batch of one sequence keeps
    that sequence's own statistic, which differs from the sum by a factor and so selects the same experts.

    Shapes:
        energies: (..., B, D_ff), float32. tokens: (..., B), the number of real tokens S_i behind every row.
        Returns (..., D_ff), float32.
    """
    if energies.shape[-2] == 1:
        return flocking(energies.squeeze(-2))
    lengths = tokens.to(device=energies.device, dtype=torch.float32).clamp_min(1.0)
    return (flocking(energies) / lengths.sqrt()[..., None]).sum(dim=-2)
