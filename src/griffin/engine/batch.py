"""Continuous batching: sequences of different lengths and configs, which join and leave between steps.

Every sequence has a key/value cache and experts of its own, so joining and leaving copy nothing. A prompt runs by
itself through the full model, chunk by chunk; a step runs all sequences that are in their generation phase together.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicLayer, PreTrainedModel

from griffin.attachment import Conversation, Griffin, Selected
from griffin.config import GriffinConfig
from griffin.engine.cache import BufferedCache
from griffin.engine.native_decoder import Caches, NativeDecoder, UnsupportedError, knows
from griffin.engine.step import Forward
from griffin.native import kernel


class Row:
    """One sequence in its generation phase.

    Args:
        cache: its keys and values.
        selected: its experts.
    """

    def __init__(self, cache: BufferedCache, selected: Selected) -> None:
        self.cache, self.selected = cache, selected
        self.token = 0  # to be run by the next step

    def copies(self, n: int) -> list[Row]:
        """So many sequences that go on from here, this one first."""
        return [self, *(Row(copy.deepcopy(self.cache), self.selected) for _ in range(n - 1))]


class Prompt:
    """A prompt on its way through the full model. Made by `Batch.prompt`."""

    def __init__(self, model: PreTrainedModel, handle: Griffin, ids: Sequence[int], config: GriffinConfig, room: int):
        self._handle, self._config = handle, config
        self._rest = torch.tensor([list(ids)], device=model.device)
        self._cache = BufferedCache(model.config.get_text_config().num_hidden_layers, room)
        self._forward = Forward(model, self._cache, None)
        self._conversation = Conversation()
        # The full model needs no statistic, and a static selection neither.
        self._gathers = (config.density < 1.0 and config.selection != "magnitude") or config.loss is not None

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
        more = {"ups"} if self._config.tier else ()
        with (
            self._handle.prompt_phase(conversation=self._conversation, gather=more) if self._gathers else nullcontext()
        ):
            logits = self._forward(chunk)
        if self._gathers:
            self._conversation = self._handle.conversation
        return None if self.left else logits[0]

    def row(self) -> Row:
        """The sequence, once the prompt has been run: its experts are selected now.

        Raises:
            ValueError: as `Griffin.select`.
        """
        if self.left:
            raise ValueError(f"{self.left} tokens of the prompt have not been run")
        return Row(self._cache, self._handle.select(self._conversation, self._config))


class Batch:
    """The sequences of one model. It holds none of them: a step is told which.

    Args:
        model: the model, in eval mode.
        handle: GRIFFIN attached to it with `mixed=True`.
    """

    def __init__(self, model: PreTrainedModel, handle: Griffin) -> None:
        if not handle.mixed:
            raise ValueError("continuous batching needs a handle with mixed=True")
        self._model, self._handle = model, handle
        self._decoder, self.step_name = _decoder(model, handle)
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._used: _Group | None = None  # whose experts the backend has

    def prompt(self, ids: Sequence[int], config: GriffinConfig, room: int = 0) -> Prompt:
        """Begin a prompt.

        Args:
            ids: its tokens.
            config: how its experts will be selected.
            room: tokens, the answer's included, to make room for at once.
        """
        return Prompt(self._model, self._handle, ids, config, room)

    @torch.no_grad()
    def step(self, rows: Sequence[Row]) -> list[Tensor | Exception]:
        """Run the `token` of every sequence.

        An exception that concerns one sequence only is given in its place; the others go on.

        Shapes:
            Returns for each row its logits (V,), float32.
        """
        found: list[Tensor | Exception | None] = [None] * len(rows)
        kinds: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            kinds.setdefault(self._kind(row.selected), []).append(place)
        groups: dict[tuple[int, ...], _Group] = {}
        for places in kinds.values():
            for at in range(0, len(places), kernel.MAX_ROWS):
                own = places[at : at + kernel.MAX_ROWS]
                name = tuple(id(rows[place]) for place in own)
                groups[name] = group = self._groups.get(name) or _Group([rows[place] for place in own])
                for place, logits in zip(own, self._alone_if_together_fails(group), strict=True):
                    found[place] = logits
        self._groups = groups  # rows that have left are let go
        return [logits for logits in found if logits is not None]

    def _alone_if_together_fails(self, group: _Group) -> list[Tensor | Exception]:
        lengths = [row.cache.length for row in group.rows]
        try:
            return list(self._run(group))
        except Exception as error:
            for row, length in zip(group.rows, lengths, strict=True):
                row.cache.cut(length)  # some layers may be a token ahead
            if len(group.rows) == 1:
                return [error]
            return [self._alone_if_together_fails(_Group([row]))[0] for row in group.rows]

    def _run(self, group: _Group) -> Tensor:
        tokens = torch.tensor([row.token for row in group.rows], device=self._model.device)
        if self._decoder is not None:
            if group.experts is None:
                self._use(group)
                group.experts = self._decoder.experts_of(self._handle.native_ff, self._handle.pruned)
                group.caches = Caches([row.cache for row in group.rows])
            assert group.caches is not None
            return self._decoder.step(tokens, group.caches, group.experts[0], None)
        self._use(group)
        caches = [row.cache for row in group.rows]
        with self._handle.generation_phase():
            if len(caches) == 1:
                return Forward(self._model, caches[0], None)(tokens[:, None])
            lengths = torch.tensor([cache.length for cache in caches], device=tokens.device)
            longest = int(lengths.max())
            mask = torch.arange(longest + 1, device=tokens.device) >= (longest - lengths)[:, None]
            return Forward(self._model, _Joined(caches), mask.long())(tokens[:, None])

    def _use(self, group: _Group) -> None:
        if self._used is not group:
            self._handle.use([row.selected for row in group.rows])
            self._used = group

    def _kind(self, selected: Selected) -> Hashable:
        """What sequences must have in common to be computed together."""
        if self._decoder is not None:
            return tuple((layer, tier.split) for layer, tier in selected.tiers.items())
        splits = tuple((layer, tier.split) for layer, tier in selected.tiers.items())
        return splits, tuple(own.shape[0] for own in selected.experts.values())


class _Group:
    """Sequences that one step computes together, and what of it outlives the step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.experts: Any = None
        self.caches: Caches | None = None


class _JoinedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values of several sequences, left-padded for the model's own attention."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append each row to its sequence; return all of them, (B, K, longest, E)."""
        own = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
            for row, layer in enumerate(self._layers)
        ]
        longest = self.get_seq_length()
        keys, values = (
            torch.cat([F.pad(each, (0, 0, longest - each.shape[2], 0)) for each in which])
            for which in zip(*own, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(int(layer.length) for layer in self._layers)


class _Joined(Cache):
    def __init__(self, caches: Sequence[BufferedCache]) -> None:
        super().__init__(layers=[_JoinedLayer(layers) for layers in zip(*(own.layers for own in caches), strict=True)])


def _decoder(model: PreTrainedModel, handle: Griffin) -> tuple[NativeDecoder | None, str]:
    """The native step, or `None`, and its name with the reason where it is the model's own forward."""
    try:
        if (reason := knows(model)) is not None:
            raise UnsupportedError(reason)
        if not handle.native_ff:
            raise UnsupportedError(f"the backend is {handle.backend.name}")
        return NativeDecoder(model, handle.native_ff), "native"
    except UnsupportedError as reason:
        return None, f"the model's own forward ({reason})"
