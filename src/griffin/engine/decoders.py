"""The one chooser of the generation step: the native step, the compiled one, or the model's own forward.

Whoever generates asks here: `griffin.generate`, chat, batches, the server, evaluations, and `griffin info`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

from griffin.attachment import Griffin, Selection
from griffin.engine.cache import BufferedCache
from griffin.engine.compiled import CompiledStep, why_not_compiled
from griffin.engine.forward import Forward
from griffin.engine.native_decoder import Caches, NativeDecoder, UnsupportedError, why_not_native
from griffin.native import kernel

logger = logging.getLogger("griffin")

STEPS = ("auto", "native", "compiled", "captured", "eager")
"""Names of generation steps.

`auto` is the native step where it runs, on a GPU the compiled one, else the model's own forward (`eager`). `captured`
is the compiled step without `torch.compile`: a CUDA graph of the model's own kernels.
"""


def new_cache(model: PreTrainedModel, room: int = 0, step: str = "auto") -> Cache:
    """An empty key/value cache; where the native or the compiled step may run the model, one that it can write into.

    Args:
        model: the model.
        room: tokens to make room for at once, so that nothing is copied until then.
        step: the generation step that will use it, a name of `STEPS`.
    """
    if why_not_native(model) is None or (_wants_compiled(model, step) and why_not_compiled(model) is None):
        return BufferedCache(model.config.get_text_config().num_hidden_layers, room)
    return DynamicCache(config=model.config)


class Decoder(Protocol):
    """The generation step of some sequences, which stay the same ones from step to step."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run one token of each sequence, and append its keys and values.

        Shapes: tokens (B,), int64. Returns logits (B, V), float32.
        """


class Decoders:
    """Which generation step a model takes, and decoders that take it.

    A fast step that was possible and is lost is a warning, once, with the reason.

    Args:
        model: the model, in eval mode.
        handle: GRIFFIN attached to it; `None` runs the full model.
        step: which step, a name of `STEPS`.

    Raises:
        ValueError: there is no step of that name, or it was asked for by name and cannot run the model.
    """

    def __init__(self, model: PreTrainedModel, handle: Griffin | None, step: str = "auto") -> None:
        if step not in STEPS:
            raise ValueError(f"step is {step!r}; expected one of {', '.join(STEPS)}")
        self._model, self._handle, self._asked = model, handle, step
        self._native: NativeDecoder | None = None
        self._compiled = False
        self.why_not: str | None = None
        """Why the native step cannot be taken, whatever the sequences; `None` if it can."""
        if step in ("auto", "native"):
            self._choose_native()
        else:
            self.why_not = f"step {step} was asked for"
        if self._native is None and _wants_compiled(model, step):
            self._choose_compiled()
        if step == "native" and self._native is None:
            raise ValueError(f"the native step cannot be taken: {self.why_not}")

    def _choose_native(self) -> None:
        model, handle = self._model, self._handle
        if handle is None:
            self.why_not = "the full model, without GRIFFIN"
        elif (reason := why_not_native(model)) is not None:
            self.why_not = reason
            logger.info("generation step: not the native one, since %s", reason)
        elif not handle.native_ff:
            self.why_not = f"the backend is {handle.backend.name}"
            logger.info("generation step: not the native one, since %s", self.why_not)
        else:
            try:
                self._native = NativeDecoder(model, handle.native_ff)
            except UnsupportedError as error:
                self.why_not = str(error)
                _warn(self.why_not)

    def _choose_compiled(self) -> None:
        reason = why_not_compiled(self._model)
        if reason is None and self._handle is not None and self._handle.backend.name == "reference":
            reason = "the reference backend indexes the weights at every step"
        self._compiled = reason is None
        if reason is not None:
            self.why_not = reason
            if self._asked != "auto":
                raise ValueError(f"the {self._asked} step cannot be taken: {reason}")
            _warn(reason)

    @property
    def name(self) -> str:
        """The step, with the reason where it is the slow one."""
        if self._compiled:
            return "compiled" if self._asked == "auto" else self._asked
        return "native" if self._native is not None else f"the model's own forward ({self.why_not})"

    def decoder(
        self, caches: Sequence[Cache], selections: Sequence[Selection], attention_mask: Tensor | None = None
    ) -> Decoder:
        """The step for these sequences, after their prompts.

        Args:
            caches: their keys and values: one cache that holds all of them, or one for each sequence.
            selections: what they are computed with: one for each sequence, or one for all; empty for the full model.
            attention_mask: 1 where a token is real; `None` where there is no padding, and for several caches.

        Shapes:
            attention_mask: (B, S), S tokens in the cache or fewer.

        Raises:
            ValueError: a step that was asked for by name cannot run these sequences.
        """
        if self._native is not None:
            reason = _why_not_these(self._model, caches, attention_mask)
            if reason is None:
                native_caches = Caches([each for each in caches if isinstance(each, BufferedCache)])
                return NativeStep(self._native, native_caches, selections, _starts(attention_mask))
            if self._asked == "native":
                raise ValueError(f"the native step cannot be taken: {reason}")
            _warn(reason)
        if self._compiled:
            if (reason := _why_not_compiled_these(self._model, caches, attention_mask)) is None:
                starts = _starts(attention_mask)
                assert isinstance(caches[0], BufferedCache)
                compiled = self._asked != "captured"
                return CompiledStep(self._model, self._handle, caches[0], selections, starts, compiled=compiled)
            if self._asked != "auto":
                raise ValueError(f"the {self._asked} step cannot be taken: {reason}")
            _warn(reason)
        return EagerStep(self._model, self._handle, caches, selections, attention_mask)


class NativeStep:
    """One call of the native library for all layers."""

    def __init__(
        self, decoder: NativeDecoder, caches: Caches, selections: Sequence[Selection], starts: Tensor | None
    ) -> None:
        self._decoder, self._caches, self._starts = decoder, caches, starts
        self._experts = decoder.experts_of(selections)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._decoder.step(tokens, self._caches, self._experts, self._starts)

    def rows(self, tokens: Tensor) -> Tensor:
        """Run the next tokens of the only sequence at once, each after those before it; all of them are appended.

        Shapes: tokens (m,), int64, 1 to 16. Returns logits (m, V), float32.
        """
        starts = None if self._starts is None else self._starts.expand(len(tokens)).contiguous()
        return self._decoder.step(tokens, self._caches, self._experts, starts, [len(tokens)])


class EagerStep:
    """The model's own forward, in the generation phase."""

    def __init__(
        self,
        model: PreTrainedModel,
        handle: Griffin | None,
        caches: Sequence[Cache],
        selections: Sequence[Selection],
        attention_mask: Tensor | None,
    ) -> None:
        self._model, self._handle, self._selections = model, handle, selections
        self._caches = caches
        self._forward = Forward(model, caches[0], attention_mask)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        if self._handle is None:
            return self._run(tokens)
        with self._handle.turn.taken():
            self._handle.use(self._selections)  # another stream with this handle may have used its own since
            with self._handle.generation_phase():
                return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        if len(self._caches) == 1:
            return self._forward(tokens[:, None])
        lengths = torch.tensor([int(cache.get_seq_length()) for cache in self._caches], device=tokens.device)
        longest = int(lengths.max())
        mask = torch.arange(longest + 1, device=tokens.device) >= (longest - lengths)[:, None]
        return Forward(self._model, _Joined(self._caches), mask.long())(tokens[:, None])


def _wants_compiled(model: PreTrainedModel, step: str) -> bool:
    """Whether the compiled step is to be taken where it can be: on a CPU only if it was asked for."""
    return step in ("compiled", "captured") or (step == "auto" and model.device.type == "cuda")


def _why_not_compiled_these(model: PreTrainedModel, caches: Sequence[Cache], mask: Tensor | None) -> str | None:
    """Why the compiled step cannot run these sequences, though it can run the model; `None` if it can."""
    if len(caches) > 1:
        return "the sequences have a key/value cache each, and the compiled step runs those of one cache"
    return _why_not_written(model, caches, mask, "compiled")


def _why_not_these(model: PreTrainedModel, caches: Sequence[Cache], mask: Tensor | None) -> str | None:
    """Why the native step cannot run these sequences, though it can run the model; `None` if it can."""
    if (reason := _why_not_written(model, caches, mask, "native")) is not None:
        return reason
    sequences = sum(each.sequences for each in caches if isinstance(each, BufferedCache))
    if sequences > kernel.MAX_ROWS:
        return f"the batch has {sequences} sequences, and the native step runs at most {kernel.MAX_ROWS}"
    return None


def _why_not_written(model: PreTrainedModel, caches: Sequence[Cache], mask: Tensor | None, step: str) -> str | None:
    """Why a step that writes into the caches itself cannot; `None` if it can."""
    for each in caches:
        if not isinstance(each, BufferedCache):
            return (
                f"the key/value cache is a {type(each).__name__}, into which the {step} step cannot write; make it by "
                "griffin.new_cache(model)"
            )
        if (reason := each.why_not_uniform(model.dtype)) is not None:
            return reason
    if torch.is_autocast_enabled(model.device.type):
        return f"autocast is on, and the {step} step has one dtype"
    if mask is not None and not bool((mask.long().diff(dim=1) >= 0).all()):
        return f"the batch is padded on the right or within, and the {step} step reads left-padded batches"
    return None


def _starts(mask: Tensor | None) -> Tensor | None:
    """First real position of each sequence of a left-padded batch. Shapes: (B,), int32."""
    return None if mask is None else (mask.shape[1] - mask.sum(dim=1)).to(torch.int32).contiguous()


@cache
def _warn(reason: str) -> None:
    """Warn of a fast step that is lost, once for each reason."""
    logger.warning("generation step: the model's own forward, which is slower, since %s", reason)


class _JoinedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values of several sequences, left-padded for the model's own attention."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append each row to its sequence; return all of them, (B, K, longest, E)."""
        updated = [
            layer.update(key_states[row : row + 1], value_states[row : row + 1])
            for row, layer in enumerate(self._layers)
        ]
        longest = self.get_seq_length()
        keys, values = (
            torch.cat([F.pad(each, (0, 0, longest - each.shape[2], 0)) for each in which])
            for which in zip(*updated, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(int(layer.get_seq_length()) for layer in self._layers)


class _Joined(Cache):
    def __init__(self, caches: Sequence[Cache]) -> None:
        layers = zip(*(each.layers for each in caches), strict=True)
        super().__init__(layers=[_JoinedLayer(of_sequences) for of_sequences in layers])
