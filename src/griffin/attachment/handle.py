"""The handle of an attached model: it gathers statistics, uses selections, and puts the model back."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor, nn

from griffin import backends
from griffin.attachment.collector import Collector
from griffin.attachment.patching import guard, is_attached, patch
from griffin.attachment.plan import Plan, plan_for
from griffin.attachment.selection import Selection, by_layer
from griffin.attachment.turn import Turn
from griffin.backends.native import NativeFF
from griffin.config import GriffinConfig
from griffin.families import Layout
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.method import scores
from griffin.method.dynamic import Split
from griffin.method.planes import PlaneSplit
from griffin.method.statistics import Statistics
from griffin.weights.fingerprint import Fingerprint, fingerprint

logger = logging.getLogger("griffin")


class Phase(enum.Enum):
    """What the FF blocks do with the tokens that come. The caller enters it; it is never guessed from shapes."""

    FULL = "full"  # outside of any phase: the untouched model
    PROMPT = "prompt"  # the full model, and the statistic is gathered
    GENERATION = "generation"  # the experts only


class Griffin:
    """A model with GRIFFIN attached. Made by `griffin.attach`; also a context manager that detaches at its end.

    Outside of a phase the model computes what it always does. `model.generate` says its phases itself; own loops say
    them with `prompt_phase` and `generation_phase`. A prompt phase is `gather`, then `plan.select`, then `use`: the
    three steps are there one by one for batches whose sequences have configs of their own.

    One thread at a time: a phase waits for another thread's phase, `model.generate` for another thread's
    `model.generate`; a generation phase refuses to run on experts that another thread's prompt selected.

    Args:
        model: the model.
        config: what to keep.
        layout: where the FF blocks are, for an unknown family.

    Raises:
        ValueError: as `griffin.attach`.
    """

    def __init__(self, model: nn.Module, config: GriffinConfig, layout: Layout | None = None) -> None:
        self.model = model
        self.blocks: tuple[FFBlock, ...] = tuple(find_ff_blocks(model, layout))
        _refuse_offloaded(self.blocks)
        if is_attached(self.blocks[0].output):
            raise ValueError(
                "GRIFFIN is attached to this model already; call detach() on the first handle, or leave its with-block"
            )
        self.plan = self._plan(config)
        self.backend = backends.resolve(
            config.backend, self.blocks, dynamic=self.plan.config.dynamic, compact=config.compact
        )
        self.selection_s = 0.0  # seconds that the last selection took, copying included
        self._gathered = Statistics()
        self._collector: Collector | None = None  # of the prompt phase that runs, if it gathers
        self._selections: tuple[Selection, ...] = ()  # of the batch: one for each sequence, or one for all
        self._in_backend: tuple[Selection, ...] = ()  # what the backend computes with
        self.handed_over = 0  # how often the backend was handed selections
        self._whole_layers = False  # whether it computes the layers that they leave whole, too
        self._sparse: dict[int, backends.SparseFF] = {}
        self._active: dict[int, backends.SparseFF] = {}  # layers that the backend's selections do not leave whole
        self._phase = Phase.FULL
        self.turn = Turn()  # taken during a phase
        self._selected_by: int | None = None  # the thread whose selections are used
        self._weights: list[Fingerprint] = []  # that static experts were selected by
        self._attached = False
        self._undo = ExitStack()

    # -- what was measured ------------------------------------------------------------------------------------------

    @property
    def config(self) -> GriffinConfig:
        """The config, with `auto` and `loss` resolved for this model."""
        return self.plan.config

    @property
    def selections(self) -> tuple[Selection, ...]:
        """What the batch is computed with: one selection for all sequences, or one for each; none before a prompt."""
        return self._selections

    @property
    def experts(self) -> Mapping[int, Tensor | list[Tensor]]:
        """Experts by layer: int64 (k,), ascending; with per-sequence experts a list of B. Empty before a prompt."""
        per_sequence = self.config.batch == "per_sequence" and not self.config.method.static
        experts: dict[int, Tensor | list[Tensor]] = {}
        for block in self._chosen if self._selections else ():
            every = torch.arange(block.width, device=block.device)
            sets = [selection.experts.get(block.layer, every) for selection in self._selections]
            experts[block.layer] = sets if per_sequence else sets[0]
        return MappingProxyType(experts)

    @property
    def statistic(self) -> Mapping[int, Tensor]:
        """Flocking statistic by layer, float32: (D_ff,), or (B, D_ff) with per-sequence experts. Empty before a prompt,
        and with a static method."""
        blocks = [block for block in self._chosen if block.layer in self._gathered.energies]
        batch = self.config.batch
        values = {block.layer: scores.flocking([block], self._gathered, batch)[0] for block in blocks}
        return MappingProxyType({layer: s if batch == "per_sequence" else s[0] for layer, s in values.items()})

    @property
    def gathered(self) -> Statistics:
        """What the prompt tokens so far add up to."""
        return self._gathered

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    @property
    def sparse_calls(self) -> int:
        """Number of FF blocks computed for experts only since `attach`: the proof that this path ran."""
        return sum(sparse.calls for sparse in self._sparse.values())

    @property
    def native_ff(self) -> Mapping[int, NativeFF]:
        """FF blocks of the native backend by layer, of all layers; empty with another backend."""
        return MappingProxyType({layer: ff for layer, ff in self._sparse.items() if isinstance(ff, NativeFF)})

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Tensors of the backend that the generation phase reads: a captured step holds their addresses."""
        return tuple(tensor for sparse in self._active.values() for tensor in sparse.buffers)

    @property
    def pruned(self) -> frozenset[int]:
        """Layers whose FF blocks the plan computes for experts only in the generation phase."""
        return frozenset(block.layer for block in self.plan.pruned)

    @property
    def splits(self) -> Mapping[int, Split | PlaneSplit]:
        """How the bytes of every layer with dynamic neuron selection are spent; empty without it."""
        return MappingProxyType(dict(self.plan.splits))

    @property
    def ff_bytes_per_token(self) -> int:
        """Bytes of FF weights that one sequence's next token reads in the generation phase."""
        return self.plan.ff_bytes

    # -- gather, select, use ----------------------------------------------------------------------------------------

    @contextmanager
    def gather(
        self,
        statistics: Statistics | None = None,
        *,
        attention_mask: Tensor | None = None,
        needs: Collection[str] = (),
    ) -> Iterator[Statistics]:
        """Run prompt tokens through the full model, and add up their statistics. Nothing is selected.

        Several forward calls inside are chunks of one prompt. Left or right padding never counts: the two-dimensional
        `attention_mask` that the model is called with is read, or the one given here.

        Args:
            statistics: what earlier turns gathered, to be continued; it stays as it is. `None` starts anew.
            attention_mask: which of the phase's tokens are real, for a model that is called without a two-dimensional
                mask. Shape (B, S), S being all tokens of the phase.
            needs: what to gather beside what this handle's plan needs, for another plan.

        Yields:
            The statistics of all prompt tokens so far; complete at the end of the phase.

        Raises:
            ValueError: inside another phase, in training mode, or after `detach`.
        """
        with self._in_phase(Phase.PROMPT):
            self._refresh()
            self._gathered = Statistics() if statistics is None else statistics.copy()
            needs = self.plan.needs.union(needs)
            self._gathered.keep_only(needs)
            collector = self._collector = Collector(self._gathered, attention_mask, needs)
            hook = self.model.register_forward_pre_hook(collector.see_arguments, with_kwargs=True)
            try:
                yield self._gathered
            finally:
                hook.remove()

    def select(self, statistics: Statistics) -> None:
        """Select by this handle's plan, and use the selections.

        Raises:
            ValueError: no prompt token came, or the scores are not finite.
        """
        if not self.config.method.static and any(b.layer not in statistics.energies for b in self._chosen):
            raise ValueError("no prompt token came: call the model inside handle.prompt_phase()")
        start = time.perf_counter()
        self.use(self.plan.select(statistics))
        self.selection_s = time.perf_counter() - start

    def use(self, selections: Sequence[Selection], *, whole_layers: bool = False) -> None:
        """Compute the next generation phases with these selections: one for each sequence, or a single one for all.

        Args:
            selections: the selections.
            whole_layers: layers that the selections leave whole are computed by the backend too, if it can do so from
                the same buffers: a compiled step is then the same one at every density, 1.0 included.

        Raises:
            ValueError: there is none, or dynamic neuron selections of the sequences differ in their splits.
        """
        with self.turn.taken():
            self._hand_over(tuple(selections), whole_layers and self.backend.name == "triton")
            self._selections = tuple(selections)
            self._selected_by = threading.get_ident()

    def plan_for(self, config: GriffinConfig) -> Plan:
        """What another config means for this model, computed by this handle's backend.

        Raises:
            ValueError: as `griffin.attach`.
        """
        plan = plan_for(self.model, self.blocks, replace(config, backend=self.backend.name))
        if plan.splits and (reason := backends.why_not_dynamic(self.backend.name)) is not None:
            raise ValueError(f"{reason}; use a selection without dynamic+")
        return plan

    @contextmanager
    def prompt_phase(
        self, *, attention_mask: Tensor | None = None, statistics: Statistics | None = None
    ) -> Iterator[None]:
        """Run prompt tokens through the full model and gather their statistic; experts are selected at the end.

        Args:
            attention_mask: as for `gather`.
            statistics: as for `gather`; `handle.gathered` after an earlier turn.

        Raises:
            ValueError: inside another phase, in training mode, after `detach`, or no prompt token came.
        """
        if self.config.method.static:
            with self._in_phase(Phase.PROMPT):
                self._refresh()
                self._collector = None
                yield
            self.use(self._selections)
            return
        self._forget()
        with self.gather(statistics, attention_mask=attention_mask) as gathered:
            yield
        self.select(gathered)

    @contextmanager
    def generation_phase(self, *, rows: Sequence[int] | None = None) -> Iterator[None]:
        """Compute the experts only.

        Args:
            rows: for several continuations of the prompts: row i of this batch continues prompt `rows[i]`, and uses its
                experts. `None`: the batch is that of the prompt phase.

        Raises:
            ValueError: inside another phase, in training mode, after `detach`, before a prompt phase, on experts that
                another thread selected or whose scores were not finite, or `rows` names a prompt that there was not.
        """
        with self._in_phase(Phase.GENERATION):
            if not self._selections:
                raise ValueError("there are no experts yet: run the prompt inside handle.prompt_phase() first")
            if self._selected_by != threading.get_ident():
                raise ValueError(
                    "another thread has run a prompt with this handle since, so its experts are not this thread's; use "
                    "one model and handle a thread, or hand the selections over: handle.use(selections)"
                )
            for selection in self._selections:
                selection.finite.check()
            self._hand_over(self._of_rows(rows), self._whole_layers)
            yield

    # -- attaching and detaching ------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patch the model until `detach`. An exception in the middle leaves the model as it was."""
        with ExitStack() as stack:
            self.plan.prepare()
            for block in self.blocks:
                self._sparse[block.layer] = self._backend_of(block, stack)
                for projection in (*block.inputs, block.output):
                    guard(stack, projection)
                for which, projection in enumerate(block.inputs):
                    patch(stack, projection, "forward", self._input_forward(block, which, projection.forward))
                patch(stack, block.output, "forward", self._output_forward(block, block.output.forward))
            self._attach_more(stack)
            self._attached = True
            if self.config.method.static:
                self._weights = self._fingerprints()
                self.select(self._gathered)
            self._undo = stack.pop_all()
        logger.info(
            "attached to %d FF blocks, %s at density %g, backend %s (%s)",
            len(self.blocks), self.config.selection, self.config.density, self.backend.name, self.backend.reason,
        )  # fmt: skip

    def detach(self) -> None:
        """Put the model back exactly as it was. Calling it twice does nothing."""
        self._phase = Phase.FULL
        self._attached = False
        self._active = {}
        self._undo.close()

    def __enter__(self) -> Griffin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _plan(self, config: GriffinConfig) -> Plan:
        return plan_for(self.model, self.blocks, config)

    def _backend_of(self, block: FFBlock, stack: ExitStack) -> backends.SparseFF:
        return self.backend.make(block, stack)

    def _attach_more(self, stack: ExitStack) -> None:
        """Patch `model.generate`."""
        from griffin.attachment.transformers_generate import attach_generate

        attach_generate(self, stack)

    @property
    def _chosen(self) -> list[FFBlock]:
        """The layers that the config names."""
        layers = self.config.layers
        return [block for block in self.blocks if layers is None or block.layer in layers]

    def _input_forward(self, block: FFBlock, which: int, full: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        layer, last = block.layer, len(block.inputs) - 1

        def forward(x: Tensor) -> Tensor:
            if self._phase is Phase.GENERATION and layer in self._active:
                return self._active[layer].read(which, x)
            collector = self._collector if self._phase is Phase.PROMPT else None
            if collector is not None and which == 0:
                collector.see_input(x)
            y = full(x)
            if collector is not None and which == last:
                collector.see_up(block, y)
            return y

        return forward

    def _output_forward(self, block: FFBlock, full: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        layer = block.layer

        def forward(z: Tensor) -> Tensor:
            if self._phase is Phase.GENERATION and layer in self._active:
                return self._active[layer].write(z)
            if self._phase is Phase.PROMPT and self._collector is not None:
                self._collector.add(block, z)
            return full(z)

        return forward

    @contextmanager
    def _in_phase(self, phase: Phase) -> Iterator[None]:
        if self.turn.mine and self._phase is not Phase.FULL:
            raise ValueError(f"already in the {self._phase.value} phase; phases do not nest")
        with self.turn.taken():
            if not self._attached:
                raise ValueError("this handle is detached; call griffin.attach again")
            refuse_training(self.model)
            self._phase = phase
            try:
                yield
            finally:
                self._phase = Phase.FULL

    def refuse_phase(self, why: str) -> None:
        """Raise `ValueError` inside of a phase."""
        refuse_training(self.model)
        if self._phase is not Phase.FULL:
            raise ValueError(f"called inside the {self._phase.value} phase; {why}")

    def _forget(self) -> None:
        """A new prompt begins: a failure in it leaves no experts of the prompt before."""
        with self.turn.taken():
            self._selections = ()

    def _refresh(self) -> None:
        """Follow the model's weights: those that were replaced since `attach`, and static experts of changed ones."""
        replaced = [sparse.refresh() for sparse in self._sparse.values()]
        if any(replaced):
            self._in_backend = ()
        if self.config.method.static and self._weights != (now := self._fingerprints()):
            self._weights, self._in_backend = now, ()
            self.use(self.plan.select(self._gathered))

    def _fingerprints(self) -> list[Fingerprint]:
        return [fingerprint(weight) for block in self.plan.pruned for weight in block.stored()]

    def _of_rows(self, rows: Sequence[int] | None) -> tuple[Selection, ...]:
        """The selections of these rows of the batch."""
        count = len(self._selections)
        if rows is None or count == 1:
            return self._selections
        if not (len(rows) and 0 <= min(rows) <= max(rows) < count):
            raise ValueError(f"rows is {tuple(rows)}; expected numbers of the {count} prompts, from 0 to {count - 1}")
        return tuple(self._selections[row] for row in rows)

    def _hand_over(self, selections: tuple[Selection, ...], whole_layers: bool) -> None:
        """Hand the backend these selections, unless it has them."""
        same = len(selections) == len(self._in_backend) and all(map(_same, selections, self._in_backend))
        if same and whole_layers == self._whole_layers:
            return
        self._whole_layers = whole_layers
        batch = by_layer(selections, self.blocks, whole_layers=whole_layers)
        for layer, experts in batch.items():
            self._sparse[layer].select(experts.sets, experts.dynamic)
        self._active = {layer: self._sparse[layer] for layer in batch}
        self._in_backend = selections
        self.handed_over += 1


def refuse_training(model: nn.Module) -> None:
    """Raise `ValueError` for a model in training mode: dropout would spoil the statistic."""
    if model.training:
        raise ValueError("the model is in training mode; GRIFFIN is for generation: call model.eval() first")


def _refuse_offloaded(blocks: Sequence[FFBlock]) -> None:
    for block in blocks:
        if block.device.type == "meta":
            raise ValueError(
                f"{block.path} has its weights on the meta device: they are on a disk or another device, and are there "
                "during a call only, so GRIFFIN cannot read its experts; load the model without offloading these layers"
            )


def _same(selection: Selection, other: Selection) -> bool:
    return selection is other
