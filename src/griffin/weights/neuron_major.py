"""Neuron-major storage: every neuron's column of the output projection becomes a contiguous row.

The weight keeps its shape, values and place in the state_dict; only its strides change, so the model's own forward
still runs on it. It is transposed in its own memory where the weight alone holds that memory. Otherwise (a state_dict
that was taken before, another tensor over the same storage, memory that numpy or a file owns) the others keep what they
hold, and the weight gets a neuron-major copy, which takes as much memory again.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import cache

import torch
from torch import Tensor, nn

logger = logging.getLogger("griffin")


def is_neuron_major(weight: Tensor) -> bool:
    """Whether every neuron's down column is contiguous.

    Shapes: weight (D, D_ff).
    """
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0]


def make_neuron_major(projection: nn.Module, path: str, undo: ExitStack) -> None:
    """Store an FF block's output projection neuron-major until `undo` closes. Takes a temporary copy of the weight.

    When `undo` closes, the weight is stored as before, at the same address unless somebody else holds its memory then.

    Args:
        projection: an `nn.Linear`, or a Conv1D, which is neuron-major as it is.
        path: its block's name in the model, for messages.

    Raises:
        ValueError: the weight is neither row- nor column-contiguous.
    """
    parameter = projection.weight
    assert isinstance(parameter, Tensor)
    if not isinstance(projection, nn.Linear) or is_neuron_major(parameter):  # as a model that was loaded for this
        return
    if not parameter.is_contiguous():
        raise ValueError(
            f"{path}: the output projection has strides {parameter.stride()}, expected a contiguous weight"
        )
    if alone(parameter):
        _transpose(parameter)
        undo.callback(_transpose_back, parameter, path)
        return
    if parameter.untyped_storage().resizable():  # else a file holds it
        _say(
            "the memory of FF output projections is held by something else too (a state_dict or an autograd graph, for "
            "instance), so they are copied instead of transposed in place: as much memory again until detach"
        )
    logger.info("%s: %.1f MB copied", path, parameter.nbytes / 1e6)
    _replace(parameter, undo)


@cache
def _say(message: str) -> None:
    """Warn once, not for every layer."""
    logger.warning(message)


@torch.no_grad()
def own_memory(projection: nn.Module) -> None:
    """Copy a weight whose memory is a file's or numpy's into torch's own, which can be transposed in place later."""
    parameter = projection.weight
    assert isinstance(parameter, Tensor)
    if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():
        parameter.data = parameter.detach().clone()


def alone(tensor: Tensor) -> bool:
    """Whether no other tensor, and nothing outside of torch, holds the memory of a tensor, as far as torch knows.

    Other references to the same tensor object do not count: they see its new strides.
    """
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or not storage.resizable() or storage.is_shared():
        return False
    return _holders(storage) == _holders_of_a_new_tensor()


def _holders(storage: torch.UntypedStorage) -> int:
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


@cache
def _holders_of_a_new_tensor() -> int:
    """The tensor itself, and the storage object that is asked: counted, in case torch counts otherwise one day."""
    storage = torch.empty(1).untyped_storage()
    tensor = nn.Parameter(torch.empty(1))
    del storage
    storage = tensor.untyped_storage()
    return _holders(storage)


@torch.no_grad()
def _transpose(parameter: Tensor) -> None:
    height, width = parameter.shape
    turned = parameter.detach().t().contiguous()
    same_memory = parameter.detach().view(width, height)  # contiguous: the same bytes under the other shape
    same_memory.copy_(turned)
    parameter.data = same_memory.t()


@torch.no_grad()
def _transpose_back(parameter: Tensor, path: str) -> None:
    if parameter.is_contiguous():  # somebody moved or replaced it meanwhile: it is in the ordinary layout already
        return
    if not alone(parameter):
        _say(
            "the memory of FF output projections is held by something else too (a state_dict taken while GRIFFIN was "
            "attached, for instance): that keeps it, and the model gets copies"
        )
        logger.info("%s: %.1f MB copied", path, parameter.nbytes / 1e6)
        parameter.data = parameter.detach().contiguous()
        return
    height, width = parameter.shape
    turned = parameter.detach().contiguous()
    same_memory = parameter.detach().t().view(height, width)
    same_memory.copy_(turned)
    parameter.data = same_memory


@torch.no_grad()
def _replace(parameter: Tensor, undo: ExitStack) -> None:
    original = parameter.detach()
    copy = original.t().contiguous().t()
    parameter.data = copy
    taken = parameter.data_ptr()

    def put_back() -> None:
        if parameter.data_ptr() != taken:  # somebody moved or replaced it meanwhile
            return
        if not torch.equal(original, parameter):  # what was changed while attached stays changed
            original.copy_(parameter.detach())
        parameter.data = original

    undo.callback(put_back)
