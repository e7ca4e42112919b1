"""The model's own forward for new tokens after those in a key/value cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


class Forward:
    """The model's forward, with the positions that padding asks for.

    Args:
        model: the model.
        cache: keys and values so far; extended by every call.
        attention_mask: 1 where a token is real, (B, S) or shorter than what comes; `None` where there is no padding.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, attention_mask: Tensor | None) -> None:
        self._model, self._cache, self._mask = model, cache, attention_mask
        accepted = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of the last position.

        Shapes: tokens (B, S), int64. Returns (B, V), float32.
        """
        arguments: dict[str, Any] = dict(self._last_only)
        if self._mask is not None:
            total = int(self._cache.get_seq_length()) + tokens.shape[1]
            if total > self._mask.shape[1]:  # generated tokens are all real
                ones = self._mask.new_ones((self._mask.shape[0], total - self._mask.shape[1]))
                self._mask = torch.cat([self._mask, ones], dim=1)
            mask = self._mask[:, :total]
            arguments["attention_mask"] = mask
            if self._positions:
                positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
                arguments["position_ids"] = positions[:, -tokens.shape[1] :]
        outputs = self._model(tokens, past_key_values=self._cache, use_cache=True, **arguments)
        logits: Tensor = outputs.logits[:, -1].float()
        return logits
