"""Which models and batches take the fast step, and taking it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from griffin.attachment import Griffin
from griffin.engine.cache import BufferedCache
from griffin.engine.native_decoder import Caches, NativeDecoder, UnsupportedError, knows
from griffin.native import kernel

logger = logging.getLogger("griffin")


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty key/value cache, one that the native step can write into where the model may take that step."""
    if knows(model) is None:
        return BufferedCache(model.config.get_text_config().num_hidden_layers)
    return DynamicCache(config=model.config)


class NativeStep:
    """The generation step of one batch by the native library: token ids in, logits out."""

    def __init__(self, decoder: NativeDecoder, handle: Griffin, cache: BufferedCache, start: Tensor | None) -> None:
        self._decoder, self._caches, self._start = decoder, Caches([cache]), start
        self._experts, self._kept = decoder.experts_of(handle.native_ff, handle.pruned)

    @classmethod
    def of(
        cls, model: PreTrainedModel, handle: Griffin, cache: Cache, attention_mask: Tensor | None
    ) -> NativeStep | None:
        """The step for this batch, or `None`, said in the log with the reason, where the model's own forward runs."""
        try:
            return cls._of(model, handle, cache, attention_mask)
        except UnsupportedError as reason:
            logger.info("generation step: the model's own forward, since %s", reason)
            return None

    @classmethod
    def _of(cls, model: PreTrainedModel, handle: Griffin, cache: Cache, mask: Tensor | None) -> NativeStep:
        if (reason := knows(model)) is not None:
            raise UnsupportedError(reason)
        if not handle.native_ff:
            raise UnsupportedError(f"the backend is {handle.backend.name}")
        if not isinstance(cache, BufferedCache):
            raise UnsupportedError(f"the cache is a {type(cache).__name__}, not griffin.new_cache's")
        start = None
        if mask is not None:
            if not bool((mask.long().diff(dim=1) >= 0).all()):
                raise UnsupportedError("the batch is not left-padded")
            start = (mask.shape[1] - mask.sum(dim=1)).to(torch.int32).contiguous()
        if (sequences := cache.sequences) > kernel.MAX_ROWS:
            raise UnsupportedError(f"the batch has {sequences} sequences, more than {kernel.MAX_ROWS}")
        return cls(NativeDecoder(model, handle.native_ff), handle, cache, start)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run one token of each sequence.

        Shapes: tokens (B,), int64. Returns logits (B, V), float32.
        """
        return self._decoder.step(tokens, self._caches, self._experts, self._start)


def step_of(model: Any, handle: Griffin | None) -> str:
    """Name of the step that this model's generation takes, with the reason where it is the slow one."""
    if handle is None:
        return "eager (the full model, without GRIFFIN)"
    reason = knows(model) or ("" if handle.native_ff else f"the backend is {handle.backend.name}")
    return f"eager ({reason})" if reason else "native"
