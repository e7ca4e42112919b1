"""What backends share that read the experts in place, in one call a block over the model's own weights.

The model's own forward calls the projections one by one, so the first input projection keeps the block's input, the
others answer with a placeholder, and the output projection makes the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack

import torch
from torch import Tensor

from griffin.layouts import FFBlock


class InPlace(ABC):
    """One FF block over the model's own weights, until `undo` closes.

    Args:
        block: the block.
        undo: takes back what was done to the model.
        backend: the backend's name.

    Raises:
        ValueError: the backend cannot compute this block.
    """

    def __init__(self, block: FFBlock, undo: ExitStack, backend: str) -> None:
        if (reason := self._why_not(block)) is not None:
            raise ValueError(f"the {backend} backend cannot be used: {reason}")
        self._ff, self._width = block, block.width
        self._undo = undo.enter_context(ExitStack())  # of this block, so that replaced weights can be taken anew
        self._x: Tensor | None = None
        self._placeholder = torch.zeros(2, device=block.device)
        self.calls = 0
        self._take()

    @staticmethod
    @abstractmethod
    def _why_not(block: FFBlock) -> str | None:
        """Why the backend cannot compute a block; `None` if it can."""

    @abstractmethod
    def _open(self) -> None:
        """Take the addresses of the model's weights, until `_undo` closes."""

    def _take(self) -> None:
        self._open()
        self._taken = _addresses(self._ff)

    def refresh(self) -> bool:
        """See `SparseFF.refresh`."""
        if _addresses(self._ff) == self._taken:
            return False
        self._undo.close()
        if (reason := self._why_not(self._ff)) is not None:
            raise ValueError(
                f"the model's weights were replaced while GRIFFIN was attached, and {reason}; attach again"
            )
        self._take()
        return True

    def read(self, which: int, x: Tensor) -> Tensor:
        """See `SparseFF.read`. Keeps the input; the projection is computed in `write`."""
        self._x = x
        return self._placeholder.to(x.dtype).expand(*x.shape[:-1], 2)

    def _input(self) -> Tensor:
        """What `read` kept."""
        x, self._x = self._x, None
        assert x is not None, "the output projection was called before the input projections"
        return x


def _addresses(block: FFBlock) -> tuple[tuple[int, tuple[int, ...], torch.dtype], ...]:
    """Where and how a block's weights and biases are stored."""
    tensors = [
        tensor
        for projection in (*block.inputs, block.output)
        for tensor in (*projection.parameters(recurse=False), *projection.buffers(recurse=False))
    ]
    return tuple((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in tensors)
