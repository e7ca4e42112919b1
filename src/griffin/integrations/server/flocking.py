"""The data of the page's flocking picture of one prompt."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from griffin.config import GriffinConfig
from griffin.integrations.server.engine import Engine

TOKENS, NEURONS = 256, 192  # the largest numbers shown


def picture(engine: Engine, ids: Sequence[int], layer: int, config: GriffinConfig, values: Tensor) -> dict[str, Any]:
    """Relative activations |Zbar| of the neurons with the largest flocking statistic, and of a sample of the others.

    Args:
        engine: whose model it is.
        ids: the tokens, `TOKENS` at most.
        layer: the layer.
        config: how many neurons are experts.
        values: the relative activations, (S, D_ff).
    """
    values = values.t()
    statistic = values.norm(dim=1)
    order = statistic.argsort(descending=True)
    width = len(order)
    top = order[: NEURONS // 2]
    others = order[len(top) :]
    evenly_spaced = torch.linspace(0, len(others) - 1, min(NEURONS - len(top), len(others))).round().long()
    rows = torch.cat([top, others[evenly_spaced]]).sort().values
    experts = set(order[: config.experts_of(width)].tolist())
    shown = values[rows]
    scale = (
        float(shown.flatten().kthvalue(math.ceil(0.99 * shown.numel())).values) or 1.0
    )  # the 99th percentile, as a few values are much larger
    image = (
        (shown / scale).clamp_max(1).sqrt().mul(255).round().to(torch.uint8)
    )  # the square root makes small values visible
    return {
        "layer": layer,
        "layers": len(engine.handle.blocks),
        "d_ff": width,
        "tokens": [engine.tokenizer.decode([token]) for token in ids],
        "neurons": rows.tolist(),
        "width": len(ids),
        "height": len(rows),
        "values": base64.b64encode(image.numpy().tobytes()).decode(),
        "scale": scale,
        "experts": {"density": config.density, "shown": [neuron in experts for neuron in rows.tolist()]},
    }
