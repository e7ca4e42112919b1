"""A copy of one request's experts, for accelerators: they need dense matrices, and no kernel here reads in place there.

The copy lies where it lay when the engine was started, whichever request it is of. So a CUDA graph of the whole model,
recorded for one row, computes the experts of any request. The copy is made when its request generates alone, and serves
while it does: two requests would read as much as the FF has, at density 0.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, Tensor | None]


class Copied:
    """One FF block by a copy of its experts.

    Args:
        read: the input projection: the rows of gate, then the rows of up; or up alone.
        write: the output projection.
        activate: computes z from the input projection's outputs: `2 * most` of them where the block is gated.
        gated: whether the block has a gate.
        most: number of experts that the copy has room for.

    Shapes:
        read: weight (2 D_ff or D_ff, D), and bias or `None`. write: weight (D, D_ff), and bias or `None`.
    """

    def __init__(
        self, read: Weights, write: Weights, activate: Callable[[Tensor], Tensor], gated: bool, most: int
    ) -> None:
        self._read, self._write, self._activate = read, write, activate
        self._width, self._parts, self.most = write[0].shape[1], 2 if gated else 1, most
        weight, bias = read
        self._rows = weight.new_zeros(self._parts * most, weight.shape[1])
        self._bias = None if bias is None else bias.new_zeros(self._parts * most)
        self._columns = write[0].new_zeros(write[0].shape[0], most)

    @torch.no_grad()
    def load(self, experts: Tensor) -> None:
        """Copy experts; room that is left is filled with neurons that add nothing. Shapes: (k,), k <= most."""
        weight, bias = self._read
        experts = experts.to(weight.device)
        k = len(experts)
        for part in range(self._parts):
            begin, rows = part * self.most, experts + part * self._width
            self._rows[begin : begin + k] = weight[rows]
            self._rows[begin + k : begin + self.most] = 0
            if self._bias is not None and bias is not None:
                self._bias[begin : begin + k] = bias[rows]
                self._bias[begin + k : begin + self.most] = 0
        self._columns[:, :k] = self._write[0][:, experts]
        self._columns[:, k:] = 0

    def run(self, x: Tensor) -> Tensor:
        """Compute rows for the experts that were loaded, before any sum over ranks. Shapes: (rows, D), as returned."""
        return F.linear(self._activate(F.linear(x, self._rows, self._bias)), self._columns, self._write[1])
