"""One projection of a model, however its weights are stored: shape, rows, bytes, norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from griffin.weights.float32_gemm import Float32GemmLinear
from griffin.weights.quantised import QuantisedLinear

# Projections that only multiply and add. Compared by exact class, as adapters (PEFT) and quantised layers subclass
# Linear. Transformers' own classes are given by name: this package does not import transformers.
_PLAIN_CLASSES = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Float32GemmLinear)
_PLAIN_NAMES = ("transformers.pytorch_utils.Conv1D", "transformers.models.falcon.modeling_falcon.FalconLinear")


def shape_of(projection: nn.Module) -> tuple[int, int]:
    """out_features, in_features."""
    if isinstance(projection, QuantisedLinear):
        return projection.out_features, projection.in_features
    height, width = rows(projection)[0].shape
    return height, width


def rows(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a floating-point projection, the weight as a view of shape (out_features, in_features).

    `nn.Linear` stores it so; the Conv1D of GPT-2 stores the transpose.
    """
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return (weight if isinstance(projection, nn.Linear) else weight.T), bias


def device_of(projection: nn.Module) -> torch.device:
    """Where the weights are."""
    weight = projection.stored if isinstance(projection, QuantisedLinear) else rows(projection)[0]
    return weight.device


def nbytes_of(projection: nn.Module) -> int:
    """Bytes of the weights as they are stored, scales included, the bias not."""
    return projection.nbytes if isinstance(projection, QuantisedLinear) else rows(projection)[0].nbytes


def bias_of(projection: nn.Module) -> Tensor:
    """The bias; empty if there is none."""
    return projection.bias if isinstance(projection.bias, Tensor) else torch.empty(0)


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is a Linear or Conv1D of floating-point weights and nothing more."""
    kind = type(projection)
    weight = getattr(projection, "weight", None)
    # The exact type of the weight: torchao's quantised tensors are subclasses that call themselves bfloat16.
    return (
        (kind in _PLAIN_CLASSES or f"{kind.__module__}.{kind.__qualname__}" in _PLAIN_NAMES)
        and isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    )
