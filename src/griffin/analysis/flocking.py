"""Measure flocking: the tokens of one sequence agree on the FF neurons that matter, different sequences do not.

The inputs are |Zbar|, the relative activations of every token, or the energies `A = s**2` of whole sequences (see
`griffin.method.statistic`). The results are tensors by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import comb

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.attachment import GATHER_ONLY, attach
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.method import selection
from griffin.method.statistic import EPS


@torch.no_grad()
def relative_activations(model: PreTrainedModel, input_ids: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """Relative activation magnitudes |Zbar| of a text, by layer, as in the paper's flocking figures.

    Every row is one token's FF activations, scaled to unit L2 norm, in absolute value.

    Shapes:
        input_ids: (1, S). Returns for each layer (S, D_ff), float32, on the CPU.

    Raises:
        ValueError: a layer that the model does not have, or a model whose FF blocks are not found.
    """
    blocks = find_ff_blocks(model)
    with ExitStack() as stack:
        recorded = {}
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise ValueError(f"there is no layer {layer}; this model has layers 0 to {len(blocks) - 1}")
            recorded[layer] = stack.enter_context(recording(blocks[layer]))
        model(input_ids, use_cache=False)
    return {layer: calls[0] for layer, calls in recorded.items()}


@contextmanager
def recording(block: FFBlock) -> Iterator[list[Tensor]]:
    """Record the relative activations of all tokens that run through an FF block.

    Yields:
        One tensor for each forward call so far, (S, D_ff), float32, on the CPU.
    """
    calls: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        z = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        calls.append((z / z.norm(dim=1, keepdim=True).clamp_min(EPS)).abs().cpu())

    hook = block.output.register_forward_pre_hook(keep)
    try:
        yield calls
    finally:
        hook.remove()


def compared(input_ids: Tensor, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """A text, its tokens permuted, and random tokens. Flocking depends on the tokens of the text, not on their order.

    All three keep the first token, as many models treat it as special.

    Args:
        input_ids: the text.
        vocabulary: number of tokens to draw random ones from.
        seed: seed of the permutation and of the random tokens.

    Shapes:
        input_ids: (1, S). Returns `original`, `permuted` and `random`, each (1, S).
    """
    generator = torch.Generator().manual_seed(seed)
    ids = input_ids.cpu()
    start, rest = ids[:, :1], ids[:, 1:]
    permuted = rest[:, torch.randperm(rest.shape[1], generator=generator)]
    drawn = torch.randint(vocabulary, rest.shape, generator=generator)
    texts = {"original": ids, "permuted": torch.cat([start, permuted], 1), "random": torch.cat([start, drawn], 1)}
    return {name: tokens.to(input_ids.device) for name, tokens in texts.items()}


@torch.no_grad()
def energies(model: PreTrainedModel, sequences: Iterable[Tensor]) -> dict[int, Tensor]:
    """Energies of the flocking statistic of every single sequence, by layer.

    Shapes:
        sequences: each (1, S). Returns for each layer (N, D_ff), float32, on the CPU.

    Raises:
        ValueError: there is no sequence, or GRIFFIN cannot prune the model.
    """
    by_layer: dict[int, list[Tensor]] = {}
    for ids in sequences:
        with attach(model, GATHER_ONLY) as handle, handle.gather() as statistics:
            model(ids.to(model.device), use_cache=False)
        for layer, energy in statistics.energies.items():
            by_layer.setdefault(layer, []).append(energy[0].cpu())
    if not by_layer:
        raise ValueError("there is no sequence to run")
    return {layer: torch.stack(energy) for layer, energy in by_layer.items()}


def energy_share(energies: Mapping[int, Tensor], density: float) -> Tensor:
    """Share of a sequence's energy in its experts, the k neurons of most energy. Without flocking it is the density.

    Shapes:
        energies: by layer, each (N, D_ff). Returns (layers, N).
    """
    shares = []
    for layer_energies in energies.values():
        k = GriffinConfig(density=density).experts_of(layer_energies.shape[1])
        shares.append(layer_energies.topk(k, dim=1).values.sum(dim=1) / layer_energies.sum(dim=1).clamp_min(EPS))
    return torch.stack(shares)


def jaccard(energies: Mapping[int, Tensor], density: float) -> Tensor:
    """Jaccard overlap `|A & B| / |A | B|` of the experts of every two sequences, by layer.

    Two random sets have an overlap of about `density / (2 - density)`.

    Shapes:
        energies: by layer, each (N, D_ff). Returns (layers, N, N), float32.
    """
    overlaps = []
    for layer_energies in energies.values():
        experts = kept(layer_energies, density)
        common = experts @ experts.T
        sizes = experts.sum(dim=1)
        overlaps.append(common / (sizes[:, None] + sizes[None, :] - common))
    return torch.stack(overlaps)


def union_share(energies: Mapping[int, Tensor], density: float, batch: int) -> Tensor:
    """Share of the neurons in the union of `batch` sequences' experts, by layer: the exact mean over all batches.

    A neuron that c of the N sequences select is missing from `C(N - c, B)` of the `C(N, B)` batches of B different
    sequences. For independent sequences the share is `1 - (1 - density)**B`; for identical ones it is the density.

    Args:
        energies: what `energies` returned.
        density: share of the neurons kept.
        batch: B, from 1 to N.

    Shapes:
        energies: by layer, each (N, D_ff). Returns (layers,), float64.
    """
    shares = []
    for layer_energies in energies.values():
        n = layer_energies.shape[0]
        missing = torch.tensor([comb(n - c, batch) / comb(n, batch) for c in range(n + 1)], dtype=torch.float64)
        selected = kept(layer_energies, density).sum(dim=0).long()
        shares.append(1 - missing[selected.cpu()].mean())
    return torch.stack(shares)


def turn_overlap(before: Mapping[int, Tensor], after: Mapping[int, Tensor], density: float) -> Tensor:
    """Jaccard overlap of a conversation's experts after one turn with those after a later one, by layer.

    Args:
        before, after: `handle.gathered.energies` after the two turns; only the first sequence counts.
        density: share of the neurons kept.

    Shapes:
        before, after: by layer, each (B, D_ff). Returns (layers,).
    """
    both = {layer: torch.stack([layer_energies[0], after[layer][0]]) for layer, layer_energies in before.items()}
    return jaccard(both, density)[:, 0, 1].cpu()


def kept(energies: Tensor, density: float) -> Tensor:
    """1.0 where a neuron is an expert, else 0.0.

    Shapes:
        energies: (N, D_ff). Returns the same shape.
    """
    k = GriffinConfig(density=density).experts_of(energies.shape[1])
    return torch.zeros_like(energies).scatter_(1, selection.topk(energies, k), 1.0)
