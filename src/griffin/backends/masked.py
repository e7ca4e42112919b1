"""Single weights instead of neurons: the projections' weights with zeros in them. For evaluation: it saves no time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor
from torch.nn import functional as F

from griffin.layouts import FFBlock
from griffin.method.dynamic import Tier
from griffin.weights.projection import rows


class MaskedFF:
    """One FF block over masked copies of its weights, which are freed by `clear`."""

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        if block.quantised:
            raise ValueError(f"{block.path} has quantised weights, which selection wanda cannot mask; load it in bf16")
        self._block = block
        self._weights: list[Tensor] = []  # of the input projections, then of the output projection
        self.calls = 0  # tests read it to know which path ran
        undo.callback(self.clear)

    def select(self, experts: Sequence[Tensor], tier: Tier | None = None) -> None:
        """There are no experts, but masked weights: see `mask`."""
        raise NotImplementedError

    def mask(self, weights: Sequence[Tensor]) -> None:
        """Take the masked weights of the input projections and of the output projection.

        Shapes: each (out, in).
        """
        self._weights = list(weights)

    def clear(self) -> None:
        """Free the masked weights."""
        self._weights = []

    def read(self, which: int, x: Tensor) -> Tensor:
        """See `SparseFF.read`; all neurons."""
        return F.linear(x, self._weights[which], rows(self._block.inputs[which])[1])

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`; all neurons."""
        self.calls += 1
        return F.linear(z, self._weights[-1], rows(self._block.output)[1])
