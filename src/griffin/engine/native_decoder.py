"""A Transformers model as the native library's generation step sees it: everything stays where it is."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from griffin.attachment.selection import Selection, by_layer
from griffin.backends.native import NativeFF, Set
from griffin.engine.cache import BufferedCache
from griffin.families import BY_TYPE
from griffin.native import abi, kernel, library, operands
from griffin.weights.quantised import QuantisedEmbedding, QuantisedLinear

_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # others change with the length
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def why_not_native(model: Any) -> str | None:
    """Why the native step cannot run a model, as far as its config tells; `None` if it may."""
    config = model.config.get_text_config()
    if (reason := library.why_not()) is not None:
        return reason
    family = BY_TYPE.get(config.model_type)
    if family is None or family.norm_offset is None:
        return f"the native step does not know the family {config.model_type}"
    if model.dtype not in _TYPES or model.device.type != "cpu":
        return f"the native step needs float32 or bfloat16 on the CPU, the model is {model.dtype} on {model.device}"
    return None


class UnsupportedError(Exception):
    """The native step cannot run a model; the message says why."""


class Caches:
    """The keys and values of a batch as the native step sees them.

    Args:
        caches: one that holds all sequences, or several whose sequences follow each other, each of its own length.
    """

    def __init__(self, caches: Sequence[BufferedCache]) -> None:
        self.caches = caches
        self._replaced: list[int] = []  # of each cache, when the addresses were taken
        self._rows: dict[tuple[int, ...], _Rows] = {}  # by the tokens of each cache's sequences

    def with_room(self, tokens: Sequence[int] | None = None) -> Any:
        """The struct, after room was made for each sequence's next tokens: a row for each of them.

        The rows of one sequence follow each other and have the same keys and values; each sees its own prefix.

        Args:
            tokens: how many of each cache's sequences; `None`: one.

        Raises:
            ValueError: a cache is empty, its layers differ in shape, or it holds several sequences that are to get
                several tokens each.
        """
        counts = (1,) * len(self.caches) if tokens is None else tuple(tokens)
        for cache, count in zip(self.caches, counts, strict=True):
            if count > 1 and cache.sequences != 1:
                raise ValueError(f"{count} tokens a sequence need a cache for each; this one holds {cache.sequences}")
            cache.reserve(cache.length + count)
        if self._replaced != (replaced := [cache.replaced for cache in self.caches]):
            self._rows.clear()
            self._replaced = replaced
        if counts not in self._rows:
            self._rows[counts] = _Rows(self.caches, counts)
        return self._rows[counts].struct_for([cache.length for cache in self.caches])


class _Rows:
    """Where the keys and values of every row are, with so many tokens of each cache's sequences."""

    def __init__(self, caches: Sequence[BufferedCache], tokens: Sequence[int]) -> None:
        layers = [[cache.buffers(layer) for cache in caches] for layer in range(len(caches[0].layers))]
        first = layers[0]
        for layer in layers:
            for (keys, values), (like, _) in zip(layer, first, strict=True):
                if any(
                    (states.stride(), states.dtype) != (like.stride(), first[0][0].dtype) for states in (keys, values)
                ):
                    raise ValueError("the cache's layers differ in shape; start with a fresh cache")
        addresses = [
            [
                row.data_ptr()
                for layer in layers
                for states, count in zip(layer, tokens, strict=True)
                for row in states[which].unbind()
                for _ in range(count)
            ]
            for which in range(2)
        ]
        self._tables = [(ctypes.c_void_p * len(table))(*table) for table in addresses]
        sequences = [states[0].shape[0] for states in first]
        self._of_caches = torch.tensor([n * count for n, count in zip(sequences, tokens, strict=True)])
        strides = torch.tensor([states[0].stride(1) * states[0].element_size() for states in first])
        self._strides = strides.repeat_interleave(self._of_caches)
        ahead = [place for n, count in zip(sequences, tokens, strict=True) for place in [*range(count)] * n]
        self._ahead = torch.tensor(ahead, dtype=torch.int32)
        self._lengths = torch.zeros(len(ahead), dtype=torch.int32)
        self._struct = abi.CacheStruct(
            *map(ctypes.addressof, self._tables),
            self._strides.data_ptr(),
            self._lengths.data_ptr(),
            None,
            _TYPES[first[0][0].dtype],
        )

    def struct_for(self, lengths: Sequence[int]) -> Any:
        """The struct for caches of these lengths."""
        before = torch.tensor(lengths, dtype=torch.int32).repeat_interleave(self._of_caches)
        torch.add(before, self._ahead, out=self._lengths)
        return self._struct


class ExpertsTable:
    """The experts of every layer as the native step sees them. Keeps what it points to alive.

    Args:
        sets: by layer, and copies of their experts; layers that are not in it are computed whole.
        layers: how many there are.
    """

    def __init__(self, sets: Mapping[int, tuple[Set, operands.Compact | None]], layers: int) -> None:
        self.table = (abi.ExpertsStruct * layers)()
        self._kept = dict(sets)
        for layer, ((indices, mask, dynamic), compact) in sets.items():
            self.table[layer] = abi.ExpertsStruct(
                indices.data_ptr(),
                indices.shape[0],
                None if mask is None else mask.data_ptr(),
                indices.element_size(),
                0,
                None if dynamic is None else ctypes.addressof(dynamic.struct),
                None if compact is None else ctypes.addressof(compact.struct),
            )


class NativeDecoder:
    """One generation step as one native call, over the model's own weights.

    Args:
        model: a Transformers causal language model on the CPU.
        ff: its FF blocks in the native backend, by layer; all of them.

    Raises:
        UnsupportedError: a family, a dtype or a part of the model that the step does not know.
    """

    def __init__(self, model: Any, ff: Mapping[int, NativeFF]) -> None:
        config = model.config.get_text_config()
        if (reason := why_not_native(model)) is not None:
            raise UnsupportedError(reason)
        self._kept: list[Any] = []
        self._model, self._config = model, config
        self._ff = dict(ff)
        self._blocks = [each.ff_block for each in ff.values()]
        self._family = BY_TYPE[config.model_type]
        decoder = model.get_decoder()
        self._rotary_module = decoder.rotary_emb
        self._positions = 0
        self._layers = (abi.LayerStruct * len(decoder.layers))()
        self._rope_types = self._find_rope_types()
        for index, layer in enumerate(decoder.layers):
            self._layers[index] = self._layer(layer, ff[index].block)
        self._struct = self._decoder(decoder)

    def experts_of(self, selections: Sequence[Selection]) -> ExpertsTable:
        """The experts of every layer as the step wants them, for these sequences or for all; made once a selection."""
        batch = by_layer(selections, self._blocks)
        sets = {}
        for layer, experts in batch.items():
            ff = self._ff[layer]
            own = ff.sets_of(experts.sets, experts.dynamic)[0]
            sets[layer] = own, ff.copies_of(own)
        return ExpertsTable(sets, len(self._layers))

    def step(
        self,
        tokens: Tensor,
        caches: Caches,
        experts: ExpertsTable,
        start: Tensor | None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the next tokens of each sequence, append their keys and values, and return the logits.

        Args:
            tokens: the tokens, those of a sequence in order.
            caches: the sequences' keys and values.
            experts: what `experts_of` gave, for one sequence or for as many as there are rows.
            start: first real position of each row's sequence in its cache; `None` where there is no padding.
            counts: tokens of each cache's sequence, each of which sees those before it; `None`: one of every sequence.

        Shapes:
            tokens: (B,), int64. start: (B,), int32. Returns (B, V), float32. B: all tokens, 1 to 16.

        Raises:
            ValueError: as `Caches.with_room`.
        """
        longest = max(cache.length for cache in caches.caches) + (max(counts) if counts else 1)
        if longest > self._positions:
            self._make_rope_tables(max(2 * longest, 1024))
        struct = caches.with_room(counts)
        struct.start = None if start is None else start.data_ptr()
        tokens = tokens.contiguous()
        logits = torch.empty(tokens.shape[0], self._struct.vocabulary)
        kernel.decode(self._struct, struct, experts.table, tokens, logits)
        for cache, count in zip(caches.caches, counts or [1] * len(caches.caches), strict=True):
            cache.advance(count)
        return logits

    # -- building ---------------------------------------------------------------------------------------------------

    def _decoder(self, decoder: nn.Module) -> abi.DecoderStruct:
        config, model = self._config, self._model
        attention = decoder.layers[0].self_attn  # type: ignore[union-attr, index]
        struct = abi.DecoderStruct()
        struct.n_layers, struct.d_model = len(self._layers), config.hidden_size
        struct.heads, struct.kv_heads = config.num_attention_heads, config.num_key_value_heads
        struct.head_size = attention.head_dim
        struct.attention_scale = attention.scaling
        struct.attention_softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
        struct.logits_softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        struct.residual_scale = getattr(config, "residual_multiplier", 1.0)
        struct.logits_scale = 1.0 / getattr(config, "logits_scaling", 1.0)
        table = model.get_input_embeddings()
        struct.embedding, dtype = self._embedding(table)
        scale = getattr(table, "embed_scale", None)
        struct.embedding_scale = (
            getattr(config, "embedding_multiplier", 1.0) if scale is None else float(scale.to(dtype))
        )
        struct.vocabulary = struct.embedding.d_out
        struct.layers = ctypes.addressof(self._layers)
        struct.final = self._norm(decoder.norm)
        struct.head = self._matrix(model.get_output_embeddings())
        if struct.head.d_out != struct.vocabulary:
            raise UnsupportedError("the native step needs a head as wide as the embedding")
        self._struct = struct
        self._make_rope_tables(2048)
        return struct

    def _layer(self, layer: Any, ff: operands.Block) -> abi.LayerStruct:
        attention = layer.self_attn
        struct = abi.LayerStruct()
        struct.attention = self._norm(layer.input_layernorm)
        if hasattr(layer, "pre_feedforward_layernorm"):
            struct.after_attention = self._norm(layer.post_attention_layernorm)
            struct.feedforward = self._norm(layer.pre_feedforward_layernorm)
            struct.after_feedforward = self._norm(layer.post_feedforward_layernorm)
        else:
            struct.feedforward = self._norm(layer.post_attention_layernorm)
        if hasattr(attention, "q_norm"):
            struct.query, struct.key = self._norm(attention.q_norm), self._norm(attention.k_norm)
        for name in ("q", "k", "v", "o"):
            setattr(struct, name, self._matrix(getattr(attention, f"{name}_proj")))
        struct.ff = ff.struct
        window = getattr(attention, "sliding_window", None)
        if self._family.window_in_config:
            window = self._config.sliding_window
        struct.window = window or 0
        kind = getattr(attention, "layer_type", None)
        struct.rope = self._rope_types.index(kind) if kind in self._rope_types else 0
        if not getattr(attention, "use_rope", True):
            struct.rope = -1
        return struct

    def _find_rope_types(self) -> list[str | None]:
        parameters = self._config.rope_parameters
        kinds: list[str | None] = [None] if "rope_type" in parameters else list(parameters)
        for kind in kinds:
            rope = parameters if kind is None else parameters[kind]
            if rope["rope_type"] not in _FIXED_ROPES:
                raise UnsupportedError(f"the native step does not know rotary embeddings of type {rope['rope_type']}")
        if len(kinds) > 2:
            raise UnsupportedError(f"the native step knows two kinds of rotary embedding, found {kinds}")
        return kinds

    def _make_rope_tables(self, positions: int) -> None:
        ids = torch.arange(positions)[None]
        tables = []
        for which, kind in enumerate(self._rope_types):
            arguments = () if kind is None else (kind,)
            cosines, sines = self._rotary_module(torch.zeros(1), ids, *arguments)
            half = cosines.shape[-1] // 2
            pair = [table[0, :, :half].float().contiguous() for table in (cosines, sines)]
            self._struct.cosines[which], self._struct.sines[which] = (table.data_ptr() for table in pair)
            self._struct.rotary = 2 * half
            self._struct.positions = positions
            tables.append(pair)
        self._tables, self._positions = tables, positions

    def _norm(self, module: Any) -> abi.NormStruct:
        weight = self._keep((module.weight.detach().float() + self._family.norm_offset).contiguous())
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if eps is None:
            raise UnsupportedError(f"the native step cannot read the epsilon of {type(module).__name__}")
        return abi.NormStruct(weight.data_ptr(), eps, 0)

    def _embedding(self, table: Any) -> tuple[abi.MatrixStruct, torch.dtype]:
        if isinstance(table, QuantisedEmbedding):
            return self._keep(operands.packed_matrix(table.parts[0])).struct, table.dtype
        if table.weight.dtype not in _TYPES:
            raise UnsupportedError(
                f"the native step needs embeddings of float32 or bfloat16, found {table.weight.dtype}"
            )
        return self._keep(operands.matrix(table.weight.detach())).struct, table.weight.dtype

    def _matrix(self, module: Any) -> Any:
        if isinstance(module, QuantisedLinear) and len(module.parts) == 1 and not module.neuron_major:
            return self._keep(module.matrices()[0]).struct
        if not isinstance(module, nn.Linear) or module.weight.dtype not in (*_TYPES, torch.float16):
            raise UnsupportedError(f"the native step cannot read a {type(module).__name__}")
        return self._keep(operands.matrix(module.weight.detach(), module.bias)).struct

    def _keep(self, part: Any) -> Any:
        self._kept.append(part)
        return part
