"""One sequence's experts by a config of its own, for batches whose sequences were selected one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from griffin.attachment import choice, profile
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method.dynamic import Tier, make_sketches, split
from griffin.method.statistics import Conversation
from griffin.weights.projection import rows


@dataclass(frozen=True, eq=False)
class Selected:
    """What one sequence is computed with in the generation phase.

    Args:
        config: the config it was selected by, with `auto` and `loss` resolved.
        experts: by layer, ascending.
        tiers: by layer, for a config with a token tier.
        ff_bytes: bytes of FF weights that a token reads.

    Shapes:
        experts: each (k,), int64.
    """

    config: GriffinConfig
    experts: Mapping[int, Tensor]
    tiers: Mapping[int, Tier]
    ff_bytes: int


@torch.no_grad()
def select_one(
    model: nn.Module, blocks: Sequence[FFBlock], backend: str, conversation: Conversation, config: GriffinConfig
) -> Selected:
    """Select the experts of every layer; layers that the config leaves out stay whole.

    Args:
        model: the model, whose profile may count.
        blocks: its FF blocks, all of them.
        backend: name of the backend that will compute them.
        conversation: what the prompt phase has gathered of the sequence.
        config: how to select.

    Raises:
        ValueError: the config cannot be used for one sequence of a batch, or the prompt phase has not gathered what it
            needs.
    """
    config, known = profile.resolved(model, blocks, config)
    if config.selection == "wanda":
        raise ValueError("selection wanda masks the model's weights, so sequences of one batch cannot differ in it")
    pruned = choice.chosen_blocks(blocks, config)
    if config.density == 1.0:
        pruned = ()
    splits = {b.layer: split(b, config.density) for b in pruned if config.tier}
    if splits and backend == "gather":
        raise ValueError("the gather backend has no token tier; use a selection without tier+")
    make_sketches(pruned, splits)
    counts = {b.layer: splits[b.layer].experts if splits else config.experts_of(b.width) for b in pruned}
    if known is not None:
        conversation = known.added_to(conversation)
    found = choice.experts(pruned, conversation, config, counts)
    experts = {b.layer: torch.arange(b.width, device=rows(b.output)[0].device) for b in blocks}
    experts |= {layer: own[0] for layer, own in found.items()}
    whole = sum(b.nbytes for b in blocks) - sum(b.nbytes for b in pruned)
    read = [splits[b.layer].nbytes if splits else b.nbytes * counts[b.layer] // b.width for b in pruned]
    tiers = choice.tiers(pruned, conversation, config, splits)
    return Selected(config, MappingProxyType(experts), MappingProxyType(tiers), whole + sum(read))
