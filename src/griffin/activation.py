"""Which activation an FF block applies to its gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""`gelu` is the exact one (erf). The order is that of the native library's numbers (`enum griffin_activation`)."""


@torch.no_grad()
def activation_of(module: nn.Module) -> str | None:
    """Which of the library's activations the module of an FF block uses, found by calling it; `None` for another one.

    Names in configs are not unique ("gelu" means three functions), so the block's own callable is asked.
    """
    for _, function in callables_of(module):
        if (activation := name_of(function)) is not None:
            return activation
    return None


def callables_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What may be the activation of an FF block: callables that have such a name, and the name."""
    named = {**vars(module), **dict(module.named_children())}
    for name, function in named.items():
        if callable(function) and any(part in name.lower() for part in ("act", "gelu")):
            yield name, function


def name_of(function: Callable[[Tensor], object]) -> str | None:
    """Which of the library's activations a function is, found by trying it out; `None` for another one."""
    probe = torch.linspace(-6.0, 6.0, 97)
    try:
        values = function(probe)
    except Exception:  # not an activation: it wants other arguments
        return None
    if not isinstance(values, Tensor) or values.shape != probe.shape:
        return None
    values = values.to(probe.dtype)  # parameters of the activation may be wider
    for activation, expected in ACTIVATIONS.items():
        if torch.allclose(values, expected(probe), rtol=1e-4, atol=1e-5):
            return activation
    return None
