"""Which request and which phase every row of a step belongs to, and the experts of every request.

vLLM concatenates the tokens of all requests of a step. A row is in the generation phase if it holds a generated token,
that is, if its position is not less than the number of prompt tokens. This rule also covers prompts that arrive in
chunks, and tokens that are computed again after a preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from griffin.attachment.plan import Plan
from griffin.config import GriffinConfig
from griffin.layouts import FFBlock
from griffin.method.statistics import Statistics
from griffin.native import kernel


@dataclass
class Counts:
    """Numbers of rows that the FF blocks computed each way, and of generated tokens that CUDA graphs of the whole model
    computed for experts, or whose experts were left out.
    """

    native: int = 0
    copied: int = 0
    recorded: int = 0
    masked: int = 0
    left_out: int = 0


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
    _indices: tuple[Tensor, Tensor] | None = None

    @cached_property
    def whole(self) -> list[int]:
        """Rows that are computed with all neurons, ascending."""
        pruned = {row for row, _ in self.pruned}
        return [row for row in range(self.rows) if row not in pruned]

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of `whole`, and those of `pruned`. Shapes: (n,), int64."""
        if self._indices is None:
            rows = self.whole, [row for row, _ in self.pruned]
            self._indices = torch.tensor(rows[0], device=device), torch.tensor(rows[1], device=device)
        return self._indices

    def set_of(self, layer: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Union of the pruned rows' experts, and the mask of the rows that use each, as `kernel.ff` takes them."""
        if layer not in self.sets:
            by_row = [request.experts[layer] for _, request in self.pruned]
            if all(experts is by_row[0] for experts in by_row):
                self.sets[layer] = by_row[0], None
            else:
                self.sets[layer] = kernel.union(by_row, width)
        return self.sets[layer]


class Needs(Enum):
    """What a step needs of the FF blocks."""

    ALL_NEURONS = "all neurons: vLLM's own FF"
    EXPERTS_OF_ONE_ROW = "the experts of its only row"
    ROWS = "its rows told apart, as the step gathers or prunes"


class Requests:
    """All unfinished requests of an engine, and the step that runs.

    Args:
        blocks: the FF blocks that are pruned; with tensor parallelism, this rank's part of each.

    Attributes:
        pays: whether computing so many requests for their experts only saves time. Where it does not, a step leaves the
            experts out: the full FF is as fast, and better.
        load: called before a request generates alone, unless it was the last that did.
    """

    def __init__(self, blocks: Sequence[FFBlock]) -> None:
        self._blocks = blocks
        self.pays: Callable[[Collection[RequestState]], bool] = lambda requests: True
        self.load: Callable[[RequestState], None] = lambda request: None
        self._loaded: RequestState | None = None
        self._states: dict[str, RequestState] = {}
        self._sets: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._generating: list[tuple[int, RequestState]] = []
        self.step: StepPlan | None = None  # what the FF blocks follow; none in vLLM's dummy runs, which are vanilla
        self.counts = Counts()
        self.incomplete = 0  # chunks of generated tokens that ran the full FF, because prompt tokens were missing
        self.prompt_tokens = 0  # tokens in the statistics, of all requests so far

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, the FF blocks follow the step that `begin` sorts. The step ends with it: experts are selected."""
        try:
            yield
            if self.step is not None:
                self.select(self.step)
        finally:
            self.step = None

    def begin(self, scheduled: Iterable[Scheduled]) -> None:
        """Let the FF blocks follow a step; inside `running`."""
        self.step = self.plan(scheduled)

    def needs(self, scheduled: Iterable[Scheduled]) -> Needs:
        """What a step of these requests needs of the FF blocks. Changes nothing."""
        parts = list(scheduled)
        generating = []
        for part in parts:
            if part.config.density == 1.0:
                continue
            request = self._states.get(part.request, RequestState(part.config))
            if _unseen(request, part):
                return Needs.ROWS
            if request.experts:
                generating.append(request)
        if not generating or not self.pays(generating):
            return Needs.ALL_NEURONS
        lone = len(parts) == 1 and parts[0].computed >= parts[0].prompt and parts[0].end - parts[0].begin == 1
        return Needs.EXPERTS_OF_ONE_ROW if lone else Needs.ROWS

    def plan(self, scheduled: Iterable[Scheduled]) -> StepPlan:
        """Sort the rows of a step."""
        gathered, pruned, finished, rows = [], [], [], 0
        for part in scheduled:
            rows = part.end
            if part.config.density == 1.0:
                continue
            request = self._states.setdefault(part.request, RequestState(part.config))
            if unseen := _unseen(request, part):
                shift = part.begin - part.computed
                gathered.append(Gathered(request, unseen.start + shift, unseen.stop + shift))
                self.prompt_tokens += len(unseen)
                request.seen = unseen.stop
                if request.seen == part.prompt:
                    finished.append(request)
            generated = range(max(part.begin + part.prompt - part.computed, part.begin), part.end)
            if request.experts:
                pruned += [(row, request) for row in generated]
            elif generated:
                self.incomplete += 1
        requests = {id(request): request for _, request in pruned}.values()
        if pruned and not self.pays(requests):
            self.counts.left_out += len(pruned)
            pruned = []
        if pruned and len(requests) == 1 and pruned[0][1] is not self._loaded:
            self._loaded = pruned[0][1]
            self.load(self._loaded)
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


def _unseen(request: RequestState, part: Scheduled) -> range:
    """Positions of the prompt tokens of a step that the request's statistic does not have yet."""
    if request.experts or part.computed > request.seen:
        return range(0)
    return range(request.seen, min(part.prompt, part.computed + part.end - part.begin))  # may have begun anew
