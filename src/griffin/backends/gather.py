"""Experts copied once per selection into buffers of width k, then read like a dense block of that width.

The buffers keep their addresses: a new selection is copied into them in place, so that a compiled graph or a CUDA graph
that reads them survives it. They are made anew only when k or the number of sequences changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.backends.reference import split_rows
from griffin.layouts import FFBlock
from griffin.method.dynamic import Dynamic
from griffin.weights.projection import rows


class GatherFF:
    """The experts of one FF block as dense weights of width k, one copy for each set of experts."""

    def __init__(self, block: FFBlock, undo: ExitStack) -> None:
        if block.quantised:
            raise ValueError(f"the gather backend copies plain weights, {block.path} has quantised ones: use native")
        self._block = block
        self._weights: list[Tensor] = []  # each (n, k, D), of n sets of experts; (n, 2k, D) where fused
        self._biases: list[Tensor | None] = []  # each (n, 1, k)
        self._out: Tensor | None = None  # (n, D, k)
        self.calls = 0  # tests read it to know which path ran

    def select(self, experts: Sequence[Tensor], dynamic: Dynamic | None = None) -> None:
        """See `SparseFF.select`."""
        assert dynamic is None, "resolve refuses it"
        self._reserve(len(experts), experts[0].shape[0])
        assert self._out is not None
        for n, expert_set in enumerate(experts):
            own_rows = (
                torch.cat([expert_set, expert_set + self._block.width]) if self._block.layout.fused else expert_set
            )
            for projection, weight, bias in zip(self._block.inputs, self._weights, self._biases, strict=True):
                full, full_bias = rows(projection)
                torch.index_select(full.detach(), 0, own_rows, out=weight[n])
                if bias is not None and full_bias is not None:
                    torch.index_select(full_bias.detach(), 0, own_rows, out=bias[n, 0])
            torch.index_select(rows(self._block.output)[0].detach(), 1, expert_set, out=self._out[n])

    def refresh(self) -> bool:
        """See `SparseFF.refresh`. Every selection copies from the weights as they are."""
        return False

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """See `SparseFF.buffers`."""
        weights = (*self._weights, *(bias for bias in self._biases if bias is not None))
        return weights if self._out is None else (*weights, self._out)

    def read(self, which: int, x: Tensor) -> Tensor:
        """See `SparseFF.read`."""
        return _project(x, self._weights[which], self._biases[which])

    def write(self, z: Tensor) -> Tensor:
        """See `SparseFF.write`."""
        if not torch.compiler.is_compiling():  # a count that changes would recompile every step
            self.calls += 1
        assert self._out is not None
        bias = rows(self._block.output)[1]
        return _project(z, self._out, None if bias is None else bias.view(1, 1, -1))

    def _reserve(self, sets: int, k: int) -> None:
        if self._out is not None and self._out.shape[0] == sets and self._out.shape[2] == k:
            return
        out = rows(self._block.output)[0]
        self._out = _buffer(out, (sets, out.shape[0], k))
        self._weights, self._biases = [], []
        for projection in self._block.inputs:
            weight, bias = rows(projection)
            height = 2 * k if self._block.layout.fused else k
            self._weights.append(_buffer(weight, (sets, height, weight.shape[1])))
            self._biases.append(None if bias is None else _buffer(bias, (sets, 1, height)))


def _buffer(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(buffer)  # CUDA graphs read it where it is instead of copying it in
    return buffer


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: x (B, S, in) or (B * S, in); weight (n, out, in), n = 1 or B; bias (n or 1, 1, out).

    Returns x's shape with out for in.
    """
    if weight.shape[0] == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0, 0])
    y = torch.bmm(split_rows(x, weight.shape[0]), weight.transpose(1, 2))
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[1])
