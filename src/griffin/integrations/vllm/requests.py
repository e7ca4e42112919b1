"""Which request and which phase every row of a step belongs to, and the experts of every request.

vLLM concatenates the tokens of all requests of a step. A row is in the generation phase if it holds a generated token,
that is, if its position is not less than the number of prompt tokens. This rule also covers prompts that arrive in
chunks, and tokens that are computed again after a preemption.
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
class RequestState:
    """What the plugin keeps for a request until it is finished, also while it is preempted."""

    config: GriffinConfig
    seen: int = 0  # prompt tokens that the statistic has: positions 0..seen-1
    statistics: Statistics = field(default_factory=Statistics)
    experts: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    copies: dict[int, tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict)


class Gathered(NamedTuple):
    """Rows begin..end-1 of a step, which go into the statistic of a request."""

    request: RequestState
    begin: int
    end: int


@dataclass(eq=False)
class StepPlan:
    """What the FF blocks need to know about a step.

    Args:
        rows: number of rows that hold tokens; the rows after them are padding.
        gathered: rows of prompt tokens, which go into the statistics of their requests.
        pruned: rows that are computed for experts only, ascending, each with its request.
        finished: requests whose prompt is complete after this step.
        sets: unions of experts by layer, kept from step to step while the same requests generate.
    """

    rows: int
    gathered: list[Gathered]
    pruned: list[tuple[int, RequestState]]
    finished: list[RequestState]
    sets: dict[int, tuple[Tensor, Tensor | None]]

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """Rows computed with all neurons, and rows computed for experts only. Shapes: (n,), int64."""
        pruned = torch.tensor([row for row, _ in self.pruned], dtype=torch.int64)
        whole = torch.ones(self.rows, dtype=torch.bool)
        whole[pruned] = False
        return whole.nonzero().squeeze(1), pruned

    def set_of(self, layer: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Union of the pruned rows' experts, and the mask of the rows that use each, as `kernel.ff` takes them."""
        if layer not in self.sets:
            by_row = [request.experts[layer] for _, request in self.pruned]
            if all(experts is by_row[0] for experts in by_row):
                self.sets[layer] = by_row[0], None
            else:
                self.sets[layer] = kernel.union(by_row, width)
        return self.sets[layer]


class Requests:
    """All unfinished requests of an engine.

    Args:
        blocks: the FF blocks that are pruned; with tensor parallelism, this rank's part of each.
    """

    def __init__(self, blocks: Sequence[FFBlock]) -> None:
        self._blocks = blocks
        self._states: dict[str, RequestState] = {}
        self._sets: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._generating: list[tuple[int, RequestState]] = []
        self.incomplete = 0  # chunks of generated tokens that ran the full FF, because prompt tokens were missing
        self.prompt_tokens = 0  # tokens in the statistics, of all requests so far

    def plan(self, scheduled: Iterable[Scheduled]) -> StepPlan:
        """Sort the rows of a step."""
        gathered, pruned, finished, rows = [], [], [], 0
        for part in scheduled:
            rows = part.end
            if part.config.density == 1.0:
                continue
            request = self._states.setdefault(part.request, RequestState(part.config))
            prompt = min(max(part.prompt - part.computed, 0), part.end - part.begin)
            if not request.experts and prompt > 0 and part.computed <= request.seen:
                unseen = part.begin + request.seen - part.computed  # after a preemption the prompt starts again
                if unseen < part.begin + prompt:
                    gathered.append(Gathered(request, unseen, part.begin + prompt))
                    self.prompt_tokens += part.begin + prompt - unseen
                    request.seen = part.computed + prompt
                    if request.seen == part.prompt:
                        finished.append(request)
            if request.experts:
                pruned += [(row, request) for row in range(part.begin + prompt, part.end)]
            elif part.begin + prompt < part.end:
                self.incomplete += 1
        if [request for _, request in pruned] != [request for _, request in self._generating]:
            self._sets = {}
        self._generating = pruned
        return StepPlan(rows, gathered, pruned, finished, self._sets)

    def select(self, step: StepPlan) -> None:
        """Select the experts of the requests whose prompt this step has completed."""
        for request in step.finished:
            experts = Plan.of(self._blocks, request.config).select(request.statistics)[0].experts
            request.experts = {b.layer: experts.get(b.layer, torch.arange(b.width)) for b in self._blocks}
            request.statistics = Statistics()

    def drop(self, names: Iterable[str]) -> None:
        """Forget requests that are finished."""
        for name in names:
            self._states.pop(name, None)

    @property
    def experts(self) -> Mapping[str, Mapping[int, Tensor]]:
        """Experts by request and layer."""
        return {name: request.experts for name, request in self._states.items()}
