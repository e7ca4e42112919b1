"""Look at flocking itself: the relative FF activations of every token of a text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.layouts import find_ff_blocks
from griffin.statistic import EPS


@torch.no_grad()
def relative_activations(model: PreTrainedModel, input_ids: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """Relative activation magnitudes |Zbar| of a text, by layer: what the paper's flocking figures show.

    Every row is one token's FF activations, scaled to unit L2 norm, in absolute value.

    Shapes:
        input_ids: (1, S). Returns for each layer (S, D_ff), float32, on the CPU.

    Raises:
        ValueError: a layer that the model does not have, or a model whose FF blocks are not found.
    """
    blocks = find_ff_blocks(model)
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise ValueError(f"there is no layer {layer}; this model has layers 0 to {len(blocks) - 1}")

            def keep(module: torch.nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                z = args[0].detach().reshape(-1, args[0].shape[-1]).float()
                found[layer] = (z / z.norm(dim=1, keepdim=True).clamp_min(EPS)).abs().cpu()

            stack.callback(blocks[layer].output.register_forward_pre_hook(keep).remove)
        model(input_ids, use_cache=False)
    return found
