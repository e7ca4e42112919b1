"""The FF block as an operator of torch: opaque to `torch.compile`, and a place where CUDA graphs are cut.

vLLM records what lies between the splitting operators of a compiled model in CUDA graphs (its piecewise mode). The FF
block is one of them, as attention is. So its code runs at every step, between two recordings, with that step's experts.
A recording reads its inputs where they lay when it was made; therefore the operator fills a tensor that the recording
before it has allocated, and never returns one of its own.

In a graph of the whole model (full mode) no code of the block runs. Such a graph holds all neurons, or for one row the
copy of one request's experts, and `runners` lets only those steps take it that need just this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

_LIBRARY = torch.library.Library("griffin", "FRAGMENT")  # type: ignore[no-untyped-call]


class Block(Protocol):
    """What the operator runs."""

    def run(self, x: Tensor) -> Tensor:
        """The FF of a step's rows. Shapes: x (rows, D), as returned."""


@eager_break_during_capture  # type: ignore[untyped-decorator]
def vllm_ff(x: Tensor, out: Tensor, name: str) -> None:
    """Compute one FF block into `out`.

    vLLM's attention layers are found the same way: by name, among the layers of the engine whose step this is. A number
    would be wrong: vLLM keeps compiled graphs on disk, and other processes and engines reuse them.

    Shapes:
        x: (rows, D), padding included; out the same.
    """
    block: Block = get_forward_context().no_compile_layers[name]
    out.copy_(block.run(x))


def _nothing(x: Tensor, out: Tensor, name: str) -> None:
    """What tracing sees: `out` is filled, and nothing is returned."""


direct_register_custom_op("vllm_ff", vllm_ff, mutates_args=["out"], fake_impl=_nothing, target_lib=_LIBRARY)


def registered(block: Block, name: str, layers: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Enter a block where the operator looks it up.

    Args:
        block: the block.
        name: its name, which the engine's other layers do not have.
        layers: vLLM's `static_forward_context` of the engine.

    Returns:
        The function that compiled code is to call in the block's place. Shapes: (rows, D), as returned.

    Raises:
        ValueError: the name is taken.
    """
    if name in layers:
        raise ValueError(f"this engine already has an FF block {name}")
    layers[name] = block

    def forward(x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ops.griffin.vllm_ff(x, out, name)
        return out

    return forward
