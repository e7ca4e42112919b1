"""The generation step of an accelerator: the model's own forward, compiled, over keys and values at fixed addresses.

At batch 1 an eager step is bound by launches. Here `torch.compile` traces the forward once, for every selection, every
number of experts and every length, and on a GPU the compiled step is captured as a CUDA graph, one a bucket of lengths.
Nothing in a step waits for the device. A prompt runs eagerly into a `BufferedCache`; its keys and values are then
copied into static buffers, which the cache holds from then on, so that the next turn's prompt finds them there.
"""

from __future__ import annotations

import gc
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache as remembered
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from griffin.attachment import Griffin, Selection
from griffin.engine.cache import BufferedCache
from griffin.weights.quantised import quantised_format

_LEAST = 256  # tokens of the smallest bucket
_KEPT = 4  # static caches of a model: batch sizes and buckets in use
_RECOMPILES = 64  # batch sizes, models and backends of one process
_WARM_UPS = 2  # runs before a capture: compilation, and libraries' own allocations


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Why a model's step cannot be compiled; `None` if it may."""
    kind = model.config.get_text_config().model_type
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers cannot compile a whole step of the family {kind}"
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention", "sliding_attention",
    }  # fmt: skip
    if others:
        return f"{kind} has layers of type {', '.join(sorted(others))}, whose state is no key/value cache"
    if (formats := quantised_format(model)) is not None:
        return f"the weights are packed ({formats}), for the native library on a CPU"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None


def bucket(tokens: int) -> int:
    """The capacity for so many tokens: four buckets from a power of two to the next, from 256 on."""
    if tokens <= _LEAST:
        return _LEAST
    step = max(_LEAST // 4, 1 << (tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process, whatever of."""
    return int(counters["stats"]["unique_graphs"])


class CompiledStep:
    """A step of the sequences of one cache.

    Args:
        model: the model.
        handle: GRIFFIN attached to it; `None`: the full model.
        cache: the sequences' keys and values, after their prompts.
        selections: what they are computed with: one for each sequence, or one for all.
        starts: first real position of each sequence, (B,); `None` where there is no padding.
        compiled: whether `torch.compile` is used, which takes a minute for a large model, once a process; without it
            the model's own kernels are captured.
        captured: whether a CUDA graph is captured, on a GPU.
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        handle: Griffin | None,
        cache: BufferedCache,
        selections: Sequence[Selection],
        starts: Tensor | None,
        *,
        compiled: bool = True,
        captured: bool = True,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        self._model, self._handle, self._cache, self._selections = model, handle, cache, selections
        self._starts, self._captured = starts, captured
        self._forward = _compiled(backend) if compiled else _step
        accepted = inspect.signature(model.forward).parameters
        self._accepted = "position_ids" in accepted, "logits_to_keep" in accepted
        self._states = _STATES.setdefault(model, OrderedDict())
        self._room: _State | None = None
        self._replaced = -1  # of the cache, when it got its room
        self._places: object = None
        self._handed_over = -1  # of the handle, when the places were taken

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """See `griffin.engine.decoders.Decoder`."""
        if self._handle is None:
            return self._run(tokens)
        with self._handle.turn.taken():
            self._handle.use(self._selections, whole_layers=True)
            with self._handle.generation_phase():
                return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        state = self._state()
        if tokens.is_cuda and self._captured:
            logits = state.replay(self._step, tokens, self._taken_places())
        else:
            logits = self._step(tokens, state)
        self._cache.advance()
        return logits

    def _taken_places(self) -> object:
        """Where a captured step reads weights and selections: they move with a prompt or another selection only."""
        handed_over = 0 if self._handle is None else self._handle.handed_over
        if handed_over != self._handed_over:
            buffers = () if self._handle is None else self._handle.buffers
            tensors = (*self._model.parameters(), *self._model.buffers(), *buffers)
            self._places = self._forward, tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)
            self._handed_over = handed_over
        return self._places

    def _step(self, tokens: Tensor, state: _State) -> Tensor:
        graphs = compiled_graphs()
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
            logits = self._forward(self._model, tokens, state.length, state.starts, state.cache, *self._accepted)
        if compiled_graphs() > graphs:
            gc.collect()  # compilation leaves cycles that hold views of weights, which detach transposes in place
        return logits

    def _state(self) -> _State:
        """The static cache that holds the sequences, with room for a token more."""
        cache, room = self._cache, self._room
        if room is None or cache.replaced != self._replaced or room.capacity <= cache.length:
            room = next((s for s in self._states.values() if s.owned_by(cache) and s.capacity > cache.length), None)
            if room is None:
                room = self._moved()
            self._room, self._replaced = room, cache.replaced
        room.set(cache.length, self._starts)
        return room

    def _moved(self) -> _State:
        """Move the sequences into a static cache of their bucket."""
        name = self._cache.sequences, bucket(self._cache.length + 1)
        if name not in self._states:
            while len(self._states) >= _KEPT:
                self._states.popitem(last=False)[1].give_up()
            self._states[name] = _State(self._cache, name[1])
        self._states.move_to_end(name)
        self._states[name].take(self._cache)
        return self._states[name]


class _State:
    """Keys and values of a batch at fixed addresses, and the captured graph that reads and writes them.

    Shapes:
        keys, values: each (B, K, capacity, E). length: (1,) int64. starts: (B,) int64.
    """

    def __init__(self, like: BufferedCache, capacity: int) -> None:
        self.capacity = capacity
        layers = []
        for layer in range(len(like.layers)):
            pair = [
                # zeros: what lies behind the tokens is masked, but must be finite
                torch.zeros(*each.shape[:2], capacity, each.shape[3], dtype=each.dtype, device=each.device)
                for each in like.buffers(layer)
            ]
            for each in pair:
                torch._dynamo.mark_dynamic(each, 2)
            layers.append(pair)
        device = layers[0][0].device
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.starts = torch.zeros(layers[0][0].shape[0], dtype=torch.int64, device=device)
        make: Any = _StaticLayer  # whose base is untyped
        self._pairs = [(keys, values) for keys, values in layers]
        self.cache = Cache(layers=[make(*pair, self.length) for pair in layers])
        self._known: tuple[int, Tensor | None] | None = None  # what length and starts hold
        self._owner: ReferenceType[BufferedCache] | None = None
        self._graph: Any = None
        self._places: object = None

    def owned_by(self, cache: BufferedCache) -> bool:
        """Whether the cache's buffers are these, in every layer."""
        return self._owner is not None and self._owner() is cache and cache.holds(self._buffers())

    def take(self, cache: BufferedCache) -> None:
        """Copy the cache's keys and values here; the cache holds these buffers from now on."""
        self.give_up()
        cache.move_into(self._buffers())
        self._owner = ref(cache)

    def give_up(self) -> None:
        """Let the cache that holds these buffers have its own again."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner.holds(self._buffers()):
            owner.move_into([(keys.clone(), values.clone()) for keys, values in self._buffers()])
        self._owner = None

    def set(self, length: int, starts: Tensor | None) -> None:
        """Tell the device where the next token goes, unless it knows: a step adds one to its length itself."""
        if self._known is None or self._known[0] != length:
            self.length.fill_(length)
        if self._known is None or self._known[1] is not starts:
            self.starts.zero_() if starts is None else self.starts.copy_(starts)
        self._known = length + 1, starts

    def replay(self, step: Callable[[Tensor, _State], Tensor], tokens: Tensor, places: object) -> Tensor:
        """Run the step as a CUDA graph, which is captured again when what it reads is somewhere else."""
        if self._graph is None or places != self._places:
            self._capture(step, tokens)
            self._places = places
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits.clone()  # the next replay writes there

    def _capture(self, step: Callable[[Tensor, _State], Tensor], tokens: Tensor) -> None:
        self._graph = None
        self._tokens = tokens.clone()
        before = self.length.clone()  # every run writes the same token at the same place
        stream = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call, unused-ignore]
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step(self._tokens, self)
                self.length.copy_(before)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool(tokens.device)):
            self._logits = step(self._tokens, self)
        self._graph = graph

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        return self._pairs


# Of a model, by batch size and capacity, the least recently taken first.
_STATES: WeakKeyDictionary[PreTrainedModel, OrderedDict[tuple[int, int], _State]] = WeakKeyDictionary()


class _StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's static buffers, written at a place that the device knows."""

    is_compileable = True
    is_sliding = False  # all tokens are kept; the mask hides the old ones

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each sequence; return whole buffers, (B, K, capacity, E)."""
        keys: Any = self.keys
        values: Any = self.values
        return keys.index_copy_(2, self.length, key_states), values.index_copy_(2, self.length, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> Tensor:  # type: ignore[override, unused-ignore]
        """Tokens before this step's, on the device."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity."""
        keys: Any = self.keys
        capacity: int = keys.shape[2]  # symbolic while it is traced
        return capacity


def _step(
    model: Any, tokens: Tensor, length: Tensor, starts: Tensor, cache: Cache, takes_positions: bool, takes_keep: bool
) -> Tensor:
    """One step. Shapes: tokens (B,). Returns logits (B, V), float32; `length` is one more afterwards."""
    layer: Any = cache.layers[0]
    capacity = layer.keys.shape[2]
    arguments: dict[str, Any] = {"logits_to_keep": 1} if takes_keep else {}
    if takes_positions:
        arguments["position_ids"] = (length - starts)[:, None]
    mask = torch.arange(capacity, device=tokens.device) >= starts[:, None]
    outputs = model(tokens[:, None], attention_mask=mask, past_key_values=cache, use_cache=True, **arguments)
    length.add_(1)
    logits: Tensor = outputs.logits[:, -1].float()
    return logits


@remembered
def _compiled(backend: str | Callable[..., Any]) -> Callable[..., Tensor]:
    """The step, compiled: one function for all models, which `torch.compile` tells apart by their structure."""
    return torch.compile(_step, fullgraph=True, dynamic=False, backend=backend)  # type: ignore[call-overload, no-any-return, unused-ignore]


@remembered
def _pool(device: torch.device) -> Any:
    """Memory that all graphs of a device share: they never run at the same time."""
    return torch.cuda.graph_pool_handle()
