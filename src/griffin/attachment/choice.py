"""From what a prompt phase has gathered to the experts of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method import selection, statistic
from griffin.method.dynamic import Split, Tier, output_norms
from griffin.method.statistics import Conversation

Experts = dict[int, tuple[Tensor, ...]]


def chosen_blocks(blocks: Sequence[FFBlock], config: GriffinConfig) -> tuple[FFBlock, ...]:
    """The blocks that the config prunes.

    Raises:
        ValueError: it names a layer that the model does not have.
    """
    if config.layers is None:
        return tuple(blocks)
    if config.layers[-1] >= len(blocks):
        raise ValueError(f"layers names layer {config.layers[-1]}; this model has layers 0 to {len(blocks) - 1}")
    return tuple(blocks[layer] for layer in config.layers)


def scores(conversation: Conversation, layers: Sequence[int], batch: str) -> Tensor:
    """The statistic of some layers of one width, of n sets of experts a layer.

    Shapes:
        Returns (layers, n, D_ff), float32.
    """
    energies = torch.stack([conversation.energies[layer] for layer in layers])
    if batch == "per_sequence":
        return statistic.flocking(energies)
    return statistic.shared(energies, torch.stack([conversation.tokens[layer] for layer in layers]))[:, None]


def experts(
    blocks: Sequence[FFBlock], conversation: Conversation, config: GriffinConfig, counts: Mapping[int, int]
) -> Experts:
    """Experts of every layer: one set, or one for each sequence.

    Args:
        blocks: the layers.
        conversation: what the prompt gave; the selection `magnitude` does not look at it.
        config: how they are selected.
        counts: how many, by layer.

    Shapes:
        Each (k,), int64, ascending.

    Raises:
        ValueError: no prompt token came, or the scores are not finite.
    """
    static = config.selection == "magnitude"
    if static:
        source = {block.layer: selection.magnitude_scores(block.input_norms())[None] for block in blocks}
    else:
        source = conversation.energies
        if any(block.layer not in source for block in blocks):
            raise ValueError("no prompt token came: call the model inside handle.prompt_phase()")
    found: Experts = {}
    for layers in _alike({block.layer: source[block.layer] for block in blocks}, counts):
        own = torch.stack([source[layer] for layer in layers]) if static else scores(conversation, layers, config.batch)
        # Each sequence draws from the same seed, so that its experts do not depend on the batch that it is in.
        seeds = [(config.seed * 1_000_003 + layer) % 2**63 for layer in layers for _ in range(own.shape[1])]
        k = counts[layers[0]]
        chosen = iter(selection.select(own.flatten(0, 1), k, config.ranking, seeds).unbind())
        for layer in layers:
            found[layer] = tuple(islice(chosen, own.shape[1]))
    return found


def tiers(
    blocks: Sequence[FFBlock], conversation: Conversation, config: GriffinConfig, splits: Mapping[int, Split]
) -> dict[int, Tier]:
    """The token tier of every layer that has a split: weights `rms(u_j) * ||W_2[:, j]||`, of the prompt's `u_j`.

    Without a gate they are `||W_2[:, j]||`. With shared experts every sequence of the batch counts the same, however
    long its prompt is.
    """
    found = {}
    for block in blocks:
        if block.layer not in splits:
            continue
        norms = output_norms(block)
        if not block.gated:
            found[block.layer] = Tier(splits[block.layer], norms[None])
            continue
        tokens = conversation.tokens[block.layer].clamp_min(1)[:, None].to(conversation.ups[block.layer].device)
        squares = conversation.ups[block.layer] / tokens
        if config.batch == "shared":
            squares = squares.mean(dim=0, keepdim=True)
        found[block.layer] = Tier(splits[block.layer], squares.sqrt() * norms.to(squares.device))
    return found


def rows_of(tier: Tier | None, rows: Sequence[int]) -> Tier | None:
    """The tier of some of the sequences, in that order."""
    if tier is None or len(tier.weights) == 1:
        return tier
    return Tier(tier.split, tier.weights[list(rows)])


def joined(tiers: Sequence[Tier | None]) -> Tier | None:
    """One tier for sequences that have one each, or `None` where none has.

    Raises:
        ValueError: their splits differ.
    """
    found = [own for own in tiers if own is not None]
    if not found:
        return None
    if len(found) < len(tiers) or any(own.split != found[0].split for own in found):
        raise ValueError("sequences of one batch need token tiers of one split, or none has a tier")
    return Tier(found[0].split, torch.cat([own.weights for own in found]))


def _alike(source: Mapping[int, Tensor], counts: Mapping[int, int]) -> Iterable[list[int]]:
    """Layers in groups of one width, one number of experts and one device: what one call can select for."""
    groups: dict[tuple[int, int, torch.device], list[int]] = {}
    for layer, own in source.items():
        groups.setdefault((own.shape[-1], counts[layer], own.device), []).append(layer)
    return groups.values()
