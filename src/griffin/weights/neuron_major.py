"""Neuron-major storage: every neuron's column of the output projection becomes a contiguous row, in the same memory.

The weight keeps its shape, values, address and place in the state_dict; only its strides change, so the model's own
forward still runs on it.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from griffin.weights.projection import rows


def is_neuron_major(weight: Tensor) -> bool:
    """Whether every neuron's down column is contiguous.

    Shapes: weight (D, D_ff).
    """
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0]


def make_neuron_major(projection: nn.Module, path: str, undo: ExitStack) -> None:
    """Store an FF block's output projection neuron-major until `undo` closes. Takes a temporary copy of the weight.

    Raises:
        ValueError: the weight is neither row- nor column-contiguous, so it cannot be transposed in its own memory.
    """
    weight = rows(projection)[0]
    if is_neuron_major(weight):  # GPT-2's Conv1D stores it so, and so does a model that was loaded for this
        return
    if not weight.is_contiguous():
        raise ValueError(f"{path}: the output projection has strides {weight.stride()}, expected a contiguous weight")
    parameter = projection.weight
    assert isinstance(parameter, Tensor)
    _transpose_storage(parameter)
    undo.callback(_transpose_back, parameter)


@torch.no_grad()
def _transpose_storage(parameter: Tensor) -> None:
    height, width = parameter.shape
    turned = parameter.detach().t().contiguous()
    same_memory = parameter.detach().view(width, height)  # contiguous: the same bytes under the other shape
    same_memory.copy_(turned)
    parameter.data = same_memory.t()


@torch.no_grad()
def _transpose_back(parameter: Tensor) -> None:
    if parameter.is_contiguous():  # somebody moved or replaced it meanwhile: it is in the ordinary layout already
        return
    height, width = parameter.shape
    turned = parameter.detach().contiguous()
    same_memory = parameter.detach().t().view(height, width)
    same_memory.copy_(turned)
    parameter.data = same_memory
