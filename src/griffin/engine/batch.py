"""Continuous batching: sequences of different lengths and configs, which join and leave between steps.

Every sequence has a key/value cache and a selection of its own, so joining and leaving copy nothing. A prompt runs by
itself through the full model, chunk by chunk; a step runs all sequences that are in their generation phase together.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from griffin.attachment import Griffin, Selection, Statistics
from griffin.config import GriffinConfig
from griffin.engine.cache import BufferedCache
from griffin.engine.decoders import Decoder, Decoders
from griffin.engine.forward import Forward
from griffin.engine.lossless import Drafts
from griffin.engine.prefix import Prefix, PrefixCache
from griffin.native import kernel


class Running:
    """One sequence in its generation phase.

    Args:
        cache: its keys and values.
        selection: what it is computed with.
    """

    def __init__(self, cache: BufferedCache, selection: Selection) -> None:
        self.cache, self.selection = cache, selection
        self.token = 0  # to be run by the next step
        self.drafts: Drafts | None = None
        """Lossless drafts, for steps that it runs alone; only of the full model."""

    def copies(self, n: int) -> list[Running]:
        """So many sequences that go on from here, this one first."""
        return [self, *(Running(copy.deepcopy(self.cache), self.selection) for _ in range(n - 1))]


class Prefill:
    """A prompt on its way through the full model. Made by `Batch.prefill`."""

    def __init__(
        self,
        model: PreTrainedModel,
        handle: Griffin,
        ids: Sequence[int],
        config: GriffinConfig,
        room: int,
        prefixes: PrefixCache | None,
    ) -> None:
        self._handle, self._plan = handle, handle.plan_for(config)
        self._cache = BufferedCache(model.config.get_text_config().num_hidden_layers, room)
        self._forward = Forward(model, self._cache, None)
        self._statistics = Statistics()
        self._prefix: Prefix | None = None
        self.reused = 0
        """Tokens of the prompt that are known from earlier ones, and need not be run."""
        if prefixes is not None:
            self._prefix = prefixes.prefix_of(ids, handle.plan.needs | self._plan.needs)
            self.reused, self._statistics = self._prefix.read(self._cache)
        self._rest = torch.tensor([list(ids[self.reused :])], device=model.device)

    @property
    def left(self) -> int:
        """Tokens that have not been run."""
        return self._rest.shape[1]

    @torch.no_grad()
    def run(self, tokens: int) -> Tensor | None:
        """Run so many of the prompt's next tokens.

        Shapes:
            Returns the logits (V,), float32, after the last one; `None` before.
        """
        chunk, self._rest = self._rest[:, :tokens], self._rest[:, tokens:]
        plan, start = self._plan, self._cache.length
        gathers = plan.gathers or self._prefix is not None  # what is kept serves every config
        gathering = self._handle.gather(self._statistics, needs=plan.needs) if gathers else nullcontext()
        with gathering as statistics:
            logits = self._forward(chunk)
        if statistics is not None:
            self._statistics = statistics
        if self._prefix is not None:
            self._prefix.keep(self._cache, start, self._statistics)
        return None if self.left else logits[0]

    def running(self) -> Running:
        """The sequence, once the prompt has been run: its experts are selected now.

        Raises:
            ValueError: as `Plan.select`.
        """
        if self.left:
            raise ValueError(f"{self.left} tokens of the prompt have not been run")
        return Running(self._cache, self._plan.select(self._statistics)[0])


class Batch:
    """The sequences of one model. It holds none of them: a step is told which.

    Args:
        model: the model, in eval mode.
        handle: GRIFFIN attached to it.
    """

    def __init__(self, model: PreTrainedModel, handle: Griffin) -> None:
        self._model, self._handle = model, handle
        self._decoders = Decoders(model, handle)
        self._groups: dict[tuple[int, ...], _Group] = {}

    @property
    def step_name(self) -> str:
        """What computes a step, with the reason where it is the slow one."""
        return self._decoders.name

    def prefill(
        self, ids: Sequence[int], config: GriffinConfig, room: int = 0, prefixes: PrefixCache | None = None
    ) -> Prefill:
        """Begin a prompt.

        Args:
            ids: its tokens.
            config: how its experts will be selected; the backend is the handle's.
            room: tokens, the answer's included, to make room for at once.
            prefixes: where the prompt's beginning is looked up and kept; `None` runs all of it. The numbers are the
                same if all prompts run in chunks of a block.

        Raises:
            ValueError: as `Griffin.plan_for`.
        """
        return Prefill(self._model, self._handle, ids, config, room, prefixes)

    @torch.no_grad()
    def step(self, sequences: Sequence[Running]) -> list[Tensor | Exception]:
        """Run the `token` of every sequence.

        An exception that concerns one sequence only is given in its place; the others go on.

        Shapes:
            Returns for each sequence its logits (V,), float32.
        """
        results: list[Tensor | Exception | None] = [None] * len(sequences)
        kinds: dict[Hashable, list[int]] = {}
        for place, sequence in enumerate(sequences):
            kinds.setdefault(self._kind(sequence.selection), []).append(place)
        groups: dict[tuple[int, ...], _Group] = {}
        for places in kinds.values():
            for at in range(0, len(places), kernel.MAX_ROWS):
                part = places[at : at + kernel.MAX_ROWS]
                name = tuple(id(sequences[place]) for place in part)
                groups[name] = group = self._groups.get(name) or _Group([sequences[place] for place in part])
                for place, logits in zip(part, self._alone_if_together_fails(group), strict=True):
                    results[place] = logits
        self._groups = groups  # sequences that have left are let go
        return [logits for logits in results if logits is not None]

    def _alone_if_together_fails(self, group: _Group) -> list[Tensor | Exception]:
        lengths = [sequence.cache.length for sequence in group.sequences]
        try:
            return list(self._run(group))
        except Exception as error:
            for sequence, length in zip(group.sequences, lengths, strict=True):
                sequence.cache.cut(length)  # some layers may be a token ahead
            if len(group.sequences) == 1:
                return [error]
            return [self._alone_if_together_fails(_Group([sequence]))[0] for sequence in group.sequences]

    def _run(self, group: _Group) -> Tensor:
        tokens = torch.tensor([sequence.token for sequence in group.sequences], device=self._model.device)
        if group.decoder is None:
            caches = [sequence.cache for sequence in group.sequences]
            group.decoder = self._decoders.decoder(caches, [sequence.selection for sequence in group.sequences])
            if len(caches) == 1 and (drafts := group.sequences[0].drafts) is not None:
                group.decoder = drafts.over(group.decoder, caches[0])
        logits = group.decoder(tokens)
        for sequence in group.sequences:
            if sequence.drafts is not None:
                sequence.drafts.ran(sequence.token)
        return logits

    def _kind(self, selection: Selection) -> Hashable:
        """What sequences must have in common to be computed together."""
        splits = tuple((layer, dynamic.split) for layer, dynamic in selection.dynamic.items())
        if self._decoders.why_not is None:
            return splits
        return splits, tuple((layer, experts.shape[0]) for layer, experts in selection.experts.items())


class _Group:
    """Sequences that one step computes together, and their decoder, which outlives the step."""

    def __init__(self, sequences: Sequence[Running]) -> None:
        self.sequences = sequences
        self.decoder: Decoder | None = None
