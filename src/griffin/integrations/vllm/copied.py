"""Copies of each request's experts, for accelerators: they need dense matrices, and no kernel there reads in place.

The experts of a request are copied when its generation phase begins, and are a dense FF block of width k from then on.
Every request reads and stores k neurons, so copies are used only while the requests of a step have fewer experts
together than the FF has neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.integrations.vllm.requests import RequestState, StepPlan


class Copied:
    """One FF block by copies of its experts.

    Args:
        layer: index of the decoder layer.
        read: the input projection: the rows of gate, then the rows of up; or up alone.
        write: the output projection.
        activate: computes z from the input projection's outputs, of which there are 2k where the block is gated.
        gated: whether the block has a gate.

    Shapes:
        read: weight (2 D_ff or D_ff, D), and bias or `None`. write: weight (D, D_ff), and bias or `None`.
    """

    def __init__(
        self,
        layer: int,
        read: tuple[Tensor, Tensor | None],
        write: tuple[Tensor, Tensor | None],
        activate: Callable[[Tensor], Tensor],
        gated: bool,
    ) -> None:
        self._layer, self._read, self._write = layer, read, write
        self._activate, self._gated = activate, gated
        self._width = write[0].shape[1]

    def pays(self, requests: Collection[RequestState]) -> bool:
        """Whether the copies of so many requests are smaller than the FF."""
        return sum(len(request.experts[self._layer]) for request in requests) < self._width

    def run(self, x: Tensor, step: StepPlan) -> Tensor:
        """Compute the pruned rows of a step, before any sum over ranks. Shapes: x (pruned rows, D), as returned."""
        rows: dict[int, tuple[RequestState, list[int]]] = {}
        for at, (_, request) in enumerate(step.pruned):
            rows.setdefault(id(request), (request, []))[1].append(at)
        if len(rows) == 1:
            return self._of(step.pruned[0][1], x)
        y = torch.empty_like(x)
        for request, places in rows.values():
            y[places] = self._of(request, x[places])
        return y

    def _of(self, request: RequestState, x: Tensor) -> Tensor:
        read, read_bias, write = self._copies(request)
        return F.linear(self._activate(F.linear(x, read, read_bias)), write, self._write[1])

    def _copies(self, request: RequestState) -> tuple[Tensor, Tensor | None, Tensor]:
        if self._layer not in request.copies:
            weight, bias = self._read
            experts = request.experts[self._layer].to(weight.device)
            rows = torch.cat([experts, experts + self._width]) if self._gated else experts
            read, read_bias = weight.detach()[rows], None if bias is None else bias.detach()[rows]
            write = self._write[0].detach()[:, experts].contiguous()
            request.copies[self._layer] = read, read_bias, write
        return request.copies[self._layer]
