"""The handle of an attached model: its phases, its statistic, its experts."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor, nn

from griffin import backends
from griffin.attachment import choice, profile
from griffin.attachment.collector import Gathering
from griffin.attachment.masking import mask_weights
from griffin.attachment.patching import patch
from griffin.attachment.selected import Selected, select_one
from griffin.backends import native
from griffin.backends.masked import MaskedFF
from griffin.config import GriffinConfig
from griffin.families import Layout
from griffin.layouts import FFBlock, find_ff_blocks
from griffin.method.dynamic import Split, Tier, make_sketches, split
from griffin.method.statistics import Conversation

logger = logging.getLogger("griffin")

_MARK = "_griffin_attached"


class Phase(enum.Enum):
    """What the FF blocks do with the tokens that come. It is said, never guessed from a tensor's shape."""

    FULL = "full"  # outside of any phase: the untouched model
    PROMPT = "prompt"  # the full model, and the statistic is gathered
    GENERATION = "generation"  # the experts only


class Griffin:
    """A model with GRIFFIN attached. Made by `griffin.attach`; also a context manager that detaches at its end.

    Outside of a phase the model computes what it always does. `model.generate` says its phases itself; own loops say
    them with `prompt_phase` and `generation_phase`.

    Not thread-safe: one handle serves one batch at a time.

    Args:
        model: the model.
        config: what to keep.
        layout: where the FF blocks are, for an unknown family.
        mixed: sequences of one batch are selected one by one, each by a config of its own (`select`, `use`).
    """

    def __init__(
        self, model: nn.Module, config: GriffinConfig, layout: Layout | None = None, *, mixed: bool = False
    ) -> None:
        self.model = model
        self.mixed = mixed
        found = find_ff_blocks(model, layout)
        config, self._profile = profile.resolved(model, found, config)
        self.config = config
        self.blocks: tuple[FFBlock, ...] = choice.chosen_blocks(found, config)
        self._masked = config.selection == "wanda"  # single weights, not neurons
        self.backend = backends.MASKED if self._masked else backends.resolve(config.backend, found, tier=config.tier)
        self._splits = {b.layer: split(b, config.density) for b in self.blocks if config.tier and config.density < 1.0}
        self._all_blocks = tuple(found)
        self._whole_bytes = sum(block.nbytes for block in found) - sum(block.nbytes for block in self.blocks)
        self.selection_s = 0.0  # seconds that the last selection took, copying included
        self._phase = Phase.FULL
        self._conversation = Conversation()
        self._gathering = Gathering(self._conversation, None)
        self._experts: choice.Experts = {}
        self._tiers: dict[int, Tier] = {}
        self._rows: tuple[int, ...] | None = None  # whose experts the backend has; None: every sequence its own
        self._sparse: dict[int, backends.SparseFF] = {}
        self._native: dict[int, native.NativeFF] = {}
        self._undo = ExitStack()
        self._attached = False
        self._ready = False  # whether weights are masked
        self._static = config.selection == "magnitude"  # experts that do not depend on the prompt
        _refuse_attached(self.blocks)

    @property
    def profile(self) -> profile.Profile | None:
        """The model's profile, where it is used."""
        return self._profile

    # -- what was measured ------------------------------------------------------------------------------------------

    @property
    def experts(self) -> Mapping[int, Tensor | list[Tensor]]:
        """Experts by layer: int64 (k,), ascending; with per-sequence experts a list of B of them.

        Empty before a prompt, and with the selection `wanda`, which keeps single weights of all neurons.
        """
        per_sequence = self.config.batch == "per_sequence" and not self._static
        return MappingProxyType({layer: list(own) if per_sequence else own[0] for layer, own in self._experts.items()})

    @property
    def statistic(self) -> Mapping[int, Tensor]:
        """Flocking statistic by layer, float32: (D_ff,), or (B, D_ff) with per-sequence experts.

        Empty before a prompt, and with the static selection `magnitude`.
        """
        per_sequence = self.config.batch == "per_sequence"
        layers = self._conversation.energies
        found = {layer: choice.scores(self._conversation, [layer], self.config.batch)[0] for layer in layers}
        return MappingProxyType({layer: own if per_sequence else own[0] for layer, own in found.items()})

    @property
    def phase(self) -> Phase:
        """The phase that was said last."""
        return self._phase

    @property
    def conversation(self) -> Conversation:
        """Energies and token counts of the prompt tokens so far."""
        return self._conversation

    @property
    def sparse_calls(self) -> int:
        """Number of FF blocks computed for experts only since `attach`: the proof that this path ran."""
        return sum(sparse.calls for sparse in self._sparse.values())

    @property
    def native_ff(self) -> Mapping[int, native.NativeFF]:
        """FF blocks of the native backend by layer, of all layers; empty with another backend."""
        return MappingProxyType(self._native)

    @property
    def pruned(self) -> frozenset[int]:
        """Layers whose FF blocks are computed for experts only in the generation phase."""
        return frozenset(self._sparse)

    @property
    def splits(self) -> Mapping[int, Split]:
        """How the bytes of every layer with a token tier are spent; empty without one."""
        return MappingProxyType(self._splits)

    @property
    def ff_bytes_per_token(self) -> int:
        """Bytes of FF weights that one sequence's next token reads in the generation phase."""
        if self._masked:
            return self._whole_bytes + sum(block.nbytes for block in self.blocks)
        return self._whole_bytes + sum(map(self._bytes_of, self.blocks))

    # -- phases -----------------------------------------------------------------------------------------------------

    @contextmanager
    def prompt_phase(
        self,
        *,
        attention_mask: Tensor | None = None,
        conversation: Conversation | None = None,
        gather: Collection[str] = (),
    ) -> Iterator[None]:
        """Run prompt tokens through the full model and gather their statistic; experts are selected at the end.

        Several forward calls inside are chunks of one prompt. Left or right padding never counts: the two-dimensional
        `attention_mask` that the model is called with is read, or the one given here.

        Args:
            attention_mask: which of the phase's tokens are real, for a model that is called without a two-dimensional
                mask. Shape (B, S), S being all tokens of the phase.
            conversation: what earlier turns gathered (`handle.conversation`), to be continued; `None` starts anew.
            gather: what to gather beside what this handle needs, for another config: its `gathers`.

        Raises:
            ValueError: inside another phase, in training mode, after `detach`, or no prompt token came.
        """
        self._enter(Phase.PROMPT)
        self._conversation = Conversation() if conversation is None else conversation.copy()
        more = self.config.gathers.union(gather)
        self._gathering = Gathering(self._conversation, attention_mask, more)
        if not self._static and not self.mixed:
            self._experts, self._ready = {}, False
        for name in {"inputs", "ups"} - more:
            getattr(self._conversation, name).clear()  # they would not be of all tokens any more
        for sparse in self._sparse.values():
            if isinstance(sparse, MaskedFF):
                sparse.clear()
        hook = self.model.register_forward_pre_hook(self._gathering.see_arguments, with_kwargs=True)
        try:
            yield
            if not self._static and not self.mixed:
                self._select()
                self._rows = None
        finally:
            hook.remove()
            self._phase = Phase.FULL

    @contextmanager
    def generation_phase(self, *, rows: Sequence[int] | None = None) -> Iterator[None]:
        """Compute the experts only.

        Args:
            rows: for several continuations of the prompts: row i of this batch continues prompt `rows[i]`, and uses its
                experts. `None`: the batch is that of the prompt phase.

        Raises:
            ValueError: inside another phase, in training mode, after `detach`, before a prompt phase, or `rows` names a
                prompt that there was not.
        """
        self._enter(Phase.GENERATION)
        try:
            if not self._experts and not self._ready:
                raise ValueError("there are no experts yet: run the prompt inside handle.prompt_phase() first")
            self._use_experts_of(None if rows is None else tuple(rows))
            yield
        finally:
            self._phase = Phase.FULL

    def select(self, conversation: Conversation, config: GriffinConfig) -> Selected:
        """Select one sequence's experts, of a handle that is `mixed`; they are computed once `use` names them.

        Args:
            conversation: what the prompt phase has gathered of the sequence.
            config: how to select; `layers` that it leaves out stay whole, `batch` and `backend` are the handle's.

        Raises:
            ValueError: as `attach`, or the prompt phase has not gathered what the config needs.
        """
        config = replace(config, backend=self.config.backend)
        return select_one(self.model, self._all_blocks, self.backend.name, conversation, config)

    def use(self, batch: Sequence[Selected]) -> None:
        """Take these sequences, in this order, as the batch of the next generation phases.

        Raises:
            ValueError: the handle is not `mixed`, or token tiers of the sequences differ in their splits.
        """
        if not self.mixed:
            raise ValueError("sequences were selected together; make the handle with mixed=True")
        for layer, sparse in self._sparse.items():
            tier = choice.joined([own.tiers.get(layer) for own in batch])
            sparse.select([own.experts[layer] for own in batch], tier)
        self._ready = True

    def detach(self) -> None:
        """Put the model back exactly as it was. Calling it twice does nothing."""
        self._phase = Phase.FULL
        self._attached = False
        self._undo.close()

    def __enter__(self) -> Griffin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _patch(self, stack: ExitStack) -> None:
        """Patch the FF blocks until `stack` closes."""
        make_sketches(self.blocks, self._splits)
        for block in self.blocks:
            if self.mixed or self._splits or self._count(block) < block.width:
                self._sparse[block.layer] = self.backend.make(block, stack)
            for which, projection in enumerate(block.inputs):
                patch(stack, projection, "forward", self._input_forward(block, which, projection.forward))
            patch(stack, block.output, "forward", self._output_forward(block, block.output.forward))
        if self.backend.name == "native":  # the native step runs the layers that stay whole, too
            for block in self._all_blocks:
                own = self._sparse.get(block.layer)
                self._native[block.layer] = own if isinstance(own, native.NativeFF) else native.NativeFF(block, stack)

    def _begin(self, undo: ExitStack) -> None:
        """Everything is patched, and `undo` takes it off again."""
        self._undo = undo
        self._attached = True
        if self._static and not self.mixed:
            self._select()
        logger.info(
            "attached to %d FF blocks, %s at density %g, backend %s (%s)",
            len(self.blocks),
            self.config.selection,
            self.config.density,
            self.backend.name,
            self.backend.reason,
        )

    def _input_forward(self, block: FFBlock, which: int, full: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        sparse = self._sparse.get(block.layer)

        def forward(x: Tensor) -> Tensor:
            if sparse is not None and self._phase is Phase.GENERATION:
                return sparse.read(which, x)
            if self._phase is not Phase.PROMPT:
                return full(x)
            if which == 0:
                self._gathering.see_input(x)
            y = full(x)
            if which == len(block.inputs) - 1:
                self._gathering.see_up(block, y)
            return y

        setattr(forward, _MARK, True)
        return forward

    def _output_forward(self, block: FFBlock, full: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        sparse = self._sparse.get(block.layer)

        def forward(z: Tensor) -> Tensor:
            if sparse is not None and self._phase is Phase.GENERATION:
                return sparse.write(z)
            if self._phase is Phase.PROMPT and (self.mixed or not self._static):
                self._gathering.add(block, z)
            return full(z)

        setattr(forward, _MARK, True)
        return forward

    def _enter(self, phase: Phase) -> None:
        if not self._attached:
            raise ValueError("this handle is detached; call griffin.attach again")
        if self._phase is not Phase.FULL:
            raise ValueError(f"already in the {self._phase.value} phase; phases do not nest")
        refuse_training(self.model)
        self._phase = phase

    def _use_experts_of(self, rows: tuple[int, ...] | None) -> None:
        """Hand the backend the experts of these sequences, where each sequence has its own."""
        sequences = max(map(len, self._experts.values()), default=1)  # wanda has weights masked, and no experts
        if rows == tuple(range(sequences)):
            rows = None
        if sequences == 1 or rows == self._rows:
            return
        if rows is not None and not (rows and 0 <= min(rows) <= max(rows) < sequences):
            raise ValueError(f"rows is {rows}; expected numbers of the {sequences} prompts, from 0 to {sequences - 1}")
        chosen = range(sequences) if rows is None else rows[:1] if len(set(rows)) == 1 else rows
        for layer, sparse in self._sparse.items():
            sparse.select([self._experts[layer][row] for row in chosen], choice.rows_of(self._tiers.get(layer), chosen))
        self._rows = rows

    def _count(self, block: FFBlock) -> int:
        """Experts of a layer."""
        own = self._splits.get(block.layer)
        return self.config.experts_of(block.width) if own is None else own.experts

    def _bytes_of(self, block: FFBlock) -> int:
        """Bytes of a layer that a token reads."""
        own = self._splits.get(block.layer)
        return block.nbytes * self._count(block) // block.width if own is None else own.nbytes

    @torch.no_grad()
    def _select(self) -> None:
        """Select the experts of every layer and hand them to the backend."""
        start = time.perf_counter()
        if self._masked:
            mask_weights(self.blocks, self._sparse, self._conversation, self.config)
            self._ready = True
            self.selection_s = time.perf_counter() - start
            return
        counts = {block.layer: self._count(block) for block in self.blocks}
        known = self._conversation if self._profile is None else self._profile.added_to(self._conversation)
        experts = choice.experts(self.blocks, known, self.config, counts)
        tiers = choice.tiers(self.blocks, known, self.config, self._splits)
        for layer, sparse in self._sparse.items():
            sparse.select(experts[layer], tiers.get(layer))
        self._experts, self._tiers = experts, tiers
        self.selection_s = time.perf_counter() - start


def refuse_training(model: nn.Module) -> None:
    """Raise `ValueError` for a model in training mode: dropout would spoil the statistic."""
    if model.training:
        raise ValueError("the model is in training mode; GRIFFIN is for generation: call model.eval() first")


def _refuse_attached(blocks: tuple[FFBlock, ...]) -> None:
    for block in blocks:
        if getattr(vars(block.output).get("forward"), _MARK, False):
            raise ValueError(
                "GRIFFIN is attached to this model already; call detach() on the first handle, or leave its with-block"
            )
