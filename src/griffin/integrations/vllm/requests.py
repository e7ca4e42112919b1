"""Whose a row of a step is, in which phase, and which experts belong to it.

vLLM puts the tokens of all requests of a step one after the other. A row is in the generation phase if its position is
that of a generated token, position >= tokens of the prompt; that also holds for the chunks of a prompt and for what is
computed again after a preemption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from griffin.attachment.plan import Plan
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method.statistics import Statistics
from griffin.native import kernel


class Scheduled(NamedTuple):
    """A request's rows of a step: rows begin..end-1 are its tokens at positions computed, computed + 1, ..."""

    request: str
    begin: int
    end: int
    computed: int
    prompt: int
    config: GriffinConfig


@dataclass(eq=False)
class Request:
    """What is kept of a request until it is finished, also while it is preempted."""

    config: GriffinConfig
    seen: int = 0  # positions below are in the statistic
    statistics: Statistics = field(default_factory=Statistics)
    experts: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    copies: dict[int, tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)


class Gathered(NamedTuple):
    """Rows begin..end-1 of a step belong to the statistic of a request."""

    request: Request
    begin: int
    end: int


@dataclass(eq=False)
class Step:
    """What the FF blocks have to know of a step.

    Args:
        rows: number of rows that are tokens; what follows is padding.
        gathered: whose statistic is gathered.
        pruned: rows that are computed for experts only, ascending, and whose experts.
        finished: requests whose prompt is complete after this step.
        sets: unions of experts by layer, kept from step to step while the same requests generate.
    """

    rows: int
    gathered: list[Gathered]
    pruned: list[tuple[int, Request]]
    finished: list[Request]
    sets: dict[int, tuple[Tensor, Tensor | None]]

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """Rows that are computed whole, and rows that are computed for experts only. Shapes: (n,), int64."""
        pruned = torch.tensor([row for row, _ in self.pruned], dtype=torch.int64)
        whole = torch.ones(self.rows, dtype=torch.bool)
        whole[pruned] = False
        return whole.nonzero().squeeze(1), pruned

    def set_of(self, layer: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Union of the pruned rows' experts and who wants which, as `kernel.ff` takes them."""
        if layer not in self.sets:
            own = [request.experts[layer] for _, request in self.pruned]
            if all(experts is own[0] for experts in own):
                self.sets[layer] = own[0], None
            else:
                self.sets[layer] = kernel.union(own, width)
        return self.sets[layer]


class Requests:
    """All requests that this process knows, over the steps.

    Args:
        blocks: the FF blocks that are pruned; of a tensor parallel model this rank's part of each.
    """

    def __init__(self, blocks: Sequence[FFBlock]) -> None:
        self._blocks = blocks
        self._known: dict[str, Request] = {}
        self._sets: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._generating: list[tuple[int, Request]] = []
        self.incomplete = 0  # requests served by the full FF, because prompt tokens were missing
        self.prompt_tokens = 0  # that were gathered

    def plan(self, scheduled: Iterable[Scheduled]) -> Step:
        """Sort the rows of a step."""
        gathered, pruned, finished, rows = [], [], [], 0
        for own in scheduled:
            rows = own.end
            if own.config.density == 1.0:
                continue
            request = self._known.setdefault(own.request, Request(own.config))
            prompt = min(max(own.prompt - own.computed, 0), own.end - own.begin)
            if not request.experts and prompt > 0 and own.computed <= request.seen:
                first = own.begin + request.seen - own.computed  # after a preemption the prompt begins anew
                if first < own.begin + prompt:
                    gathered.append(Gathered(request, first, own.begin + prompt))
                    self.prompt_tokens += own.begin + prompt - first
                    request.seen = own.computed + prompt
                    if request.seen == own.prompt:
                        finished.append(request)
            if request.experts:
                pruned += [(row, request) for row in range(own.begin + prompt, own.end)]
            elif own.begin + prompt < own.end:
                self.incomplete += 1
        if [request for _, request in pruned] != [request for _, request in self._generating]:
            self._sets = {}
        self._generating = pruned
        return Step(rows, gathered, pruned, finished, self._sets)

    def select(self, step: Step) -> None:
        """Select the experts of the requests whose prompt this step has completed."""
        for request in step.finished:
            experts = Plan.of(self._blocks, request.config).select(request.statistics)[0].experts
            request.experts = {b.layer: experts.get(b.layer, torch.arange(b.width)) for b in self._blocks}
            request.statistics = Statistics()

    def drop(self, names: Iterable[str]) -> None:
        """Forget requests that are finished."""
        for name in names:
            self._known.pop(name, None)

    @property
    def experts(self) -> Mapping[str, Mapping[int, Tensor]]:
        """Experts by request and layer."""
        return {name: request.experts for name, request in self._known.items()}
