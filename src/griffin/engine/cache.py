"""A key/value cache with room to grow, so that a step appends in place and native code can write into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_ROOM = 256  # tokens by which a buffer grows at least


class BufferedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: views of buffers that are longer than what is in them.

    Args:
        room: tokens that there is room for from the start.

    Shapes:
        keys, values: (B, K, tokens, E), views of buffers (B, K, capacity, E).
    """

    def __init__(self, room: int = 0, **kwargs: Any) -> None:
        self.room = room
        self.buffers: list[Tensor | None] = [None, None]
        self.replaced = 0  # how often a buffer was replaced by another
        self.length = 0
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    # Transformers' own methods (crop, reorder_cache, batch_select_indices, ...) read and assign these two.
    @property
    def keys(self) -> Tensor | None:
        """The cached keys."""
        return self._view(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.buffers[0] = self._buffer_of(value, 0)
        self.length = 0 if value is None or value.dim() < 4 else value.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """The cached values."""
        return self._view(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.buffers[1] = self._buffer_of(value, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them.

        Shapes: each (B, K, S, E).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        for which, states in enumerate((key_states, value_states)):
            buffer = self._reserved(which, end, states)
            buffer[:, :, self.length : end] = states
        self.length = end
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. Transformers' own crop cuts keys and then values, which here share one length.

        Args:
            tokens_to_remove: 0 or negative: minus the number of tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop was called with {tokens_to_remove}; expected minus the number of tokens to remove")
        self.length = max(0, self.length + tokens_to_remove)

    def holds(self, tokens: int) -> bool:
        """Whether there is room for so many tokens in all."""
        return all(_fits(buffer, tokens) for buffer in self.buffers)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all.

        Raises:
            ValueError: the layer is empty, so the shape of its keys is not known.
        """
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.dim() < 4:
            raise ValueError("the cache is empty: run the prompt first")
        self._reserved(0, tokens, keys)
        self._reserved(1, tokens, values)

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self.length

    def _view(self, which: int) -> Tensor | None:
        buffer = self.buffers[which]
        return buffer if buffer is None or buffer.dim() < 4 else buffer[:, :, : self.length]

    def _buffer_of(self, value: Tensor | None, which: int) -> Tensor | None:
        """The buffer behind an assigned value: the present one if the value is its beginning (a crop)."""
        buffer = self.buffers[which]
        if (
            value is not None
            and buffer is not None
            and value.dim() == buffer.dim() == 4
            and value.data_ptr() == buffer.data_ptr()
            and value.stride() == buffer.stride()
            and value.shape[:2] == buffer.shape[:2]
        ):
            return buffer
        self.replaced += 1
        return value

    def _reserved(self, which: int, tokens: int, like: Tensor) -> Tensor:
        buffer = self.buffers[which]
        if buffer is not None and _fits(buffer, tokens):
            return buffer
        capacity = self.room if self.room >= tokens else tokens + max(_ROOM, tokens // 2)
        larger = torch.empty((*like.shape[:2], capacity, like.shape[3]), dtype=like.dtype, device=like.device)
        if buffer is not None and buffer.dim() == 4:
            larger[:, :, : self.length] = buffer[:, :, : self.length]
        self.buffers[which] = larger
        self.replaced += 1
        return larger


class BufferedCache(Cache):
    """A cache of such layers. Layers with a sliding window keep all tokens; the mask hides the old ones.

    Args:
        layers: how many.
        room: tokens that there is room for from the start, so that nothing is copied until then.
    """

    def __init__(self, layers: int, room: int = 0) -> None:
        super().__init__(layers=[BufferedLayer(room) for _ in range(layers)])

    @property
    def sequences(self) -> int:
        """Number of sequences in it; 0 while it is empty."""
        keys = self._buffered[0].keys
        return 0 if keys is None else keys.shape[0]

    @property
    def length(self) -> int:
        """Tokens of each sequence in it, padding included."""
        return self._buffered[0].length

    @property
    def replaced(self) -> int:
        """Changes whenever a buffer is another one."""
        return sum(layer.replaced for layer in self._buffered)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all.

        Raises:
            ValueError: the cache is empty, so the shape of its keys is not known.
        """
        for layer in self._buffered:
            if not layer.holds(tokens):
                layer.reserve(tokens)

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values with the room behind them, each (B, K, capacity, E)."""
        keys, values = self._buffered[layer].buffers
        assert keys is not None
        assert values is not None
        return keys, values

    def holds(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether these are the buffers, of every layer."""
        return all(
            keys is pair[0] and values is pair[1]
            for (keys, values), pair in zip((layer.buffers for layer in self._buffered), buffers, strict=True)
        )

    def move_into(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy all tokens into other buffers, of every layer, and hold those from now on.

        Shapes: each (B, K, capacity, E), with room for the tokens.
        """
        for layer, pair in zip(self._buffered, buffers, strict=True):
            for states, buffer in zip((layer.keys, layer.values), pair, strict=True):
                assert states is not None
                buffer[:, :, : layer.length] = states
            layer.buffers = list(pair)
            layer.replaced += 1

    def why_not_uniform(self, dtype: torch.dtype) -> str | None:
        """Why the native step cannot read the keys and values: their shapes or dtypes differ; `None` if it can."""
        shapes = set()
        for layer in self._buffered:
            for states in (layer.keys, layer.values):
                if states is None or states.dim() < 4:
                    return "the key/value cache is empty: run the prompt first"
                if states.dtype != dtype:
                    return f"the prompt left keys and values of {states.dtype} (autocast?), and the model is {dtype}"
                shapes.add((states.shape[0], states.shape[2]))
        return f"the cache's layers hold batches and lengths {sorted(shapes)}" if len(shapes) > 1 else None

    def advance(self, tokens: int = 1) -> None:
        """So many tokens were written behind the others, into every layer's buffers."""
        for layer in self._buffered:
            layer.length += tokens

    def cut(self, tokens: int) -> None:
        """Forget all tokens but the first so many."""
        for layer in self._buffered:
            layer.length = min(layer.length, tokens)

    @property
    def _buffered(self) -> list[BufferedLayer]:
        return self.layers  # type: ignore[return-value]


def _fits(buffer: Tensor | None, tokens: int) -> bool:
    return buffer is not None and buffer.dim() == 4 and buffer.shape[2] >= tokens and buffer.is_contiguous()
