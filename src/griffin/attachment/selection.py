"""What one sequence is computed with in the generation phase, and what a batch of such sequences is computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic, joined
from griffin.method.selection import Finite
from griffin.weights.projection import device_of

if TYPE_CHECKING:
    from griffin.attachment.plan import Plan


@dataclass(frozen=True, eq=False)
class Selection:
    """What one sequence is computed with. Made by `Plan.select`.

    Args:
        plan: the plan that selected it.
        experts: by layer, ascending; layers that are not in it stay whole.
        dynamic: by layer, for a config with dynamic neuron selection.
        finite: whether the scores were; on an accelerator that is known later.

    Shapes:
        experts: each (k,), int64.
    """

    plan: Plan
    experts: Mapping[int, Tensor]
    dynamic: Mapping[int, Dynamic]
    finite: Finite = field(default_factory=Finite)


class LayerExperts(NamedTuple):
    """One layer's experts of a batch: one set for all sequences, or one for each; and the dynamic selection of both.

    Shapes:
        sets: each (k,), int64, ascending.
    """

    sets: tuple[Tensor, ...]
    dynamic: Dynamic | None


def by_layer(
    selections: Sequence[Selection], blocks: Sequence[FFBlock], *, whole_layers: bool = False
) -> dict[int, LayerExperts]:
    """The experts of a batch, for every layer that one of its sequences does not compute whole.

    Args:
        selections: one for each sequence, in order; or a single one, or the same one each time, for all of them.
        blocks: the model's FF blocks.
        whole_layers: the other layers too: all their neurons.

    Raises:
        ValueError: there is no selection, or sequences differ in the split of their dynamic neuron selection.
    """
    if not selections:
        raise ValueError("there are no selections to use; give one for each sequence, or one for all")
    if all(selection is selections[0] for selection in selections):
        selections = selections[:1]
    layers = {layer for selection in selections for layer in selection.experts}
    batch = {}
    for block in blocks:
        if block.layer not in layers and not whole_layers:
            continue
        sets = [selection.experts.get(block.layer) for selection in selections]
        if any(experts is None for experts in sets):
            every = torch.arange(block.width, device=device_of(block.output))
            sets = [every if experts is None else experts for experts in sets]
        dynamic = joined([selection.dynamic.get(block.layer) for selection in selections])
        batch[block.layer] = LayerExperts(tuple(experts for experts in sets if experts is not None), dynamic)
    return batch
