"""Experts copied out for each request: for accelerators, which want dense matrices and have no kernel that reads in
place.

A request's experts are copied when its first token is generated, and are then a dense FF block of width k. That reads
and keeps k neurons for every request, so it is done for so few requests that they are fewer than the whole FF's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.integrations.vllm.requests import Request, Step


class Copied:
    """One FF block by copies of its experts.

    Args:
        layer: its number.
        read: gate and up, one above the other, or up alone.
        write: the output projection.
        activate: from what is read to z; takes rows of 2k where there is a gate.
        gated: whether there is a gate.

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

    def pays(self, step: Step) -> bool:
        """Whether the copies of this step's requests are smaller than the FF. If not, they are let go."""
        requests = {id(request): request for _, request in step.pruned}.values()
        if sum(len(request.experts[self._layer]) for request in requests) < self._width:
            return True
        for request in requests:
            request.copies.pop(self._layer, None)
        return False

    def run(self, x: Tensor, step: Step) -> Tensor:
        """The rows of a step's requests, before any sum over ranks. Shapes: x (pruned rows, D), as returned."""
        y = torch.empty_like(x)
        rows: dict[int, tuple[Request, list[int]]] = {}
        for at, (_, request) in enumerate(step.pruned):
            rows.setdefault(id(request), (request, []))[1].append(at)
        for request, own in rows.values():
            read, read_bias, write = self._copies(request)
            y[own] = F.linear(self._activate(F.linear(x[own], read, read_bias)), write, self._write[1])
        return y

    def _copies(self, request: Request) -> tuple[Tensor, Tensor | None, Tensor]:
        if self._layer not in request.copies:
            weight, bias = self._read
            experts = request.experts[self._layer].to(weight.device)
            rows = torch.cat([experts, experts + self._width]) if self._gated else experts
            own = weight.detach()[rows], None if bias is None else bias.detach()[rows]
            request.copies[self._layer] = (*own, self._write[0].detach()[:, experts].contiguous())
        return request.copies[self._layer]
